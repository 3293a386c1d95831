"""Whether the source would be quicker than the destination before this one in the chain.

Strategy: nobody knows what a link could carry, so it is tried: every now and then a few messages, which have to be
fetched anyway, are fetched from the source, and the speeds compared. In a chain that is well, the source's link is
taken by the first destination, and what is left of it is slower than what the one before passes on.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from ft_transport._deadline import MAX_WAIT, Deadline
from ft_transport._lanes.fetch import Fetcher

__all__ = ["PROBE_MESSAGES", "SourceProbe"]

# Messages that are fetched from the source in one probe.
# More than one lane has under way at once, so that the last ones come at the link's speed and not at that of its round
# trip.
PROBE_MESSAGES = 4
# How many times as fast the source has to be: turning to it takes some of its link from all others.
# With less, two destinations that are equally quick would change places for ever, each seeing the other's noise.
_TIMES_AS_FAST = 2


class SourceProbe:
    """Trials beside the lanes to the destination before this one.

    Args:
        lanes: The lanes to it.
        begin: Begins to fetch :data:`PROBE_MESSAGES` from the source.
        interval: How long it is left alone first; after each probe that changed nothing, twice as long.

    Attributes:
        nbytes_wire: All bytes of the probes so far.
        nbytes_direct: How many of them were read from the source's memory.
    """

    def __init__(self, lanes: Fetcher, begin: Callable[[], Fetcher], interval: timedelta) -> None:
        self.nbytes_wire = self.nbytes_direct = 0
        self._lanes = lanes
        self._begin = begin
        self._interval = min(interval, MAX_WAIT)
        self._running: Fetcher | None = None
        self._began = Deadline(interval)
        self._leave_alone()

    def _leave_alone(self) -> None:
        self._due, self._nbytes_before = Deadline(self._interval), self._lanes.nbytes
        # A link that is slow for good would be tried for ever, each time at the cost of all others.
        self._interval *= 2

    def look(self) -> bool:
        """Begin a probe if it is time; gives whether one has ended and the source is much quicker. Call it often."""
        if self._running is None:
            if self._due.expired():
                self._began, self._running = Deadline(self._interval), self._begin()
            return False
        # It ends by itself, once its messages are here: no time-out of its own, since slow is what it is to find out.
        if self._running.alive:
            return False
        before = (self._lanes.nbytes - self._nbytes_before) / self._due.elapsed()
        source = self._running.nbytes / self._began.elapsed()
        self.close()
        self._leave_alone()
        return source > _TIMES_AS_FAST * before

    def close(self) -> None:
        """End a probe that is under way. May be called twice."""
        running, self._running = self._running, None
        if running is not None:
            running.close()
            self.nbytes_wire += running.nbytes_wire
            self.nbytes_direct += running.nbytes_direct
