"""A described state, ready to be served to any number of destinations.

Strategy: what all destinations have in common is made once: the manifest, as the bytes of its frame, the messages, and
their digests, each by whoever sends the message first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ft_transport._options import Options
from ft_transport._plan.blocks import share
from ft_transport._plan.placement import Gatherer
from ft_transport._plan.unchanged import Reading, Versions
from ft_transport._process import no_collection
from ft_transport._state.describe import describe
from ft_transport._telemetry.report import TransferReport
from ft_transport._wire.digest import digest_message
from ft_transport._wire.encode import encode_manifest
from ft_transport._wire.frames import Header
from ft_transport._wire.layout import lay_out
from ft_transport.errors import LocalProtocolError

__all__ = ["Outbound"]


class Outbound:
    """A described state, ready to be served to any number of destinations at once.

    Args:
        state_dict: The state. Its memory is read until the last :func:`serve` has returned.
        step: Step of the state.
        options: The caller's choices.
        report: Filled with what the state is.
        await_end: Waits until nothing is read any more; see ``_plan.unchanged.Reading``.

    Attributes:
        versions: Tells whether the state has changed since. Release it once nothing is read any more.

    Raises:
        LocalProtocolError: A leaf cannot travel; every such path is named.
    """

    def __init__(
        self,
        state_dict: object,
        step: int | None,
        options: Options,
        report: TransferReport,
        await_end: Callable[[Reading], object] | None = None,
    ) -> None:
        self.options = options
        with no_collection():
            manifest, blocks = describe(state_dict)
            if options.shared:
                share(block.memory for block in blocks.values())
                manifest, blocks = describe(state_dict)
            limits = options.limits(sum(nbytes for nbytes, _ in manifest.storages))
            self.header = Header(step, limits, options.digest, options.sample)
            self.layout = lay_out(manifest, limits)
            self.frame = encode_manifest(manifest, self.header)
        self.versions = Versions(manifest, self.layout, blocks, await_end)
        self.gatherer = Gatherer(self.layout, blocks, options.device)
        self._digests: dict[int, int] = {}
        report.num_leaves = len(manifest.leaves)
        report.num_messages = len(self.layout.messages)
        report.nbytes_total = self.layout.nbytes
        report.nbytes_staged = self.gatherer.staged_bytes(range(report.num_messages))

    def note_digest(self, message: int, data: torch.Tensor) -> None:
        """Fingerprint a message, once for all destinations."""
        if self.header.digest and message not in self._digests:
            held = self.gatherer.held(message)
            try:
                self._digests[message] = digest_message(data, self.header.digest, self.header.sample, held)
            except LocalProtocolError:
                self.gatherer.check()  # which names it
                raise

    def digests(self) -> list[int]:
        """Fingerprints of all messages, in order; empty where nothing is verified."""
        return [self._digests[message] for message in range(len(self.layout.messages))] if self.header.digest else []
