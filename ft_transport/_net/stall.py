"""How long a call may go on: until its deadline, or until a peer has been silent for too long.

Strategy: TCP tells nothing of a peer whose machine has lost its power or its network, for minutes. So whoever has
nothing to say says so, every quarter of a second, and silence that lasts is a failure long before the deadline.
"""

from __future__ import annotations

from datetime import timedelta

from ft_transport._deadline import Deadline
from ft_transport.errors import PeerFailure, TransferTimeout

__all__ = ["HEARTBEAT", "StallTimer", "PeerStalled"]

# How often whoever has nothing to say says so, and how long a kernel call lasts at most before it is made again. It
# bounds how late a cancelled thread ends, too. Four of it are one second, below which a pause of the interpreter would
# pass for a failure. TCP's own keepalive would be no help: it begins after two hours (RFC 1122, 4.2.3.6).
HEARTBEAT = timedelta(milliseconds=250)


class PeerStalled(PeerFailure):
    """The peer is there, as far as the network knows, and nothing has come from it for too long."""

    _outcome = "timed out"


class StallTimer:
    """How long a call may go on.

    Args:
        deadline: It ends then, whatever happens.
        stall: It ends when nothing has moved for so long; None for as long as you like.
        peer: Who is silent then, for the message.
    """

    def __init__(self, deadline: Deadline, stall: timedelta | None = None, peer: str = "the peer") -> None:
        self.deadline = deadline
        self._peer = peer
        self._silent = Deadline(stall) if stall is not None else None
        self._cancelled = ""

    def progressed(self) -> None:
        """Something has: the silence is over, and begins anew."""
        if self._silent is not None:
            self._silent.restart()

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return bool(self._cancelled)

    def cancel(self, reason: str) -> None:
        """Let the next :meth:`check` raise. Any thread."""
        self._cancelled = reason

    def check(self) -> None:
        """Go on, or not.

        Raises:
            TransferTimeout: The deadline has passed.
            PeerStalled: Nothing has moved for too long.
            PeerFailure: It is cancelled.
        """
        # The deadline first: who is late and silent is late, which is what the caller has set and what the error's name
        # promises. Silence last: the reason that somebody gave for cancelling says more.
        if self.deadline.expired():
            raise TransferTimeout(f"timed out after {self.deadline.timeout.total_seconds():g} s")
        if self._cancelled:
            raise PeerFailure(self._cancelled)
        if self._silent is not None and self._silent.expired():
            raise PeerStalled(f"{self._peer} has been silent for {self._silent.timeout.total_seconds():g} s")
