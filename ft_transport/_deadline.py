"""How much time is left. The only reader of the clock that decides anything.

One :class:`Deadline` is made at the entry of each public call; every wait inside takes what is left of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

# A wait of less than 1 ms means the *group's* own time-out to gloo (60 s or more), so nothing may be shorter.
MIN_WAIT = timedelta(milliseconds=1)
# Nor longer: a poll counts milliseconds in 32 bits, gloo nanoseconds in 64, and locks refuse more than they can count.
MAX_WAIT = timedelta(days=20)
# Between two looks: at first what a short copy takes, then more, up to what nobody feels.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 500e-6


class Deadline:
    """A point in monotonic time that one call must not outlast.

    Args:
        timeout: Budget from now on. Zero or less is already past; more than :data:`MAX_WAIT` counts as that.
    """

    __slots__ = ("_begin", "_budget", "_end", "_timeout")

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._budget = min(timeout, MAX_WAIT).total_seconds()
        self.restart()

    def restart(self) -> None:
        """Let the budget begin anew, from now on."""
        self._begin = time.monotonic()
        self._end = self._begin + self._budget

    @property
    def timeout(self) -> timedelta:
        """The budget that this deadline was made with."""
        return self._timeout

    def remaining(self) -> timedelta:
        """Time left, never less than 1 ms."""
        return max(timedelta(seconds=self._end - time.monotonic()), MIN_WAIT)

    def expired(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self._end

    def elapsed(self) -> float:
        """Seconds since the deadline was made."""
        return time.monotonic() - self._begin

    def poll(self, is_over: Callable[[], bool]) -> bool:
        """Look again and again whether something is over, as long as there is time; gives whether it is."""
        pause = _FIRST_PAUSE_S
        while not is_over():
            if self.expired():
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        return True

    def expire(self) -> None:
        """Let it have passed. Any thread."""
        self._end = min(self._end, time.monotonic())


def processor_seconds() -> float:
    """Seconds for which the calling thread has had a processor."""
    return time.thread_time()
