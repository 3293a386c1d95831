"""Nesting: flattened, named, and built again."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import pytest
import torch
from helpers import Point, difference
from hypothesis import given
from hypothesis import strategies as st
from states import STATES

from ft_transport import LocalProtocolError
from ft_transport._state.tree import LEAF, Node, flatten, format_path, paths_of, unflatten
from ft_transport._wire.decode import check_tree

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
    nodes, leaves, shared = flatten(tree)
    again = unflatten(nodes, leaves, shared)
    assert again == tree
    assert repr(again) == repr(tree)
    assert len(paths_of(nodes)) == len(leaves) == nodes.count(LEAF) == check_tree(nodes)


@pytest.mark.parametrize("name", STATES)
def test_states_come_back(name: str) -> None:
    state = STATES[name](1)
    nodes, leaves, _ = flatten(state)
    again = unflatten(nodes, leaves)
    assert type(again) is type(state)
    assert difference(again, state) == ""


def test_paths() -> None:
    tree = {"a": [1, (2,)], 3: Point({"x": 4}, 5), "d": deque([6])}
    nodes, leaves, _ = flatten(tree)
    paths = paths_of(nodes)
    assert paths == [("a", 0), ("a", 1, 0), (3, "x", "x"), (3, "y"), ("d", 0)]
    assert leaves == [1, 2, 4, 5, 6]
    assert format_path(paths[2]) == "3.x.x"
    assert format_path(()) == "<root>"


def test_a_leaf_is_a_tree() -> None:
    assert flatten(5) == ([LEAF], [5], {})
    assert paths_of([LEAF]) == [()]
    assert unflatten([LEAF], [5]) == 5


def test_order_is_kept_and_keys_are_not_sorted() -> None:
    tree = {"b": 1, "a": 2, 10: 3, 9: 4}
    nodes, leaves, _ = flatten(tree)
    assert leaves == [1, 2, 3, 4]
    assert list(unflatten(nodes, leaves)) == ["b", "a", 10, 9]  # type: ignore[call-overload]


def test_attributes_of_an_ordered_dict_come_along() -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    nodes, leaves, _ = flatten(state)
    assert ("_metadata", "", "version") in paths_of(nodes)
    again: Any = unflatten(nodes, leaves)
    assert again._metadata == state._metadata  # type: ignore[attr-defined]
    assert list(again) == ["weight", "bias"]


def test_containers_keep_what_makes_them() -> None:
    factories = {"f": defaultdict(list, a=2), "n": defaultdict(None, b=3)}
    tree = {"d": deque([1], maxlen=4), **factories, "s": torch.Size([2, 3])}
    nodes, leaves, _ = flatten(tree)
    again: Any = unflatten(nodes, leaves)
    assert again["d"].maxlen == 4
    assert again["f"].default_factory is list
    assert again["n"].default_factory is None
    assert type(again["s"]) is torch.Size


class SubDict(dict[str, int]):
    pass


class SubList(list[int]):
    pass


@pytest.mark.parametrize("value", [Counter("a"), {1, 2}, "text", b"bytes", range(3), None])
def test_what_is_no_plain_container_is_a_leaf(value: object) -> None:
    assert flatten(value) == ([LEAF], [value], {})


@pytest.mark.parametrize("value", [SubDict(a=1), SubList([1, 2]), SubDict(), SubList()])
def test_containers_of_a_class_of_the_users(value: Any) -> None:
    value.note = "kept"
    nodes, leaves, _ = flatten(value)
    again: Any = unflatten(nodes, leaves)
    assert type(again) is type(value)
    assert again == value
    assert again.note == "kept"


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
    nodes, leaves, _ = flatten(tree)
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


def test_a_container_in_several_places_comes_back_as_one() -> None:
    shared: list[Any] = [1, {"x": "y"}]
    tree = {"a": shared, "b": [shared, list(shared)], "c": shared[1]}
    nodes, leaves, found = flatten(tree)
    again: Any = unflatten(nodes, leaves, found)
    assert again == tree
    assert again["a"] is again["b"][0]
    assert again["a"] is not again["b"][1]
    assert again["a"][1] is again["b"][1][1] is again["c"]


def test_a_container_is_not_shared_where_its_leaves_are_not_the_same() -> None:
    shared = [torch.ones(1)]
    nodes, _, found = flatten([shared, shared])
    mine = [torch.ones(1), torch.ones(1)]
    again: Any = unflatten(nodes, mine, found)
    assert again[0] is not again[1]
    assert [inner[0] for inner in again] == mine


def test_containers_that_come_and_go_are_not_taken_for_one_another() -> None:
    """A class registered with pytree makes its children anew each time: their ids may be the same."""
    nodes, leaves, found = flatten([Pair(i, i + 1) for i in range(50)])
    assert found == {}
    again: Any = unflatten(nodes, leaves, found)
    assert [(pair.a, pair.b) for pair in again] == [(i, i + 1) for i in range(50)]


class Pair:
    """Registered with torch's pytree below; its children are in a list that it makes when it is flattened."""

    def __init__(self, a: int, b: int) -> None:
        self.a, self.b = a, b


torch.utils._pytree.register_pytree_node(
    Pair, lambda pair: ([[pair.a, pair.b]], "context"), lambda children, context: Pair(*next(iter(children)))
)


@dataclasses.dataclass
class Settings:
    width: int
    extra: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    width: int


def test_dataclasses_come_back_with_every_attribute() -> None:
    settings = Settings(3, {"x": [1]})
    settings.added = 5  # type: ignore[attr-defined]
    nodes, leaves, _ = flatten([settings, Frozen(4)])
    assert paths_of(nodes) == [(0, "width"), (0, "extra", "x", 0), (0, "added"), (1, "width")]
    again: Any = unflatten(nodes, leaves)
    assert again == [settings, Frozen(4)]
    assert again[0].added == 5
