"""Network namespaces with links of a given rate between them, as root; and heals over these.

By itself it prints how long the heals take:

    python -m netns.shaped_links --replicas 1 3 7          (in the folder tests/)
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from multiproc.harness import Workers, workers

from ft_transport import LaneTransport, Progress

from .long_link import enter as enter_namespace

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=60)
STEP = 1
_PREFIX = "ftt"


def rights() -> str:
    """Why namespaces cannot be made here, empty if they can."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        return "needs root, ip and tc"
    name = f"{_PREFIX}{os.getpid()}probe"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "probe0", "type", "bridge")
    except subprocess.CalledProcessError as exc:
        return f"needs the right to make network namespaces: {exc.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def shaped_links(number: int, rate: str, slow: dict[int, str]) -> Iterator[list[str]]:
    """So many namespaces, each with a link of this rate, both ways, to a switch; gone afterwards.

    Args:
        number: How many.
        rate: Of their links.
        slow: Rates of those links that have another one.
    """
    prefix = f"{_PREFIX}{os.getpid()}"
    switch, names = f"{prefix}switch", [f"{prefix}n{i}" for i in range(number)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for i, name in enumerate(names):
            _ip("netns", "add", name)
            port = f"port{i}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            for namespace, device in ((switch, port), (name, "eth0")):
                shape = f"root tbf rate {slow.get(i, rate)} burst 512kb latency 20ms".split()
                add = ["tc", "-n", namespace, "qdisc", "add", "dev", device, *shape]
                subprocess.run(add, check=True, capture_output=True, text=True)
        yield names
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def cut(number: int) -> None:
    """Take a namespace off the switch: its packets vanish, and nobody is told."""
    _ip("-n", f"{_PREFIX}{os.getpid()}switch", "link", "set", f"port{number}", "nomaster")


def mend(number: int) -> None:
    """Undo :func:`cut`."""
    _ip("-n", f"{_PREFIX}{os.getpid()}switch", "link", "set", f"port{number}", "master", "br0")


# ---------------------------------------------------------------------------------- inside a worker


def enter(rank: int, names: list[str]) -> None:
    """Move this process into its namespace."""
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    enter_namespace(names[rank])


def make_state(megabytes: int) -> dict[str, torch.Tensor]:
    period = torch.arange(99_991, dtype=torch.int32).to(torch.uint8)
    size = megabytes * 1_000_000 // 4
    return {f"{i}": period.repeat(size // period.numel() + 1)[i : i + size].clone() for i in range(4)}


_transport: LaneTransport[Any] | None = None
_state: dict[str, torch.Tensor] = {}
_first: float | None = None  # when the first bytes had come


def prepare(megabytes: int, topology: str, source: bool, dies_at: float, stall: timedelta) -> str:
    """Make a transport and its state; gives the metadata."""
    global _transport, _state, _first
    _first = None
    if _transport is not None:
        _transport.shutdown()
    _state = make_state(megabytes)
    if not source:
        for tensor in _state.values():
            tensor.zero_()

    def progress(now: Progress) -> None:
        global _first
        if _first is None and now.nbytes_done:
            _first = time.monotonic()
        if dies_at and now.nbytes_done >= dies_at * now.nbytes_total:
            os.kill(os.getpid(), signal.SIGKILL)

    _transport = LaneTransport(
        TIMEOUT,
        CPU,
        None if source else lambda: _state,
        topology=topology,  # type: ignore[arg-type]
        stall_timeout=stall,
        blocking=True,
        on_progress=None if source else progress,
    )
    return _transport.metadata()


def serve(number: int) -> dict[str, Any]:
    assert _transport is not None
    _transport.send_checkpoint(list(range(1, number + 1)), STEP, _state, TIMEOUT)
    report = _transport.last_report
    assert report is not None
    return report.as_dict()


class Healed(NamedTuple):
    """When a receive began, had bytes, and ended, on the clock that all processes share; whether the state is right."""

    began: float
    first: float
    ended: float
    sound: bool


def heal(metadata: str, megabytes: int, begin: float) -> Healed:
    """Receive, from a moment of the monotonic clock on."""
    assert _transport is not None
    threading.Event().wait(max(0.0, begin - time.monotonic()))
    began = time.monotonic()
    got = _transport.recv_checkpoint(0, metadata, STEP, TIMEOUT)
    ended = time.monotonic()
    _transport.disallow_checkpoint()
    expected = make_state(megabytes)
    assert _first is not None
    return Healed(began, _first, ended, all(torch.equal(got[name], expected[name]) for name in expected))


# ---------------------------------------------------------------------------------- inside the test


class Result(NamedTuple):
    """What a round of heals took.

    Attributes:
        seconds: From the first begin to the last end.
        copies: Bytes that left the source, in copies of the state.
        num_healed: Destinations with the right state.
        firsts: When each destination had its first bytes, in seconds from the first begin, in the order of the chain.
        ends: When each destination was done, in seconds from the first begin, in the order of the chain.
    """

    seconds: float
    copies: float
    num_healed: int
    firsts: list[float]
    ends: list[float]


def measure(
    ranks: Workers,
    number: int,
    megabytes: int,
    topology: str = "chain",
    victim: int = -1,
    stall: timedelta = timedelta(seconds=5),
) -> Result:
    """Heal so many at once from rank 0; the victim, counted from 1, is killed half-way."""
    for rank in range(number + 1):
        ranks[rank].start(prepare, megabytes, topology, rank == 0, 0.5 if rank == victim else 0.0, stall)
    metadata, *_ = [ranks[rank].result() for rank in range(number + 1)]
    ranks[0].start(serve, number)
    begin = time.monotonic() + 0.2
    for rank in range(1, number + 1):
        # One shortly after the other, so that the order of the chain is known.
        ranks[rank].start(heal, metadata, megabytes, begin + 0.01 * rank)
    healed: list[Healed] = [ranks[rank].result() for rank in range(1, number + 1) if rank != victim]
    report = ranks[0].result()
    if victim > 0:
        ranks[victim].wait_dead()
    began = min(each.began for each in healed)
    copies, num_healed = report["nbytes_wire"] / report["nbytes_total"], sum(each.sound for each in healed)
    firsts, ends = [each.first - began for each in healed], [each.ended - began for each in healed]
    return Result(max(ends), copies, num_healed, firsts, ends)


@contextmanager
def replicas(number: int, rate: str, slow: dict[int, str] | None = None) -> Iterator[Workers]:
    """A source and so many destinations, each a process in a namespace of its own; see :func:`shaped_links`."""
    with shaped_links(number + 1, rate, slow or {}) as names, workers(number + 1) as ranks:
        for rank in range(number + 1):
            ranks[rank].start(enter, rank, names)
        for rank in range(number + 1):
            ranks[rank].result()
        yield ranks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 3, 7])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--topology", choices=["chain", "star"], default="chain")
    arguments = parser.parse_args()
    if reason := rights():
        print(reason, file=sys.stderr)
        return 2
    print(f"{arguments.megabytes} MB over links of {arguments.rate}, {arguments.topology}")
    for number in arguments.replicas:
        with replicas(number, arguments.rate) as ranks:
            result = measure(ranks, number, arguments.megabytes, arguments.topology)
            print(f"{number} healed in {result.seconds:.2f} s, {result.copies:.2f} copies left the source", flush=True)
            if number > 2:
                middle = (number + 1) // 2
                result = measure(ranks, number, arguments.megabytes, arguments.topology, victim=middle)
                print(f"  one killed half-way: the others in {result.seconds:.2f} s, {result.copies:.2f} copies")
    return 0


if __name__ == "__main__":
    sys.exit(main())
