"""Threads that work for one call, and are over when it is.

Strategy: the caller may be in the main thread, where Ctrl-C can come at any moment, also while it ends its threads. So
what ends them is begun again when it is interrupted. Each thread says itself that it is over, and none is joined
before: a join that Ctrl-C interrupts takes its thread for ended (CPython 3.11).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

__all__ = ["ThreadGroup", "Ticker", "periodically", "uninterrupted"]

# A thread that was being started when Ctrl-C came runs by then, or never will.
_BEGINNING = timedelta(seconds=1)


class ThreadGroup:
    """Some threads. Any thread may start one, and wait for all."""

    def __init__(self) -> None:
        # One condition for "it has begun" and "it is over": both are rare, and whoever waits looks again.
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._working: set[threading.Thread] = set()

    def start(self, name: str, run: Callable[..., None], *args: Any) -> None:
        """Run something in a thread of its own.

        Raises:
            RuntimeError: No more threads are to be had.
        """

        def work() -> None:
            with self._changed:
                self._changed.notify_all()
            try:
                run(*args)
            finally:
                with self._changed:
                    self._working.discard(thread)
                    self._changed.notify_all()

        # Daemons, so that an interpreter that ends is not held up by a peer that is slow. Calls join them all the same.
        thread = threading.Thread(target=work, name=f"ft_transport-{name}", daemon=True)
        with self._changed:
            # Before it begins: whoever waits for all must see it even if Ctrl-C comes within start().
            self._threads.append(thread)
            self._working.add(thread)
        try:
            thread.start()
        except RuntimeError:
            with self._changed:
                self._threads.remove(thread)
                self._working.discard(thread)
            raise
        except BaseException:
            with self._changed:
                self._changed.wait_for(lambda: thread.ident is not None, _BEGINNING.total_seconds())
            raise

    def attend(self) -> None:
        """Wait until all others are over, or Ctrl-C comes."""
        # A callback of the user's may run in one of them, and call what ends them all: it cannot wait for itself.
        own = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: all(thread.ident in (None, own) for thread in self._working))

    def join(self) -> None:
        """Wait until all others are over: one of them may call what waits for them, by way of a user's callback.

        Raises:
            KeyboardInterrupt: It came meanwhile. They are over.
        """
        uninterrupted(self.attend)
        for thread in self._threads:
            # None: its start was interrupted, and it has never run. join() would raise.
            if thread.ident not in (None, threading.get_ident()):
                thread.join()


def uninterrupted(end: Callable[[], None]) -> None:
    """Call what ends something; again, whenever Ctrl-C interrupts it.

    Raises:
        KeyboardInterrupt: It came meanwhile. What had to end has ended.
    """
    # Only KeyboardInterrupt: it comes from outside, at any instruction. Whatever else ends with an error ends for a
    # reason of its own.
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            end()
            break
        # The newest; they are all the same to who pressed the keys.
        except KeyboardInterrupt as exc:
            interrupt = exc
    if interrupt is not None:
        raise interrupt


class Ticker:
    """Calls something every so often while a block runs (``with``), any number of blocks, none within another.

    From one thread for all of them, which begins with the first and is over with :meth:`end`: to begin one takes as
    long as a scheduler likes where cores are busy. The call is made until it gives True; and where no thread is to be
    had, never.

    Args:
        call: What to call. No block is left while it is under way.
        interval: How often. The first time in a block may be sooner, and is no later.
        name: Of the thread.
    """

    def __init__(self, call: Callable[[], bool | None], interval: timedelta, name: str) -> None:
        self._call = call
        self._interval = interval
        self._name = name
        self._changed = threading.Condition()  # held while it calls
        self._within = self._over = False
        self._threads: ThreadGroup | None = None

    def __enter__(self) -> None:
        if self._threads is None:
            self._threads = ThreadGroup()
            with suppress(RuntimeError):
                self._threads.start(self._name, self._run)
        # Last: should Ctrl-C come while the thread begins, there is no block, and nobody to leave it.
        self._within = True

    def __exit__(self, *exc_info: object) -> None:
        uninterrupted(self._leave)

    def _leave(self) -> None:
        self._within = False
        with self._changed:
            pass

    def end(self) -> None:
        """End the thread; nothing is called any more when this returns. May be called twice."""
        uninterrupted(self._end)

    def _end(self) -> None:
        self._leave()
        # Set without the lock, which the thread holds while it calls: it is seen at the latest after that.
        self._over = True
        with self._changed:
            self._changed.notify_all()
        if self._threads is not None:
            self._threads.join()
        # It may be of whoever holds this, and both would stay until the collector comes. ``bool()`` does nothing.
        self._call = bool

    def _run(self) -> None:
        with self._changed:
            # A condition and no sleep, so that nobody waits for the interval when it is over.
            while not self._changed.wait_for(lambda: self._over, self._interval.total_seconds()):
                if self._within and self._call():
                    return


@contextmanager
def periodically(call: Callable[[], bool | None], interval: timedelta, name: str) -> Iterator[None]:
    """Call something every so often while the block runs, from a thread that has ended when this does.

    Until it gives True; and where no thread is to be had, never.
    """
    ticker = Ticker(call, interval, name)
    try:
        with ticker:
            yield
    finally:
        ticker.end()
