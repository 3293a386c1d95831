"""What a description says, and what is built by it."""

from __future__ import annotations

import torch
from helpers import noise

from ft_transport._state.describe import describe
from ft_transport._state.geometry import geometry
from ft_transport._state.kinds.base import PLAIN
from ft_transport._state.manifest import Leaf, Leaves, View, Views


def test_build_by_torchs_own_treespec() -> None:
    manifest, _ = describe({"a": 1, "b": [2, 3]})
    manifest.treespec = torch.utils._pytree.tree_structure({"a": 1, "b": [2, 3]})
    assert manifest.build([4, 5, 6]) == {"a": 4, "b": [5, 6]}


SHAPE = geometry(torch.float32, (2,), (1,))
OTHER = geometry(torch.int64, (3,), (1,))


def views(*storages: int) -> Views:
    return Views([*storages], [SHAPE] * len(storages), [0] * len(storages))


def test_views_are_columns_and_read_as_rows() -> None:
    found = views(0, 1)
    found.append([View(2, OTHER, 5)])
    found.add(*found.part(0, 1))
    assert list(found) == [View(0, SHAPE, 0), View(1, SHAPE, 0), View(2, OTHER, 5), View(0, SHAPE, 0)]
    assert (found[2], len(found)) == (View(2, OTHER, 5), 4)
    found[1] = View(7, OTHER, 1)
    assert (found.storages, found.geometries, found.offsets) == (
        [0, 7, 2, 0],
        [SHAPE, OTHER, OTHER, SHAPE],
        [0, 1, 5, 0],
    )


def test_leaves_that_are_all_plain() -> None:
    leaves = Leaves(3, views(0, 1, 2), {})
    assert list(leaves) == [Leaf("tensor", (View(i, SHAPE, 0),)) for i in range(3)]
    assert [list(each) for each in (leaves.firsts, leaves.owners, leaves.plain)] == [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2]]


def test_leaves_of_no_view_and_of_several() -> None:
    every = views(0, 1, 2, 3)
    others = {0: Leaf("value", (), 5), 2: Leaf("some kind", (every[1], every[2]), "context", (PLAIN, PLAIN))}
    leaves = Leaves(4, every, others)
    assert list(leaves) == [others[0], Leaf("tensor", (every[0],)), others[2], Leaf("tensor", (every[3],))]
    assert [*leaves.firsts] == [0, 0, 1, 3, 4]
    assert [*leaves.owners] == [1, 2, 2, 3]
    assert leaves.plain == [1, 3]
    again = Leaves.of(list(leaves))
    assert (list(again), again.others, list(again.views)) == (list(leaves), others, list(every))


def test_a_leaf_that_is_the_same_as_an_earlier_one_is_none_of_the_plain() -> None:
    tensor, parameter = noise(2, 1), torch.nn.Parameter(noise(3, 2))
    manifest, tensors = describe([tensor, parameter, 1, parameter, tensor, noise(2, 3)])
    leaves = manifest.leaves
    assert manifest.same == {3: 1, 4: 0}
    assert (leaves[3], leaves[4]) == (leaves[1], leaves[0])
    assert leaves.plain == [0, 5]
    assert [view.storage for view in leaves.views] == [0, 1, 1, 0, 2]
    assert len(tensors.tensors) == 3
    again = Leaves.of(list(leaves), manifest.same)
    assert (again.others, list(again.views)) == (leaves.others, list(leaves.views))
