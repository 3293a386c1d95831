"""Where those who call are received: each is led to the transfer that it is for, or waits for one."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from ft_transport._deadline import Deadline
from ft_transport._lanes.protocol import Conversation, Frame, Role, Visit
from ft_transport._lanes.session import Talk
from ft_transport._lanes.supplier import Supply
from ft_transport._net.connection import Connection
from ft_transport._net.stall import HEARTBEAT, Patience
from ft_transport.errors import TransferError

__all__ = ["Desk", "Host"]

logger = logging.getLogger("ft_transport")

# Destinations that wait for a transfer to begin, or for a place in one; the oldest makes room. None has a thread.
MAX_WAITING = 256
# Lanes open at once, whatever they are for: each has a thread. A destination that gets fewer than it wants makes do.
MAX_ALL_LANES = 1024


class Host(Protocol):
    """A transfer that is open to destinations."""

    def receive_guest(self, talk: Talk, visit: Visit) -> bool:
        """Serve a destination from now on, in a thread of its own, or tell it at once why not. Must not block.

        False to let it wait, for another transfer or for a place in this one.
        """
        ...

    def tick(self) -> None:
        """Called now and then; must not block."""
        ...


class Desk:
    """Leads connections to transfers. Safe to be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._host: Host | None = None
        self._closed = False
        self._waiting: list[tuple[Talk, Visit]] = []
        self._supplies: dict[bytes, Supply] = {}

    def welcome(self, connection: Connection, visit: Visit) -> None:
        """Take over a new connection; called by the listener."""
        header = visit.header
        if header.frame is Frame.ATTACH:
            with self._lock:
                supply = self._supplies.get(visit.body[0])
                if supply is not None and sum(each.num_lanes for each in self._supplies.values()) < MAX_ALL_LANES:
                    supply.attach(connection, header)
                    return
            connection.close()
            return
        conversation = Conversation(Role.SOURCE, header.attempt, header.step)
        conversation.received(header)
        talk = Talk(connection, conversation)
        with self._lock:
            if self._host is None or not self._host.receive_guest(talk, visit):
                self._wait(talk, visit)

    def _wait(self, talk: Talk, visit: Visit) -> None:
        if self._closed:
            talk.connection.close()
            return
        self._waiting.append((talk, visit))
        if len(self._waiting) > MAX_WAITING:
            self._waiting.pop(0)[0].connection.close()

    def open(self, host: Host) -> None:
        """From now on destinations are for this transfer, those that wait first."""
        with self._lock:
            self._host = host
            self._let_in(host)

    def _let_in(self, host: Host) -> None:
        """Ask for each one that waits whether it is its turn. The lock is held."""
        waiting, self._waiting = self._waiting, []
        for talk, visit in waiting:
            if not talk.connection.idle:
                talk.connection.close()  # it has given up meanwhile
            elif not host.receive_guest(talk, visit):
                self._wait(talk, visit)

    def close(self, host: Host) -> None:
        """From now on destinations wait for another one."""
        with self._lock:
            if self._host is host:
                self._host = None

    def register(self, ident: bytes, supply: Supply) -> None:
        """From now on lanes with this identity are for this supply."""
        with self._lock:
            self._supplies[ident] = supply

    def unregister(self, ident: bytes) -> None:
        with self._lock:
            self._supplies.pop(ident, None)

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
            for talk, visit in there + newer:
                if self._host is None or not self._host.receive_guest(talk, visit):
                    self._wait(talk, visit)
            host = self._host
        if host is not None:
            host.tick()

    def close_all(self) -> None:
        """Close the connections of all who wait, and of all who still come."""
        with self._lock:
            self._closed = True
            for talk, _ in self._waiting:
                talk.connection.close()
            self._waiting.clear()


def _is_told(talk: Talk) -> bool:
    """Say that somebody is here; gives whether the other one is, too. Does not block; who is gone is closed."""
    try:
        # It has nothing to say yet: what can be read is the end of its connection, or a breach of the protocol.
        if talk.connection.idle and talk.connection.takes_more:
            # A frame of a few bytes into a buffer that has room does not block.
            talk.say(Frame.WAIT, Patience(Deadline(HEARTBEAT)))
            return True
    except TransferError:
        pass
    talk.connection.close()
    return False
