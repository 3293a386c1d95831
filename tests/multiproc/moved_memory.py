"""Moves memory away under a transfer, from another thread, and says what became of it. Run in a process of its own.

Usage: ``python -m tests.multiproc.moved_memory lanes|direct|group|relay|again|read``. Prints a line of JSON for each
case.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from ft_transport import LaneTransport, TornStateError
from ft_transport._deadline import Deadline
from ft_transport._group.channel import GroupChannel, Pending
from ft_transport._group.destination import receive
from ft_transport._group.source import serve
from ft_transport._lanes import fabric
from ft_transport._lanes.session import fingerprint
from ft_transport._net.cma import TOKEN_BYTES, PeerMemory
from ft_transport._options import Options
from ft_transport._plan.blocks import Block, Held, held
from ft_transport._plan.source import SourcePlan
from ft_transport._telemetry.report import PeerReport, TransferReport
from ft_transport.errors import LocalProtocolError
from ft_transport.testing import FaultProxy
from tests.helpers import Wrapped

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=20)
STEP = 7
NUMEL = 6 << 20
# What comes down a lane before the first payload byte is less than this; what follows is more.
AT = 1 << 20

State = dict[str, torch.Tensor]
Move = Callable[[torch.Tensor], None]


def exchange(tensor: torch.Tensor) -> None:
    tensor.data = torch.full_like(tensor, 9)


def shrink(tensor: torch.Tensor) -> None:
    tensor.data = torch.full((4,), 9.0)


def reset(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.set_(torch.full((8,), 9.0))  # type: ignore[call-overload]


def give_back(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def give_half_back(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)


MOVES: list[Move] = [exchange, shrink, reset, give_back, give_half_back]


def make(seed: int) -> State:
    state = {f"w{i}": torch.full((NUMEL // 4,), float(seed + i)) for i in range(4)}
    return {**state, "bias": torch.full((5,), float(seed))}


def in_another_thread(move: Move, tensors: list[torch.Tensor]) -> None:
    thread = threading.Thread(target=lambda: [move(tensor) for tensor in tensors])
    thread.start()
    thread.join()


def lanes(move: Move, side: str, shadow: bool) -> dict[str, Any]:
    state, template = make(1), make(5)
    # The last one is far from what has been read already, whatever the lanes do.
    victims = [*(state if side == "source" else template).values()][-2:]
    done = threading.Event()

    def tamper(connection: int, direction: str, position: int, data: bytes) -> bytes:
        if direction == "down" and position > AT and not done.is_set():
            done.set()
            in_another_thread(move, victims)
        return data

    source: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, host="127.0.0.1")
    one: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, lambda: template, host="127.0.0.1", lanes=1, shadow=shadow)
    with FaultProxy(source.metadata(), tamper) as proxy:
        found = _moved(source, one, proxy.metadata, state)
    assert done.is_set()
    return found


def _moved(source: LaneTransport[Any], one: LaneTransport[Any], metadata: str, state: State) -> dict[str, Any]:
    """How a transfer has ended, on both sides."""
    error: BaseException | None = None
    source.send_checkpoint([1], STEP, state, TIMEOUT)
    try:
        one.recv_checkpoint(0, metadata, STEP, TIMEOUT)
    except Exception as exc:
        error = exc
    report = source.last_report
    source.disallow_checkpoint()
    assert report is not None
    found = {"error": repr(error), "torn": one.torn, "source": repr(report.error), "outcome": report.peers[0].outcome}
    for transport in (source, one):
        transport.shutdown()
    return found


class ActingMemory(PeerMemory):
    """Another process's memory; acts once the first piece of a message has been read from it."""

    acts: list[Callable[[], None]] = []  # noqa: RUF012

    def read_into(self, address: int, view: memoryview) -> None:
        super().read_into(address, view)
        if len(view) > TOKEN_BYTES and self.acts:
            self.acts.pop()()


def direct(move: Move, side: str, shadow: bool) -> dict[str, Any]:
    """As over lanes; but the destination reads the source's memory."""
    state, template = make(1), make(5)
    victims = [*(state if side == "source" else template).values()][-2:]
    ActingMemory.acts[:] = [lambda: in_another_thread(move, victims)]
    fabric.PeerMemory = ActingMemory  # type: ignore[misc]
    source: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, host="127.0.0.1")
    one: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, lambda: template, host="127.0.0.1", lanes=1, shadow=shadow)
    return _moved(source, one, source.metadata(), state)


def relay(move: Move, side: str, shadow: bool) -> dict[str, Any]:
    """The first of a chain loses what it passes on: the second one turns to the source."""
    state, template = make(1), make(5)
    source: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, host="127.0.0.1")
    first: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, lambda: template, host="127.0.0.1")
    second: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, None, host="127.0.0.1", shadow=shadow)
    source.send_checkpoint([1, 2], STEP, state, TIMEOUT)
    first.recv_checkpoint(0, source.metadata(), STEP, TIMEOUT)
    in_another_thread(move, [*template.values()][:4])
    result = second.recv_checkpoint(0, source.metadata(), STEP, TIMEOUT)
    sound = all(torch.equal(result[name], tensor) for name, tensor in state.items())
    with contextlib.suppress(TornStateError):  # what the first one has now is not what was sent
        first.disallow_checkpoint()
    source.disallow_checkpoint()
    for transport in (source, first, second):
        transport.shutdown()
    return {"sound": sound}


def again(move: Move, side: str, shadow: bool) -> dict[str, Any]:
    """What is compared and not moved is read too: the memory goes when its first part has been."""
    state, template = make(1), make(1)
    victims = [*(state if side == "source" else template).values()][-2:]
    done = threading.Event()

    def tamper(connection: int, direction: str, position: int, data: bytes) -> bytes:
        if connection and direction == "up" and not done.is_set():
            done.set()
            in_another_thread(move, victims)
        return data

    source: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, host="127.0.0.1")
    one: LaneTransport[Any] = LaneTransport(
        TIMEOUT, CPU, lambda: template, host="127.0.0.1", lanes=1, skip_unchanged=True
    )
    error: BaseException | None = None
    with FaultProxy(source.metadata(), tamper) as proxy:
        source.send_checkpoint([1], STEP, state, TIMEOUT)
        try:
            one.recv_checkpoint(0, proxy.metadata, STEP, TIMEOUT)
        except Exception as exc:
            error = exc
    source.disallow_checkpoint()
    for transport in (source, one):
        transport.shutdown()
    return {"error": repr(error)}


def read() -> dict[str, Any]:
    """Fingerprints are taken of memory that another thread gives back, and takes anew, all the time."""
    tensor = torch.full((NUMEL,), 1.0)
    nbytes, stop = tensor.nbytes, threading.Event()
    found = {"whole": 0, "voided": 0, "moved": 0}

    def take() -> None:
        while not stop.is_set():
            (block,) = held([Block(tensor)])
            if block.nbytes < nbytes:
                time.sleep(0.001)
                continue
            part = Held(block, 0, nbytes)
            try:
                fingerprint(part.view, part)
                part.check()
                found["whole"] += 1
            except LocalProtocolError:
                found["voided"] += 1

    thread = threading.Thread(target=take)
    thread.start()
    deadline = Deadline(TIMEOUT)
    while min(found["whole"], found["voided"]) < 20 and not deadline.expired():
        tensor.untyped_storage().resize_(0)
        tensor.untyped_storage().resize_(nbytes)
        found["moved"] += 1
        time.sleep(0.002 * (found["moved"] % 8))
    stop.set()
    thread.join()
    return found


class Acting(Wrapped):
    """Acts before the n-th message is posted."""

    def __init__(self, channel: Any, operation: str, at: int, act: Callable[[], None]) -> None:
        super().__init__(channel)
        self.left, self.operation, self.act = at, operation, act

    def _count(self, operation: str, tensor: torch.Tensor) -> None:
        if operation == self.operation and tensor.numel() > 1 << 10:
            self.left -= 1
            if self.left == 0:
                self.act()

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        self._count("send", tensor)
        return super().send(tensor, tag)

    def recv(self, tensor: torch.Tensor, tag: int) -> Pending:
        self._count("recv", tensor)
        return super().recv(tensor, tag)


def group(move: Move, side: str, shadow: bool) -> dict[str, Any]:
    state, template = make(1), make(5)
    victims = [*(state if side == "source" else template).values()][-2:]
    store = torch.distributed.HashStore()
    made: list[Any] = [None, None]

    def join(rank: int) -> None:
        made[rank] = torch.distributed.ProcessGroupGloo(store, rank, 2, TIMEOUT)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends = GroupChannel(made[0], 1, CPU), GroupChannel(made[1], 0, CPU)
    # Each side loses its own memory, once two messages are under way there.
    which, operation = (0, "send") if side == "source" else (1, "recv")
    acting = Acting(ends[which], operation, 3, lambda: in_another_thread(move, victims))
    source, destination = (acting, ends[1]) if side == "source" else (ends[0], acting)
    reports = (
        TransferReport("source", "test", STEP, [PeerReport(1)]),
        TransferReport("destination", "test", STEP, [PeerReport(0)]),
    )
    settings = Options(CPU, verify=True, shadow=shadow)
    errors: list[BaseException | None] = [None, None]

    def run() -> None:
        try:
            receive(destination, STEP, lambda: template, settings, Deadline(TIMEOUT), reports[1])
        except Exception as exc:
            errors[1] = exc

    thread = threading.Thread(target=run)
    thread.start()
    try:
        outbound = SourcePlan(state, STEP, settings, reports[0])
        serve(source, outbound, Deadline(TIMEOUT), reports[0].peers[0])
    except Exception as exc:
        errors[0] = exc
    thread.join()
    assert acting.left <= 0
    return {"error": repr(errors[1]), "torn": reports[1].torn, "source": repr(errors[0]), "outcome": ""}


def main(way: str) -> None:
    if way == "read":
        print(json.dumps(read()))
        return
    for move in MOVES:
        for side in ("destination",) if way == "relay" else ("source", "destination"):
            for shadow in [False, True][: 2 if side == "destination" and way in ("lanes", "direct", "group") else 1]:
                if way == "group" and side == "destination" and not shadow and move in (give_back, give_half_back):
                    continue  # Gloo has the address, and writes there: see docs/faults.md
                ways = {"lanes": lanes, "direct": direct, "group": group, "relay": relay, "again": again}
                found = ways[way](move, side, shadow)
                print(json.dumps({"move": move.__name__, "side": side, "shadow": shadow, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
