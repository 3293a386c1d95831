"""A TCP proxy that damages what passes, for tests of lanes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from ft_transport._meeting import Invitation

__all__ = ["Proxy", "Tamper", "flip", "once"]

# Called with connection (counted from 0), direction ("up" to the listener, "down" from it), the position of the first
# byte in that direction's stream, and the bytes; gives what to pass on instead, None to cut the connection.
Tamper = Callable[[int, str, int, bytes], "bytes | None"]


class Proxy:
    """Stands between those who dial and one listener.

    Args:
        metadata: Of the listener.
        tamper: What to do to the bytes.

    Attributes:
        metadata: What those who dial are given instead.
        nbytes: Bytes passed on so far, in both directions.
        num_connections: Accepted so far.
    """

    def __init__(self, metadata: str, tamper: Tamper) -> None:
        self.nbytes = 0
        self.num_connections = 0
        self._target = Invitation.decode(metadata)
        self._tamper = tamper
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        port = self._listener.getsockname()[1]
        self.metadata = self._target._replace(addresses=("127.0.0.1",), port=port).encode()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target.port))
            except OSError:
                near.close()
                continue
            number = self.num_connections
            self.num_connections += 1
            self._sockets += [near, far]
            for arguments in ((number, "up", near, far), (number, "down", far, near)):
                thread = threading.Thread(target=self._pump, args=arguments)
                self._threads.append(thread)
                thread.start()

    def _pump(self, number: int, direction: str, source: socket.socket, target: socket.socket) -> None:
        position = 0
        try:
            while data := source.recv(1 << 16):
                passed = self._tamper(number, direction, position, data)
                if passed is None:
                    break
                position += len(data)
                self.nbytes += len(passed)
                target.sendall(passed)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def cut(self) -> None:
        """Cut every connection, as the death of the process behind would, and take no new one."""
        for end in (self._listener, *self._sockets):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._sockets):
            end.close()


def flip(data: bytes, position: int, at: int) -> bytes:
    """Flip the lowest bit of the byte at place ``at`` of the stream, if it is among these."""
    if not position <= at < position + len(data):
        return data
    damaged = bytearray(data)
    damaged[at - position] ^= 1
    return bytes(damaged)


def once(damage: Callable[[bytes], bytes | None], at: int, direction: str, connection: int) -> Tamper:
    """Damage the bytes of one connection from place ``at`` on, as far as they come in one piece."""

    def tamper(number: int, way: str, position: int, data: bytes) -> bytes | None:
        if (number, way) != (connection, direction) or not position <= at < position + len(data):
            return data
        damaged = damage(data[at - position :])
        return None if damaged is None else data[: at - position] + damaged

    return tamper
