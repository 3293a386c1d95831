"""Plain values of Python, numpy and torch."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import math
import pathlib
import random
import re
import types
import uuid
import zoneinfo
from typing import Any

import numpy as np
import torch
from helpers import noise

from corpus.case import Table

__all__ = ["CASES"]

CASES = Table("values")


class Color(enum.Enum):
    """A user's enum."""

    RED = "red"
    BLUE = ("blue", 3)


class Level(enum.IntEnum):
    """A user's enum of integers."""

    LOW = 1
    HIGH = 10


class Access(enum.Flag):
    """A user's flags."""

    READ = enum.auto()
    WRITE = enum.auto()


class Mode(str, enum.Enum):
    """A user's enum of strings."""

    TRAIN = "train"


class Sampler:
    """A user's class with attributes."""

    def __init__(self, epoch: int, **more: Any) -> None:
        self.epoch = epoch
        self.__dict__.update(more)


class Compact:
    """A user's class with slots."""

    __slots__ = ("epoch", "unset", "weights")

    def __init__(self, epoch: int, weights: Any) -> None:
        self.epoch = epoch
        self.weights = weights


class Careful:
    """A user's class that says itself what is kept."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.cache = {"expensive": value}

    def __getstate__(self) -> dict[str, Any]:
        return {"value": self.value}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
        self.cache = {"expensive": self.value}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A user's configuration, without tensors."""

    width: int
    betas: tuple[float, float] = (0.9, 0.999)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def schedule(step: int) -> float:
    """A user's function."""
    return 1.0 / (1 + step)


# By name: what makes a value from a seed. Each goes beside a tensor, alone, and in a list.
_VALUES: dict[str, Any] = {
    "integers": lambda n: [0, -1, n, 255, -(1 << 31), (1 << 63) - 1, -(1 << 63), (1 << 64) - 1],
    "integers beyond 64 bits": lambda n: [1 << 64, -(1 << 63) - 1, 1 << 200, -(1 << 300) + n],
    "an integer of ten thousand digits": lambda n: 10**10_000 + n,
    "booleans": lambda n: [True, False, 1, 0, bool(n % 2)],
    "floats": lambda n: [0.1 * n, -0.0, 0.0, math.inf, -math.inf, 5e-324, 1.7976931348623157e308],
    "nan": lambda n: [math.nan, n],
    "complex": lambda n: [complex(1.5, -0.0), complex(-0.0, n), complex(math.nan, math.inf)],
    "text": lambda n: ["", "gr\u00fc\u00dfe", "\U0001f30d", "a\x00b", f"{n}", "\u202e"],
    "lone surrogates": lambda n: ["\udcff", "a\ud800b", f"\udfff{n}"],
    "long text": lambda n: f"{n}" * 5_000,
    "bytes": lambda n: [b"", b"\x00\xff", bytes([n])],
    "long bytes": lambda n: bytes(range(256)) * 40 + bytes([n]),
    "bytearray": lambda n: [bytearray(b"ab"), bytearray([n])],
    "none": lambda n: [None, n],
    "ellipsis": lambda n: [..., n],
    "ranges": lambda n: [range(n), range(3, 30, 7), range(0), range(-(1 << 70), 1 << 80, 3)],
    "slices": lambda n: [slice(n), slice(1, None, -1), slice(None)],
    "sets": lambda n: [{1, "a", None}, {n}, {(1, 2), frozenset({3})}],
    "frozensets": lambda n: [frozenset({(1, 2), None}), frozenset({n})],
    "counter": lambda n: collections.Counter({"a": n, "b": 2}),
    "dates and times": lambda n: [
        datetime.datetime(2026, 2, 3, 4, 5, 6, n),
        datetime.date(2026, 2, n),
        datetime.time(1, 2, 3, n),
        datetime.timedelta(days=-1, microseconds=n),
    ],
    "time zones": lambda n: [
        datetime.datetime(2026, 2, 3, tzinfo=datetime.timezone.utc) + datetime.timedelta(n),
        datetime.datetime(2026, 2, 3, n, tzinfo=datetime.timezone(datetime.timedelta(hours=2, minutes=30), "named")),
        datetime.timezone(datetime.timedelta(hours=-n)),
    ],
    "zoneinfo": lambda n: [
        zoneinfo.ZoneInfo("Europe/Berlin"),
        datetime.datetime(2026, n, 3, tzinfo=zoneinfo.ZoneInfo("UTC")),
    ],
    "paths": lambda n: [pathlib.Path(f"/data/{n}"), pathlib.PurePosixPath("a/../b"), pathlib.PureWindowsPath(r"C:\x")],
    "decimals": lambda n: [
        decimal.Decimal("0.10"),
        decimal.Decimal(n),
        decimal.Decimal("-Infinity"),
        decimal.Decimal("NaN"),
    ],
    "fractions": lambda n: [fractions.Fraction(1, 3), fractions.Fraction(-n, 7)],
    "uuid": lambda n: uuid.UUID(int=n),
    "dtypes": lambda n: [torch.float32, torch.bfloat16, torch.float8_e4m3fn, (torch.int8, torch.int16)[n % 2]],
    "devices": lambda n: [torch.device("cpu"), torch.device("cuda", n), torch.device("meta")],
    "sizes": lambda n: [torch.Size([n, 3]), torch.Size([])],
    "layouts": lambda n: [torch.strided, torch.sparse_coo, (torch.jagged, torch.sparse_csr)[n % 2]],
    "qschemes": lambda n: [torch.per_tensor_affine, (torch.per_channel_affine, torch.per_tensor_symmetric)[n % 2]],
    "random state": lambda n: random.Random(n).getstate(),
    "random state after gauss": lambda n: _after_gauss(n),
    "numpy's random state": lambda n: np.random.RandomState(n).get_state(),
    "numpy's random state as a dict": lambda n: np.random.RandomState(n).get_state(legacy=False),
    "state of a PCG64": lambda n: np.random.Generator(np.random.PCG64(n)).bit_generator.state,
    "state of a Philox": lambda n: np.random.Philox(n).state,
    "state of an MT19937": lambda n: np.random.MT19937(n).state,
    "state of an SFC64": lambda n: np.random.SFC64(n).state,
    "torch's random state": lambda n: torch.Generator().manual_seed(n).get_state(),
    "generator": lambda n: torch.Generator().manual_seed(n),
}


def _after_gauss(seed: int) -> Any:
    generator = random.Random(seed)
    generator.gauss(0.0, 1.0)
    return generator.getstate()


def _placed(make: Any, seed: int) -> Any:
    return {"value": make(seed), "tensor": noise(3, seed), "list": [(make(seed),)]}


def _alone(make: Any, seed: int) -> Any:
    return {"value": make(seed)}


for _name, _make in _VALUES.items():
    CASES.add(_name, functools.partial(_placed, _make))
    CASES.add(f"{_name} without a tensor", functools.partial(_alone, _make))


# ------------------------------------------------------------------------------------- user's classes


@CASES.case(allow=[Color, Level, Access, Mode])
def enums(seed: int) -> Any:
    return {
        "enum": [Color.RED, Color.BLUE],
        "int": Level(1 if seed % 2 else 10),
        "flag": [Access.READ, Access.READ | Access.WRITE, Access(0)],
        "str": Mode.TRAIN,
        "tensor": noise(2, seed),
    }


@CASES.case(allow=[Sampler])
def object_with_attributes(seed: int) -> Any:
    return {"sampler": Sampler(seed, order=[3, 1, 2], name="x"), "tensor": noise(3, seed)}


@CASES.case(allow=[Compact])
def object_with_slots(seed: int) -> Any:
    return {"compact": Compact(seed, (1, 2)), "tensor": noise(3, seed)}


@CASES.case(allow=[Settings])
def configuration(seed: int) -> Any:
    return {"settings": Settings(seed, extra={"a": [1]}), "tensor": noise(3, seed)}


@CASES.case(allow=[Careful])
def object_that_chooses_its_state(seed: int) -> Any:
    return {"careful": Careful(seed), "tensor": noise(3, seed)}


@CASES.case(allow=[Sampler])
def object_with_tensors(seed: int) -> Any:
    return {"sampler": Sampler(seed, weights=noise(5, seed), deep={"more": [noise(2, seed + 1)]})}


@CASES.case(allow=[Sampler])
def object_with_a_large_tensor(seed: int) -> Any:
    return {"sampler": Sampler(seed, weights=noise(100_000, seed))}


@CASES.case(allow=[Sampler])
def object_with_tied_tensors(seed: int) -> Any:
    weight = noise((4, 5), seed)
    return {"weight": weight, "sampler": Sampler(seed, weight=weight, row=weight[2]), "large": noise(1000, seed)}


@CASES.case(allow=[Compact, Sampler])
def slots_with_tied_tensors(seed: int) -> Any:
    weight = torch.nn.Parameter(noise((40, 50), seed))
    return {"a": Compact(seed, weight), "b": Sampler(seed, weight=weight), "weight": weight}


@CASES.case(allow=[Sampler])
def one_object_twice(seed: int) -> Any:
    sampler = Sampler(seed, order=[1, 2])
    return {"a": sampler, "b": [sampler], "tensor": noise(2, seed)}


@CASES.case(allow=[Sampler])
def object_that_knows_itself(seed: int) -> Any:
    sampler = Sampler(seed)
    sampler.me = sampler  # type: ignore[attr-defined]
    return {"sampler": sampler, "tensor": noise(2, seed)}


@CASES.case(allow=[schedule, Sampler, math.sqrt])
def functions_and_classes(seed: int) -> Any:
    return {"function": schedule, "class": Sampler, "builtin": math.sqrt, "tensor": noise(2, seed)}


@CASES.case(allow=[torch.nn.Linear, torch.Tensor])
def classes_of_torch(seed: int) -> Any:
    return {"class": torch.nn.Linear, "other": torch.Tensor, "tensor": noise(2, seed)}


@CASES.case(varies=False)
def builtin_types(seed: int) -> Any:
    return [int, float, dict, list]


@CASES.case(allow=[types.SimpleNamespace])
def namespaces(seed: int) -> Any:
    return {"namespace": types.SimpleNamespace(lr=0.1, seed=seed, names=["a"]), "tensor": noise(2, seed)}


@CASES.case(allow=[re._compile])  # type: ignore[attr-defined]
def patterns(seed: int) -> Any:
    return {"pattern": re.compile(f"layer{seed}.*"), "tensor": noise(2, seed)}


# --------------------------------------------------------------------------------------------- numpy


_NUMPY_DTYPES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "U5",
    "S4",
    "datetime64[ns]",
    "timedelta64[s]",
    "V6",
]


def _array(shape: Any, seed: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    """An array of random bytes; of text, random digits."""
    if dtype[0] == "U":
        return np.array([str((seed * 7919 + i) % 99_991) for i in range(math.prod(shape))], dtype=dtype).reshape(shape)
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    values = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, nbytes, dtype=np.uint8)
    return values.view(dtype).reshape(shape)


def _arrays(dtype: str, seed: int) -> Any:
    return {
        "array": _array((3, 4), seed, dtype),
        "scalar": _array((1,), seed, dtype)[0],
        "empty": np.empty((0, 2), dtype),
    }


for _name in _NUMPY_DTYPES:
    CASES.add(f"numpy {_name}", functools.partial(_arrays, _name))


@CASES.case()
def numpy_shapes(seed: int) -> Any:
    return {
        "0d": _array((), seed),
        "3d": _array((2, 3, 4), seed),
        "column-major": np.asfortranarray(_array((3, 4), seed)),
        "transposed": _array((3, 4), seed).T,
        "strided": _array((9, 4), seed)[::2, 1:3],
        "reversed": _array((5,), seed)[::-1],
        "repeated": np.broadcast_to(_array((1, 3), seed), (4, 3)),
    }


@CASES.case()
def numpy_structured(seed: int) -> Any:
    array = np.zeros(3, dtype=[("id", "<i4"), ("weight", "<f8", (2,)), ("name", "U4")])
    array["id"] = seed
    array["weight"] = np.nan
    array["name"] = "x"
    return {"array": array, "record": array[1]}


@CASES.case()
def numpy_of_objects(seed: int) -> Any:
    return {"array": np.array([1, "a", None, seed], dtype=object), "tensor": noise(2, seed)}


@CASES.case()
def numpy_scalars(seed: int) -> Any:
    return [
        np.float32(0.1),
        np.int64(seed),
        np.bool_(True),
        np.float64("nan"),
        np.str_("x"),
        np.bytes_(b"y"),
        np.uint8(7),
    ]


@CASES.case()
def numpy_scalars_of_time(seed: int) -> Any:
    return [np.datetime64("2026-01-02"), np.datetime64("NaT", "D"), np.timedelta64(seed, "ms"), np.complex64(1 + 2j)]


@CASES.case()
def numpy_dtypes(seed: int) -> Any:
    return [np.dtype("float32"), np.dtype([("a", "i4")]), np.dtype(f"U{seed}")]


@CASES.case()
def large_numpy(seed: int) -> Any:
    return {"array": _array((500, 400), seed), "columns": _array((2000, 100), seed, "float64")[:, 5:8], "n": seed}


@CASES.case()
def one_array_twice(seed: int) -> Any:
    array = _array((100, 100), seed)
    return {"a": array, "b": [array], "tensor": noise(3, seed)}


@CASES.case()
def numpy_and_torch_side_by_side(seed: int) -> Any:
    return {f"{i}": noise(4, seed + i) if i % 2 else _array((4,), seed + i) for i in range(20)}
