"""What is true of every transport, whatever it moves over: one call at a time, and what holds when it is over.

Strategy: a call has one frame, :meth:`TransportBase._transfer`, and whatever comes out of it has gone through there. So
each error is one of ours and says where it happened, each report is complete, each transfer is told of exactly once,
and none of that is written twice. Not here: how a state moves, and what torchft's Manager means by its calls
(``_torchft/managed.py``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from numbers import Integral

from ft_transport._deadline import Deadline
from ft_transport._options import Options
from ft_transport._plan.torn import TornGuard
from ft_transport._process import NoCollection, undisturbed
from ft_transport._telemetry.events import publish
from ft_transport._telemetry.progress import watching
from ft_transport._telemetry.report import TransferReport
from ft_transport.errors import LocalProtocolError, TransferError

__all__ = ["TransportBase", "check_duration", "check_ranks", "check_step"]


class TransportBase:
    """A transport whose calls move states.

    Args:
        options: The caller's choices.
        state_dict: Gives the template, None for fresh states.
        timeout: Upper bound of each transfer as a whole.

    Raises:
        TypeError: A time-out or ``state_dict`` is of another type.
        ValueError: An argument is out of range.
    """

    def __init__(self, options: Options, state_dict: Callable[[], object] | None, timeout: timedelta) -> None:
        # Checked once, here, where the caller's own line is in the traceback; not in a transfer, whose errors become a
        # failed step.
        check_duration("timeout", timeout)
        if options.strict and state_dict is None:
            raise ValueError("strict: expected False without state_dict, which gives the template")
        if options.on_mismatch not in ("fresh", "refuse") and not callable(options.on_mismatch):
            raise ValueError(f"on_mismatch: expected 'fresh', 'refuse' or a function, got {options.on_mismatch!r}")
        self._options = options
        self._state_dict = state_dict
        self._timeout = timeout
        # Not reentrant: a callback of a transfer that begins another one on the same transport is told so, and does not
        # find the first one's state half changed.
        self._busy = threading.Lock()
        self._guard = TornGuard()
        self._last_report: TransferReport | None = None

    @property
    def last_report(self) -> TransferReport | None:
        """The report of the newest transfer, None before the first.

        Complete once that call is over; that of a source over lanes, which serves when the call has returned, once
        ``disallow_checkpoint`` has returned.
        """
        return self._last_report

    @property
    def torn(self) -> bool:
        """Whether the template holds a mix of two states: from the first byte that lands in it until all agree.

        A failed receive leaves it so; the next complete one heals it. Do not use the state while it is torn: save no
        checkpoint of it. May be read from any thread.
        """
        return self._guard.torn

    @contextmanager
    def _transfer(self, report: TransferReport, *, goes_on: bool = False) -> Iterator[None]:
        """One call: keeps a second one out, and torch's modes; completes the report, fills in the error, tells.

        Args:
            report: Of this call; ``last_report`` from now on.
            goes_on: What the call begins goes on when it has returned: whoever ends it completes the report, unless
                the call raises.

        Raises:
            LocalProtocolError: Another call is under way, of which nothing changes; or in the place of an error that is
                none of ours.
        """
        # Not waited for: the other call may take its whole time-out, and this one's deadline would be over by then.
        if not self._busy.acquire(blocking=False):
            raise LocalProtocolError("a transfer is under way on this transport; one at a time")
        start = time.perf_counter()
        try:
            try:
                # What goes on sees to the collector itself, also while this call waits for its end.
                with nullcontext() if goes_on else self._no_collection_at_first(), undisturbed():
                    # Also of a call that fails at once: what it says is why.
                    self._last_report = report
                    yield
            finally:
                # Before anybody is told: a callback may begin the next transfer.
                self._busy.release()
        except TransferError as exc:
            self._end(report, start, exc)
            raise
        except Exception as exc:
            # No local name for the new error: its traceback would hold this frame, and the frame the error, and both
            # all that the call has used, until the collector comes.
            raise self._end(report, start, LocalProtocolError(f"{type(exc).__name__}: {exc}")) from exc
        except BaseException as exc:  # Ctrl-C is told of as it is, and goes on its way
            self._finish(report, start, exc)
            raise
        if not goes_on:
            self._finish(report, start, None)

    @contextmanager
    def _no_collection_at_first(self) -> Iterator[None]:
        """Hold back the collector while the block runs; in one that lasts, see :meth:`_watching`."""
        self._held_back = held_back = NoCollection()
        try:
            yield
        finally:
            held_back.end()

    def _watching(self, report: TransferReport, deadline: Deadline) -> AbstractContextManager[None]:
        """Say now and then how far a call is, and let the collector come again in one that lasts."""
        return watching(report, deadline, self._held_back.end)

    def _end(self, report: TransferReport, start: float, error: TransferError) -> TransferError:
        _fill_in(error, report)
        # As it is when everything is over; whoever raised could not know yet.
        error.torn = self._guard.torn
        self._finish(report, start, error)
        return error

    def _finish(self, report: TransferReport, start: float, error: BaseException | None) -> None:
        if report.finish(time.perf_counter() - start, error):
            self._publish(report)

    def _publish(self, report: TransferReport) -> None:
        """Tell how a transfer ended; never raises."""
        publish(report, self._options.on_event)

    def _limit(self, timeout: timedelta | None) -> Deadline:
        """The deadline of a call that begins now; None for the constructor's."""
        return Deadline(self._timeout if timeout is None else min(timeout, self._timeout))


def check_duration(name: str, value: timedelta) -> None:
    """Raises ValueError for an argument that is no time at all, TypeError for what is none."""
    if not isinstance(value, timedelta):
        raise TypeError(f"{name}: expected a datetime.timedelta, got {type(value).__name__}")
    if value <= timedelta(0):
        raise ValueError(f"{name}: expected more than 0 s, got {value.total_seconds():g} s")


def check_ranks(ranks: Sequence[int], size: int | None = None, own: int | None = None) -> None:
    """Check the ranks of peers, before anything is posted: Gloo's answer to one that is out of range is a SIGSEGV.

    Args:
        ranks: Those.
        size: Number of ranks of the group; None where there is none.
        own: This side's rank; None where it is not known.

    Raises:
        LocalProtocolError: One cannot be a peer's, or is there twice: two threads would serve it on one channel.
    """
    for rank in ranks:
        if not isinstance(rank, Integral):
            raise LocalProtocolError(f"rank {rank!r}: expected an int, got {type(rank).__name__}")
        if size is not None and not 0 <= rank < size:
            raise LocalProtocolError(f"rank {rank}: expected 0 to {size - 1}, the ranks of the group", peer_rank=rank)
        if rank == own:
            raise LocalProtocolError(f"rank {rank}: expected another rank than this side's own", peer_rank=rank)
    if len(set(ranks)) != len(ranks):
        raise LocalProtocolError(f"ranks {ranks}: expected each once")


def check_step(step: int) -> None:
    """Raises LocalProtocolError for what is no step: it is compared, and crosses as a number of 64 bits."""
    if not isinstance(step, Integral) or not 0 <= step < 1 << 63:
        raise LocalProtocolError(f"step: expected an int of 0 or more, got {step!r}")


def _fill_in(error: TransferError, report: TransferReport) -> None:
    """Say where in the transfer an error happened, as far as the one who raised it did not."""
    if error.step is None:
        error.step = report.step
    # With several destinations the one that it names, else the first that was not served; the report has all.
    worst = next((peer for peer in report.peers if peer.rank == error.peer_rank), None) or next(
        (peer for peer in report.peers if peer.outcome != "complete"), None
    )
    if worst is not None:
        # Whoever raised knows better, if it said.
        error.phase = error.phase or worst.phase
        if error.peer_rank is None:
            error.peer_rank = worst.rank
        error.nbytes_done = worst.nbytes
    error.nbytes_total = report.nbytes_total
