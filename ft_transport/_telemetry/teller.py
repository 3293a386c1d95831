"""Calls code that is not ours (callbacks, log handlers, exporters) where it may take its time.

Strategy: whoever serves transfers leaves its calls here and goes on. They are made one after the other, each once, by a
thread that lives as long as there are some.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable

from ft_transport._deadline import Deadline

__all__ = ["Teller"]

logger = logging.getLogger("ft_transport")

# In place of a thread's number, until it runs.
_NOBODY_YET = -1


class Teller:
    """Makes calls in the order in which they were left. Any thread may leave one; a call may leave others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._caller = 0  # the thread that makes calls now, 0 for none
        self._thread: threading.Thread | None = None  # the newest of our own

    def leave(self, call: Callable[[], None]) -> None:
        """Let it be called soon, in another thread. Does not block."""
        with self._changed:
            self._calls.append(call)
            self._begin()

    def call(self, call: Callable[[], None]) -> None:
        """Call it here and now; if others wait to be called, let it be called after them instead, in another thread."""
        with self._changed:
            self._calls.append(call)
            # Whoever may call here does, so that what a caller is told of its own transfer has been told when the call
            # returns. But never before what was left earlier.
            is_next = not self._caller and len(self._calls) == 1
            if not is_next:
                self._begin()
                return
            self._caller = threading.get_ident()
        self._make_calls(is_caller=True)

    def drain(self, limit: Deadline) -> bool:
        """Wait until all were called, or the limit has passed; gives whether they were. From a call itself: at once."""
        own = threading.get_ident()
        with self._changed:
            if self._caller == own:
                return False
            self._begin()
            if not self._caller and self._calls:
                self._caller = own  # no thread is to be had: here, then
        if self._caller == own:
            self._make_calls(is_caller=True)
        with self._changed:
            # Python's locks take no longer time-out: they raise OverflowError.
            seconds = min(limit.remaining().total_seconds(), threading.TIMEOUT_MAX)
            idle = self._changed.wait_for(lambda: not self._caller and not self._calls, seconds)
            thread = self._thread
        if idle and thread is not None and thread.ident is not None:
            thread.join()  # it has nothing left to do
        return idle

    def _begin(self) -> None:
        """Have a thread if there is something to call and none. The lock is held."""
        if self._caller or not self._calls:
            return
        thread = threading.Thread(target=self._run, name="ft_transport-telling", daemon=True)
        # Before it runs, so that nobody begins a second one.
        self._caller = _NOBODY_YET
        try:
            thread.start()
            self._thread = thread
        except RuntimeError:  # no more threads are to be had: later, then
            self._caller = 0
        except BaseException:  # Ctrl-C; it may run all the same
            self._caller = 0
            raise

    def _run(self) -> None:
        with self._changed:
            # Ctrl-C came while this thread was being started, and somebody else makes the calls now.
            if self._caller not in (0, _NOBODY_YET):
                return
            self._caller = threading.get_ident()
        self._make_calls(is_caller=False)

    def _make_calls(self, is_caller: bool) -> None:
        try:
            while True:
                with self._changed:
                    if not self._calls:
                        return
                    # Out of the list first: a call that raises is not made again.
                    call = self._calls.popleft()
                try:
                    call()
                except BaseException as exc:
                    # In a thread of its own there is nobody to raise it to.
                    if is_caller and not isinstance(exc, Exception):
                        raise  # Ctrl-C
                    with contextlib.suppress(Exception):  # a filter or handler of the user's
                        logger.exception("what was told something raised")
        finally:
            with self._changed:
                self._caller = 0
                self._begin()  # if there is something left, Ctrl-C has come
                self._changed.notify_all()
