"""Objects as pickles that name only what is allowed, without the leaves and values in them."""

from __future__ import annotations

import collections
import io
import operator
import os
import pickle
from typing import Any

import pytest
import torch
from helpers import Config, Point, noise

from ft_transport._state.classes import NotAllowed
from ft_transport._state.pickles import (
    UnpicklingError,
    check_pickle,
    globals_in,
    pickle_object,
    unpickle_allowed,
    unpickle_object,
)


class Holder:
    """Not allowed but where a test says so."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def is_tensor(found: object) -> bool:
    return isinstance(found, torch.Tensor)


def is_text(found: object) -> bool:
    return isinstance(found, bytearray)


def taken_apart(value: object) -> tuple[bytes, list[object], list[object]]:
    inner: list[object] = []
    data, values = pickle_object(value, inner, is_tensor, is_text)
    return data, values, inner


def test_leaves_and_tagged_values_are_taken_out_each_once() -> None:
    weight, text = noise(1000, 1), bytearray(b"tagged" * 100)
    value = Holder(a=weight, b=[weight, text], c={"d": text, "e": Holder(f=noise(2, 2))})
    data, values, inner = taken_apart(value)
    assert len(data) < 300
    assert values == [text]
    assert values[0] is text
    assert [each.shape for each in inner if isinstance(each, torch.Tensor)] == [(1000,), (2,)]
    with torch.serialization.safe_globals([Holder]):
        again: Any = unpickle_object(data, values, inner, unpickle_allowed)
    assert again.a is again.b[0] is weight
    assert again.b[1] is again.c["d"] is text


def test_the_value_itself_is_not_taken_out() -> None:
    """Else nothing would be left to pickle: it would be a pickle of a number."""
    text = bytearray(b"x")
    data, values, _ = taken_apart(text)
    assert values == []
    assert globals_in(data) != set()


def test_a_value_that_contains_itself() -> None:
    value = Holder()
    value.me = value
    data, *_ = taken_apart(value)
    with torch.serialization.safe_globals([Holder]):
        again: Any = unpickle_object(data, (), (), unpickle_allowed)
    assert again.me is again


@pytest.mark.parametrize("value", [[os.system], [os.getcwd], [NotImplemented], {"a": os.stat_result}])
def test_what_no_receiver_can_allow_is_refused_at_the_source(value: Any) -> None:
    with pytest.raises(ValueError, match="no receiver can allow it"):
        taken_apart(value)


class Evil:
    def __reduce__(self) -> Any:
        return operator.methodcaller, ("append", 1)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (Point(1, 2), {"helpers.Point"}),
        ([Point(1, 2), Holder(a=Config(1))], {"helpers.Point", f"{__name__}.Holder", "helpers.Config"}),
        (Evil(), {"operator.methodcaller"}),
        (collections.OrderedDict(a=1), set()),
        (b"bytes", set()),
    ],
)
def test_a_refusal_names_all_that_is_not_allowed(value: Any, names: set[str]) -> None:
    data = pickle.dumps(value, 2)
    if not names:
        check_pickle(data)
        return
    with pytest.raises(NotAllowed) as caught:
        check_pickle(data)
    assert caught.value.names >= names - {"copyreg._reconstructor"}
    with pytest.raises(NotAllowed):
        unpickle_allowed(data, lambda number: None)


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"\x80\x02c", b"garbage", pickle.dumps(Config(1), 2)[:-3]])
def test_what_is_damaged_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="pickle"):
        check_pickle(data)


@pytest.mark.parametrize("number", ["0", 1.0, True, 5, -3])
def test_persistent_ids_of_a_peer(number: Any) -> None:
    """True is no number: it would be the second leaf."""
    buffer = io.BytesIO()
    marked = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: object) -> Any:
            return number if found is marked else None

    Pickler(buffer, 2).dump([marked])
    with pytest.raises((TypeError, IndexError, UnpicklingError)):
        assert unpickle_object(buffer.getvalue(), ["value"], ["leaf", "other"], unpickle_allowed) == [marked]
