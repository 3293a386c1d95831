"""Message to memory, for both ends: where the bytes of a message are taken from, or land.

Strategy: a range of the layout is a block of memory, whatever became of it: the state's own, the template's, fresh. So
one class says for the source and for the destination which messages can be moved as they lie, and copies the others.
Small ones are never moved as they lie: under an asynchronous quorum, torchft's default, forward goes on meanwhile on
either side, and changes small buffers (BatchNorm's statistics).

Not here: which block a range is (``_plan.source``, ``_plan.destination``).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ft_transport._device import is_on
from ft_transport._plan.blocks import Block, Blocks, Held, Places, copy_blocks
from ft_transport._plan.buffers import Bucket, aligned
from ft_transport._process import memory_at
from ft_transport._state.manifest import Manifest
from ft_transport._telemetry.report import TransferReport
from ft_transport._wire.layout import Layout
from ft_transport.errors import LocalProtocolError

__all__ = ["Placement", "note_state"]


def note_state(report: TransferReport, manifest: Manifest, layout: Layout) -> None:
    """Note in the report what is moved."""
    report.num_leaves = len(manifest.leaves)
    report.num_messages = len(layout.sizes)
    report.nbytes_total = layout.nbytes


class Placement:
    """Where each message lies. Any thread, each for other messages.

    Args:
        layout: The messages.
        blocks: The memory of each of the layout's ranges, in their order.
        places: Where the user's tensors among it are.
        device: Where messages live while they are moved.
    """

    def __init__(self, layout: Layout, blocks: Blocks, places: Places, device: torch.device) -> None:
        # Not private: a ``load_state_dict`` may exchange the template's tensors behind us, and then
        # ``DestinationPlan.find_again`` puts other blocks here.
        self.blocks = blocks
        self._layout = layout
        self._places = places
        self._device_type = device.type

    def check(self) -> None:
        """Raises LocalProtocolError if a tensor of the user's has lost its memory; see ``_plan.blocks.Places``."""
        self._places.check()

    def is_staged(self, message: int) -> bool:
        """Whether a message must go through a bucket."""
        return self._directly(message) is None

    def staged_bytes(self, messages: Iterable[int]) -> int:
        """What a bucket must hold for these messages."""
        sizes = self._layout.sizes
        return sum(aligned(sizes[message]) for message in messages if self.is_staged(message))

    def direct(self, message: int) -> torch.Tensor | None:
        """The memory of a message, flat uint8, to be moved as it lies; None if it must be staged.

        Raises:
            LocalProtocolError: As :meth:`check`.
        """
        found = self._directly(message)
        if found is None:
            return None
        block, begin, nbytes = found
        # Looked at for each message, not once: from one message to the next seconds may pass, in which the user's code
        # runs. A message is a few MiB, so the look costs nothing.
        if not block.here:
            self.check()
        return block.bytes(begin, begin + nbytes)

    def held(self, message: int) -> Held | None:
        """As :meth:`direct`, for messages on the CPU: to read it while its owner may take it away."""
        found = self._directly(message) if self._device_type == "cpu" else None
        if found is None:
            return None
        block, begin, nbytes = found
        return Held(block, begin, begin + nbytes)

    def bytes_of(self, message: int, bucket: Bucket | None) -> torch.Tensor:
        """The bytes of a message: :meth:`direct`, or a copy in the bucket, see :meth:`gather`."""
        direct = self.direct(message)
        if direct is not None:
            return direct
        assert bucket is not None
        staged = bucket.take(self._layout.sizes[message])
        self.gather(message, staged)
        return staged

    def view(self, message: int, bucket: Bucket) -> memoryview:
        """As :meth:`bytes_of`, for messages on the CPU; for as long as this and the bucket are."""
        held = self.held(message)
        if held is not None:
            return held.view
        staged = self.bytes_of(message, bucket)
        return memory_at(staged.data_ptr(), staged.numel())

    def gather(self, message: int, staged: torch.Tensor) -> None:
        """Copy a message from where its pieces lie; raises as :meth:`check`.

        From an accelerator it is only begun, in the calling thread's streams: see ``_device.Copies``.
        """
        self._copy(message, staged, gather=True)

    def scatter(self, message: int, staged: torch.Tensor) -> None:
        """Copy a staged message to where its pieces belong; as :meth:`gather`."""
        self._copy(message, staged, gather=False)

    def memory_of(self, message: int) -> list[torch.Tensor]:
        """What holds the ranges that a message has pieces of."""
        return [self.blocks.memory[which] for which in self._layout.owners[message]]

    def memory(self) -> list[torch.Tensor]:
        """What holds each of the layout's ranges, in their order."""
        return self.blocks.memory

    def _copy(self, message: int, staged: torch.Tensor, *, gather: bool) -> None:
        owners, nbytes = self._layout.owners[message], self._layout.ranges.nbytes
        # Only whole ranges share a message.
        sizes, begins = [self._layout.sizes[message]], [self._layout.begins[message]]
        if len(owners) > 1:
            sizes, begins = [nbytes[which] for which in owners], []
        try:
            copy_blocks(self.blocks, owners, sizes, staged, gather=gather, begins=begins)
        except LocalProtocolError:
            self.check()  # which names it
            raise

    def _directly(self, message: int) -> tuple[Block, int, int] | None:
        # Whatever the device. On an accelerator this bounds what forward may overwrite to buckets, too.
        if self._layout.is_small(message):
            return None
        # Only small ranges share a message, so this is the one piece.
        # Unpacked as one on purpose: two here would be a layout that both sides read differently.
        (which,) = self._layout.owners[message]
        block = self.blocks[which]
        if not block.dense or not is_on(block.memory, self._device_type):
            return None
        return block, self._layout.begins[message], self._layout.sizes[message]
