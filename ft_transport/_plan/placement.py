"""Which memory a message is taken from."""

from __future__ import annotations

import torch

from ft_transport._plan.blocks import Block, Blocks, Held, copy_blocks
from ft_transport._plan.buffers import Bucket, aligned
from ft_transport._process import memory_at
from ft_transport._wire.layout import Layout, Piece
from ft_transport.errors import LocalProtocolError

__all__ = ["Gatherer"]


class Gatherer:
    """Takes the bytes of messages from a state's memory.

    Args:
        layout: The messages.
        blocks: The memory of each byte range.
        device: Where messages live.
    """

    def __init__(self, layout: Layout, blocks: Blocks, device: torch.device) -> None:
        self._layout = layout
        self._blocks = blocks
        self._device = device

    def staged(self, message: int) -> bool:
        """Whether a message must be gathered into a bucket.

        Small ones always are: under async quorum forward goes on meanwhile, and changes small buffers (BatchNorm).
        """
        pieces = self._layout.messages[message]
        if self._layout.is_small(message):
            return True
        block, _, _ = self._part(pieces[0])
        return not block.dense or block.memory.device.type != self._device.type

    def staged_bytes(self, messages: range) -> int:
        """What a bucket must hold for these messages."""
        return sum(aligned(self._layout.sizes[message]) for message in messages if self.staged(message))

    def check(self) -> None:
        """Raises LocalProtocolError if a tensor of the state has lost its memory; see ``_plan.blocks.Blocks``."""
        self._blocks.check()

    def gather(self, message: int, bucket: Bucket | None) -> torch.Tensor:
        """The bytes of a message: the state's own memory, or a copy in the bucket; raises as :meth:`check`."""
        parts = [self._part(piece) for piece in self._layout.messages[message]]
        if not self.staged(message):
            block, begin, nbytes = parts[0]
            if not block.here:
                self.check()
            return block.bytes(begin, begin + nbytes)
        assert bucket is not None
        staged = bucket.take(self._layout.sizes[message])
        try:
            copy_blocks(parts, staged, gather=True)
        except LocalProtocolError:
            self.check()  # which names it
            raise
        return staged

    def held(self, message: int) -> Held | None:
        """The state's own memory, where that is on the CPU and is what :meth:`gather` gives."""
        if self.staged(message) or self._device.type != "cpu":
            return None
        block, begin, nbytes = self._part(self._layout.messages[message][0])
        return Held(block, begin, begin + nbytes)

    def view(self, message: int, bucket: Bucket) -> memoryview:
        """As :meth:`gather`, for messages on the CPU: valid as long as this gatherer and the bucket are."""
        held = self.held(message)
        if held is not None:
            return held.view
        staged = self.gather(message, bucket)
        return memory_at(staged.data_ptr(), staged.numel())

    def _part(self, piece: Piece) -> tuple[Block, int, int]:
        storage, begin, end = piece
        block = self._blocks.get((storage, begin))
        if block is not None:
            return block, 0, end - begin
        first = self._layout.ranges[self._layout.range_of(storage, begin)].begin
        return self._blocks[storage, first], begin - first, end - begin
