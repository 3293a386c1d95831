"""A long way between two network namespaces: what goes in at one end comes out at the other, so much later.

The kernel's own (``netem``) is missing in many builds, so each end is a TUN device, and a process carries packets
between them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_MTU = 9000
# What waits for the link is dropped beyond this, as a switch would.
_QUEUE_BYTES = 16 << 20


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def enter(name: str) -> None:
    """Move this thread into a namespace."""
    descriptor = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(descriptor)


def _tun() -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TUN | _IFF_NO_PI))
    return descriptor


class _Way:
    """One direction: packets that leave one after the other, and arrive later."""

    def __init__(self, into: int, delay: float, bytes_per_second: float) -> None:
        self._into = into
        self._delay = delay
        self._rate = bytes_per_second
        self._free = 0.0  # when the link has nothing more to send
        self._under_way: deque[tuple[float, bytes]] = deque()

    def take(self, packet: bytes, now: float) -> None:
        begin = max(now, self._free)
        if (begin - now) * self._rate <= _QUEUE_BYTES:
            self._free = begin + len(packet) / self._rate
            self._under_way.append((self._free + self._delay, packet))

    def deliver(self, now: float) -> None:
        while self._under_way and self._under_way[0][0] <= now:
            with contextlib.suppress(OSError):  # while that end is not up yet it takes nothing
                os.write(self._into, self._under_way.popleft()[1])

    @property
    def due(self) -> float:
        return self._under_way[0][0] if self._under_way else float("inf")


def carry(ends: list[int], delay: float, bytes_per_second: float) -> None:
    """Carry packets until this process is killed."""
    ways = {ends[0]: _Way(ends[1], delay, bytes_per_second), ends[1]: _Way(ends[0], delay, bytes_per_second)}
    poll = select.epoll()
    for end in ends:
        poll.register(end, select.EPOLLIN)
    while True:
        wait = min(way.due for way in ways.values()) - time.monotonic()
        for end, _ in poll.poll(min(max(wait, 0.0), 1.0)):
            for _ in range(64):
                try:
                    ways[end].take(os.read(end, _MTU), time.monotonic())
                except BlockingIOError:
                    break
        now = time.monotonic()
        for way in ways.values():
            way.deliver(now)


@contextmanager
def long_link(
    prefix: str, round_trip: float, bytes_per_second: float, window: int | None = None
) -> Iterator[list[str]]:
    """Two namespaces with a link between them; gone afterwards.

    Args:
        prefix: Of their names.
        round_trip: Of the link, in seconds.
        bytes_per_second: Of the link, each way.
        window: Bytes that one connection may have under way; None: what TCP allows.
    """
    names = [f"{prefix}far{i}" for i in range(2)]
    carrier = None
    try:
        for name in names:
            _ip("netns", "add", name)
        command = [sys.executable, __file__, *names, str(round_trip / 2), str(bytes_per_second)]
        carrier = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert carrier.stdout is not None
        assert carrier.stdout.readline() == b"ready\n"
        for i, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"10.78.0.{i + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "mtu", str(_MTU), "up")
            _ip("-n", name, "link", "set", "lo", "up")
            if window is not None:
                route = f"10.78.0.0/24 dev eth0 proto kernel scope link src 10.78.0.{i + 1} window {window}"
                _ip("-n", name, "route", "change", *route.split())
        yield names
    finally:
        if carrier is not None:
            carrier.kill()
            carrier.communicate()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


if __name__ == "__main__":
    _ends = []
    for _name in sys.argv[1:3]:
        enter(_name)
        _ends.append(_tun())
    print("ready", flush=True)
    carry(_ends, float(sys.argv[3]), float(sys.argv[4]))
