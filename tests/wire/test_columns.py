"""Columns of integers: there and back, byte for byte, and what is none."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_transport._wire.columns import pack_column, unpack_column

# From the smallest to the largest of each size, in bytes.
LIMITS = {1: (-(1 << 7), (1 << 7) - 1), 2: (-(1 << 15), (1 << 15) - 1), 4: (-(1 << 31), (1 << 31) - 1)}
LIMITS[8] = (-(1 << 63), (1 << 63) - 1)

# What a peer of any machine sends.
BYTES = [
    ([], b""),
    ([0], b"\x00"),
    ([0, 0, 0], b"\x00\x00\x00"),
    ([1, -1, 127, -128], b"\x01\xff\x7f\x80"),
    ([1, 128], b"\x01\x00\x80\x00"),
    ([-2, -129], b"\xfe\xff\x7f\xff"),
    ([1, 0x123456, -2], b"\x01\x00\x00\x00\x56\x34\x12\x00\xfe\xff\xff\xff"),
    ([0x0102030405060708, -1], b"\x08\x07\x06\x05\x04\x03\x02\x01" + b"\xff" * 8),
]


@pytest.mark.parametrize(("values", "data"), BYTES)
def test_columns_are_written_and_read_as_they_were(values: list[int], data: bytes) -> None:
    assert pack_column(values) == data
    assert unpack_column(data, len(values)) == values


@pytest.mark.parametrize("size", LIMITS)
def test_the_least_size_that_holds_all(size: int) -> None:
    for limit in LIMITS[size]:
        for values in ([limit], [0, limit], [limit, 0, 1], list(LIMITS[size])):
            data = pack_column(values)
            assert len(data) == size * len(values)
            assert unpack_column(data, len(values)) == values
        if size < 8:
            beyond = limit + (1 if limit > 0 else -1)
            assert len(pack_column([0, beyond])) == 4 * size


@pytest.mark.parametrize("beyond", [1 << 63, -(1 << 63) - 1, 1 << 100])
def test_what_64_bits_do_not_hold(beyond: int) -> None:
    with pytest.raises(OverflowError):
        pack_column([0, beyond])


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-200, 200)))
def test_any_integers_come_back(values: list[int]) -> None:
    got = unpack_column(pack_column(values), len(values))
    assert got == values
    assert {*map(type, got)} <= {int}


def test_more_bytes_for_each_than_are_needed_are_read() -> None:
    assert unpack_column(b"\x01\x00\x00\x00\xff\xff\xff\xff", 2) == [1, -1]
    assert unpack_column(bytes(16), 2) == [0, 0]


def test_a_machine_of_the_other_byte_order_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as one of this order can show: there every value is turned around, both ways."""
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    turned = pack_column([1, 0x1234])
    assert turned == b"\x00\x01\x12\x34"
    assert unpack_column(turned, 2) == [1, 0x1234]


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"\x00", 0),
        (b"", 1),
        (b"\x00", 2),
        (b"\x00" * 3, 2),
        (b"\x00" * 3, 1),
        (b"\x00" * 5, 1),
        (b"\x00" * 16, 1),
        (b"\x00" * 48, 3),
        (b"\x00" * 7, 4),
        (b"", -1),
        (b"\x00" * 2, -1),
        (b"\x00" * 4, 1 << 62),
        (b"\x00", 1 << 100),
    ],
)
def test_bytes_of_another_number_of_integers(data: bytes, count: int) -> None:
    with pytest.raises(ValueError, match=f"expected a column of {count} integers, got {len(data)} bytes"):
        unpack_column(data, count)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize(
    "data", [None, 1, True, 1.0, "\x00", "abc", [0], (0, 0, 0), (), bytearray(3), memoryview(b"abc")]
)
def test_what_is_no_bytes(data: Any, count: int) -> None:
    with pytest.raises(ValueError, match=f"integers, got a {type(data).__name__}"):
        unpack_column(data, count)
