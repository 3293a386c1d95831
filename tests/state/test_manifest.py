"""What a state dict is described as: geometry, storages, blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CPU, distinct_nbytes, noise, raw_bytes
from hypothesis import given
from hypothesis import strategies as st
from states import STATES

from ft_transport import LocalProtocolError
from ft_transport._plan.blocks import copy_blocks, indexed
from ft_transport._plan.source import place
from ft_transport._state.describe import describe
from ft_transport._state.geometry import geometry, merge
from ft_transport._wire.layout import Limits, lay_out

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.mark.parametrize(
    ("shape", "stride", "dense", "closes_gaps", "expanded", "order"),
    [
        ((), (), True, False, False, ()),
        ((4,), (1,), True, False, False, (0,)),
        ((3, 4), (4, 1), True, False, False, (0, 1)),
        ((3, 4), (1, 3), True, False, False, (1, 0)),
        ((3, 1, 4), (4, 99, 1), True, False, False, (0, 2)),
        ((4,), (2,), False, True, False, (0,)),
        ((3, 4), (5, 1), False, True, False, (0, 1)),
        ((3, 4), (0, 1), False, False, True, (1,)),
        ((3, 4), (0, 2), False, True, True, (1,)),
        ((3,), (0,), False, False, True, ()),
        ((3, 4), (2, 1), False, False, False, None),
        ((0, 4), (4, 1), False, False, False, (1,)),
    ],
)
def test_geometry(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dense: bool,
    closes_gaps: bool,
    expanded: bool,
    order: tuple[int, ...] | None,
) -> None:
    found = geometry(torch.float32, shape, stride)
    assert found.closes_gaps == closes_gaps
    assert found.expanded == expanded
    if found.numel:
        assert found.dense == dense
        assert found.order == order


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 30)), max_size=4))
def test_geometry_agrees_with_counting(dims: list[tuple[int, int]]) -> None:
    shape, stride = tuple(size for size, _ in dims), tuple(step for _, step in dims)
    found = geometry(torch.int16, shape, stride)
    offsets = [0]
    for size, step in dims:
        offsets = [offset + i * step for offset in offsets for i in range(size)]
    distinct = set(offsets)
    assert found.numel == len(offsets)
    assert found.span == 2 * (max(offsets) + 1)
    if found.dense:
        assert len(distinct) == len(offsets) == max(offsets) + 1
    if found.order is not None and not found.expanded:
        assert len(distinct) == len(offsets)
    if found.closes_gaps:
        assert len(distinct) < max(offsets) + 1


def test_equal_geometries_are_one_object() -> None:
    assert geometry(torch.int8, (2,), (1,)) is geometry(torch.int8, (2,), (1,))
    assert str(geometry(torch.bfloat16, (2, 3), (3, 1))) == "bfloat16 (2, 3)"


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=8))
def test_merge_covers_exactly_what_it_was_given(pairs: list[tuple[int, int]]) -> None:
    extents = [(begin, begin + size) for begin, size in pairs]
    merged = merge(extents)
    covered = {byte for begin, end in extents for byte in range(begin, end)}
    assert {byte for begin, end in merged for byte in range(begin, end)} == covered
    assert sum(end - begin for begin, end in merged) == len(covered)
    assert merged == sorted(merged)


def test_only_overlapping_ranges_are_joined() -> None:
    assert merge([(4, 8), (0, 4), (6, 9)]) == [(0, 4), (4, 9)]


@pytest.mark.parametrize("name", STATES)
def test_blocks_hold_exactly_the_bytes_that_the_views_show(name: str) -> None:
    """Copied by range into the described storages, each view shows its leaf again."""
    state = STATES[name](1)
    manifest, tensors = describe(state)
    storages = [torch.zeros(storage.nbytes, dtype=torch.uint8) for storage in manifest.storages]
    layout = lay_out(manifest, Limits())
    blocks = place(manifest, layout, tensors, CPU).blocks
    for index, piece in enumerate(layout.ranges):
        target = storages[piece.storage][piece.begin : piece.end]
        gaps = layout.gaps.get(index)
        if gaps is None:
            copy_blocks([(blocks[index], 0, piece.end - piece.begin)], target, gather=True)
            continue
        message = torch.zeros(piece.end - piece.begin, dtype=torch.uint8)
        copy_blocks([(blocks[index], 0, message.numel())], message, gather=True)
        block = indexed(storages[piece.storage], piece.begin, gaps.end, gaps.places, gaps.unit)
        copy_blocks([(block, 0, message.numel())], message, gather=False)
    shown_by = iter(leaf for leaf in _leaves(state) if isinstance(leaf, torch.Tensor))
    for leaf in manifest.leaves:
        for view in leaf.views:
            expected = raw_bytes(next(shown_by))
            shape = view.geometry
            if view.storage < 0:
                assert expected == b""
                continue
            size = shape.itemsize
            strides = [stride * size for stride in shape.stride]
            shown = storages[view.storage].as_strided([*shape.shape, size], [*strides, 1], view.begin)
            assert bytes(shown.reshape(-1).tolist()) == expected
    assert len(blocks) == len(layout.ranges)


def _leaves(state: object) -> list[object]:
    from ft_transport._state.tree import flatten

    return flatten(state).leaves


def test_nothing_is_copied() -> None:
    state = {"a": noise(10, 1), "b": noise((4, 4), 2)[:, :2]}
    manifest, tensors = describe(state)
    blocks = place(manifest, lay_out(manifest, Limits()), tensors, CPU).blocks
    assert {block.memory.data_ptr() for block in blocks} == {t.data_ptr() for t in state.values()}


def test_ten_rows_become_a_storage_of_ten_rows() -> None:
    manifest, _ = describe(noise((1000, 16), 1)[500:510])
    assert sum(storage.nbytes for storage in manifest.storages) == 640


def test_distant_views_of_one_storage_stay_together_but_not_what_lies_between() -> None:
    base = noise(10_000, 1)
    state = {"a": base[:10], "b": base[9000:9010]}
    manifest, _ = describe(state)
    (storage,) = manifest.storages
    assert storage.nbytes < 80 + 2 * 64
    assert lay_out(manifest, Limits()).nbytes == distinct_nbytes(state)


@pytest.mark.parametrize("offset", range(5))
def test_views_of_any_dtype_stay_aligned(offset: int) -> None:
    base = noise(1024, 1, torch.uint8)
    state = {
        "bytes": base[offset : offset + 3],
        "doubles": base[512:544].view(torch.float64)[1:3],
        "ints": base[800:840].view(torch.int32)[offset:],
    }
    manifest, _ = describe(state)
    for leaf in manifest.leaves:
        for view in leaf.views:
            assert view.begin % view.geometry.itemsize == 0
            assert view.end <= manifest.storages[view.storage].nbytes


class Dispatching(torch.Tensor):
    """A subclass with a dispatch of its own and nothing that says what is inside."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def test_everything_that_cannot_travel_is_named() -> None:
    state = {"a": lambda: None, "ok": noise(2, 1), "b": [Dispatching(torch.ones(1))]}
    with pytest.raises(LocalProtocolError) as caught:
        describe(state)
    message = caught.value.message
    assert "a: a value of class function cannot be encoded" in message
    assert "b.0: a tensor of class Dispatching cannot travel" in message
    assert "ok" not in message


def test_one_tensor_in_several_places_is_described_once() -> None:
    weight = noise(4, 1)
    manifest, tensors = describe({"a": weight, "b": [weight], "c": weight[:2]})
    assert manifest.same == {1: 0}
    assert len(tensors.tensors) == 2
    assert len(manifest.storages) == 1
    assert manifest.leaves[1] == manifest.leaves[0]


def test_build_by_torchs_own_treespec() -> None:
    manifest, _ = describe({"a": 1, "b": [2, 3]})
    manifest.treespec = torch.utils._pytree.tree_structure({"a": 1, "b": [2, 3]})
    assert manifest.build([4, 5, 6]) == {"a": 4, "b": [5, 6]}
