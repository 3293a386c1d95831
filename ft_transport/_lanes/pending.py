"""Which messages are still to be fetched. No I/O.

Strategy: one queue for all lanes, from which each takes the next message when it has room: so a quick lane takes more
than a slow one, and what a broken lane owed is the others' next. What is here is known by its digest, which is what a
relay passes on and a later receive resumes from.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from datetime import timedelta

__all__ = ["PendingMessages"]


class PendingMessages:
    """The messages of one receive. Shared by its lanes, and by whoever passes on what has landed.

    Args:
        num_messages: All of them, in the order in which they are fetched.

    Attributes:
        digests: Of the messages that are here and sound.
    """

    def __init__(self, num_messages: int) -> None:
        self.digests: dict[int, int] = {}
        self._num_messages = num_messages
        # In the layout's order: whoever is behind in the chain asks in the same, and so finds what it asks for.
        self._todo = deque(range(num_messages))
        self._damaged: Counter[int] = Counter()
        self._changed = threading.Condition()

    @property
    def complete(self) -> bool:
        """Whether every message is here and sound."""
        return len(self.digests) == self._num_messages

    @property
    def num_todo(self) -> int:
        """How many are still to be asked for."""
        return len(self._todo)

    def take(self, stopped: Callable[[], bool], *, block: bool, leave: int = 0) -> int | None:
        """A message to ask for.

        Args:
            stopped: Whether to give up waiting; looked at when :meth:`wake` is called.
            block: Wait until there is one.
            leave: None of the last ones.

        Returns:
            None if there is none; with ``block``, if there will be none any more.
        """
        with self._changed:
            if block:
                self._changed.wait_for(lambda: self._todo or self.complete or stopped())
            # One message at a time, a few microseconds each: to share them out beforehand would give a slow lane as
            # many as a quick one.
            return self._todo.popleft() if len(self._todo) > leave and not stopped() else None

    def take_next(self, message: int) -> bool:
        """Take this message, if it is the next one to be asked for; gives whether it was."""
        with self._changed:
            if not self._todo or self._todo[0] != message:
                return False
            self._todo.popleft()
            return True

    def wake(self) -> None:
        """Let those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    def give_back(self, messages: Iterable[int]) -> None:
        """These were asked for and will not come."""
        with self._changed:
            # To the front: they are the oldest, and others may be waiting for them.
            self._todo.extendleft(reversed(list(messages)))
            self._changed.notify_all()

    def landed(self, message: int, digest: int) -> None:
        """This one is here and sound."""
        with self._changed:
            self.digests[message] = digest
            self._changed.notify_all()

    def damaged(self, message: int) -> int:
        """This one came damaged and is to be fetched again; gives how often it has by now."""
        with self._changed:
            self._damaged[message] += 1
            self._todo.appendleft(message)
            self._changed.notify_all()
            return self._damaged[message]

    def again(self, messages: Iterable[int]) -> None:
        """These were here, and are to be fetched once more."""
        with self._changed:
            for message in messages:
                # Those behind wait for it until it is here again: what the memory holds now is forward's.
                del self.digests[message]
                self._todo.append(message)
            self._changed.notify_all()

    def was_damaged(self, message: int) -> bool:
        """Whether this one came damaged before."""
        return self._damaged[message] > 0

    def forgive(self) -> None:
        """Count damage anew: somebody else supplies from now on."""
        with self._changed:
            self._damaged.clear()

    def await_message(self, message: int, limit: timedelta) -> bool:
        """Wait for a message to be here; gives whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: message in self.digests, limit.total_seconds())
