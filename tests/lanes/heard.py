"""What one side of a conversation over lanes has said, for tests that play the other one."""

from __future__ import annotations

import socket
from contextlib import closing
from datetime import timedelta
from typing import Any

from ft_transport._deadline import Deadline
from ft_transport._lanes.protocol import LaneFrame, LaneProtocol, Role
from ft_transport._lanes.session import Session
from ft_transport._net.connection import Connection
from ft_transport._net.stall import StallTimer
from ft_transport.errors import PeerFailure

# Frame, number and body of each.
Script = list[tuple[LaneFrame, int, Any]]


def heard(sock: socket.socket, mine: Role) -> Script:
    """All that the peer of this socket has said, until it closed the connection, whether it could be said or not."""
    session = Session(Connection(sock, "peer"), LaneProtocol(mine, 1, 7))
    session.protocol.received = lambda header: None  # type: ignore[method-assign]
    found: Script = []
    with closing(session.connection):
        while True:
            try:
                header, body = session.recv(StallTimer(Deadline(timedelta(seconds=10))))
            except PeerFailure:
                return found
            found.append((header.frame, header.number, body))
