"""Whether this replica holds a mix of two states, and what it must not do then. No I/O.

Strategy: a receive in place tears the template with its first byte, and only a complete one heals it. What a torn
replica must not do is found by the order of torchft's calls. In each step the Manager calls ``metadata()``; then, once
the quorum is there, ``recv_checkpoint()`` if it found this replica to be behind; and ``disallow_checkpoint()`` after
the vote and before the optimizer steps. So a torn replica for which no receive was tried between the two counts as
healthy, and this is the last moment to stop it. A receive that was tried and failed has failed the step already.

A replica that refuses the others' state will refuse it again: each time it is in the quorum, takes no part in the step,
and with that fails it for the others. It is stopped at the same place, and ends as if ``load_state_dict`` had raised.

``docs/faults.md`` says which calls this rests on; ``tests/multiproc/test_torn.py`` holds torchft to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ft_transport.errors import LocalProtocolError, RemoteProtocolError, TornStateError, reason_of
from ft_transport.report import TransferReport

__all__ = ["Guard"]

# Refusals in a row for a reason that may pass (no memory, a callback that raises) until the replica is stopped. Each
# costs the others a step, and some reasons do pass.
MAX_REFUSALS = 3


class Guard:
    """What a transport remembers of its receives.

    Threading: one receive at a time; :attr:`torn` may be read from any thread.
    """

    def __init__(self) -> None:
        self._torn = False
        self._cause = ""
        self._report: TransferReport | None = None  # of the receive that is under way
        self._tried = False
        self._refusals = 0  # in a row
        self._refusal = ""  # why this replica cannot take what the others have, as the newest receive has found

    @property
    def torn(self) -> bool:
        """Whether the template holds a mix, now."""
        report = self._report
        return self._torn or (report is not None and report.torn)

    def begin_quorum(self) -> None:
        """A quorum is about to be asked for: from now on it counts whether a receive is tried."""
        self._tried = False
        self._refusal = ""

    @contextmanager
    def receiving(self, report: TransferReport) -> Iterator[None]:
        """A receive, which says in ``report.torn`` from when on it has written to the template."""
        self._tried, self._report = True, report
        try:
            yield
            self._torn, self._cause = False, ""
            self._refusals = 0
        except BaseException as exc:
            if any(peer.outcome == "refused" for peer in report.peers):
                self._refusals += 1
                if report.unfit or self._refusals >= MAX_REFUSALS:
                    self._refusal = reason_of(exc)
            if report.torn:
                text = reason_of(exc)
                step = "" if report.step is None else f" of step {report.step}"
                self._torn, self._cause = True, f"a receive{step} broke off ({text})"
            raise
        finally:
            self._report = None

    def restored(self) -> None:
        """The whole template holds one state again, from elsewhere.

        Raises:
            LocalProtocolError: A receive is under way.
        """
        if self._report is not None:
            raise LocalProtocolError("a receive is under way; restore the template when it is over")
        self._torn, self._cause = False, ""

    def check_source(self) -> None:
        """Call before a state is described.

        Raises:
            TornStateError: It is a mix.
        """
        if self.torn:
            raise TornStateError(f"this replica holds a mix of two states and cannot serve: {self._cause}", torn=True)

    def check_step(self) -> None:
        """Call before the optimizer steps.

        Raises:
            TornStateError: The state is a mix, and the newest quorum has found no source to heal it from.
            RemoteProtocolError: This replica has refused the state that it was to heal from, and will again.
        """
        if self._refusal:
            raise RemoteProtocolError(
                f"this replica cannot take the state of the others, and would only fail their steps: {self._refusal}",
                torn=self.torn,
            )
        if self.torn and not self._tried:
            raise TornStateError(
                f"this replica holds a mix of two states, and nobody was left to heal it: {self._cause}. Restart it "
                "from the last durable checkpoint, or empty so that it heals from others. (Or load a whole state into "
                "the template and call the transport's restored().)",
                torn=True,
            )
