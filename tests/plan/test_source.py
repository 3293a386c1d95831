"""Where the bytes of each message lie at the source."""

from __future__ import annotations

import pytest
import torch
from helpers import CPU, noise, raw_bytes
from states import STATES

from ft_transport._plan.blocks import Blocks, copy_blocks, indexed
from ft_transport._plan.source import place
from ft_transport._state.describe import describe
from ft_transport._wire.layout import Limits, lay_out

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


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
            copy_blocks(blocks, [index], [piece.end - piece.begin], target, gather=True)
            continue
        message = torch.zeros(piece.end - piece.begin, dtype=torch.uint8)
        copy_blocks(blocks, [index], [message.numel()], message, gather=True)
        block = indexed(storages[piece.storage], piece.begin, gaps.end, gaps.places, gaps.unit)
        copy_blocks(Blocks.of([block]), [0], [message.numel()], message, gather=False)
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
