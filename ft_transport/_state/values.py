"""How a plain value becomes msgpack's own types, and is read back without trust.

Strategy: nil, booleans, floats, strings, bytes and integers of 64 bits are themselves; everything else is an array
``[tag, …]``, each tag with one line to write it and one to read it. What has no tag is pickled (``_state.pickles``).
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import pathlib
import sys
import uuid
import zoneinfo
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ft_transport._state.classes import (
    ATOMIC,
    FindClass,
    allowed_class,
    class_name,
    dtype_name,
    dtype_of,
    expect,
    expect_class,
    is_allowed,
    numpy_descr,
    numpy_dtype,
)
from ft_transport._state.pickle_cost import check_cost
from ft_transport._state.pickles import HARMLESS, globals_in, pickle_object, unpickle_allowed, unpickle_object

__all__ = ["check_cost", "check_keys", "decode_value", "encode_value", "is_native", "not_allowed_in"]


def names_in(data: Any) -> set[str]:
    """What an encoded value names by its tags and pickles, however deep."""
    # Without recursion: a peer can nest as deep as msgpack reads.
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
                found |= globals_in(first)
    return found


def not_allowed_in(data: Any) -> set[str]:
    """Of what an encoded value names, all that is not allowed."""
    return {name for name in names_in(data) if not is_allowed(name) and name not in HARMLESS}


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
        # What msgpack has a type for. Python's integers have no bound.
        if -(1 << 63) <= value < 1 << 64:
            return value
    elif cls in ATOMIC:
        return value
    encode = _ENCODE.get(cls)
    if encode is not None:
        return encode(value)
    # Before classes that an Enum may derive from: an IntEnum is an int to everybody else.
    if isinstance(value, enum.Enum):
        return ["enum", class_name(cls), value._name_, encode_value(value._value_)]
    if _is_numpy_scalar(value):
        return _encode_numpy_scalar(value)
    if isinstance(value, type):
        return ["class", class_name(value)]
    if _is_numpy(value, "dtype"):
        return ["numpy dtype", encode_value(numpy_descr(value))]
    inner: list[object] = []
    data, values = pickle_object(value, inner, lambda found: isinstance(found, torch.Tensor), is_native)
    if inner:
        raise ValueError("a tensor inside of a key or of a set")
    check_cost(data)  # as the receiver does, which refuses what its unpickler cannot build
    return ["object", data, *map(encode_value, values)]


def _tagged(tag: str) -> Callable[[Any], list[Any]]:
    return lambda values: [tag, *map(encode_value, values)]


def _fields(tag: str, *names: str) -> Callable[[Any], list[Any]]:
    return lambda value: [tag, *(encode_value(getattr(value, name)) for name in names)]


# Bounds an integer of more than 64 bits: a range or fraction of such takes time by the square of their length.
# Two of this size are multiplied in a tenth of a second, and a fraction of them is reduced in one.
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
    # The other system's class cannot be made; a receiver gets its own.
    pathlib.PosixPath: lambda v: ["path", "Path", str(v)],
    pathlib.WindowsPath: lambda v: ["path", "Path", str(v)],
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
    # msgpack's own types are themselves.
    if not isinstance(data, tuple):
        return data
    return _DECODE[expect(str, data[0])](data[1:], find_class)


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
    # Python salts the hashes of text, anew for each process, and not those of numbers: ``hash(n)`` is n modulo 2^61 -
    # 1, so whoever chooses the numbers can make all of them collide. Tuples of numbers are weaker still, hence four
    # times.
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
    # By name first: values of an Enum may have been renumbered between two versions of a program.
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


# NumPy is optional, to torch as well. Where it is not imported, no value of its classes can be here.
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
    # ``frombuffer`` refuses items of no bytes.
    if not dtype.itemsize:  # an empty text, whatever bytes NumPy has for it
        return numpy.zeros((), dtype)[()]
    return numpy.frombuffer(data, dtype, count=1)[0]
