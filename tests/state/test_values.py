"""Plain values as msgpack's own types, and back."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import pathlib
import uuid
import zoneinfo
from typing import Any

import msgpack
import numpy
import pytest
import torch
from helpers import Config
from hypothesis import given
from hypothesis import strategies as st

from ft_transport._state.values import (
    MAX_INT_BYTES,
    MAX_UNSALTED_KEYS,
    check_keys,
    decode_value,
    encode_value,
    is_native,
    not_allowed_in,
)


class Colour(enum.Enum):
    RED = 1


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


NATIVE: list[Any] = [
    None, True, -(1 << 63), (1 << 64) - 1, 1 << 64, -(1 << 200), 1.5, float("inf"), "\udcff", b"\x00", (1, (2,)),
    [1, [2]], {1: "a", (2, 3): None}, {1, "a"}, frozenset({1}), bytearray(b"x"), 1 - 2j, slice(1, None, 2),
    range(3, 9, 2), ..., torch.Size([2, 3]), torch.bfloat16, torch.device("cuda", 1), torch.sparse_coo,
    torch.channels_last, torch.per_tensor_affine, datetime.date(2026, 1, 2), datetime.time(1, 2, 3, 4, fold=1),
    datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.timezone(datetime.timedelta(hours=2), "X")),
    datetime.datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")), datetime.timedelta(-1, 5, 7),
    decimal.Decimal("1.10"), fractions.Fraction(1, 3), uuid.UUID(int=5), pathlib.Path("/a"),
    pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("c:/d"), numpy.float32(1.5), numpy.int64(-1),
    numpy.dtype("<f4"), numpy.datetime64("2026-01-02"),
]  # fmt: skip


def packed(value: Any) -> Any:
    """What arrives, as msgpack reads it."""
    data = msgpack.packb(encode_value(value), unicode_errors="surrogatepass")
    return msgpack.unpackb(data, use_list=False, strict_map_key=False, unicode_errors="surrogatepass")


# By number: the text of a set hangs on the process, and the workers must name the same tests.
@pytest.mark.parametrize("value", NATIVE, ids=[f"{number} {type(it).__name__}" for number, it in enumerate(NATIVE)])
def test_what_has_a_tag_comes_back_without_a_pickle(value: Any) -> None:
    assert is_native(value)
    data = packed(value)
    assert not_allowed_in(data) == set()
    again = decode_value(data)
    assert again == value
    assert type(again) is type(value)
    assert repr(again) == repr(value)


@given(st.integers())
def test_integers_of_any_length(value: int) -> None:
    assert decode_value(packed(value)) == value


def test_an_integer_that_is_too_long_is_refused_on_both_sides() -> None:
    assert decode_value(packed(1 << (8 * MAX_INT_BYTES - 9)))
    with pytest.raises(ValueError, match="an integer of more than"):
        encode_value(1 << 8 * MAX_INT_BYTES)
    with pytest.raises(ValueError, match="at most 65536 are accepted"):
        decode_value(("int", bytes(MAX_INT_BYTES + 1)))


@pytest.mark.parametrize("value", [Colour.RED, Rights.READ | Rights.WRITE, Colour, Config(3)])
def test_classes_of_the_users_must_be_allowed(value: Any) -> None:
    cls = value if isinstance(value, type) else type(value)
    name = f"{cls.__module__}.{cls.__qualname__}"
    assert is_native(value) == (cls is not Config)
    data = packed(value)
    assert not_allowed_in(data) == {name}
    with pytest.raises(ValueError, match="is not allowed"):
        decode_value(data)
    with torch.serialization.safe_globals([cls]):
        assert not_allowed_in(data) == set()
        assert decode_value(data) == value


@pytest.mark.parametrize(
    "data",
    [
        ("enum", "state.test_values.Colour", "GREEN", 2),
        ("enum", "helpers.Config", "RED", 1),
        ("class", "torch.float32"),
        ("range", 1, 2, 0),
        ("complex", 1, 2),
        ("torch", "float32"),
        ("path", "PosixPath", "/a"),
        ("numpy", "<f4", b"\x00"),
        ("numpy dtype", "|O"),
        ("zone", "../../etc/passwd"),
        ("no such tag",),
        (None,),
        (),
        ("{}", 1),
    ],
)
def test_what_stands_for_no_value(data: Any) -> None:
    with torch.serialization.safe_globals([Colour, Config]), pytest.raises((ValueError, TypeError, LookupError)):
        decode_value(data)


def test_a_tensor_inside_of_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="a tensor inside of a key"):
        encode_value(Config(torch.ones(1)))  # type: ignore[arg-type]


def test_keys_that_a_dict_takes_long_to_tell_apart_are_bounded() -> None:
    """Text has a salt that a peer does not know; numbers are their own hash, and can be chosen to collide."""
    many = tuple(range(0, 2 * MAX_UNSALTED_KEYS + 2, 2))
    with pytest.raises(ValueError, match="keys, at most 65536"):
        check_keys(many)
    for keys in (many[:-1], tuple(map(str, many)), tuple(range(2 * MAX_UNSALTED_KEYS))):
        assert check_keys(keys) is keys
    with pytest.raises(ValueError, match="keys, at most"):
        check_keys(tuple((key,) for key in range(MAX_UNSALTED_KEYS // 4 + 1)))
