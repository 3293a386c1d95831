"""Where messages land that lanes have fetched; what has come damaged, and what was here already.

Strategy: all lanes share one sink, and no two have the same message, so what lands needs no lock. A message counts once
its digest agrees: where one does not, it is fetched again, and until then nobody is passed it.
"""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import NamedTuple

import torch

from ft_transport._device import NO_STREAMS, Streams
from ft_transport._lanes.pending import PendingMessages
from ft_transport._lanes.relay import Relay
from ft_transport._lanes.session import Target, fingerprint
from ft_transport._plan.buffers import Bucket, aligned, by_turns
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.rewrite import Rewrite
from ft_transport._process import memory_at
from ft_transport._telemetry.report import TransferReport
from ft_transport._wire.layout import Layout
from ft_transport.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["Incurable", "Landing", "Sink"]

logger = logging.getLogger("ft_transport")

# How often one message may come damaged from the same supplier. TCP's checksum has 16 bits, so damage comes through now
# and then; three times the same message is no chance, but bad memory, or a source whose memory changes, and neither
# mends itself.
_MAX_DAMAGED = 3


class Incurable(RemoteProtocolError):
    """A message always comes damaged."""


class Landing(NamedTuple):
    """Where a message lands.

    Attributes:
        message: Which.
        target: The memory.
        aside: It, if it is beside what forward has written.
        staged: It, if it is in a bucket.
        bucket: That one.
    """

    message: int
    target: Target
    aside: torch.Tensor | None = None
    staged: torch.Tensor | None = None
    bucket: Bucket | None = None


class Sink:
    """Where messages land. Its methods are called by the lanes, each for another message.

    Args:
        layout: The messages.
        landing: Where they land.
        pending: Learns which are here.
        report: Learns how many bytes are.
        verified: Whether messages have digests.
        claims: Messages that may be here already, with their digests; None where it is still to be taken.
        rewrite: Keeps what forward may overwrite; None if nobody trains meanwhile.
        streams: To copy in.

    Attributes:
        streams: As above; whoever calls is in them (``Streams.use``).
        relay: Passes on what has landed, None if nobody would ask.
    """

    def __init__(
        self,
        layout: Layout,
        landing: DestinationPlan,
        pending: PendingMessages,
        report: TransferReport,
        claims: dict[int, int | None],
        *,
        verified: bool,
        rewrite: Rewrite | None = None,
        streams: Streams = NO_STREAMS,
    ) -> None:
        self.pending = pending
        self.relay: Relay | None = None
        self.verified = verified
        self._layout = layout
        self.streams = streams
        self._landing = landing
        self._report = report
        self._claims = claims
        self._claimed: dict[int, int] = {}
        self._rewrite = rewrite
        # A report counts a message once, also one that is fetched again after forward has written to it.
        self._counted: set[int] = set()  # messages that the report counts
        self._lock = threading.Lock()

    @property
    def sizes(self) -> list[int]:
        """Bytes of each message."""
        return self._layout.sizes

    @property
    def lane_bytes(self) -> int:
        """What one lane takes of memory for buckets, at the most."""
        return max(self.sizes, default=0) * len(by_turns(self.streams))

    def fetch_written_again(self) -> bool:
        """Ask again for the large messages that forward has written to, to keep them; gives whether there are any."""
        written = self._rewrite.written() if self._rewrite is not None else []
        if written:
            logger.info("forward has written to what had landed: %d messages are fetched again", len(written))
            self.pending.again(written)
        return bool(written)

    def is_missing(self, message: int) -> bool:
        """Whether a message is not here already for sure, so that it is to be asked for without a look."""
        return message not in self._claims

    def claim(self, message: int, bucket: Bucket) -> int | None:
        """The digest of a message that may be here already, as its memory is now; None if it is not."""
        # What came damaged is not there any more, whatever was: it has been written over.
        if self.is_missing(message) or self.pending.was_damaged(message) or self._is_written(message):
            return None
        held = self._landing.placement.held(message)
        if held is None:
            staged = self._take(message, bucket)
            self._landing.placement.gather(message, staged)
            self.streams.begun().finish()
            here = memory_at(staged.data_ptr(), staged.numel())
        else:
            here = held.view
        self._claimed[message] = digest = fingerprint(here, held)
        return digest if self._claims[message] in (None, digest) else None

    def begin(self, message: int, bucket: Bucket) -> Landing:
        """Where a message is to land that comes now.

        Args:
            bucket: Not used any more, if the message is staged in it, until :meth:`end`.
        """
        nbytes = self.sizes[message]
        # Forward has the newer value there, and trains with it: the source's goes beside it until the optimizer may
        # step.
        if self._rewrite is not None and self._is_written(message):
            aside = self._rewrite.take_aside(message)
            return Landing(message, Target(memory_at(aside.data_ptr(), nbytes)), aside=aside)
        held = self._landing.placement.held(message)
        if held is None:
            staged = self._take(message, bucket)
            return Landing(message, Target(memory_at(staged.data_ptr(), nbytes)), staged=staged, bucket=bucket)
        # Into the template itself, and not by way of a copy: so it is torn from the first byte on, before any digest is
        # known. What makes that safe is the guard, and shadow= for those who would rather pay.
        self._note_torn(message)
        provide = partial(self._landing.provide, message) if self._landing.has_pages else None
        return Landing(message, Target(held.view, held, provide))

    def end(self, landing: Landing, digest: int | None) -> bool:
        """A message is there, with this digest, None if it came damaged; gives whether it is sound."""
        message, nbytes, staged = landing.message, len(landing.target.view), landing.staged
        if digest is None:
            return False
        if staged is not None and landing.bucket is not None:
            # Only now: what has come damaged into a bucket has torn nothing.
            self._note_torn(message)
            self._landing.placement.scatter(message, staged)
            landing.bucket.lend(self.streams.begun())
            if self._rewrite is not None and self._rewrite.taken(message) is staged:
                self._rewrite.keep(message, staged)
            elif self.relay is not None and not self.relay.keep(message, staged) and self.streams.cross:
                self.relay.keep_on_its_way(message, landing.bucket)
        if landing.aside is not None and self._rewrite is not None:
            self._rewrite.keep(message, landing.aside)
        with self._lock:
            if message not in self._counted:
                self._counted.add(message)
                self._report.peers[0].nbytes += nbytes
                self._report.nbytes_staged += nbytes if staged is not None else 0
        # Last: from now on it is passed on.
        self.pending.landed(message, digest)
        return True

    def _is_written(self, message: int) -> bool:
        """Whether forward has written where a large message lands, which so must land aside."""
        return self._rewrite is not None and self._rewrite.is_written(message)

    def named(self, error: LocalProtocolError) -> LocalProtocolError:
        """The error with the paths, if memory of the template was taken away."""
        try:
            self._landing.check()
        except LocalProtocolError as exc:
            return exc
        return error

    def _take(self, message: int, bucket: Bucket) -> torch.Tensor:
        taken = self._rewrite.take(message) if self._rewrite is not None and self._layout.is_small(message) else None
        if taken is None:
            bucket.reset(aligned(self.sizes[message]))
            taken = bucket.take(self.sizes[message])
        return taken

    def _note_torn(self, message: int) -> None:
        """A message is about to be written to where it belongs."""
        if not self._report.torn and self._landing.touches_template(message):
            self._report.torn = True

    def note_damage(self, message: int) -> None:
        """A message came damaged.

        Raises:
            RemoteProtocolError: It always does.
        """
        with self._lock:
            self._report.num_repaired += 1
        times = self.pending.damaged(message)
        logger.warning("message %d came damaged and is fetched again", message)
        if times >= _MAX_DAMAGED:
            raise Incurable(
                f"message {message} of {len(self.sizes)} differs from what the source sent, {times} times: "
                "damaged on the way, or changed at the source while it was sent"
            )

    def keep(self, message: int) -> None:
        """A message was here already, as :meth:`claim` has said."""
        with self._lock:
            self._counted.add(message)
            self._report.nbytes_kept += self.sizes[message]
        if self._rewrite is not None and (taken := self._rewrite.taken(message)) is not None:
            self._rewrite.keep(message, taken)
        # With the digest that was taken here; that the supplier has the same is what SAME says.
        self.pending.landed(message, self._claimed[message])
