"""Where the elements of a tensor lie: shapes, strides, gaps, and ranges that are joined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ft_transport._state.geometry import Geometry, alone_in, geometry, merge


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


DENSE, GAPS, NONE = (
    geometry(torch.float32, shape, stride) for shape, stride in [((2,), (1,)), ((2,), (2,)), ((0,), (1,))]
)


@pytest.mark.parametrize(
    ("storages", "shapes", "alone"),
    [
        ([], [], []),
        ([7, 5, 9], [DENSE, DENSE, DENSE], [0, 1, 2]),
        ([7, 5, 7], [DENSE, DENSE, DENSE], [1]),
        ([7, 5, 9], [DENSE, GAPS, NONE], [0]),
        ([7, 7], [DENSE, GAPS], []),
    ],
    ids=["none", "all", "two of one storage", "gaps, and without elements", "beside one with gaps"],
)
def test_views_that_are_alone_in_their_storage(storages: list[int], shapes: list[Geometry], alone: list[int]) -> None:
    assert list(alone_in(storages, shapes)) == alone
