"""What is true of every torchft transport, whatever it moves over: of each call, and of what may be asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from ft_transport._memory import undisturbed
from ft_transport._torn import Guard
from ft_transport.divergence import StateDigest, state_digest
from ft_transport.errors import LocalProtocolError, TransferError
from ft_transport.events import EventCallback, tell
from ft_transport.report import TransferReport

__all__ = ["Asked", "Call"]


class _Options(Protocol):
    @property
    def on_event(self) -> EventCallback | None: ...


class _Transport(Protocol):
    _busy: threading.Lock
    _guard: Guard
    _last_report: TransferReport | None

    @property
    def _options(self) -> _Options: ...


class Asked:
    """What an application may ask a torchft transport about its state, or tell it."""

    _guard: Guard
    _state_dict: Callable[[], object] | None

    @property
    def torn(self) -> bool:
        """Whether the template holds a mix of two states: from the first byte that lands in it until all agree.

        A failed receive leaves it so; the next complete one heals it. Do not use the state while it is torn: save no
        checkpoint of it. May be read from any thread.
        """
        return self._guard.torn

    def restored(self) -> None:
        """Say that the whole template holds one state again, which came from elsewhere: a durable checkpoint.

        Raises:
            LocalProtocolError: A receive is under way.
        """
        self._guard.restored()

    def state_digest(self, state_dict: object = None) -> StateDigest:
        """Fingerprint a state, to compare it with other replicas'; see ``ft_transport.state_digest``.

        Args:
            state_dict: None for what the function gives that the constructor got.
        """
        if state_dict is None:
            if self._state_dict is None:
                raise ValueError("state_dict: expected one, since the transport was given no function that gives it")
            state_dict = self._state_dict()
        return state_digest(state_dict)


class Call:
    """Keeps a second call out, and torch's modes, completes the report, fills in the error, tells how it ended.

    Args:
        transport: Whose call it is.
        report: Of this call; ``last_report`` from now on.
        goes_on: What the call has begun goes on when it has returned: the report is completed by somebody else then.
    """

    def __init__(self, transport: _Transport, report: TransferReport, *, goes_on: bool = False) -> None:
        self._busy = transport._busy
        self._report = report
        self._transport = transport
        self._goes_on = goes_on
        self._start = 0.0

    def __enter__(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise LocalProtocolError("a transfer is under way on this transport; one at a time")
        self._modes = undisturbed()
        self._modes.__enter__()
        self._transport._last_report = self._report
        self._start = time.perf_counter()

    def __exit__(self, cls: type | None, exc: BaseException | None, traceback: object) -> None:
        self._modes.__exit__(None, None, None)
        self._busy.release()
        report = self._report
        if isinstance(exc, Exception) and not isinstance(exc, TransferError):
            wrapped = LocalProtocolError(f"{cls.__name__ if cls else ''}: {exc}")
            _fill_in(wrapped, report, self._transport._guard)
            self._finish(wrapped)
            raise wrapped from exc
        if isinstance(exc, TransferError):
            _fill_in(exc, report, self._transport._guard)
        if exc is not None or not self._goes_on:
            self._finish(exc)

    def _finish(self, exc: BaseException | None) -> None:
        if self._report.finish(time.perf_counter() - self._start, exc):
            tell(self._report, self._transport._options.on_event)


def _fill_in(error: TransferError, report: TransferReport, guard: Guard) -> None:
    """Say where in the transfer an error happened, as far as the one who raised it did not."""
    if error.step is None:
        error.step = report.step
    worst = next((peer for peer in report.peers if peer.outcome != "complete"), None)
    if worst is not None:
        error.phase = error.phase or worst.phase
        if error.peer_rank is None:
            error.peer_rank = worst.rank
        error.nbytes_done = worst.nbytes
    error.nbytes_total = report.nbytes_total
    error.torn = guard.torn
