"""Opens lanes to one supplier.

Strategy: the first one is dialled by who waits for it, the others at the address that has answered, all at once and
each in a thread of its own: over a long way to dial takes as long as a small state. They are cancelled once nobody
needs them any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ft_transport._lanes.chain import Route
from ft_transport._lanes.growth import LaneCount
from ft_transport._lanes.protocol import LaneFrame, LaneProtocol, Role, encode
from ft_transport._lanes.session import Session
from ft_transport._net.connection import Wakeup
from ft_transport._net.dial import dial
from ft_transport._net.handshake_io import SslContexts
from ft_transport._net.stall import StallTimer

__all__ = ["Opening"]


class Opening:
    """How lanes to one supplier are opened.

    Args:
        route: To it.
        attempt: As in every header.
        step: As in every header.
        contexts: For TLS.
        timer: Gives each lane its own.

    Raises:
        OSError: No descriptor is to be had.

    Attributes:
        count: How many there are to be.
        num_begun: How many were dialled.
    """

    def __init__(
        self,
        route: Route,
        attempt: int,
        step: int,
        contexts: SslContexts | None,
        timer: Callable[[str], StallTimer],
    ) -> None:
        self.count = LaneCount(1, 0.0, is_local=False)
        self.num_begun = 0
        self._route = route
        self._ids = (attempt, step)
        self._contexts = contexts
        self._new_timer = timer
        self._under_way: set[StallTimer] = set()
        # Not the one that lanes ring: whoever reads that may be long in a callback of the user's.
        self._cancelled = Wakeup()

    def decide(self, chosen: int | Literal["auto"], first: Session, lane_bytes: int) -> None:
        """How many there are to be, now that there is one. Arguments as of ``LaneCount``."""
        path = first.connection
        self.count = LaneCount(chosen, path.round_trip, is_local=path.is_local, lane_bytes=lane_bytes)

    def begin(self) -> StallTimer:
        """Note that one is to be opened; gives its timer."""
        self.num_begun += 1
        timer = self._new_timer(self._route.label)
        self._under_way.add(timer)
        return timer

    def dial(self, timer: StallTimer) -> Session:
        """Open one. Any thread; raises as :func:`dial`."""
        endpoint, ident, _ = route = self._route
        first = encode(LaneFrame.ATTACH, *self._ids, body=[ident])
        try:
            connection = dial(endpoint, first, timer, self._contexts, route.label, self._cancelled)
        except BaseException:
            self.end(timer)
            raise
        # What has answered once is all that is tried from now on: the others may swallow what is sent to them.
        self._route = route._replace(endpoint=endpoint._replace(addresses=(connection.address,)))
        protocol = LaneProtocol(Role.DESTINATION, *self._ids)
        protocol.sent(LaneFrame.ATTACH)
        return Session(connection, protocol)

    def end(self, timer: StallTimer) -> None:
        """Note that it is open, or will not be. Any thread."""
        self._under_way.discard(timer)

    @property
    def is_under_way(self) -> bool:
        """Whether one may yet be opened."""
        return bool(self._under_way)

    def cancel(self) -> None:
        """Let those who dial give up at once."""
        for timer in list(self._under_way):
            timer.cancel("the transfer is over")
        self._cancelled.wake()

    def close(self) -> None:
        """Nobody dials any more. May be called twice."""
        self._cancelled.close()
