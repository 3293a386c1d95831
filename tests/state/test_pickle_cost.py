"""What a pickle would cost: honest ones pass, and those that would take years or overrun the stack do not."""

from __future__ import annotations

import io
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from helpers import Config, Point
from hypothesis import given
from hypothesis import strategies as st
from torch import _weights_only_unpickler as weights_only

from ft_transport._state.pickle_cost import MAX_COST, MAX_KEYS, check_cost

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Plain:
    """Has attributes, and itself among them."""

    def __init__(self) -> None:
        self.me = self
        self.values = [1, 2, (3, 4)]


class Ordered(OrderedDict):  # type: ignore[type-arg]
    """A user's OrderedDict."""


HONEST: list[Any] = [
    None, True, 5, -5, 1 << 100, 1.5, "text", b"bytes", bytearray(b"x"), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [],
    [1, [2, [3]]], {}, {"a": 1, 2: {"b": (3,)}}, set(), {1, "a"}, frozenset({1, (2, 3)}), 1j, Counter("aab"),
    OrderedDict(a=1), datetime(2020, 1, 1, tzinfo=timezone.utc), Fraction(1, 3),
    PurePosixPath("/a/b"), Config(3), Point(1, [Point(2, 3)]), Plain(),
    [Config(1)] * 500, {index: index for index in range(5000)},
]  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", HONEST, ids=lambda value: type(value).__name__)
def test_honest_pickles_pass(value: Any, protocol: int) -> None:
    check_cost(pickle.dumps(value, protocol))


@pytest.mark.parametrize("value", [deque([1]), Ordered(a=1), [defaultdict(int, a=1)]])
def test_what_the_weights_only_unpickler_cannot_fill_is_refused(value: Any) -> None:
    data = pickle.dumps(value, 2)
    with pytest.raises(ValueError, match="which cannot be read"):
        check_cost(data)
    try:
        with torch.serialization.safe_globals([deque, Ordered, defaultdict]):
            weights_only.Unpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        return
    pytest.skip("this torch, which fills it, is not the only one that may have to")


@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.binary(),
        lambda inner: (
            st.tuples(inner, inner)
            | st.lists(inner, max_size=4)
            | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        ),
    ),
    st.sampled_from(PROTOCOLS),
)
def test_any_plain_pickle_passes(value: Any, protocol: int) -> None:
    check_cost(pickle.dumps([value, value], protocol))


def laughs(levels: int, end: bytes) -> bytes:
    """A tuple of twice a tuple of twice a tuple …, and what is done with it."""
    twice = b"".join(b"h%c" % index * 2 + b"\x86q%c" % (index + 1) for index in range(levels))
    return b"\x80\x02)q\x00" + twice + b"h%c" % levels + end


@pytest.mark.parametrize(
    "end",
    [b".", b"}h\x30K\x01s.", b"}(h\x30K\x01u.", b"(K\x01K\x02h\x30K\x03d.", b"\x8f(h\x30\x90.", b"(h\x30\x91.", b"N."],
)
def test_shared_parts_count_each_time(end: bytes) -> None:
    end = b"0" + end if end != b"." else end
    for levels in (60, 200):
        with pytest.raises(ValueError, match="a pickle of more than"):
            check_cost(laughs(levels, end))
    check_cost(laughs(10, b"."))


def test_many_cheap_uses_of_one_costly_key() -> None:
    key = laughs(16, b"q\xff0}(")
    check_cost(key + b"h\xffK\x01u.")
    with pytest.raises(ValueError, match=f"more than {MAX_COST} values"):
        check_cost(key + b"h\xffK\x01" * 1000 + b"u.")


@pytest.mark.parametrize(("begin", "nest"), [(b")", b"\x85"), (b"", b"]"), (b"", b"}K\x01")])
def test_nesting_is_bounded(begin: bytes, nest: bytes) -> None:
    end = {b"\x85": b"", b"]": b"a" * 99_999, b"}K\x01": b"N" + b"s" * 100_000}[nest]
    with pytest.raises(ValueError, match="nested deeper"):
        check_cost(b"\x80\x04" + begin + nest * 100_000 + end + b".")


@pytest.mark.parametrize("make", [set, frozenset, dict.fromkeys])
@pytest.mark.parametrize("protocol", PROTOCOLS[2:])
def test_keys_that_are_not_text_are_bounded(make: Any, protocol: int) -> None:
    check_cost(pickle.dumps(make(map(str, range(MAX_KEYS + 1))), protocol))
    if protocol >= 4 or make is dict.fromkeys:
        with pytest.raises(ValueError, match="keys that are not text"):
            check_cost(pickle.dumps(make(range(MAX_KEYS + 1)), protocol))


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b".", b"0.", b"a.", b"s.", b"u.", b"(u.", b"N(s.", b"}(N\x85s.", b"h\x05.", b"NR.", b"N(0a."],
)
def test_what_is_no_pickle(data: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        check_cost(data)


@given(st.binary(max_size=60))
def test_random_bytes(data: bytes) -> None:
    try:
        check_cost(data)
    except (ValueError, KeyError, IndexError):
        pass
