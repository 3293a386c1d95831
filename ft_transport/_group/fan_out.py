"""What both sides of a transfer share: the caller's choices, and how a transfer ends.

``_group.source`` and ``_group.destination`` drive it: describe, lay out, agree, move, verify, rebuild.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ft_transport._group.channel import Channel
from ft_transport._group.control import Control
from ft_transport._telemetry.events import EventCallback
from ft_transport._telemetry.report import Copies, OnMismatch, PeerReport, Progress, ProgressCallback
from ft_transport._threads import Crew
from ft_transport._wire.digest import NUM_SAMPLES
from ft_transport._wire.layout import Limits
from ft_transport.errors import PeerFailure, TransferTimeout, reason_of

__all__ = ["NUM_BUCKETS", "Options", "end_badly", "for_each", "tell_progress"]

logger = logging.getLogger("ft_transport")

# Buckets on each side for each peer. While one moves, the other is filled or emptied.
NUM_BUCKETS = 2

# On an accelerator's group the operations of a pair run in the order in which they are posted, so both sides must
# post them alike: with no more flights than buckets, neither ever has to wait for a bucket out of turn.
_ACCELERATOR_LIMITS = Limits(window=NUM_BUCKETS)

# Gloo keeps a core busy on each side. With fewer cores than this the digests would take from it.
_CORES_TO_SPARE = 4


@dataclass(frozen=True)
class Options:
    """What the caller may choose about a transfer.

    Attributes:
        device: Where messages live that the channel moves.
        verify: Whether the source sends digests of its messages: True of every byte, False none, None of every byte
            where there are cores to spare for it, else of a sample of large messages.
        strict: Whether missing and unused template leaves are an error.
        progress: Called after each flight, from the thread that serves the peer.
        shadow: As a destination, receive beside the template, and copy into it once everything agrees.
        on_event: Called with the event of each transfer that is over.
        on_mismatch: As a destination, what becomes of a leaf that does not fit the template's.
        copies: What is known of the callback that gives the template; None: that it gives no copies.
        shared: Whether the group moves all that it is given into shared memory.
    """

    device: torch.device
    verify: bool | None = None
    strict: bool = False
    progress: ProgressCallback | None = None
    shadow: bool = False
    on_event: EventCallback | None = None
    on_mismatch: OnMismatch = "fresh"
    copies: Copies | None = None
    shared: bool = False

    def limits(self, nbytes: int) -> Limits:
        """How this side cuts the messages of a state of ``nbytes`` when it is the source."""
        return Limits() if self.device.type == "cpu" else _ACCELERATOR_LIMITS

    @property
    def digest(self) -> str:
        """Which digest this side sends when it is the source, empty for none."""
        if self.verify is False:
            return ""
        return "xxh3" if self.device.type == "cpu" else "sum"

    @property
    def sample(self) -> int:
        """Which block of large messages the digests read, another one for each transfer; -1 for all."""
        spare = self.digest != "xxh3" or len(os.sched_getaffinity(0)) >= _CORES_TO_SPARE
        return -1 if self.verify or spare else random.randrange(NUM_SAMPLES)


def end_badly(control: Control, peer: PeerReport, exc: BaseException) -> None:
    """Note how a transfer ended, tell the peer where it still listens, leave nothing that could touch memory."""
    peer.reason = reason_of(exc)
    if isinstance(exc, TransferTimeout):
        peer.outcome = "timed out"
    elif control.peer_gave_up:
        peer.outcome = "failed"
        if peer.phase == "move":
            control.await_closure()
    elif isinstance(exc, PeerFailure):
        peer.outcome = "failed" if control.channel.broken else "dead"
    elif control.refused:
        peer.outcome = "refused"
    elif control.gave_up:
        peer.outcome = "failed"
    elif peer.phase == "rebuild":
        peer.outcome = "failed"  # the source has its DONE and listens no more
    else:
        peer.outcome = "failed"
        control.last_words(peer.reason)


def tell_progress(callback: ProgressCallback | None, progress: Progress) -> None:
    """Call the user's callback; what it raises does not end the transfer."""
    if callback is None:
        return
    try:
        callback(progress)
    except Exception:
        logger.exception("the progress callback raised; the transfer goes on")


def for_each(channels: Sequence[Channel], run: Callable[[int], None]) -> list[BaseException | None]:
    """Run ``run(index)`` for every channel at once, each in its own thread; gives what each raised.

    A single channel is served in the caller's thread. The threads work on the caller's device and stream.
    """
    errors: list[BaseException | None] = [None] * len(channels)

    def guarded(index: int, stream: torch.Stream | None = None) -> None:
        try:
            if stream is not None:
                torch.accelerator.set_stream(stream)
            run(index)
        except BaseException as exc:
            # A traceback kept here would keep the frames of this thread, and with them the group.
            errors[index] = exc.with_traceback(None)

    if len(channels) == 1:
        guarded(0)
        return errors
    stream = torch.accelerator.current_stream() if torch.accelerator.is_available() else None

    crew = Crew()
    try:
        for index, channel in enumerate(channels):
            crew.start(f"rank{channel.peer_rank}", guarded, index, stream)
        crew.attend()
    except BaseException:
        # Ctrl-C, or no more threads to be had: nothing may move once this call is over.
        for channel in channels:
            channel.abort()
        raise
    finally:
        crew.join()
    return errors
