"""Leads each connection that was let in to the transfer that it is for, or lets it wait for one.

Strategy: a process listens on one port for as long as its transport lives, and transfers come and go: a quorum may have
a destination dial before its source has been told of it. So who comes early waits here, without a thread, and is told
every now and then that somebody is there. Lanes name the supplier that they are for, and wait for nothing.

Not here: who is let in (``_net.listener``), and who is served by a transfer (``_lanes.admission``).
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from ft_transport._deadline import Deadline
from ft_transport._lanes.protocol import FirstFrame, LaneFrame, LaneProtocol, Role
from ft_transport._lanes.session import Session
from ft_transport._lanes.supplier import Supplier
from ft_transport._net.connection import Connection
from ft_transport._net.stall import HEARTBEAT, StallTimer
from ft_transport.errors import TransferError

__all__ = ["Dispatcher", "Transfer"]

logger = logging.getLogger("ft_transport")

# Destinations that wait for a transfer to begin, or for a place in one; the oldest makes room. None has a thread.
# As many as the replicas of a large job, all started at once and none with a source yet.
MAX_WAITING = 256
# Lanes open at once, whatever they are for: each has a thread. A destination that gets fewer than it wants makes do.
MAX_ALL_LANES = 1024


class Transfer(Protocol):
    """A transfer that is open to destinations."""

    def accept(self, session: Session, first: FirstFrame) -> bool:
        """Serve a destination from now on, in a thread of its own, or tell it at once why not. Must not block.

        False to let it wait, for another transfer or for a place in this one.
        """
        ...

    def tick(self) -> None:
        """Called now and then; must not block."""
        ...


class Dispatcher:
    """Leads connections to transfers. Safe to be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transfer: Transfer | None = None
        self._closed = False
        self._waiting: list[tuple[Session, FirstFrame]] = []
        self._suppliers: dict[bytes, Supplier] = {}

    def dispatch(self, connection: Connection, first: FirstFrame) -> None:
        """Take over a new connection; called by the listener."""
        header = first.header
        if header.frame is LaneFrame.ATTACH:
            with self._lock:
                # Under the lock until it is attached: a supplier that ends is unregistered first, and then joins its
                # lanes.
                supplier = self._suppliers.get(first.body[0])
                if supplier is not None and self._has_room(supplier):
                    supplier.attach(connection, header)
                    return
            connection.close()
            return
        protocol = LaneProtocol(Role.SOURCE, header.attempt, header.step)
        protocol.received(header)
        session = Session(connection, protocol)
        with self._lock:
            if self._transfer is None or not self._transfer.accept(session, first):
                self._wait(session, first)

    def _has_room(self, supplier: Supplier) -> bool:
        # One lane for everybody: who gets none at all gives up after a few trials.
        return not supplier.num_lanes or sum(each.num_lanes for each in self._suppliers.values()) < MAX_ALL_LANES

    def _wait(self, session: Session, first: FirstFrame) -> None:
        if self._closed:
            session.connection.close()
            return
        self._waiting.append((session, first))
        if len(self._waiting) > MAX_WAITING:
            self._waiting.pop(0)[0].connection.close()

    def open(self, transfer: Transfer) -> None:
        """From now on destinations are for this transfer, those that wait first."""
        with self._lock:
            self._transfer = transfer
            self._let_in(transfer)

    def _let_in(self, transfer: Transfer) -> None:
        """Ask for each one that waits whether it is its turn. The lock is held."""
        waiting, self._waiting = self._waiting, []
        for session, first in waiting:
            if not session.connection.idle:
                session.connection.close()  # it has given up meanwhile
            elif not transfer.accept(session, first):
                self._wait(session, first)

    def close(self, transfer: Transfer) -> None:
        """From now on destinations wait for another one."""
        with self._lock:
            # An older one may be closed late, by an optimizer's hook in another thread, when the next one is open
            # already.
            if self._transfer is transfer:
                self._transfer = None

    def register(self, ident: bytes, supplier: Supplier) -> None:
        """From now on lanes with this identity are for this supplier."""
        with self._lock:
            self._suppliers[ident] = supplier

    def unregister(self, ident: bytes) -> None:
        with self._lock:
            self._suppliers.pop(ident, None)

    def tick(self) -> None:
        """Tell those who wait that somebody is here; called by the listener.

        They are taken out of line meanwhile, and told without the lock: a transfer may begin at any moment, and its
        thread must neither wait for 256 sends nor speak on a connection that this one is speaking on.
        """
        with self._lock:
            told, self._waiting = self._waiting, []
        there = [entry for entry in told if _is_told(entry[0])]
        with self._lock:
            newer, self._waiting = self._waiting, []
            for session, first in there + newer:
                if self._transfer is None or not self._transfer.accept(session, first):
                    self._wait(session, first)
            transfer = self._transfer
        if transfer is not None:
            transfer.tick()

    def close_all(self) -> None:
        """Close the connections of all who wait, and of all who still come."""
        with self._lock:
            self._closed = True
            for session, _ in self._waiting:
                session.connection.close()
            self._waiting.clear()


def _is_told(session: Session) -> bool:
    """Say that somebody is here; gives whether the other one is, too. Does not block; who is gone is closed."""
    try:
        # It has nothing to say yet: what can be read is the end of its connection, or a breach of the protocol.
        if session.connection.idle and session.connection.takes_more:
            # A frame of a few bytes into a buffer that has room does not block.
            session.send(LaneFrame.WAIT, StallTimer(Deadline(HEARTBEAT)))
            return True
    except TransferError:
        pass
    session.connection.close()
    return False
