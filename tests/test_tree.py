"""Flatten and build again."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import pytest
import torch
from helpers import Point, difference
from hypothesis import given
from hypothesis import strategies as st
from states import STATES

from ft_transport import LocalProtocolError
from ft_transport._tree import LEAF, Node, flatten, format_path, unflatten

trees = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(deque),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
        st.tuples(inner, inner).map(Point._make),
    ),
    max_leaves=20,
)


@given(trees)
def test_any_tree_comes_back(tree: object) -> None:
    nodes, paths, leaves = flatten(tree)
    again = unflatten(nodes, leaves)
    assert again == tree
    assert repr(again) == repr(tree)
    assert len(paths) == len(leaves) == nodes.count(LEAF)


@pytest.mark.parametrize("name", STATES)
def test_states_come_back(name: str) -> None:
    state = STATES[name](1)
    nodes, _, leaves = flatten(state)
    again = unflatten(nodes, leaves)
    assert type(again) is type(state)
    assert difference(again, state) == ""


def test_paths() -> None:
    tree = {"a": [1, (2,)], 3: Point({"x": 4}, 5), "d": deque([6])}
    _, paths, leaves = flatten(tree)
    assert paths == [("a", 0), ("a", 1, 0), (3, "x", "x"), (3, "y"), ("d", 0)]
    assert leaves == [1, 2, 4, 5, 6]
    assert format_path(paths[2]) == "3.x.x"
    assert format_path(()) == "<root>"


def test_a_leaf_is_a_tree() -> None:
    assert flatten(5) == ([LEAF], [()], [5])
    assert unflatten([LEAF], [5]) == 5


def test_order_is_kept_and_keys_are_not_sorted() -> None:
    tree = {"b": 1, "a": 2, 10: 3, 9: 4}
    nodes, _, leaves = flatten(tree)
    assert leaves == [1, 2, 3, 4]
    assert list(unflatten(nodes, leaves)) == ["b", "a", 10, 9]  # type: ignore[call-overload]


def test_attributes_of_an_ordered_dict_come_along() -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    nodes, paths, leaves = flatten(state)
    assert ("_metadata", "", "version") in paths
    again: Any = unflatten(nodes, leaves)
    assert again._metadata == state._metadata  # type: ignore[attr-defined]
    assert list(again) == ["weight", "bias"]


def test_containers_keep_what_makes_them() -> None:
    factories = {"f": defaultdict(list, a=2), "n": defaultdict(None, b=3)}
    tree = {"d": deque([1], maxlen=4), **factories, "s": torch.Size([2, 3])}
    nodes, _, leaves = flatten(tree)
    again: Any = unflatten(nodes, leaves)
    assert again["d"].maxlen == 4
    assert again["f"].default_factory is list
    assert again["n"].default_factory is None
    assert type(again["s"]) is torch.Size


class SubDict(dict[str, int]):
    pass


class SubList(list[int]):
    pass


@pytest.mark.parametrize("value", [SubDict(a=1), SubList([1]), Counter("a"), {1, 2}, "text", b"bytes", range(3), None])
def test_what_is_no_plain_container_is_a_leaf(value: object) -> None:
    assert flatten(value) == ([LEAF], [()], [value])


def test_a_tree_that_contains_itself() -> None:
    tree: dict[str, Any] = {}
    tree["self"] = [tree]
    with pytest.raises(LocalProtocolError, match=r"self\.0\.self.*contains itself") as caught:
        flatten(tree)
    assert caught.value.phase == "describe"


def test_deep_but_allowed_and_too_deep() -> None:
    tree: object = 1
    for _ in range(1000):
        tree = [tree]
    nodes, _, leaves = flatten(tree)
    assert unflatten(nodes, leaves) is not None
    with pytest.raises(LocalProtocolError, match="nested deeper than 1000"):
        flatten([tree])


@pytest.mark.parametrize(
    ("nodes", "leaves"),
    [
        ([], []),
        ([LEAF], []),
        ([LEAF], [1, 2]),
        ([LEAF, LEAF], [1, 2]),
        ([Node("list", 2), LEAF], [1]),
        ([Node("list", 1), LEAF, LEAF], [1, 2]),
        ([Node("set", 1), LEAF], [1]),
    ],
)
def test_what_is_not_one_tree(nodes: list[Node], leaves: list[object]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        unflatten(nodes, leaves)
