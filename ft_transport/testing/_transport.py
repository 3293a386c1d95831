"""A transport whose transfers have faults, to try out a whole job with."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

from ft_transport._group.channel import Channel
from ft_transport._telemetry.report import PHASES, PeerReport, Progress, TransferReport
from ft_transport.testing._channel import FaultyChannel
from ft_transport.testing._faults import Faults
from ft_transport.testing._proxy import FaultProxy

__all__ = ["FaultyTransport"]

logger = logging.getLogger("ft_transport")

T = TypeVar("T", bound="FaultyTransport")
G = TypeVar("G", bound=Faults)

# A process that kills itself may go on for a moment; it shall not get further than the fault.
_MOMENT = 0.05


def signal_self(number: signal.Signals) -> None:
    """Send this process a signal; the calling thread gets no further where it ends or stops the process."""
    if number == signal.SIGSTOP:
        # To this thread, which stops on its way out of the call, and all others then: of a signal to the process the
        # kernel may tell any thread, and on a busy machine 0.05 s may pass until that one runs.
        signal.pthread_kill(threading.get_ident(), number)
    else:
        # A handler of Python's runs in the main thread, whose sleep only a signal to the process ends.
        os.kill(os.getpid(), number)
        threading.Event().wait(_MOMENT)


@dataclass(frozen=True)
class _Strike:
    """What this process does to itself.

    Attributes:
        what: For the log.
        phase: In which it happens.
        share: Of the bytes that must have moved before; None for one left to chance.
        moving: Whether it waits for that share, and not for the phase to begin.
        act: Does it.
    """

    what: str
    phase: str
    share: float | None
    moving: bool
    act: Callable[[], None]


class _Strikes:
    """What a process does to itself in those of its transfers that are chosen.

    Args:
        on_fault: Called with a line of text before each.

    Attributes:
        planned: All, for each such transfer.
    """

    def __init__(self, on_fault: Callable[[str], None] | None) -> None:
        self.planned: list[_Strike] = []
        self._on_fault = on_fault
        self._due: list[_Strike] = []
        self._where = ""
        self._lock = threading.Lock()

    def begin(self, where: str, shares: Sequence[float]) -> None:
        """A transfer that is chosen begins; a strike without a share gets the one that was drawn for it."""
        self._where = where
        self._due = [
            dataclasses.replace(strike, share=drawn if strike.share is None else strike.share)
            for strike, drawn in zip(self.planned, shares, strict=True)
        ]

    def end(self) -> None:
        """It is over."""
        self._due = []

    def strike(self, wanted: Callable[[_Strike], bool]) -> None:
        """Carry out those that are due now."""
        with self._lock:
            # Taken off the list before it acts: what raises must not strike again while the error is on its way out.
            now = [strike for strike in self._due if wanted(strike)]
            self._due = [strike for strike in self._due if strike not in now]
            # The threads of other destinations get no further meanwhile.
            for strike in now:
                text = f"{self._where}: {strike.what} in {strike.phase}"
                logger.warning("fault: %s", text)
                if self._on_fault is not None:
                    self._on_fault(text)
                strike.act()


class FaultyTransport(Faults):
    """Passes every call on to a transport, some of whose transfers have the faults that it is given.

    ::

        transport = FaultyTransport(LaneTransport(...), at=3).die_in("move", share=0.5)
        manager = Manager(checkpoint_transport=transport, ...)

    What happens on the way (``drop_after``, ``corrupt``, …) happens to receives over lanes, where a
    :class:`FaultProxy` is put between, and to both sides over a process group, where a :class:`FaultyChannel` is. Wrap
    a transport several times for several faults at different times.

    Args:
        transport: A ``PGTransport`` or ``LaneTransport``.
        at: Which of its transfers have the faults, counted from 1; None for all.
        chance: With which probability these have them.
        role: Count and strike only where this side is the ``"source"`` or the ``"destination"``; None for both.
        seed: The same seed, the same faults.
        on_fault: Called with a line of text before this process does something to itself.

    All other attributes are the transport's. Threading: as the transport.
    """

    def __init__(
        self,
        transport: Any,
        *,
        at: int | None = None,
        chance: float = 1.0,
        role: Literal["source", "destination"] | None = None,
        seed: int = 0,
        on_fault: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(seed=seed)
        self.transport = transport
        self.num_transfers = 0
        self._chosen = at, chance, role
        self._strikes = _Strikes(on_fault)
        self._struck = False
        # Through wrappers around wrappers.
        self._inner = transport
        while isinstance(self._inner, FaultyTransport):
            self._inner = self._inner.transport
        self._theirs = self._inner._options
        self._inner._options = dataclasses.replace(self._theirs, on_progress=self._on_progress, on_phase=self._in_phase)
        if hasattr(self._inner, "_channel"):
            self._make_channel = self._inner._channel
            self._inner._channel = self._new_channel

    # -------------------------------------------------------------------------------------- vocabulary

    def die_in(self: T, phase: str, *, share: float | None = 0.0) -> T:
        """SIGKILL this process in a phase of the transfer.

        Args:
            phase: ``"describe"``, ``"agree"``, ``"move"``, ``"verify"`` or ``"rebuild"``. A source has no
                ``"rebuild"``, a destination no ``"describe"``, a source over lanes no ``"verify"``.
            share: In ``"move"``: when so much of the bytes has moved, as far as this side knows; 0 as soon as any has,
                None for a share that the seed draws. Other phases: at their begin.
        """
        return self.signal_in(phase, signal.SIGKILL, share=share)

    def freeze_in(self: T, phase: str, *, share: float | None = 0.0) -> T:
        """SIGSTOP this process in a phase; see :meth:`die_in`. It goes on when somebody sends it SIGCONT."""
        return self.signal_in(phase, signal.SIGSTOP, share=share)

    def signal_in(self: T, phase: str, number: signal.Signals, *, share: float | None = 0.0) -> T:
        """Send this process a signal in a phase; see :meth:`die_in`."""

        def act() -> None:
            signal_self(number)

        return self._strike(_Strike(number.name, phase, share, phase == "move", act))

    def raise_in(self: T, phase: str, error: BaseException) -> T:
        """Raise at the begin of a phase, as an error of this side's own would."""

        def act() -> None:
            raise error

        return self._strike(_Strike(f"raise {error!r}", phase, 0.0, False, act))

    def wait_in(self: T, phase: str, seconds: float, *, share: float | None = 0.0) -> T:
        """Do nothing for so long in a phase, as a machine that is busy with something else; see :meth:`die_in`."""

        def act() -> None:
            threading.Event().wait(seconds)

        return self._strike(_Strike(f"wait {seconds:g} s", phase, share, phase == "move", act))

    def _strike(self: T, strike: _Strike) -> T:
        if strike.phase not in PHASES:
            raise ValueError(f"phase: expected one of {', '.join(PHASES)}, got {strike.phase!r}")
        self._strikes.planned.append(strike)
        return self

    # ------------------------------------------------------------------------------------------- calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        self._begin("source", step)
        # Over lanes the transfer goes on when this has returned, until disallow_checkpoint.
        self.transport.send_checkpoint(dst_ranks, step, state_dict, timeout)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        self._begin("destination", step)
        try:
            if not (self._struck and self._faults and metadata.startswith("ft-lanes")):
                return self.transport.recv_checkpoint(src_rank, metadata, step, timeout)
            with self._give(FaultProxy(metadata)) as proxy:
                return self.transport.recv_checkpoint(src_rank, proxy.metadata, step, timeout)
        finally:
            self._end()

    def disallow_checkpoint(self) -> None:
        try:
            self.transport.disallow_checkpoint()
        finally:
            self._end()

    def shutdown(self, wait: bool = True) -> None:
        self._end()
        self.transport.shutdown(wait)

    # ------------------------------------------------------------------------------------------ inside

    def _begin(self, role: str, step: int) -> None:
        self._end()
        at, chance, of_role = self._chosen
        if of_role not in (None, role):
            return
        self.num_transfers += 1
        # In this order: `at` first would skip the draw, and shift what all later transfers draw.
        chosen = self._random.random() < chance and at in (None, self.num_transfers)
        # Drawn whether they are needed or not, so that each transfer has its own place in the sequence.
        shares = [self._random.random() for _ in self._strikes.planned]
        if chosen:
            self._struck = True
            self._strikes.begin(f"transfer {self.num_transfers} ({role}, step {step})", shares)

    def _end(self) -> None:
        self._struck = False
        self._strikes.end()

    def _in_phase(self, report: PeerReport | TransferReport, phase: str) -> None:
        if self._theirs.on_phase is not None:
            self._theirs.on_phase(report, phase)
        mine = self._inner.last_report
        # A source over lanes may still serve a destination of the transfer before.
        if mine is not None and any(report is known for known in (mine, *mine.peers)):
            self._strikes.strike(lambda strike: strike.phase == phase and not strike.moving)

    def _on_progress(self, progress: Progress) -> None:
        if self._theirs.on_progress is not None:
            self._theirs.on_progress(progress)
        done, total = progress.nbytes_done, progress.nbytes_total
        self._strikes.strike(lambda strike: strike.moving and done >= (strike.share or 0.0) * total)

    def _new_channel(self, rank: int, lock: threading.Lock | None = None) -> Channel:
        channel: Channel = self._make_channel(rank, lock)
        if self._struck and self._faults:
            return cast(Channel, self._give(FaultyChannel(channel)))
        return channel

    def _give(self, other: G) -> G:
        """Give this transport's faults to what carries them out, as new."""
        other._faults = [dataclasses.replace(fault) for fault in self._faults]
        other._random = self._random
        return other
