"""What goes on over lanes beside the thread that trains: what is served when the call has returned, and a receive that
somebody else may end.

Strategy: the calls that begin these, and those that end them, come from several threads: torchft's quorum thread, the
one that trains, and whoever shuts the transport down. So each of them is ended by a copy of the reference, and only
then forgotten.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ft_transport._deadline import Deadline
from ft_transport._lanes.destination import DestinationTransfer, LocalPeer
from ft_transport._lanes.relay import Relay
from ft_transport._lanes.source import SourceTransfer
from ft_transport._net.endpoint import Endpoint
from ft_transport._options import LaneOptions
from ft_transport._plan.resume import PartialReceive
from ft_transport._plan.rewrite import Received
from ft_transport._plan.torn import Attempt, TornGuard
from ft_transport._telemetry.report import TransferReport
from ft_transport.errors import TornStateError

__all__ = ["SHUT_DOWN", "Receiving", "Serving"]

logger = logging.getLogger("ft_transport")

SHUT_DOWN = "this transport has been shut down"


class Serving:
    """What goes on when the call that has begun it is over.

    Attributes:
        transfer: As the source.
        relay: As a destination that passes the state on.
    """

    def __init__(self) -> None:
        self.transfer: SourceTransfer | None = None
        self.relay: Relay | None = None

    def serve(self, transfer: SourceTransfer, state_dict: object, guard: TornGuard, *, blocking: bool) -> None:
        """Serve a state. Returns once that is done if it is asked for, or the state may change before :meth:`finish`.

        Raises:
            TornStateError: It is a mix. Destinations are told.
            LocalProtocolError: A leaf cannot travel. As above.
        """
        self.transfer = transfer
        try:
            guard.check_source()
        except TornStateError as exc:
            # Destinations wait for this step's state: told why there is none they fail within a moment.
            transfer.refuse(exc.message)
            raise
        transfer.open(state_dict)
        # DiLoCo asks for the quorum in a hook behind its inner optimizer's step, and writes parameters through
        # ``.data`` as soon as that returns: nothing may read them by then.
        if blocking or transfer.within_step():
            try:
                transfer.drain()
            finally:
                self.end()

    def finish(self) -> None:
        """Wait until all is served that was begun, or its deadline has passed; then :meth:`end`.

        Never raises: the Manager's call that leads here is in no ``try``, and no socket is worth a training process.
        """
        transfer, relay = self.transfer, self.relay
        try:
            if transfer is not None:
                transfer.drain()
            if relay is not None:
                relay.drain()
            self.end()
        except Exception:
            logger.exception("the transfer could not be ended as it should")

    def end(self, *, keep_source: bool = False) -> None:
        """End what an earlier call has left under way; nothing reads the state any more then."""
        transfer, relay = None if keep_source else self.transfer, self.relay
        if transfer is not None:
            transfer.close()
        if relay is not None:
            relay.close()
        # Forgotten only now: Ctrl-C may have come, and whoever calls next must find what still reads. And not what
        # another thread has begun meanwhile.
        if self.transfer is transfer:
            self.transfer = None
        if self.relay is relay:
            self.relay = None


class Receiving:
    """The receives of one transport, one at a time.

    Attributes:
        kept: What one that broke has left in the template, for the next one; else None.
        is_shut_down: Whether there will be no more.
    """

    def __init__(self) -> None:
        self.kept: PartialReceive | None = None
        self.is_shut_down = False
        self._num_attempts = 0
        self._running: tuple[DestinationTransfer, int] | None = None  # and the thread that it runs in

    def begin(
        self,
        endpoint: Endpoint,
        local: LocalPeer,
        options: LaneOptions,
        deadline: Deadline,
        report: TransferReport,
        attempt: Attempt,
        *,
        trains: bool,
    ) -> DestinationTransfer:
        """A receive, which :meth:`run` runs; see ``_lanes/destination.py``."""
        # By this number the source tells which of two conversations with one destination is the later one: that of an
        # earlier receive, which is over here, may reach it after this one's.
        self._num_attempts += 1
        number, step = self._num_attempts, report.step
        assert step is not None, "torchft always gives one"
        return DestinationTransfer(endpoint, step, number, local, options, deadline, report, attempt, trains=trains)

    def run(
        self, transfer: DestinationTransfer, template: Callable[[], object] | None
    ) -> tuple[Received, Relay | None]:
        """Receive."""
        self._running = transfer, threading.get_ident()
        if self.is_shut_down:  # since this call has begun, so nobody has cancelled it
            transfer.cancel(SHUT_DOWN)
        # For this attempt alone, whatever becomes of it: it says itself what is left afterwards.
        earlier, self.kept = self.kept, None
        try:
            return transfer.run(template, earlier)
        finally:
            self._running, self.kept = None, transfer.kept

    def shut_down(self) -> bool:
        """Let the receive that is under way fail within a moment; gives whether there is one to wait for.

        In the thread of that receive, which a user's callback may call this from, there is none.
        """
        self.is_shut_down = True
        # Read once: the receive may end at any moment, in its own thread.
        running = self._running
        if running is None:
            return False
        transfer, thread = running
        transfer.cancel(SHUT_DOWN)
        # Else the callback that has called this would wait for the call that it is in.
        return thread != threading.get_ident()
