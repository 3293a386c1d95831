"""Classes and dtypes by name, and which of them a peer may name.

Strategy: the receiver's list of safe globals, torch's own, decides alone (``torch.serialization.add_safe_globals``).
What is refused is refused with the line of code that would allow it, or with the reason why none should: of Python's
own modules and of loaders nothing but classes that hold values, since a call of anything else may run code.
"""

from __future__ import annotations

import _compat_pickle
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import _weights_only_unpickler as weights_only

__all__ = [
    "ATOMIC",
    "MORE_DTYPES",
    "STORAGE",
    "FindClass",
    "NotAllowed",
    "advice",
    "allowed_class",
    "class_name",
    "dtype_name",
    "dtype_of",
    "expect",
    "expect_class",
    "if_imported",
    "imported_class",
    "is_allowed",
    "numpy_descr",
    "numpy_dtype",
    "user_allowed",
]

# Finds a class by the name that :func:`class_name` gave it.
FindClass = Callable[[str], Any]

# Classes of values that are no containers, need no tag, and cannot change.
# Exact classes: a subclass of ``int`` (an IntEnum, a bool's cousin) would come back as a plain one.
ATOMIC = frozenset({type(None), bool, int, float, str, bytes})


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def class_name(cls: Any) -> str:
    """``module.name`` of a class or function that the receiver can find by it.

    Raises:
        ValueError: It is local, or hidden by another of that name.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    # Known before a byte leaves. A class in a function, or one that a decorator has replaced under its name, could not
    # be found by any receiver.
    if if_imported(cls.__module__, cls.__qualname__) is not cls:
        raise ValueError(f"class {name} cannot be found by its name: expected one at the top of a module")
    return name


def if_imported(module: str, qualname: str) -> Any:
    """What a module has by this name; None where it is not imported, or not yet as far as that.

    A leaf of a class can exist only where somebody has imported the class, so this tells whether there may be one.
    """
    # Looked up among what is imported, and never imported: importing a module that a peer names is running code of the
    # peer's choice, and importing one that no leaf needs takes time.
    # Another thread may be importing it just now, as torch does DTensor's with the first optimizer that is made: then
    # the module is listed, and lacks what comes later in it.
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def allowed_class(name: str) -> Any:
    """A class that the receiver allows: its own list of torch's safe globals decides.

    Raises:
        NotAllowed: It is not; the text says how to allow it.
    """
    allowed = _BUILTIN.get(name) or user_allowed().get(name)
    if allowed is None:
        raise NotAllowed([name])
    return allowed


# What holds values and calls nothing. Not ``getattr``, ``eval``, ``print``, nor ``map`` and ``filter``, which call what
# they are given.
_BUILTIN: dict[str, Any] = {
    f"builtins.{cls.__name__}": cls for cls in (int, float, complex, str, bytes, bool, list, dict, set, tuple)
}


def user_allowed() -> dict[str, Any]:
    # torch's list, not one of our own: what a job has allowed for ``torch.load`` is allowed here, and there is one
    # place to look.
    allowed: dict[str, Any] = weights_only._get_user_allowed_globals()  # type: ignore[no-untyped-call]
    return allowed


class NotAllowed(ValueError):
    """What a peer's value names is not allowed; the text says how to allow it, or why not to.

    Attributes:
        names: All of it, as the peer calls it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        super().__init__(advice(self.names))


def advice(names: Iterable[str]) -> str:
    """What to do about names that are not allowed: code that can be pasted as it is, or why there is none."""
    # Text that can be pasted. A heal that fails for want of a class is repaired by whoever reads the log, at night.
    never, entries, modules, named = [], [], set(), []
    for name in sorted(names):
        # Never imported for the advice, either.
        found = _Named(name)
        if found.why_not:
            never.append(found.why_not)
            continue
        named.append(name)
        entries.append(found.entry)
        modules |= {found.module} - {"builtins"}
    parts = []
    if named:
        many = len(named) > 1
        imports = f"import {', '.join(sorted(modules | {'torch'}))}; "
        parts.append(
            f"{'classes' if many else 'class'} {', '.join(named)} {'are' if many else 'is'} not allowed; "
            f"if you trust {'them' if many else 'it'}, call {imports}"
            f"torch.serialization.add_safe_globals([{', '.join(entries)}]) on the receiver"
        )
    return "; ".join(parts + never)


class _Named:
    """What a peer's pickle names, as far as this process knows it. Nothing is imported for it.

    Attributes:
        module: Of what it stands for here.
        entry: For ``add_safe_globals``.
        why_not: Set instead if it must not be allowed.
    """

    def __init__(self, name: str) -> None:
        module, _, short = name.rpartition(".")
        # A nested class is found in its module, not in the class around it.
        while module and module not in sys.modules and module.rpartition(".")[0] in sys.modules:
            module, _, outer = module.rpartition(".")
            short = f"{outer}.{short}"
        # By what name protocol 2 knows what has had another one since.
        self.module, short = _compat_pickle.NAME_MAPPING.get(
            (module, short), (_compat_pickle.IMPORT_MAPPING.get(module, module), short)
        )
        found = if_imported(self.module, short)
        written = short if self.module == "builtins" else f"{self.module}.{short}"
        as_torch_knows_it = f"{getattr(found, '__module__', self.module)}.{getattr(found, '__qualname__', short)}"
        self.entry = written if as_torch_knows_it == name else f'({written}, "{name}")'
        self.why_not = _why_not(name, self.module, short, found)


def _why_not(name: str, module: str, short: str, found: Any) -> str:
    # Allowing this one would undo all the others: it is ``torch.load`` of bytes inside of the pickle, by default with
    # code.
    if name == STORAGE:
        return "a bare storage cannot travel, since reading one may run code: send a tensor of it"
    top = module.partition(".")[0]
    if top in weights_only._blocklisted_modules:
        return f"{name} cannot travel: torch reads nothing of {top}"
    if found is not None and not callable(found):
        return f"{name} cannot travel: it is no class"
    if f"{module}.{short}".startswith(_LOADERS):
        return f"{name} cannot travel: it may run code"
    if top in sys.stdlib_module_names:
        harmless = isinstance(found, type) and (module in _HARMLESS_MODULES or f"{module}.{short}" in _HARMLESS_CLASSES)
        if not harmless or (module == "builtins" and short in _CALLERS):
            return f"{name} cannot travel: of Python's own, only classes that hold values should be allowed"
    return ""


# Modules of Python whose classes hold values, and such classes of others; functions and all else may run code.
_HARMLESS_MODULES = frozenset(
    {"builtins", "collections", "datetime", "decimal", "fractions", "ipaddress", "pathlib", "uuid", "zoneinfo"}
)
_HARMLESS_CLASSES = frozenset(
    {"argparse.Namespace", "array.array", "random.Random", "time.struct_time", "types.SimpleNamespace"}
)
_CALLERS = frozenset({"classmethod", "filter", "map", "property", "staticmethod", "super", "type"})
# What reads files or runs code, of packages that everybody has.
_LOADERS = (
    "numpy.fromfile", "numpy.load", "numpy.lib.", "numpy.memmap", "torch.compile", "torch.hub.", "torch.jit.",
    "torch.load", "torch.ops.", "torch.package.", "torch.serialization.", "torch.storage.",
    "torch.utils.cpp_extension.",
)  # fmt: skip


def is_allowed(name: str) -> bool:
    return name != STORAGE and (name in _BUILTIN or name in user_allowed())


# What storages are pickled as: a call of torch.load, which runs what it is given. Whoever allows it is mistaken.
STORAGE = "torch.storage._load_from_bytes"


def imported_class(name: str) -> Any:
    """Any class, its module imported if need be: for those who trust the peer with code already."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        return if_imported(module.__name__, ".".join(parts[split:]))
    raise ValueError(f"class {name} cannot be found")


_DTYPES: dict[str, torch.dtype] = {
    dtype_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}


def expect(cls: type, value: Any) -> Any:
    """The value, which must be of exactly this class: True is no size."""
    # ``isinstance`` would take True for a size of 1.
    if type(value) is not cls:
        raise TypeError(f"expected {cls.__name__}, got {type(value).__name__}")
    return value


def expect_class(value: Any) -> Any:
    """The value, which must be a class."""
    if not isinstance(value, type):
        raise TypeError(f"expected a class, got {type(value).__name__}")
    return value


def dtype_of(name: Any) -> torch.dtype:
    """The dtype of this name."""
    return _DTYPES[expect(str, name)]


def numpy_descr(dtype: Any) -> Any:
    """What describes a NumPy dtype: a string, a list of fields, or ("ml_dtypes", name).

    Raises:
        ValueError: Nothing does: it is of a class that neither NumPy nor ``ml_dtypes`` brings.
    """
    import numpy

    # ml_dtypes' bfloat16 is a NumPy dtype of kind 'V': its own description says two raw bytes, and a receiver would get
    # those.
    if dtype.type.__module__ == MORE_DTYPES:
        return MORE_DTYPES, dtype.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it becomes raw bytes, which is refused below
        descr = numpy.lib.format.dtype_to_descr(dtype)
    if not dtype.hasobject and not _same_dtype(numpy.lib.format.descr_to_dtype(descr), dtype):
        raise ValueError(f"the NumPy dtype {str(dtype)[:80]} of {type(dtype).__module__} cannot travel")
    return descr


# A package of numbers that NumPy lacks, as bfloat16. NumPy's own description of them is raw bytes.
MORE_DTYPES = "ml_dtypes"


def _same_dtype(some: Any, other: Any) -> bool:
    """Whether two are the same, fields included: to NumPy raw bytes may equal what they were made of."""
    # Equal is not the same: NumPy compares raw bytes of a length with whatever they were made of.
    if some != other or some.type is not other.type:
        return False
    if some.subdtype or other.subdtype:
        return some.shape == other.shape and _same_dtype(some.base, other.base)
    return all(_same_dtype(some[name], other[name]) for name in some.names or ())


def numpy_dtype(descr: Any) -> Any:
    """The NumPy dtype that :func:`numpy_descr` described.

    Raises:
        ValueError: It would hold objects, or needs a package that is not here.
    """
    import numpy

    if type(descr) is tuple and len(descr) == 2 and descr[0] == MORE_DTYPES:
        try:
            # The one import that a peer can cause: of this very package, whose name is not the peer's.
            made = getattr(importlib.import_module(MORE_DTYPES), expect(str, descr[1]), None)
        except ImportError:
            raise ValueError(f"a NumPy dtype of {MORE_DTYPES}, which is not installed on the receiver") from None
        if not (isinstance(made, type) and issubclass(made, numpy.generic)):
            raise ValueError(f"{MORE_DTYPES} has no dtype {descr[1]!r}")
        return numpy.dtype(made)
    dtype = numpy.lib.format.descr_to_dtype(descr)
    if dtype.hasobject:
        raise ValueError(f"a NumPy dtype of objects: {descr!r}")
    return dtype
