"""Which destinations a source lets in, and when there is nobody left to wait for. No I/O.

Strategy: a source does not know which process will come for which rank, nor that one has died, only that one more says
HELLO. So it counts: as many places as destinations are expected, some to spare for those who are started again and come
anew before anybody has noticed that they were gone, and an end to how many may come at all. Whoever finds no place
waits, and asks again.

Not here: locks. Everything is called with the lock of the transfer held.
"""

from __future__ import annotations

from datetime import timedelta

from ft_transport._deadline import Deadline
from ft_transport._lanes.chain import DestinationState
from ft_transport._net.stall import HEARTBEAT
from ft_transport._telemetry.report import PeerReport, TransferReport

__all__ = ["Admission"]

# Destinations that are served at once beyond those that are expected: some are started again, and come anew while the
# source does not know yet that they were gone. Those who find no place wait for one. Each has a thread, and its lanes.
SPARE_DESTINATIONS = 16
# Conversations of one transfer beyond those that are expected, one after the other: each leaves a line in the report.
SPARE_CONVERSATIONS = 1024

# Who waits for a place asks again with each heartbeat; who has not for so long is gone.
_CROWDED = 4 * HEARTBEAT


class Admission:
    """Who may come, who is expected still, who is being served.

    Args:
        report: Has an entry for each destination that is expected; gets more as others come. Whether one is served is
            what its ``outcome`` says.
        step: Of the transfer.

    Attributes:
        is_over: Nobody is served any more, and nobody will be.
        is_closing: Whoever waits for a place is not waited for.
    """

    def __init__(self, report: TransferReport, step: int) -> None:
        self.is_over = False
        self.is_closing = False
        self._report = report
        self._step = step
        self._expected = list(report.peers)
        self._open = not report.peers  # to whoever comes
        self._known: dict[bytes, DestinationState] = {}
        # How many may still come, and be served at once.
        self._num_left = len(report.peers) + SPARE_CONVERSATIONS
        self._num_places = len(report.peers) + SPARE_DESTINATIONS
        self._crowded = Deadline(timedelta(0))  # until then somebody may be waiting for a place

    def refusal(self, identity: bytes, attempt: int, step: int) -> str | None:
        """Why a destination is never served by this transfer, None if it is, or waits."""
        if step > self._step:
            return None  # the next transfer may be for it
        if step < self._step:
            return f"expected step {step}, source has step {self._step}"
        earlier = self._known.get(identity)
        if earlier is not None and earlier.attempt > attempt:
            # TCP keeps the order of one connection, not of two: this one has been on its way for longer.
            return "a later attempt has come before"
        if not self._num_left:
            return "too many have come for this transfer"
        return None

    def has_place(self, identity: bytes, step: int) -> bool:
        """Whether a destination that was not refused can be served now.

        One that asks for a later step waits for the transfer that is for it, and one for which there is no place for
        one that is free. Who is served already takes its own place.
        """
        if step > self._step or self.is_over:
            return False
        # Dead ones count until their thread has noticed: they hold memory and lanes as long.
        served = [known for known, state in self._known.items() if state.peer.outcome == "pending"]
        if identity in served or len(served) < self._num_places:
            return True
        self._crowded = Deadline(_CROWDED)
        return False

    def admit(self, identity: bytes, attempt: int) -> DestinationState:
        """Give a destination its place, and a line in the report: a new one if it has been here before."""
        self._num_left -= 1
        earlier = self._known.get(identity)
        if earlier is not None:
            peer = PeerReport(earlier.peer.rank)
            # A list of its own, which replaces the other: whoever is looking at that one is not disturbed.
            self._report.peers = [peer if known is earlier.peer else known for known in self._report.peers]
        elif self._expected:
            peer = self._expected.pop(0)
        else:
            peer = PeerReport(-1)
            self._report.peers.append(peer)
        state = self._known[identity] = DestinationState(peer, attempt)
        return state

    @property
    def is_open(self) -> bool:
        """Whether nobody in particular is expected, and whoever comes is served."""
        return self._open

    @property
    def num_expected(self) -> int:
        """How many have not come."""
        return len(self._expected)

    def give_up(self, reason: str) -> None:
        """Who has not come is not waited for any more."""
        self._open = False
        while self._expected:
            peer = self._expected.pop()
            if peer.outcome == "pending":  # else the call has raised, and that is why it was not served
                peer.outcome, peer.reason = "timed out", reason

    def settle(self, *, is_late: bool) -> bool:
        """Note that the transfer is over, if nobody is expected or served any more; gives whether it just became so.

        Args:
            is_late: The deadline has passed: whoever waits for a place gets none.
        """
        if self.is_over or self._open or self._expected:
            return False
        if any(peer.outcome == "pending" for peer in self._report.peers):
            return False
        if not (self._crowded.expired() or is_late or self.is_closing):
            return False  # those who had the places are gone, and it is the turn of whoever waits
        self.is_over = True
        return True
