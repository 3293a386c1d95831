"""Whether this replica holds a mix of two states, and what it must not do then. No I/O.

Strategy: a receive in place tears the template with its first byte, and only a complete one heals it. What a torn
replica must not do is found by the order of torchft's calls. In each step the Manager calls ``metadata()``; then, once
the quorum is there, ``recv_checkpoint()`` if it found this replica to be behind; and ``disallow_checkpoint()`` after
the vote and before the optimizer steps. So a torn replica for which no receive was tried between the two counts as
healthy, and this is the last moment to stop it. A receive that was tried and failed has failed the step already.

A receive heals what it brings. A state that lacks a leaf which an earlier receive has left half written (another model,
an EMA that the new source does not keep) heals all but that leaf, and the replica stays torn.

A replica that refuses the others' state, or whose source cannot describe its own, will not be healed the next time
either: each time it is in the quorum, takes no part in the step, and with that fails it for the others. It is stopped
at the same place, and ends as if ``load_state_dict`` had raised.

``docs/faults.md`` says which calls this rests on; ``tests/multiproc/test_torn.py`` holds torchft to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ft_transport._telemetry.report import TransferReport, outcome_of
from ft_transport.errors import LocalProtocolError, PeerFailure, RemoteProtocolError, TornStateError, reason_of

__all__ = ["Attempt", "TornGuard"]

# Leaves that a text names.
_MAX_NAMED = 3


class _Landing(Protocol):
    def paths(self) -> set[str]: ...
    def paths_in_place(self) -> set[str]: ...


class Attempt:
    """A receive that is under way.

    Attributes:
        landing: Where it lands, once that is planned.
    """

    def __init__(self) -> None:
        self.landing: _Landing | None = None


# Refusals in a row for a reason that may pass (no memory, a callback that raises, a source that cannot describe its
# state) until the replica is stopped. Each costs the others a step, and some reasons do pass.
MAX_REFUSALS = 3


class TornGuard:
    """What a transport remembers of its receives.

    Threading: one receive at a time; :attr:`torn` may be read from any thread.
    """

    def __init__(self) -> None:
        self._torn = False
        self._cause = ""
        self._paths: set[str] = set()  # of the leaves that are a mix
        self._unseen = False  # a receive was tried, and the Manager takes it for complete
        self._report: TransferReport | None = None  # of the receive that is under way
        self._tried = False
        self._refusals = 0  # in a row
        self._refusal = ""  # why this replica cannot take what the others have, as the newest receive has found

    @property
    def torn(self) -> bool:
        """Whether the template holds a mix, now."""
        # Read without a lock, from the training thread, while the quorum thread fills the report in. Both are one
        # assignment; and a replica is torn from a moment before the first byte lands, never after.
        report = self._report
        # While a receive runs its report says so, which whoever moves bytes fills in: no call for each message.
        return self._torn or (report is not None and report.torn)

    def begin_quorum(self) -> None:
        """A quorum is about to be asked for: from now on it counts whether a receive is tried."""
        self._tried = False
        self._refusal = ""

    @contextmanager
    def receiving(self, report: TransferReport) -> Iterator[Attempt]:
        """A receive, which says in ``report.torn`` from when on it has written to the template, and in the attempt
        what lands where."""
        attempt = Attempt()
        self._tried, self._report = True, report
        try:
            yield attempt
            # Only when the block has ended without an error: a receive that has everything and then fails to build a
            # leaf leaves the template a mix.
            self._heal(attempt.landing)
            self._refusals = 0
        except BaseException as exc:
            # One that either side has refused has moved no byte. What counts is whether the next one will be, too.
            if _is_refusal(exc, report):
                self._refusals += 1
                # A template of another shape does not change by itself, nor does another transport at the source. No
                # room, or a callback that raised, may be over in the next step.
                if getattr(exc, "_for_good", False) or self._refusals >= MAX_REFUSALS:
                    self._refusal = reason_of(exc)
            else:
                self._refusals = 0
            if report.torn:
                step = "" if report.step is None else f" of step {report.step}"
                # All that were to land there, and not those that have: which bytes have come nobody knows when a pair
                # breaks.
                paths = attempt.landing.paths_in_place() if attempt.landing is not None else set()
                self._tear(f"a receive{step} broke off ({reason_of(exc)})", paths)
            raise
        finally:
            # The plan holds the template, and an error that somebody keeps holds this frame.
            self._report = attempt.landing = None

    def _heal(self, landing: _Landing | None) -> None:
        # By path, and not by memory: a leaf that was half written may lie elsewhere by now, and is as wrong there.
        left = self._paths - landing.paths() if self._paths and landing is not None else set()
        self._torn = self._unseen = bool(left)
        self._paths = left
        self._cause = f"{self._cause}, and what has arrived since lacks {_some(left)}" if left else ""

    def _tear(self, cause: str, paths: set[str]) -> None:
        self._torn, self._unseen, self._cause = True, False, cause
        self._paths |= paths

    def lose(self, paths: list[str]) -> None:
        """This replica's forward has written to leaves of a state that was received, and nobody has their bytes."""
        self._tear(
            f"forward has written to {_some(set(paths))} after the state had landed there; shadow=True keeps a copy",
            set(paths),
        )
        # The Manager takes the heal for done, and will not ask for another one.
        self._unseen = True

    def mark_restored(self) -> None:
        """The whole template holds one state again, from elsewhere.

        Raises:
            LocalProtocolError: A receive is under way.
        """
        # It would be torn again a moment later, by bytes that are under way.
        if self._report is not None:
            raise LocalProtocolError("a receive is under way; restore the template when it is over")
        self._torn, self._unseen, self._paths, self._cause = False, False, set(), ""
        self._refusals = 0

    def check_source(self) -> None:
        """Call before a state is described.

        Raises:
            TornStateError: It is a mix.
        """
        if self.torn:
            raise TornStateError(f"this replica holds a mix of two states and cannot serve: {self._cause}", torn=True)

    def check_step(self, *, failed: bool = False) -> None:
        """Call before the optimizer steps.

        Args:
            failed: The caller knows that it will not step: something else has failed before a heal could be tried.

        Raises:
            TornStateError: The state is a mix, and the newest quorum has found no source to heal it from, or takes it
                for healed.
            RemoteProtocolError: This replica has refused the state that it was to heal from, and will again.
        """
        # Raised out of ``disallow_checkpoint()``, that is out of ``should_commit()``: torchft has no other way to leave
        # out a replica which heartbeats and cannot heal, and each step that it stays in fails for all.
        if self._refusal:
            raise RemoteProtocolError(
                "this replica cannot be healed from the others, and would only fail their steps: " + self._refusal,
                torn=self.torn,
            )
        # A receive that was tried and failed has failed the step: the Manager does not let the optimizer step, and
        # finds this replica behind in the next quorum. To stop here would end a process that can still be healed.
        if self.torn and (self._unseen or not (self._tried or failed)):
            why = "which the Manager takes for healed" if self._unseen else "and nobody was left to heal it"
            raise TornStateError(
                f"this replica holds a mix of two states, {why}: {self._cause}. Restart it "
                "from the last durable checkpoint, or empty so that it heals from others. (Or load a whole state into "
                "the template and call the transport's mark_restored().)",
                torn=True,
            )


def _is_refusal(error: BaseException, report: TransferReport) -> bool:
    """Whether a receive has ended before a byte moved, because one side cannot have it."""
    if outcome_of(error) == "refused" or any(peer.outcome == "refused" for peer in report.peers):
        return True
    # The source has said why there is none: a leaf that cannot travel, no room to copy small tensors. It trains on, and
    # it is not the one to stop: it has what this replica lacks, and all others would have to follow it.
    said_why = isinstance(error, PeerFailure) and outcome_of(error) == "failed"
    return said_why and not report.torn and not any(peer.nbytes for peer in report.peers)


def _some(paths: set[str]) -> str:
    # Sorted, so that the same trouble has the same text each time it is logged.
    named = sorted(paths)[:_MAX_NAMED]
    return ", ".join(named) + (f" and {len(paths) - len(named)} more" if len(paths) > len(named) else "")
