"""The source's side of a transfer over lanes: a state is offered, and destinations come for it.

Strategy: a state is offered once, and then nobody is waited for: ``send_checkpoint`` returns, and training goes on.
Each destination that comes has a thread (``_lanes.serving``), and all of them end by the transfer's deadline. Torchft's
Manager calls ``disallow_checkpoint`` before the optimizer may step, and that is where those who are still being served
are waited for.
"""

from __future__ import annotations

import logging
import threading
from contextlib import nullcontext
from dataclasses import replace

from ft_transport._deadline import Deadline
from ft_transport._lanes.admission import Admission
from ft_transport._lanes.dispatcher import Dispatcher
from ft_transport._lanes.messages import StateMessages
from ft_transport._lanes.news import News
from ft_transport._lanes.protocol import FirstFrame
from ft_transport._lanes.serving import Line, Serving, send_failed
from ft_transport._lanes.session import Session
from ft_transport._net.stall import StallTimer
from ft_transport._options import LaneOptions
from ft_transport._plan.source import SourcePlan
from ft_transport._process import NO_COLLECTION, NoCollection
from ft_transport._telemetry.report import Outcome, TransferReport
from ft_transport._telemetry.teller import Teller
from ft_transport._threads import ThreadGroup, uninterrupted
from ft_transport.errors import reason_of

__all__ = ["SourceTransfer"]

logger = logging.getLogger("ft_transport")


class SourceTransfer:
    """A state, open to destinations from :meth:`open` to :meth:`close`.

    Args:
        options: The caller's choices.
        deadline: Of the whole transfer.
        report: Filled with what happened; has a ``PeerReport`` for each expected destination.
        dispatcher: Leads destinations here.
        teller: Calls the caller's callbacks.
    """

    def __init__(
        self, options: LaneOptions, deadline: Deadline, report: TransferReport, dispatcher: Dispatcher, teller: Teller
    ) -> None:
        self.report = report
        assert report.step is not None, "over lanes a transfer always has one"
        # A chain of one is none. Without digests nobody would see what a destination's own forward has made of the
        # memory that it passes on.
        self._options = replace(options, chain=options.chain and len(report.peers) > 1 and bool(options.digest))
        self._deadline = deadline
        self._dispatcher = dispatcher
        self._changed = threading.Condition()
        self._admission = Admission(report, report.step)
        self._line = Line(report, self._options.chain, options.stall)
        self._news = News(report, options, deadline, teller)
        self._serving: dict[bytes, Serving] = {}  # by identity, the newest of each
        self._crew = ThreadGroup()
        self._failure = ""
        self._store: StateMessages | None = None
        self._uncollected: NoCollection | None = None
        self._uncollected_until = Deadline(NO_COLLECTION)

    def open(self, state_dict: object) -> None:
        """Describe the state and let destinations in, those that wait first.

        Raises:
            LocalProtocolError: A leaf cannot travel. Destinations are let in, and told so.
            TransferTimeout: A device that the state is on has not come to an end by the deadline. As above.
        """
        report, store = self.report, None
        # Until nobody reads it: what describes a state goes with it, and a collector that comes before, while
        # destinations wait, walks through all of it.
        self._uncollected, self._uncollected_until = NoCollection(), Deadline(NO_COLLECTION)
        try:
            with report.phase("describe", self._options.on_phase):
                outbound = SourcePlan(
                    state_dict,
                    report.step,
                    self._options,
                    report,
                    lambda reading: self.end_reading(),
                    deadline=self._deadline,
                )
                store = self._store = StateMessages(outbound, fabric=self._options.reads_by)
                # Destinations compare the state with their templates while the small ones are copied. Not where a
                # copy may take its time, as from an accelerator that is in the middle of a step.
                if not store.streams.cross:
                    self._dispatcher.open(self)
                store.copy_small()
        except BaseException as exc:
            # Destinations are told: they would wait for their whole time-out, and with them the collectives of
            # everybody.
            self._failure = reason_of(exc)
            raise
        finally:
            if store is not None:
                store.let_read(self._failure)
            if store is None or store.streams.cross:
                self._dispatcher.open(self)

    def refuse(self, reason: str) -> None:
        """In the place of :meth:`open`: let destinations in, and tell them why there is no state for them."""
        self._failure = reason
        self._dispatcher.open(self)

    # ------------------------------------------------------------------------------ destinations

    def accept(self, session: Session, first: FirstFrame) -> bool:
        identity, name = first.body
        attempt, step = first.header.attempt, first.header.step
        with self._changed:
            if (reason := self._admission.refusal(identity, attempt, step)) is not None:
                self._news.refused(str(name), session.connection.address, reason)
                send_failed(session, reason, wait=False)
                session.connection.close()
                return True
            if not self._admission.has_place(identity, step):
                return False
            if (earlier := self._serving.get(identity)) is not None:
                # The same process has come again: its first connection is one that it has given up, and may hang for
                # minutes.
                earlier.session.connection.abort()
            state = self._admission.admit(identity, attempt)
            state.peer.address, state.peer.name = session.connection.address, str(name)
            timer = StallTimer(self._deadline, self._options.stall, "the destination")
            # One timer for all that is said on its control connection: whoever answers there is alive, however slow its
            # lanes.
            serving = self._serving[identity] = Serving(
                session, state, timer, self._line, self._dispatcher, self._news, self._options.on_phase
            )
            self._start(serving)
        return True

    def _start(self, serving: Serving) -> None:
        try:
            self._crew.start("destination", self._run, serving)
        except RuntimeError as exc:  # no more threads to be had
            peer = serving.state.peer
            logger.warning("%s cannot be served: %s", peer.label, exc)
            peer.outcome, peer.reason = "failed", reason_of(exc)
            serving.session.connection.close()
            self._settle()
            self._changed.notify_all()

    def _run(self, serving: Serving) -> None:
        store = self._store
        outcome: Outcome = "failed"
        try:
            # An optimizer that steps in this very thread (a callback's) would wait for itself.
            with store.here() if store is not None else nullcontext():
                outcome = serving.run(store, self._failure)
        finally:
            if store is not None:
                store.await_offer()  # who has refused at once is told of when the state is described, and not before
            del store  # it goes when it is released
            with self._changed:
                serving.state.peer.outcome = outcome
                self._settle()
                self._changed.notify_all()

    # --------------------------------------------------------------------------------------- end

    def _settle(self) -> None:
        """Complete the report, once no destination is expected or served any more. The lock is held."""
        if self._admission.settle(is_late=self._deadline.expired()):
            error = self._store.error if self._store is not None else None
            self._release()
            if not self._failure:  # else the call has raised, and that was told
                self._news.over(error)

    def tick(self) -> None:
        """End a transfer whose deadline has passed and for which nobody has come; say how far the others are."""
        if self._uncollected_until.expired():
            self._collect_again()
        with self._changed:
            if self._deadline.expired():
                self._admission.give_up("timed out waiting for it")
            self._settle()
            self._changed.notify_all()
        self._news.look()

    def _give_up_expected(self, reason: str) -> None:
        self._admission.give_up(reason)
        self._settle()
        self._changed.notify_all()

    def drain(self) -> None:
        """Wait until every destination is served or has failed, or the deadline has passed.

        A destination that has not come within the stall time-out from now on is not waited for.
        """
        # From now on, and not from when the state was offered: torchft calls this after the step's collectives, in
        # which a destination that is alive takes part, so it has come by then.
        absent, admission = Deadline(self._options.stall), self._admission
        with self._changed:
            if admission.is_open:  # nobody was expected, so nobody is waited for who has not come
                self._give_up_expected("")
            while not admission.is_over and not self._deadline.expired():
                if admission.num_expected and absent.expired():
                    self._give_up_expected(f"it has not come within {absent.timeout.total_seconds():g} s")
                    continue
                limits = [self._deadline.remaining()] + ([absent.remaining()] if admission.num_expected else [])
                self._changed.wait_for(lambda: admission.is_over, min(limits).total_seconds())

    @property
    def is_over(self) -> bool:
        """Whether nobody is served any more, and nobody will be."""
        return self._admission.is_over

    def end_reading(self) -> None:
        """As :meth:`drain`, then as :meth:`close`: somebody is about to change the state."""
        self.drain()
        self.close()

    def within_step(self) -> bool:
        """Whether the state may change before :meth:`drain` is called; see ``_plan.unchanged``."""
        store = self._store
        return store is not None and store.within_step()

    def close(self) -> None:
        """End what is still under way; when this returns, nothing reads the state. Raises nothing but Ctrl-C."""
        uninterrupted(self._close)

    def _close(self) -> None:
        self._dispatcher.close(self)
        with self._changed:
            self._admission.is_closing = True
            self._give_up_expected("it has not come before the source ended the transfer")
            for serving in self._serving.values():
                serving.cancel("the source has ended the transfer")
        # Each ends by itself, within a heartbeat: its timer is cancelled.
        self._crew.join()
        with self._changed:
            self._release()
        self._news.drain()

    def _release(self) -> None:
        """Nothing is read any more: optimizers need not wait, and the copies of small tensors go."""
        store, self._store = self._store, None
        if store is not None:
            store.release()
        del store
        self._collect_again()

    def _collect_again(self) -> None:
        if self._uncollected is not None:
            self._uncollected.end()
