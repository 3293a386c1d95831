"""Whether this replica holds a mix of two states, and what it must not do then. No I/O.

Strategy: a receive in place tears the template with its first byte, and only a complete one heals it. What a torn
replica must not do is found by the order of torchft's calls. In each step the Manager calls ``metadata()``; then, once
the quorum is there, ``recv_checkpoint()`` if it found this replica to be behind; and ``disallow_checkpoint()`` after
the vote and before the optimizer steps. So a torn replica for which no receive was tried between the two counts as
healthy, and this is the last moment to stop it. A receive that was tried and failed has failed the step already.

``docs/faults.md`` says which calls this rests on; ``tests/multiproc/test_torn.py`` holds torchft to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ft_transport.errors import LocalProtocolError, TornStateError, reason_of
from ft_transport.report import TransferReport

__all__ = ["Guard"]


class Guard:
    """What a transport remembers of its receives.

    Threading: one receive at a time; :attr:`torn` may be read from any thread.
    """

    def __init__(self) -> None:
        self._torn = False
        self._cause = ""
        self._report: TransferReport | None = None  # of the receive that is under way
        self._tried = False

    @property
    def torn(self) -> bool:
        """Whether the template holds a mix, now."""
        report = self._report
        return self._torn or (report is not None and report.torn)

    def begin_quorum(self) -> None:
        """A quorum is about to be asked for: from now on it counts whether a receive is tried."""
        self._tried = False

    @contextmanager
    def receiving(self, report: TransferReport) -> Iterator[None]:
        """A receive, which says in ``report.torn`` from when on it has written to the template."""
        self._tried, self._report = True, report
        try:
            yield
            self._torn, self._cause = False, ""
        except BaseException as exc:
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
        """
        if self.torn and not self._tried:
            raise TornStateError(
                f"this replica holds a mix of two states, and nobody was left to heal it: {self._cause}. Restart it "
                "from the last durable checkpoint, or empty so that it heals from others. (Or load a whole state into "
                "the template and call the transport's restored().)",
                torn=True,
            )
