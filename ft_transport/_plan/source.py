"""A described state, ready to be served to any number of destinations.

Strategy: what all destinations have in common is made once: the manifest, as the bytes of its frame, the messages, and
their digests, each by whoever sends the message first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter

import torch

from ft_transport._deadline import Deadline
from ft_transport._device import settle
from ft_transport._options import Options
from ft_transport._plan.blocks import Block, Blocks, Places, held, indexed, share
from ft_transport._plan.placement import Placement, note_state
from ft_transport._plan.unchanged import ChangeDetector, Reading
from ft_transport._process import no_collection
from ft_transport._state.describe import Tensors, describe
from ft_transport._state.manifest import Manifest, View
from ft_transport._telemetry.report import TransferReport
from ft_transport._wire.digest import digest_message
from ft_transport._wire.encode import encode_manifest
from ft_transport._wire.frames import ManifestHeader
from ft_transport._wire.layout import Gaps, Layout, Piece, lay_out
from ft_transport.errors import LocalProtocolError

__all__ = ["SourcePlan", "place"]


class SourcePlan:
    """A described state, ready to be served to any number of destinations at once.

    Args:
        state_dict: The state. Its memory is read until the last destination is served.
        step: Step of the state.
        options: The caller's choices.
        report: Filled with what the state is.
        await_end: Waits until nothing is read any more; see ``_plan.unchanged.Reading``.
        deadline: Until when the devices are waited for that the state is on; None: as long as it takes.

    Attributes:
        streams: To copy in, on these devices and the wire's.
        placement: Where its messages are.
        versions: Tells whether the state has changed since. Release it once nothing is read any more.

    Raises:
        LocalProtocolError: A leaf cannot travel; every such path is named.
        TransferTimeout: A device has not come to an end by the deadline.
    """

    def __init__(
        self,
        state_dict: object,
        step: int | None,
        options: Options,
        report: TransferReport,
        await_end: Callable[[Reading], object] | None = None,
        *,
        deadline: Deadline | None = None,
    ) -> None:
        self.options = options
        # Describing makes hundreds of thousands of small objects and no cycle. The collector would start every 700 of
        # them, and walk through all of the trainer's.
        with no_collection():
            manifest, tensors = describe(state_dict)
            if options.shared:
                share(tensors.tensors)
                # The group would move them where they are seen to move, so it is done, and noted anew, before.
                manifest, tensors = describe(state_dict)
            # Before a byte of it is read.
            self.streams = settle(() if tensors.on_cpu else tensors.tensors, deadline, options.device)
            if not tensors.on_cpu:
                # Leaves of a user's class may have read theirs when they were taken apart, of what was not yet there.
                manifest, tensors = describe(state_dict)
            # How it is cut is decided here alone: the destination finds the limits in the manifest, and need not agree.
            limits = options.limits(sum(map(itemgetter(0), manifest.storages)))
            self.header = ManifestHeader(step, limits, options.digest, options.sample)
            self.layout = lay_out(manifest, limits)
            self.frame = encode_manifest(manifest, self.header)
            self.placement = place(manifest, self.layout, tensors, options.device)
        self.versions = ChangeDetector(manifest, self.layout, self.placement.memory(), await_end)
        self._digests: dict[int, int] = {}
        note_state(report, manifest, self.layout)
        report.nbytes_staged = self.placement.staged_bytes(range(report.num_messages))

    def note_digest(self, message: int, data: torch.Tensor) -> None:
        """Fingerprint a message, once for all destinations."""
        # Not locked: two destinations may take one digest twice, at the same time, and store the same number.
        if self.header.digest and message not in self._digests:
            lent = self.placement.held(message)
            try:
                self._digests[message] = digest_message(data, self.header.digest, self.header.sample, lent)
            except LocalProtocolError:
                self.placement.check()  # which names it
                raise

    def digests(self) -> list[int]:
        """Fingerprints of all messages, in order; empty where nothing is verified."""
        return [self._digests[message] for message in range(len(self.layout.sizes))] if self.header.digest else []


def place(manifest: Manifest, layout: Layout, tensors: Tensors, device: torch.device) -> Placement:
    """Where the messages of a described state are: in its own memory.

    Args:
        manifest: Of the state.
        layout: Its messages.
        tensors: The state's own, behind the manifest's views.
        device: Where messages live.
    """
    # Of every tensor, also of those that share a block with others: each may lose its memory by itself.
    places = Places(tensors.tensors, tensors.addresses, tensors.alive, manifest, lambda: _owners(manifest))
    return Placement(layout, _blocks(manifest, layout, tensors), places, device)


def _owners(manifest: Manifest) -> list[int]:
    """The leaf of each tensor behind a manifest's views."""
    # A leaf that is the same object as an earlier one has that one's views and no tensors of its own.
    return [leaf for leaf in manifest.leaves.owners if leaf not in manifest.same]


def _numbers(manifest: Manifest) -> Sequence[int]:
    """The number of the view of each tensor behind a manifest."""
    if not manifest.same:
        return range(len(manifest.views))
    return [number for number, leaf in enumerate(manifest.leaves.owners) if leaf not in manifest.same]


def _blocks(manifest: Manifest, layout: Layout, tensors: Tensors) -> Blocks:
    """The memory of each of the layout's ranges."""
    views, shapes, ranges = manifest.views, tensors.geometries, layout.ranges
    of_tensors = Blocks(
        list(tensors.tensors),
        tensors.alive,
        tensors.bases,
        tensors.capacities,
        tensors.addresses,
        on_host=tensors.on_cpu,
    )
    # Most ranges are one tensor as it is: for many small ones, a call for each costs more than all that is done in it.
    if views.geometries == shapes and ranges.lone == range(len(shapes)):
        return of_tensors
    own = _numbers(manifest)
    behind = {number: index for index, number in enumerate(own)}
    others: dict[int, list[int]] = {
        which: [behind[number]] if number >= 0 else []
        for which, number in enumerate(ranges.lone)
        if number < 0 or views.geometries[number] is not shapes[behind[number]]
    }
    for number in sorted({*own}.difference(ranges.lone)):
        # An empty tensor is a view of no storage (EMPTY): it has a shape to tell, and no bytes.
        if (view := views[number]).storage >= 0:
            others[layout.range_of(view.storage, view.begin)].append(behind[number])
    mine = [views[number] for number in own]
    found = [_block(ranges[which], layout.gaps.get(which), members, mine, tensors) for which, members in others.items()]
    if len(others) == len(ranges):
        return Blocks.of(held(found))
    blocks = of_tensors.part([behind.get(number, 0) for number in ranges.lone])
    blocks.put(list(others), held(found))
    return blocks


def _block(piece: Piece, gaps: Gaps | None, members: Sequence[int], views: Sequence[View], tensors: Tensors) -> Block:
    """The memory of a range that several tensors show, or one with gaps."""
    first = members[0]
    tensor, shape = tensors.tensors[first], tensors.geometries[first]
    if shape is not views[first].geometry:
        # A column of a matrix, say, of which nothing else is in the state: moved as it lies, the whole matrix would
        # travel.
        # Its gaps do not travel: the manifest has it without, and so have all others here, which are the same view.
        dims = shape.order or ()
        sizes, strides = [shape.shape[dim] for dim in dims], [shape.stride[dim] for dim in dims]
        return Block(tensor.detach().as_strided(sizes, strides, tensors.offsets[first]), dense=False)
    # If one of the tensors is all of the range, it is taken as it is.
    for index in members:
        if _is_whole(views[index], piece):
            return Block(tensors.tensors[index])
    shift = tensors.offsets[first] * shape.itemsize - views[first].begin
    if gaps is not None:
        return indexed(tensor.detach(), piece.begin + shift, gaps.end + shift, gaps.places, gaps.unit)
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return Block(flat.set_(tensor.untyped_storage(), piece.begin + shift, (piece.end - piece.begin,), (1,)))


def _is_whole(view: View, piece: Piece) -> bool:
    """Whether a view is all of a range, without gaps."""
    return view.geometry.dense and (view.begin, view.end) == (piece.begin, piece.end)
