"""This process's own TCP connections, from outside: found by their port, cut, or slowed down. Linux.

A descriptor is duplicated, so what is done to the copy is done to the connection, and nothing of the transport's is
touched.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["cut", "listening", "slow_down"]

# From Linux' socket.h. Connections that a listening socket accepts inherit it.
_SO_MAX_PACING_RATE = 47


@contextmanager
def _tcp_sockets() -> Iterator[list[socket.socket]]:
    found = []
    try:
        for name in os.listdir("/proc/self/fd"):
            try:
                if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    found.append(socket.socket(fileno=os.dup(int(name))))
            except OSError:
                pass  # closed meanwhile
        yield [s for s in found if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM]
    finally:
        for opened in found:
            opened.close()


def _ports(opened: socket.socket) -> tuple[int, int]:
    """The port here and the port there, 0 where there is none."""
    try:
        here = opened.getsockname()[1]
    except OSError:
        return 0, 0
    try:
        return here, opened.getpeername()[1]
    except OSError:
        return here, 0


def cut(port: int, share: float | None = None) -> int:
    """End the established connections to or from a port, and give their number.

    Args:
        port: Of either side.
        share: Only one of them, 0 for the oldest, towards 1 for the newest; None for all.
    """
    with _tcp_sockets() as sockets:
        chosen = []
        for opened in sockets:
            here, there = _ports(opened)
            if there and port in (here, there):
                chosen.append(opened)
        if share is not None:
            chosen = chosen[int(share * len(chosen)) :][:1]
        for opened in chosen:
            try:
                opened.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        return len(chosen)


def slow_down(port: int, bytes_per_second: int) -> None:
    """Let the kernel send no more than so much over each connection that a listening socket will accept."""
    with _tcp_sockets() as sockets:
        for opened in sockets:
            if _ports(opened) == (port, 0):
                opened.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, bytes_per_second)


def listening() -> set[int]:
    """The ports that this process listens on."""
    with _tcp_sockets() as sockets:
        return {_ports(opened)[0] for opened in sockets if opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)}
