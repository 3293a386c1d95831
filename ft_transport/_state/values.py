"""How a plain value becomes msgpack's own types, and is read back without trust.

Strategy: nil, booleans, floats, strings, bytes and integers of 64 bits are themselves; everything else is an array
``[tag, …]``, each tag with one line to write it and one to read it. What has no tag is pickled, with two things taken
out first: values that have a tag, and leaves (tensors, arrays) whose bytes travel in messages. The pickle is read by
torch's weights-only unpickler, and may name nothing but classes that the receiver has allowed
(``torch.serialization.add_safe_globals``) and a few harmless ones.
"""

from __future__ import annotations

import _compat_pickle
import datetime
import decimal
import enum
import fractions
import importlib
import io
import pathlib
import pickle
import struct
import sys
import types
import uuid
import warnings
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import _weights_only_unpickler as weights_only

from ft_transport._state.pickle_cost import check_cost

__all__ = [
    "ATOMIC",
    "FindClass",
    "Load",
    "UnpicklingError",
    "NotAllowed",
    "advice",
    "allowed_class",
    "check_cost",
    "check_keys",
    "check_pickle",
    "class_name",
    "decode_value",
    "dtype_name",
    "dtype_of",
    "encode_value",
    "expect",
    "imported_class",
    "is_native",
    "not_allowed_in",
    "numpy_descr",
    "numpy_dtype",
    "pickle_object",
    "unpickle_allowed",
    "unpickle_object",
]

UnpicklingError = pickle.UnpicklingError

# Finds a class by the name that :func:`class_name` gave it.
FindClass = Callable[[str], Any]

# Classes of values that are no containers, need no tag, and cannot change.
ATOMIC = frozenset({type(None), bool, int, float, str, bytes})


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------- classes


def class_name(cls: Any) -> str:
    """``module.name`` of a class or function that the receiver can find by it.

    Raises:
        ValueError: It is local, or hidden by another of that name.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    if _resolve(cls.__module__, cls.__qualname__) is not cls:
        raise ValueError(f"class {name} cannot be found by its name: expected one at the top of a module")
    return name


def _resolve(module: str, qualname: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def allowed_class(name: str) -> Any:
    """A class that the receiver allows: its own list of torch's safe globals decides.

    Raises:
        NotAllowed: It is not; the text says how to allow it.
    """
    allowed = _BUILTIN.get(name) or _user_allowed().get(name)
    if allowed is None:
        raise NotAllowed([name])
    return allowed


_BUILTIN: dict[str, Any] = {
    f"builtins.{cls.__name__}": cls for cls in (int, float, complex, str, bytes, bool, list, dict, set, tuple)
}


def _user_allowed() -> dict[str, Any]:
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
    never, entries, modules, named = [], [], set(), []
    for name in sorted(names):
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
        found = _resolve(self.module, short)
        written = short if self.module == "builtins" else f"{self.module}.{short}"
        as_torch_knows_it = f"{getattr(found, '__module__', self.module)}.{getattr(found, '__qualname__', short)}"
        self.entry = written if as_torch_knows_it == name else f'({written}, "{name}")'
        self.why_not = _why_not(name, self.module, short, found)


def _why_not(name: str, module: str, short: str, found: Any) -> str:
    if name == _STORAGE:
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


def names_in(data: Any) -> set[str]:
    """What an encoded value names by its tags and pickles, however deep."""
    found: set[str] = set()
    rest = [data]
    while rest:
        value = rest.pop()
        if isinstance(value, tuple):
            rest += value
            tag, first = (*value, None, None)[:2]
            if tag in ("enum", "class") and type(first) is str:
                found.add(first)
            elif tag == "object" and type(first) is bytes:
                found |= _globals_in(first)
    return found


def _is_allowed(name: str) -> bool:
    return name != _STORAGE and (name in _BUILTIN or name in _user_allowed())


def not_allowed_in(data: Any) -> set[str]:
    """Of what an encoded value names, all that is not allowed."""
    return {name for name in names_in(data) if not _is_allowed(name) and name not in _HARMLESS}


# What storages are pickled as: a call of torch.load, which runs what it is given. Whoever allows it is mistaken.
_STORAGE = "torch.storage._load_from_bytes"


def imported_class(name: str) -> Any:
    """Any class, its module imported if need be: for those who trust the peer with code already."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        return _resolve(module.__name__, ".".join(parts[split:]))
    raise ValueError(f"class {name} cannot be found")


# -------------------------------------------------------------------------------------------- encode


def is_native(value: object) -> bool:
    """Whether a value has a tag or needs none, whatever it contains."""
    cls = type(value)
    if cls in ATOMIC or cls in _ENCODE or isinstance(value, (enum.Enum, type)):
        return True
    return _is_numpy_scalar(value) or _is_numpy(value, "dtype")


def encode_value(value: object) -> Any:
    """What msgpack can write for ``value``.

    Raises:
        Exception: It cannot be encoded; pickling runs its class's own code, which may raise anything.
    """
    cls = type(value)
    if cls is int:
        assert isinstance(value, int)
        if -(1 << 63) <= value < 1 << 64:
            return value
    elif cls in ATOMIC:
        return value
    encode = _ENCODE.get(cls)
    if encode is not None:
        return encode(value)
    if isinstance(value, enum.Enum):
        return ["enum", class_name(cls), value._name_, encode_value(value._value_)]
    if _is_numpy_scalar(value):
        return _encode_numpy_scalar(value)
    if isinstance(value, type):
        return ["class", class_name(value)]
    if _is_numpy(value, "dtype"):
        return ["numpy dtype", encode_value(numpy_descr(value))]
    inner: list[object] = []
    data, values = pickle_object(value, inner, lambda found: isinstance(found, torch.Tensor))
    if inner:
        raise ValueError("a tensor inside of a key or of a set")
    check_cost(data)  # as the receiver does, which refuses what its unpickler cannot build
    return ["object", data, *map(encode_value, values)]


def _tagged(tag: str) -> Callable[[Any], list[Any]]:
    return lambda values: [tag, *map(encode_value, values)]


def _fields(tag: str, *names: str) -> Callable[[Any], list[Any]]:
    return lambda value: [tag, *(encode_value(getattr(value, name)) for name in names)]


# Bounds an integer of more than 64 bits: a range or fraction of such takes time by the square of their length.
MAX_INT_BYTES = 1 << 16


def _big_int_bytes(value: int) -> bytes:
    if value.bit_length() >= 8 * MAX_INT_BYTES:
        raise ValueError(f"an integer of more than {MAX_INT_BYTES} bytes")
    return value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)


_ENCODE: dict[type, Callable[[Any], list[Any]]] = {
    int: lambda v: ["int", _big_int_bytes(v)],
    tuple: _tagged("()"),
    list: _tagged("[]"),
    set: _tagged("set"),
    frozenset: _tagged("frozenset"),
    dict: lambda v: ["{}", *(encode_value(item) for pair in v.items() for item in pair)],
    bytearray: lambda v: ["bytearray", bytes(v)],
    complex: lambda v: ["complex", v.real, v.imag],
    slice: _fields("slice", "start", "stop", "step"),
    range: _fields("range", "start", "stop", "step"),
    type(...): lambda v: ["..."],
    torch.Size: _tagged("size"),
    torch.dtype: lambda v: ["dtype", dtype_name(v)],
    torch.device: lambda v: ["device", str(v)],
    torch.layout: lambda v: ["torch", str(v)],
    torch.memory_format: lambda v: ["torch", str(v)],
    torch.qscheme: lambda v: ["torch", str(v)],
    datetime.date: _fields("date", "year", "month", "day"),
    datetime.time: _fields("time", "hour", "minute", "second", "microsecond", "tzinfo", "fold"),
    datetime.datetime: _fields(
        "datetime", "year", "month", "day", "hour", "minute", "second", "microsecond", "tzinfo", "fold"
    ),
    datetime.timedelta: _fields("timedelta", "days", "seconds", "microseconds"),
    datetime.timezone: lambda v: ["timezone", *map(encode_value, v.__getinitargs__())],
    zoneinfo.ZoneInfo: lambda v: ["zone", v.key],
    decimal.Decimal: lambda v: ["decimal", str(v)],
    fractions.Fraction: _fields("fraction", "numerator", "denominator"),
    uuid.UUID: lambda v: ["uuid", v.bytes],
    pathlib.PurePosixPath: lambda v: ["path", "PurePosixPath", str(v)],
    pathlib.PureWindowsPath: lambda v: ["path", "PureWindowsPath", str(v)],
    pathlib.PosixPath: lambda v: ["path", "Path", str(v)],
    pathlib.WindowsPath: lambda v: ["path", "Path", str(v)],
}


# -------------------------------------------------------------------------------------------- decode

_DTYPES: dict[str, torch.dtype] = {
    dtype_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
_TORCH: dict[str, Any] = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, (torch.layout, torch.memory_format, torch.qscheme))
}
_PATHS: dict[str, Any] = {cls.__name__: cls for cls in (pathlib.PurePosixPath, pathlib.PureWindowsPath, pathlib.Path)}

# Reads a value; the second argument finds the classes that it names.
_Decode = Callable[[Any], Any]


def decode_value(data: Any, find_class: FindClass = allowed_class) -> Any:
    """The value that :func:`encode_value` wrote.

    Args:
        data: What msgpack has read, with arrays as tuples.
        find_class: Finds a class by its name, or raises.

    Raises:
        Exception: It is none, or names a class that is not allowed.
    """
    if not isinstance(data, tuple):
        return data
    return _DECODE[expect(str, data[0])](data[1:], find_class)


def expect(cls: type, value: Any) -> Any:
    """The value, which must be of exactly this class: True is no size."""
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


def _all(args: Sequence[Any], find_class: FindClass) -> Iterator[Any]:
    return (decode_value(arg, find_class) for arg in args)


def _of_ints(cls: Callable[..., Any]) -> Callable[[Any, FindClass], Any]:
    return lambda args, find: cls(*(expect(int, value) for value in _all(args, find)))


def _at_time(cls: Callable[..., Any]) -> Callable[[Any, FindClass], Any]:
    def decode(args: Any, find: FindClass) -> Any:
        *numbers, zone, fold = _all(args, find)
        return cls(*(expect(int, number) for number in numbers), zone, fold=expect(int, fold))

    return decode


def _decode_int(data: Any) -> int:
    if len(expect(bytes, data)) > MAX_INT_BYTES:
        raise ValueError(f"an integer of {len(data)} bytes, at most {MAX_INT_BYTES} are accepted")
    return int.from_bytes(data, "little", signed=True)


def _decode_slice(args: Any, find: FindClass) -> slice:
    start, stop, step = _all(args, find)
    return slice(start, stop, step)


def _decode_dict(args: Any, find: FindClass) -> dict[Any, Any]:
    items = list(_all(args, find))
    return dict(zip(check_keys(tuple(items[::2])), items[1::2], strict=True))


# Bounds the keys of one container whose hashes are not salted as those of text are: a peer can choose numbers, and
# tuples of them, that a dict needs N² steps to tell apart, which takes seconds with this many. 0, 1, 2, … may be more.
MAX_UNSALTED_KEYS = 1 << 16


def check_keys(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys, if a set or dict of them can be made in reasonable time.

    Raises:
        ValueError: It may not be.
    """
    cost = 0
    for key in keys:
        cls = type(key)
        if cls is not str and cls is not bytes:
            cost += 1 if cls is float or (cls is int and -(1 << 63) <= key < 1 << 64) else 4
    if cost > MAX_UNSALTED_KEYS and keys != tuple(range(len(keys))):
        raise ValueError(f"{len(keys)} keys, at most {MAX_UNSALTED_KEYS} that are numbers are accepted")
    return keys


def _decode_enum(args: Any, find: FindClass) -> Any:
    name, member, value = args
    cls = find(expect(str, name))
    if not isinstance(cls, type) or not issubclass(cls, enum.Enum):
        raise TypeError(f"{name} is no Enum")
    if member in cls.__members__:
        return cls.__members__[member]
    if not issubclass(cls, enum.Flag):
        raise ValueError(f"{name} has no member {member!r}")
    return cls(expect(int, decode_value(value, find)))  # several flags at once


def _decode_object(args: Any, find: FindClass) -> Any:
    data, *values = args
    decoded = [decode_value(value, find) for value in values]
    return unpickle_object(expect(bytes, data), decoded, (), unpickle_allowed)


def _decode_zone(args: Any, find: FindClass) -> zoneinfo.ZoneInfo:
    (key,) = args
    return zoneinfo.ZoneInfo(expect(str, key))


_DECODE: dict[str, Callable[[Any, FindClass], Any]] = {
    "int": lambda args, find: _decode_int(*args),
    "()": lambda args, find: tuple(_all(args, find)),
    "[]": lambda args, find: list(_all(args, find)),
    "set": lambda args, find: set(check_keys(tuple(_all(args, find)))),
    "frozenset": lambda args, find: frozenset(check_keys(tuple(_all(args, find)))),
    "{}": _decode_dict,
    "bytearray": lambda args, find: bytearray(expect(bytes, *args)),
    "complex": lambda args, find: complex(*(expect(float, arg) for arg in args)),
    "slice": _decode_slice,
    "range": _of_ints(range),
    "...": lambda args, find: ...,
    "size": _of_ints(lambda *sizes: torch.Size(sizes)),
    "dtype": lambda args, find: dtype_of(*args),
    "device": lambda args, find: torch.device(expect(str, *args)),
    "torch": lambda args, find: _TORCH[expect(str, *args)],
    "date": _of_ints(datetime.date),
    "time": _at_time(datetime.time),
    "datetime": _at_time(datetime.datetime),
    "timedelta": _of_ints(datetime.timedelta),
    "timezone": lambda args, find: datetime.timezone(*_all(args, find)),
    "zone": _decode_zone,
    "decimal": lambda args, find: decimal.Decimal(expect(str, *args)),
    "fraction": _of_ints(fractions.Fraction),
    "uuid": lambda args, find: uuid.UUID(bytes=expect(bytes, *args)),
    "path": lambda args, find: _PATHS[expect(str, args[0])](expect(str, args[1])),
    "enum": _decode_enum,
    "class": lambda args, find: expect_class(find(expect(str, *args))),
    "numpy": lambda args, find: _decode_numpy_scalar(*args),
    "numpy dtype": lambda args, find: numpy_dtype(decode_value(*args)),
    "object": _decode_object,
}


# --------------------------------------------------------------------------------------------- numpy


def _is_numpy_scalar(value: object) -> bool:
    return _is_numpy(value, "generic") and type(value).__module__ == "numpy"


def _is_numpy(value: object, cls: str) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, getattr(numpy, cls))


def _encode_numpy_scalar(value: Any) -> list[Any]:
    if value.dtype.hasobject:
        raise ValueError("a NumPy scalar that holds objects")
    return ["numpy", encode_value(numpy_descr(value.dtype)), value.tobytes()]


def _decode_numpy_scalar(descr: Any, data: Any) -> Any:
    import numpy

    dtype = numpy_dtype(decode_value(descr))
    expect(bytes, data)
    if not dtype.itemsize:  # an empty text, whatever bytes NumPy has for it
        return numpy.zeros((), dtype)[()]
    return numpy.frombuffer(data, dtype, count=1)[0]


def numpy_descr(dtype: Any) -> Any:
    """What describes a NumPy dtype: a string, a list of fields, or ("ml_dtypes", name).

    Raises:
        ValueError: Nothing does: it is of a class that neither NumPy nor ``ml_dtypes`` brings.
    """
    import numpy

    if dtype.type.__module__ == _MORE_DTYPES:
        return _MORE_DTYPES, dtype.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it becomes raw bytes, which is refused below
        descr = numpy.lib.format.dtype_to_descr(dtype)
    if not dtype.hasobject and not _same_dtype(numpy.lib.format.descr_to_dtype(descr), dtype):
        raise ValueError(f"the NumPy dtype {str(dtype)[:80]} of {type(dtype).__module__} cannot travel")
    return descr


# A package of numbers that NumPy lacks, as bfloat16. NumPy's own description of them is raw bytes.
_MORE_DTYPES = "ml_dtypes"


def _same_dtype(some: Any, other: Any) -> bool:
    """Whether two are the same, fields included: to NumPy raw bytes may equal what they were made of."""
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

    if type(descr) is tuple and len(descr) == 2 and descr[0] == _MORE_DTYPES:
        try:
            made = getattr(importlib.import_module(_MORE_DTYPES), expect(str, descr[1]), None)
        except ImportError:
            raise ValueError(f"a NumPy dtype of {_MORE_DTYPES}, which is not installed on the receiver") from None
        if not (isinstance(made, type) and issubclass(made, numpy.generic)):
            raise ValueError(f"{_MORE_DTYPES} has no dtype {descr[1]!r}")
        return numpy.dtype(made)
    dtype = numpy.lib.format.descr_to_dtype(descr)
    if dtype.hasobject:
        raise ValueError(f"a NumPy dtype of objects: {descr!r}")
    return dtype


# ------------------------------------------------------------------------------------------- objects

# What a pickle may name beside the receiver's own list: containers, and what pickle writes bytes with.
_HARMLESS = frozenset({"collections.OrderedDict", "collections.Counter", "_codecs.encode"})
# A class that cannot be loaded says so before a byte lands; protocol 2 is what the weights-only unpickler reads.
_PROTOCOL = 2


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, root: object, inner: list[object], is_leaf: Callable[[object], bool]) -> None:
        super().__init__(file, _PROTOCOL)
        self.values: list[object] = []
        self._root = root
        self._inner = inner
        self._is_leaf = is_leaf
        self._known: dict[int, int] = {}

    def persistent_id(self, found: Any) -> int | None:
        if found is NotImplemented or (type(found) in _NAMED and found.__module__ in weights_only._blocklisted_modules):
            # Known before a byte leaves, whatever the receiver allows.
            raise ValueError(f"{found!r} cannot travel: no receiver can allow it")
        # Tensors have no truth, and pickle's own types need no help.
        if found is self._root or type(found) in _PICKLED:
            return None
        known = self._known.get(id(found))
        if known is not None:
            return known
        if self._is_leaf(found):
            self._known[id(found)] = number = len(self._inner)
            self._inner.append(found)
            return number
        if is_native(found) and not isinstance(found, type):
            self.values.append(found)
            self._known[id(found)] = number = -len(self.values)
            return number
        return None


# What is pickled by its name.
_NAMED = frozenset({type, types.FunctionType, types.BuiltinFunctionType})
_PICKLED = ATOMIC | {tuple, list, dict}


def pickle_object(value: object, inner: list[object], is_leaf: Callable[[object], bool]) -> tuple[bytes, list[object]]:
    """Pickle ``value`` without the leaves and the tagged values inside of it.

    Args:
        value: What has no tag of its own.
        inner: The leaves that are found are appended here.
        is_leaf: Says what is one.

    Returns:
        The pickle, and the values that were taken out.

    Raises:
        Exception: It cannot be pickled; its class's own code runs, which may raise anything.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, value, inner, is_leaf)
    pickler.dump(value)
    return buffer.getvalue(), pickler.values


# Gives what a persistent id stands for.
Load = Callable[[Any], object]


def unpickle_object(
    data: bytes, values: Sequence[object], inner: Sequence[object], unpickle: Callable[[bytes, Load], object]
) -> object:
    """The value that :func:`pickle_object` wrote.

    Args:
        data: The pickle.
        values: What was taken out of it.
        inner: The leaves that were taken out of it.
        unpickle: :func:`unpickle_allowed`, unless code from the peer is trusted.

    Raises:
        Exception: It is damaged, or names a class that is not allowed.
    """
    return unpickle(data, lambda number: inner[number] if expect(int, number) >= 0 else values[-1 - number])


def unpickle_allowed(data: bytes, load: Load) -> object:
    """Read a pickle that may name only what the receiver allows.

    Raises:
        Exception: It is damaged, or names something else.
    """
    check_pickle(data)
    make: Any = weights_only.Unpickler
    unpickler = make(io.BytesIO(data), encoding="utf-8")
    unpickler.persistent_load = load
    return unpickler.load()


def check_pickle(data: bytes) -> None:
    """Check that a pickle names nothing that is not allowed; nothing of it is run.

    Raises:
        NotAllowed: It does; all of it is named.
        ValueError: It is none that the weights-only unpickler reads.
    """
    names = _globals_in(data)
    check_cost(data)
    refused = names - _HARMLESS - (_user_allowed().keys() - {_STORAGE})
    if refused:
        raise NotAllowed(refused)


def _globals_in(data: bytes) -> set[str]:
    try:
        return weights_only.get_globals_in_pkl(io.BytesIO(data))
    except (pickle.UnpicklingError, EOFError, ValueError, struct.error, IndexError, AssertionError) as exc:
        raise ValueError(f"damaged pickle: {type(exc).__name__}: {exc}") from exc
