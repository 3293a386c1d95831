"""Fresh memory of a group's destination, provided before what lands there.

Strategy: a group reads from the wire in one thread, which would wait for one page after the other. So threads of our
own have the system provide them, in the order in which messages come. A flight whose memory is not there is not posted:
the group's thread would be at their heels, and have the system provide the same page twice.
"""

from __future__ import annotations

import os
import threading
from collections import deque

from ft_transport._deadline import Deadline
from ft_transport._plan.destination import DestinationPlan
from ft_transport._threads import ThreadGroup, uninterrupted
from ft_transport._wire.layout import Layout
from ft_transport.errors import TransferTimeout

__all__ = ["Ahead"]

# A system provides pages to as many processors as ask. With four it is quicker than most wires.
_MAX_THREADS = 4


class Ahead:
    """Threads that have the memory of flights provided, from :meth:`start` to :meth:`close`. For one thread.

    Args:
        layout: The flights.
        landing: Where they land.
    """

    def __init__(self, layout: Layout, landing: DestinationPlan) -> None:
        self._landing = landing
        flights = layout.flights if landing.has_pages else []
        self._left = [len(messages) for messages in flights]  # messages of each flight whose memory is not there
        self._todo = deque((flight, message) for flight, messages in enumerate(flights) for message in messages)
        self._end = 0
        self._changed = threading.Condition()
        self._crew = ThreadGroup()
        self._closing = False

    def start(self) -> None:
        """Begin, if any memory is fresh."""
        threads = min(_MAX_THREADS, len(os.sched_getaffinity(0))) if self._left else 0
        for number in range(threads):
            try:
                self._crew.start("pages", self._run)
            except RuntimeError:  # no more threads are to be had
                if number == 0:
                    # Whoever writes to the memory has it provided then, as without us.
                    self._left = []
                return

    def _run(self) -> None:
        while (next_one := self._take()) is not None:
            flight, message = next_one
            self._landing.provide(message, ahead=True)
            with self._changed:
                self._left[flight] -= 1
                if self._left[flight] == 0:
                    self._changed.notify_all()

    def _take(self) -> tuple[int, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or not self._todo or self._todo[0][0] < self._end)
            return self._todo.popleft() if self._todo and not self._closing else None

    def go_on(self, end: int) -> None:
        """Let the memory of all flights before this one be provided."""
        # No more than may be posted. What is provided long before bytes come may have been taken back by then.
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def is_there(self, flight: int) -> bool:
        """Whether the memory of a flight is there, or nobody sees to that."""
        return not self._left or self._left[flight] == 0

    def await_memory(self, flight: int, deadline: Deadline) -> None:
        """Wait until it is.

        Raises:
            TransferTimeout: The deadline passed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_there(flight), deadline.remaining().total_seconds()):
                raise TransferTimeout(f"timed out after {deadline.timeout.total_seconds():g} s")

    def close(self) -> None:
        """End. May be called twice."""
        uninterrupted(self._close)

    def _close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._crew.join()
