"""Objects of classes that have no tag, as pickles that are read without trust.

Strategy: what a pickle cannot be spared is kept as small as can be. Values that have a tag of their own, and leaves
whose bytes travel in messages, are taken out first (pickle's persistent ids). What is left is protocol 2, which torch's
weights-only unpickler reads: it calls nothing but what it is given leave for. What reading would cost is found out
before (``_state.pickle_cost``).
"""

from __future__ import annotations

import io
import pickle
import struct
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import _weights_only_unpickler as weights_only

from ft_transport._state.classes import ATOMIC, STORAGE, NotAllowed, expect, user_allowed
from ft_transport._state.pickle_cost import check_cost

__all__ = [
    "HARMLESS",
    "Load",
    "UnpicklingError",
    "check_pickle",
    "globals_in",
    "pickle_object",
    "unpickle_allowed",
    "unpickle_object",
]

# Named here so that no other file has to import pickle.
UnpicklingError = pickle.UnpicklingError


# What a pickle may name beside the receiver's own list: containers, and what pickle writes bytes with.
HARMLESS = frozenset({"collections.OrderedDict", "collections.Counter", "_codecs.encode"})
# A class that cannot be loaded says so before a byte lands; protocol 2 is what the weights-only unpickler reads.
_PROTOCOL = 2


class _Pickler(pickle.Pickler):
    def __init__(
        self,
        file: io.BytesIO,
        root: object,
        inner: list[object],
        is_leaf: Callable[[object], bool],
        has_tag: Callable[[object], bool],
    ) -> None:
        super().__init__(file, _PROTOCOL)
        self.values: list[object] = []
        self._root = root
        self._inner = inner
        self._is_leaf = is_leaf
        self._has_tag = has_tag
        self._known: dict[int, int] = {}

    def persistent_id(self, found: Any) -> int | None:
        # pickle writes classes and functions by name, wherever they are in the value: the one place to see them all
        # before a byte has left.
        if found is NotImplemented or (type(found) in _NAMED and found.__module__ in weights_only._blocklisted_modules):
            # Known before a byte leaves, whatever the receiver allows.
            raise ValueError(f"{found!r} cannot travel: no receiver can allow it")
        # Tensors have no truth, and pickle's own types need no help.
        if found is self._root or type(found) in _PICKLED:
            return None
        # Kept alive by the value that is pickled, so an id stays one object's.
        known = self._known.get(id(found))
        if known is not None:
            return known
        # Taken out, and written as a number: its bytes travel in messages, beside all others, and not inside of a
        # pickle, which would be copied three times.
        if self._is_leaf(found):
            self._known[id(found)] = number = len(self._inner)
            self._inner.append(found)
            return number
        if self._has_tag(found) and not isinstance(found, type):
            self.values.append(found)
            # Negative for values, others for leaves: persistent ids have one number line.
            self._known[id(found)] = number = -len(self.values)
            return number
        return None


# What is pickled by its name.
_NAMED = frozenset({type, types.FunctionType, types.BuiltinFunctionType})
_PICKLED = ATOMIC | {tuple, list, dict}


def pickle_object(
    value: object,
    inner: list[object],
    is_leaf: Callable[[object], bool],
    has_tag: Callable[[object], bool],
) -> tuple[bytes, list[object]]:
    """Pickle ``value`` without the leaves and the tagged values inside of it.

    Args:
        value: What has no tag of its own.
        inner: The leaves that are found are appended here.
        is_leaf: Says what is one.
        has_tag: Says what is written without a pickle: ``_state.values.is_native``.

    Returns:
        The pickle, and the values that were taken out.

    Raises:
        Exception: It cannot be pickled; its class's own code runs, which may raise anything.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, value, inner, is_leaf, has_tag)
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
    # Checked as a whole before any of it is built: the unpickler itself would refuse only when it comes to a name, with
    # half of the objects made.
    check_pickle(data)
    # torch's, which is written in Python and knows a few dozen opcodes. ``pickle.Unpickler`` with ``find_class`` would
    # do as well, but for what ``REDUCE`` can call.
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
    names = globals_in(data)
    check_cost(data)
    # Subtracted even if it was allowed by the user; see :func:`_why_not` in ``_state.classes``.
    refused = names - HARMLESS - (user_allowed().keys() - {STORAGE})
    if refused:
        raise NotAllowed(refused)


def globals_in(data: bytes) -> set[str]:
    try:
        return weights_only.get_globals_in_pkl(io.BytesIO(data))
    except (pickle.UnpicklingError, EOFError, ValueError, struct.error, IndexError, AssertionError) as exc:
        raise ValueError(f"damaged pickle: {type(exc).__name__}: {exc}") from exc
