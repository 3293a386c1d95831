"""What the machine itself can do: no transport is quicker than the slowest of what its bytes pass."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable

import torch
import xxhash

__all__ = ["measure"]

# Large enough that no cache of a processor holds it, small enough to be there on any machine.
_NBYTES = 256 << 20
_TIMES = 3
_CPU = torch.device("cpu")


def measure(device: torch.device, scale: float = 1.0) -> dict[str, float]:
    """Bytes per second of what bounds a transfer within this machine, by name.

    Args:
        device: Where states are; an accelerator's copies to and from the host are measured, too.
        scale: Shrinks what is moved, 0 to 1.
    """
    nbytes = max(int(_NBYTES * scale), 1 << 20)
    host = torch.ones(nbytes, dtype=torch.uint8)
    other = torch.zeros_like(host)
    found = {
        "copy in memory": _rate(nbytes, lambda: other.copy_(host)),
        "digest (xxh3), one thread": _rate(nbytes, lambda: xxhash.xxh3_64_intdigest(host.numpy().data)),
    }
    for count in (1, 4):
        found[f"loopback, {count} connection{'s' if count > 1 else ''}"] = _loopback(host, other, count)
    if device.type != "cpu":
        found |= _device_copies(nbytes, device)
    return found


def _device_copies(nbytes: int, device: torch.device) -> dict[str, float]:
    there = torch.ones(nbytes, dtype=torch.uint8, device=device)
    found = {}
    for name, host in (
        ("pinned", torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)),
        ("pageable", torch.ones(nbytes, dtype=torch.uint8)),
    ):
        for way, target, source in (("from", host, there), ("to", there, host)):

            def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
                target.copy_(source, non_blocking=True)
                torch.accelerator.synchronize(device)

            found[f"{way} {device.type}, {name} memory"] = _rate(nbytes, copy)
    return found


def _rate(nbytes: int, act: Callable[[], object]) -> float:
    act()  # pages that nobody has touched, a context that is not there yet
    seconds = []
    for _ in range(_TIMES):
        begin = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begin)
    return nbytes / statistics.median(seconds)


def _loopback(source: torch.Tensor, target: torch.Tensor, count: int) -> float:
    """Of so many connections at once, each with a thread at either end and a share of the bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        pairs = [(socket.create_connection(server.getsockname()), server.accept()[0]) for _ in range(count)]
    share = source.numel() // count

    def send(which: int) -> None:
        pairs[which][0].sendall(source.numpy().data[which * share : (which + 1) * share])

    def receive(which: int) -> None:
        view = target.numpy().data[which * share : (which + 1) * share]
        while len(view):
            view = view[pairs[which][1].recv_into(view, 0, socket.MSG_WAITALL) :]

    def move() -> None:
        threads = [threading.Thread(target=end, args=(which,)) for which in range(count) for end in (send, receive)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    try:
        return _rate(share * count, move)
    finally:
        for pair in pairs:
            for end in pair:
                end.close()
