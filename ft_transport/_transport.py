"""What is true of every torchft transport, whatever it moves over: of each call, and of what may be asked."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

from ft_transport._manager import calling_manager, goes_on_training, registered_state
from ft_transport._plan.rewrite import Rewrite
from ft_transport._plan.torn import Guard
from ft_transport._process import undisturbed
from ft_transport._telemetry.events import EventCallback, tell
from ft_transport._telemetry.report import TransferReport
from ft_transport._telemetry.teller import Teller
from ft_transport.errors import LocalProtocolError, TransferError
from ft_transport.state_digest import StateDigest, state_digest

__all__ = ["Asked", "Call"]

logger = logging.getLogger("ft_transport")


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
    _state_dict: Callable[[], object] | Literal["manager"] | None
    _captured: list[object]  # what capture_template() has found; empty without
    _manager: weakref.ref[Any] | None
    _rewrite: Rewrite | None
    _from_manager: bool

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
        self._rewrite = None

    def capture_template(self) -> None:
        """Take the template now, on the calling thread, and keep its tensors for all receives that follow.

        Without, the ``state_dict`` function is called in each receive, on torchft's quorum thread; with an asynchronous
        quorum that is under a running forward, which modules whose ``state_dict()`` moves their parameters (FSDP2,
        which reshards) do not bear. Call it on the thread that trains, when the model is built, and again when tensors
        have been replaced or added: after the optimizer's first step.

        Raises:
            ValueError: There is no ``state_dict`` function to call.
        After an error: what was captured before is kept.
        """
        self._captured = [self._call_state_dict(None)]

    def _template(self) -> Callable[[], object] | None:
        """What gives the template in a receive that is beginning."""
        if self._captured:
            (captured,) = self._captured
            return lambda: captured
        if self._state_dict is None:
            return None
        manager = calling_manager()
        return lambda: self._call_state_dict(manager)

    def _call_state_dict(self, manager: object) -> object:
        if self._state_dict is None:
            raise ValueError("state_dict: expected one, since the transport was given no function that gives it")
        if self._state_dict != "manager":
            return self._state_dict()
        if manager is None and self._manager is not None:
            manager = self._manager()
        return registered_state(manager)

    def state_digest(self, state_dict: object = None) -> StateDigest:
        """Fingerprint a state, to compare it with other replicas'; see ``ft_transport.state_digest``.

        Args:
            state_dict: None for what the function gives that the constructor got.
        """
        return state_digest(self._call_state_dict(None) if state_dict is None else state_dict)

    # ------------------------------------------------------------------- what the Manager's calls mean

    def _begin_quorum(self) -> None:
        """A Manager asks for the metadata: a new step begins. Somebody else may ask at any time, which means nothing.

        Who never had a Manager is taken at its word.
        """
        manager = calling_manager()
        if manager is not None:
            goes_on_training(manager)  # one that does not say must not get as far as a heal
            self._manager = weakref.ref(manager)
        if manager is not None or not self._from_manager:
            self._guard.begin_quorum()

    def _trains_meanwhile(self) -> bool:
        """Whether the training thread goes on during the receive that is beginning."""
        manager = calling_manager()
        self._from_manager = manager is not None
        return goes_on_training(manager)

    def _keep(self, rewrite: Rewrite | None) -> None:
        """Remember what has been received, until :meth:`_settle`."""
        self._rewrite = rewrite
        if rewrite is not None:
            rewrite.watch(self._settle)

    def _settle(self) -> None:
        """Make what was received the source's again, whatever forward has written. Never raises."""
        rewrite, self._rewrite = self._rewrite, None
        if rewrite is None:
            return
        try:
            with undisturbed():
                lost = rewrite.write()
        except Exception as exc:
            logger.exception("a received state could not be written again")
            lost = [f"an unknown part of the state ({exc})"]
        if lost:
            self._guard.lose(lost)


class Call:
    """Keeps a second call out, and torch's modes, completes the report, fills in the error, tells how it ended.

    Args:
        transport: Whose call it is.
        report: Of this call; ``last_report`` from now on.
        goes_on: What the call has begun goes on when it has returned: the report is completed by somebody else then.
        teller: Tells in the right order what is told from several threads; None where nothing is.
    """

    def __init__(
        self, transport: _Transport, report: TransferReport, *, goes_on: bool = False, teller: Teller | None = None
    ) -> None:
        self._busy = transport._busy
        self._report = report
        self._transport = transport
        self._goes_on = goes_on
        self._teller = teller
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
            told = partial(tell, self._report, self._transport._options.on_event)
            if self._teller is None:
                told()
            else:
                self._teller.call(told)


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
