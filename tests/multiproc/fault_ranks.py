"""What a rank does in a cell of the table of faults; see ``test_faults.py``. Runs inside of workers."""

from __future__ import annotations

import functools
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.distributed import AllreduceOptions, TCPStore
from torchft.process_group import ProcessGroupGloo

from ft_transport import (
    LaneTransport,
    LocalProtocolError,
    PGTransport,
    Progress,
    RemoteProtocolError,
    TransferReport,
)
from ft_transport._group.channel import GroupChannel, Pending
from ft_transport._group.control import FRAME_TAG
from ft_transport._lanes import fabric as _fabric
from ft_transport._net.cma import PeerMemory
from ft_transport._net.connection import Connection
from ft_transport._net.one_sided import await_closed
from ft_transport._net.stall import StallTimer
from ft_transport._options import LaneOptions, Options
from ft_transport._torchft import lanes as _lanes
from ft_transport._wire.layout import Limits
from ft_transport.bench.groups import join
from ft_transport.testing import FaultProxy, FaultyFabric, FaultyTransport, _proxy
from ft_transport.testing import _fabric as _faulty
from ft_transport.testing._transport import signal_self

from .harness import PATIENCE, Residue, digest, quiet, residue, tell, wait_until

SIZE = 4
DESTINATIONS = [1, 2, 3]
VICTIM = 2  # where a destination has the fault
FRESH = 3  # has no template
STEP = 7
DEADLINE = 2.0  # of calls that must run into it
STALL = 1.0  # after which a silent peer counts as gone, over lanes

KIB, MIB = 1 << 10, 1 << 20
LARGE = [5 * MIB, 3 * MIB, 2 * MIB]
SMALL = [1000 + 7 * i for i in range(30)]
OLD, LATER = 200, 255

# Small messages, so that a small state has many flights.
LIMITS = Limits(message_bytes=256 * KIB, flight_bytes=512 * KIB, pack_below=16 * KIB, window=4)
# Slow enough for faults to strike in the middle.
RATE = 12e6
# By what messages are read, and which read of a destination's stands still where a fault is to strike in its middle.
TCP, CMA, ONE_SIDED = "tcp", "cma", "one_sided"
STILL = 3

_SIGNALS = {
    "killed": signal.SIGKILL,
    "two killed": signal.SIGKILL,
    "terminated": signal.SIGTERM,
    "stopped": signal.SIGSTOP,
    "interrupted": signal.SIGINT,
}

# On the way to the victim, over lanes.
_ON_THE_WAY: dict[str, Callable[[FaultyTransport], FaultyTransport]] = {
    "message damaged": lambda faulty: faulty.corrupt(5),
    "always damaged": lambda faulty: faulty.corrupt(5, times=-1),
    "truncated": lambda faulty: faulty.truncate(5, 100),
    "doubled": lambda faulty: faulty.duplicate(5),
    "frame damaged": lambda faulty: faulty.corrupt("MANIFEST"),
    "lane cut": lambda faulty: faulty.drop_after(3 * MIB, lanes=1),
    "cut": lambda faulty: faulty.drop_after(3 * MIB),
    "frozen": lambda faulty: faulty.freeze_after(3 * MIB),
    "delayed": lambda faulty: faulty.delay(0.02),
    "throttled": lambda faulty: faulty.throttle(10e6),
}
# Those of a group's network are had in memory, and those after the last digest.
_NOT_HERE = {"frozen", "message damaged", "truncated"}


def real(wire: str, who: str, fault: str, phase: str) -> bool:
    """Whether a cell is run with the four ranks of this file."""
    if fault == "queue full" or phase == "after":
        return False
    return wire == "lanes" or who != "network" or fault not in _NOT_HERE


class SlowMemory(PeerMemory):
    """Another process's memory, no quicker to read than a link."""

    rate = RATE

    def read_into(self, address: int, view: memoryview) -> None:
        time.sleep(len(view) / self.rate)
        super().read_into(address, view)


class SmallOptions(Options):
    def limits(self, nbytes: int) -> Limits:
        return LIMITS


class SmallLaneOptions(LaneOptions):
    def limits(self, nbytes: int) -> Limits:
        return LIMITS


@dataclass(frozen=True)
class Case:
    """One cell, the same for all ranks. ``topology`` and ``fabric`` are "" over the group."""

    number: int
    who: str = ""
    fault: str = ""
    phase: str = ""
    topology: str = ""
    fabric: str = ""
    patience: dict[int, float] = field(default_factory=dict)
    victims: tuple[int, ...] = ()

    @property
    def kills(self) -> bool:
        return self.fault in ("killed", "two killed", "terminated")

    @property
    def signals(self) -> signal.Signals | None:
        return _SIGNALS.get(self.fault)

    def fresh(self, rank: int) -> bool:
        """Whether a rank has no template. Where all are to be torn, all have one."""
        return rank == FRESH and self.who == "destination"

    def timeout(self, rank: int) -> timedelta:
        return timedelta(seconds=self.patience.get(rank, 20.0))

    @property
    def strikes(self) -> bool:
        """Whether somebody has the fault once it is known how far all of them are."""
        return bool(self.signals) or self.fault in ("changing", "disallowed")

    @property
    def slow(self) -> bool:
        """Whether bytes must move for longer than it takes to have the fault."""
        return self.phase == "move" and (self.strikes or self.fault == "deadline")

    @property
    def rate(self) -> float:
        return RATE / 6 if self.fault == "deadline" else RATE

    @property
    def past_proxy(self) -> bool:
        """Whether the lanes are cut, or stand still, while messages go past them."""
        return self.fault in ("cut", "frozen") and self.fabric in (CMA, ONE_SIDED)

    @property
    def reads(self) -> bool:
        """Whether messages are read from memory, where that can be."""
        return self.fabric in (CMA, ONE_SIDED) and self.phase in ("move", "verify")

    def stands_still(self, rank: int) -> bool:
        """Whether a read of this rank's is to be under way when the fault strikes, and to end after all is over."""
        hit = rank in self.victims or self.who == "source"
        meanwhile = (self.slow and self.fault != "disallowed") or self.past_proxy
        return self.fabric == ONE_SIDED and rank > 0 and hit and meanwhile

    @property
    def notes(self) -> int:
        """How many MiB of strings make the manifest so large that a fault can strike in its middle."""
        return 12 if self.phase == "manifest" and self.signals else 0


@dataclass
class Outcome:
    """How a call ended in one rank; times of the monotonic clock."""

    began: float
    ended: float
    error: BaseException | None
    report: dict[str, Any]
    sound: bool  # the state is the source's, byte for byte
    progress: list[Progress]

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def raised(self) -> str:
        """The name of the error's public class."""
        public = (cls.__name__ for cls in type(self.error).__mro__ if not cls.__module__.startswith("ft_transport._"))
        return "" if self.error is None else next(public)

    @property
    def torn(self) -> bool:
        """What the error says, or where it is none of ours, the report."""
        return bool(getattr(self.error, "torn", self.report["torn"]))

    def peer(self, rank: int) -> dict[str, Any]:
        (found,) = [peer for peer in self.report["peers"] if peer["rank"] == rank]
        return dict(found)


class Rank:
    """What a worker keeps from case to case."""

    def __init__(self) -> None:
        self.group = ProcessGroupGloo(timeout=timedelta(seconds=60))
        self.template = make_state(old=True)
        self.progress: list[Progress] = []
        # Of a source: all destinations have some of the state, and since then it has changed.
        self.all_have_some = threading.Event()
        self.changed = threading.Event()
        # As the Manager keeps it: with its traceback, whose frames hold whatever they hold.
        self.kept_error: BaseException | None = None
        self.transport: PGTransport[Any] | LaneTransport[Any] | None = None
        self.fabric: FaultyFabric | None = None
        self.stands_still = False
        self.proxy: FaultProxy | None = None
        self.meeting: TCPStore | None = None


_rank: Rank | None = None


def this_rank() -> Rank:
    global _rank
    if _rank is None:
        _rank = Rank()
    return _rank


def make_state(*, old: bool = False, notes: int = 0) -> dict[str, Any]:
    """The state to move, or an untouched template."""
    generator = torch.Generator().manual_seed(1)

    def tensor(nbytes: int) -> torch.Tensor:
        if old:
            return torch.full((nbytes,), OLD, dtype=torch.uint8)
        # Random is slow. The period is a prime, so that no two messages are alike.
        period = torch.randint(0, 100, (99991,), dtype=torch.uint8, generator=generator)
        return period.repeat(nbytes // period.numel() + 1)[:nbytes].clone()

    return {
        "large": [tensor(nbytes) for nbytes in LARGE],
        "small": {f"bias {i}": tensor(nbytes) for i, nbytes in enumerate(SMALL)},
        "step": STEP,
        "notes": [f"{i}" + "n" * MIB for i in range(notes)],
    }


@functools.cache
def expected_digest(notes: int) -> str:
    return digest(make_state(notes=notes))


def tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [*state["large"], *state["small"].values()]


# ------------------------------------------------------------------------------------- the meeting


def new_meeting() -> TCPStore:
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def meet(rank: int, store: int) -> None:
    this_rank().meeting = TCPStore("localhost", store, is_master=False, wait_for_workers=False)


def meeting() -> TCPStore:
    found = this_rank().meeting
    assert found is not None
    return found


def configure(rank: int, address: str) -> None:
    """As the Manager does before a transfer, on the same group object."""
    join(this_rank().group, address, rank, SIZE)


def arrive(case: Case, what: str, number: int = 1) -> int:
    """Count one more rank that has come so far; gives how many have."""
    return int(meeting().add(f"{case.number}/{what}", number))


def arrived(case: Case, what: str) -> int:
    return arrive(case, what, 0)


# ---------------------------------------------------------------------------------------- the call


def transfer(rank: int, case: Case) -> Outcome:
    """Send from rank 0, receive elsewhere, have the fault where it is due; the victim of a kill never returns."""
    this = this_rank()
    this.progress, this.kept_error, this.stands_still = [], None, False
    for tensor in tensors(this.template):
        tensor.fill_(OLD)
    with ExitStack() as stack:
        if case.notes:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            (_fault_in_lane_manifest if case.topology else _fault_in_manifest)(patch, case, rank)
        if case.fault == "clock jumps":
            stack.enter_context(_jumping_clock())
        if case.fabric in (CMA, ONE_SIDED):
            _read_slowly(stack.enter_context(pytest.MonkeyPatch.context()), case, rank)
        return _send(case) if rank == 0 else _receive(rank, case)


def _read_slowly(patch: pytest.MonkeyPatch, case: Case, rank: int) -> None:
    this = this_rank()
    if case.slow or case.past_proxy:
        patch.setattr(SlowMemory, "rate", case.rate)
        for module in (_fabric, _faulty):
            patch.setattr(module, "PeerMemory", SlowMemory)
    # By cma a lane that seems to come from elsewhere is not left.
    patch.setattr(_proxy, "_ADDRESS", "127.0.0.1")
    # What stands still does so until the parent has looked at what it left.
    patch.setattr(_lanes, "_CLOSING", timedelta(milliseconds=10))
    if case.fabric == ONE_SIDED:
        this.fabric = FaultyFabric(ONE_SIDED)
        if case.stands_still(rank):
            this.fabric.delay_at(STILL)


def _send(case: Case) -> Outcome:
    transport = _transport(case, 0, None)
    state = make_state(notes=case.notes)
    meeting().set(f"{case.number}/metadata", transport.metadata())
    wait_until(lambda: arrived(case, "destinations") == len(DESTINATIONS))
    _fault_before(case, 0)

    def call() -> None:
        if case.fault != "nothing to send":
            transport.send_checkpoint(DESTINATIONS, STEP, state, case.timeout(0))
            if case.fault == "disallowed":
                _await_some(transport.last_report)
                transport.disallow_checkpoint()
        elif case.topology:
            wait_until(lambda: arrived(case, "over") == len(DESTINATIONS))

    try:
        with _twisted(case, state):
            outcome = _outcome(transport, call)
            _name_ranks(case, outcome)
        return outcome
    finally:
        for tensor in tensors(state):
            tensor.fill_(LATER)
        transport.shutdown()


def _name_ranks(case: Case, outcome: Outcome) -> None:
    """Lanes do not know which destination is which rank."""
    missing = set(DESTINATIONS)
    for peer in outcome.report["peers"] if case.topology else []:
        for rank in DESTINATIONS:
            if peer["name"].endswith(f"pid {int(meeting().get(f'{case.number}/pid {rank}'))}"):
                peer["rank"] = rank
                missing.discard(rank)
    for peer in outcome.report["peers"]:
        if peer["rank"] < 0:
            peer["rank"] = missing.pop()


def _receive(rank: int, case: Case) -> Outcome:
    step = STEP + (rank in case.victims and case.fault == "other step")
    transport = _transport(case, rank, _template(case, rank))
    meeting().set(f"{case.number}/pid {rank}", str(os.getpid()))
    metadata = meeting().get(f"{case.number}/metadata").decode()
    if case.past_proxy and rank in case.victims:
        this_rank().proxy = FaultProxy(metadata)
        metadata = this_rank().proxy.metadata
    arrive(case, "destinations")
    if rank in case.victims:
        # Not before the others wait for this rank already.
        wait_until(lambda: arrived(case, "destinations") == len(DESTINATIONS))
        _fault_before(case, rank)
    received: list[Any] = []

    def call() -> None:
        with _limited(case, rank):
            received.append(transport.recv_checkpoint(0, metadata, step, case.timeout(rank)))

    try:
        outcome = _outcome(transport, call)
        arrive(case, "over")
        outcome.sound = bool(received) and digest(received[0]) == expected_digest(case.notes)
        with suppress(RemoteProtocolError):  # one whose template cannot take the state is stopped here
            transport.disallow_checkpoint()
        return outcome
    finally:
        transport.shutdown()
        proxy, this_rank().proxy = this_rank().proxy, None
        if proxy is not None:
            proxy.close()


def _template(case: Case, rank: int) -> Callable[[], object] | None:
    template = this_rank().template
    if rank not in case.victims or case.who != "destination":
        return None if case.fresh(rank) else lambda: template
    if case.fault == "no room":
        return None
    if case.fault == "other template":
        return lambda: {**template, "large": [torch.zeros(3, dtype=torch.uint8), *template["large"][1:]]}
    if case.fault == "callback raises":
        return _raises
    if case.fault == "callback blocks":
        return _blocks
    return lambda: template


def _raises() -> object:
    raise ValueError("the optimizer is not there yet")


def _blocks() -> object:
    threading.Event().wait(DEADLINE + 1.0)
    return this_rank().template


def _transport(case: Case, rank: int, template: Callable[[], object] | None) -> FaultyTransport:
    made: PGTransport[Any] | LaneTransport[Any]
    cpu = torch.device("cpu")
    if case.topology:
        made = LaneTransport(
            case.timeout(rank),
            cpu,
            template,
            host="127.0.0.1",
            topology=cast(Any, case.topology),
            stall_timeout=timedelta(seconds=STALL),
            blocking=case.fault != "disallowed",
            on_progress=_progress(case, rank),
            on_mismatch="refuse",
            fabric="auto" if case.fabric == CMA else case.fabric,
        )
        made._options = SmallLaneOptions(**vars(made._options))
    else:
        group, progress = this_rank().group, _progress(case, rank)
        made = PGTransport(group, case.timeout(rank), cpu, template, on_progress=progress, on_mismatch="refuse")
        made._options = SmallOptions(**vars(made._options))
    this_rank().transport = made
    return _with_faults(case, rank, FaultyTransport(made, on_fault=lambda text: tell("fault")))


def _with_faults(case: Case, rank: int, faulty: FaultyTransport) -> FaultyTransport:
    if case.topology and rank and case.slow and case.fabric == TCP:
        faulty.throttle(case.rate)
    if rank not in case.victims or case.past_proxy:
        return faulty
    if case.signals and case.phase == "move":
        return faulty.signal_in("move", case.signals)
    if case.signals and case.phase == "verify":
        return faulty.signal_in("move", case.signals, share=1.0)
    if case.fault == "slow":
        return faulty.throttle(10e6)
    if case.fault == "own error":
        return faulty.raise_in("rebuild" if case.phase == "after" else "verify", OSError("the disk is full"))
    return _ON_THE_WAY.get(case.fault, lambda found: found)(faulty)


def _progress(case: Case, rank: int) -> Callable[[Progress], None]:
    """Notes how far it is; a source that is to have its fault waits until all destinations are so far."""
    this, seen = this_rank(), set[int]()
    this.all_have_some.clear()
    this.changed.clear()
    lock = threading.Lock()

    def progress(now: Progress) -> None:
        this.progress.append(now)
        if case.fault == "changing unseen" and not rank and not case.topology:
            # What is posted has its digest. On a busy machine all of it would be read before the next change.
            this.changed.clear()
            this.changed.wait(PATIENCE)
        # In a chain those behind wait for who stands still before them.
        if case.stands_still(rank) and now.nbytes_done and case.topology == "star":
            _await_still(case)
        if this.proxy is not None and now.nbytes_done:
            this.proxy.cut() if case.fault == "cut" else this.proxy.freeze()
        struck = case.strikes and case.fault != "disallowed" and case.phase in ("move", "verify")
        if rank or 0 not in case.victims or not struck:
            return
        if case.phase == "verify" and now.nbytes_done < now.nbytes_total:
            return
        with lock:
            seen.add(threading.get_ident())
        report = this.transport.last_report if this.transport is not None else None
        if case.topology and report is not None:
            # The callback has a thread of its own, so it holds nobody: they are slow enough.
            _await_some(report, now.nbytes_total if case.phase == "verify" else 1)
            if case.fabric == ONE_SIDED and case.slow and case.topology == "star":
                with suppress(TimeoutError):  # one has failed, which is not for this thread to tell
                    wait_until(lambda: arrived(case, "still") == len(DESTINATIONS), 5 * STALL)
        else:
            wait_until(lambda: len(seen) == len(DESTINATIONS))
        if case.fault == "changing":
            this.all_have_some.set()
            this.changed.wait(PATIENCE)

    return progress


def _await_still(case: Case) -> None:
    """Wait until a read of this rank's stands still, and say so once."""
    this = this_rank()
    fabric = this.fabric
    # Where nobody may read another process's memory, none ever does.
    with suppress(TimeoutError):
        wait_until(lambda: fabric is None or fabric.num_late > 0, STALL)
    if not this.stands_still:
        this.stands_still = True
        arrive(case, "still")


def _await_some(report: TransferReport, nbytes: int = 1) -> None:
    """Wait until all destinations have so much of the state."""
    wait_until(lambda: all(peer.nbytes >= nbytes for peer in report.peers))


def _outcome(transport: FaultyTransport, call: Callable[[], None]) -> Outcome:
    began = time.monotonic()
    error = None
    try:
        call()
    except BaseException as exc:
        error = this_rank().kept_error = exc
    ended = time.monotonic()
    report = transport.last_report
    return Outcome(
        began, ended, error, {"peers": []} if report is None else report.as_dict(), False, this_rank().progress
    )


# -------------------------------------------------------------------------------------- the faults


def have_fault(case: Case) -> None:
    """Die or freeze, here and now."""
    assert case.signals is not None
    tell("fault")
    signal_self(case.signals)


def _fault_before(case: Case, rank: int) -> None:
    if rank in case.victims and case.signals and case.phase == "before":
        have_fault(case)


@contextmanager
def _twisted(case: Case, state: dict[str, Any]) -> Iterator[None]:
    """Make the state one that cannot travel, or change all of it again and again."""
    over, this = threading.Event(), this_rank()

    def change() -> None:
        if case.fault == "changing":
            this.all_have_some.wait(PATIENCE)
        while not over.is_set():
            for tensor in tensors(state):
                (tensor.data if case.fault == "changing unseen" else tensor).bitwise_xor_(1)
            this.changed.set()

    if case.fault == "no code":
        state["model"] = {"hook": lambda: None}
    thread = threading.Thread(target=change)
    if case.fault.startswith("changing"):
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


@contextmanager
def _limited(case: Case, rank: int) -> Iterator[None]:
    """Take this process's memory or descriptors away, for a while."""
    if rank not in case.victims or case.fault not in ("no room", "no descriptors"):
        yield
        return
    if case.fault == "no room":
        # A thread's stack is 8 MiB, an arena for fresh tensors 64 MiB.
        what, limit = resource.RLIMIT_AS, int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + 40 * MIB
    else:
        what, limit = resource.RLIMIT_NOFILE, 1 + max(map(int, os.listdir("/proc/self/fd")[:-1]))
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (limit, hard))
    gaps = []
    try:
        # Numbers below the limit may be free: what was opened before and closed since.
        with suppress(OSError):
            while case.fault == "no descriptors":
                gaps.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(what, (soft, hard))
        for gap in gaps:
            os.close(gap)


@contextmanager
def _jumping_clock() -> Iterator[None]:
    """The wall clock is an hour ahead or behind, every time somebody looks."""
    real_time, ahead = time.time, 3600.0

    def jumping() -> float:
        nonlocal ahead
        ahead = -ahead
        return real_time() + ahead

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", jumping)
        yield


def _fault_in_manifest(patch: pytest.MonkeyPatch, case: Case, rank: int) -> None:
    """The victim has its fault when the first bytes of the manifest have arrived, before the frame's end has."""
    send, recv = GroupChannel.send, GroupChannel.recv

    def patched_recv(self: GroupChannel, tensor: torch.Tensor, tag: int) -> Pending:
        if tag != FRAME_TAG or tensor.numel() < MIB:
            return recv(self, tensor, tag)
        tensor.zero_()
        pending = recv(self, tensor, tag)
        wait_until(lambda: int(tensor[0]) != 0)
        arrive(case, "manifest")
        if rank in case.victims:
            have_fault(case)
        return pending

    def patched_send(self: GroupChannel, tensor: torch.Tensor, tag: int) -> Pending:
        pending = send(self, tensor, tag)
        if 0 in case.victims and tag == FRAME_TAG and tensor.numel() > MIB:
            wait_until(lambda: arrived(case, "manifest") == len(DESTINATIONS))
            _first_has_fault(case)
        return pending

    patch.setattr(GroupChannel, "recv", patched_recv)
    patch.setattr(GroupChannel, "send", patched_send)


def _fault_in_lane_manifest(patch: pytest.MonkeyPatch, case: Case, rank: int) -> None:
    """As :func:`_fault_in_manifest`, over lanes."""
    read, write = Connection.read, Connection.write

    def patched_read(self: Connection, nbytes: int, timer: StallTimer) -> bytearray:
        if nbytes <= MIB:
            return read(self, nbytes, timer)
        begin = read(self, MIB, timer)
        arrive(case, "manifest")
        if rank in case.victims:
            have_fault(case)
        return begin + read(self, nbytes - MIB, timer)

    def patched_write(self: Connection, parts: Any, timer: StallTimer, **options: Any) -> None:
        if 0 in case.victims and sum(map(len, parts)) > 4 * MIB:
            data = b"".join(parts)
            write(self, [data[: 2 * MIB]], timer)
            wait_until(lambda: arrived(case, "manifest") == len(DESTINATIONS))
            _first_has_fault(case)
            parts = [data[2 * MIB :]]
        write(self, parts, timer, **options)

    patch.setattr(Connection, "read", patched_read)
    patch.setattr(Connection, "write", patched_write)


_once = threading.Lock()
_had_fault = -1


def _first_has_fault(case: Case) -> None:
    """The thread of one destination is enough."""
    global _had_fault
    with _once:
        if _had_fault == case.number:
            return
        _had_fault = case.number
        have_fault(case)


# ----------------------------------------------------------------------------------------- a look


def template_bytes(rank: int) -> tuple[str, float, bool]:
    """Fingerprint of the template, which share of it has been written to, and whether by anything changed since."""
    found = tensors(this_rank().template)
    written = sum(int(torch.count_nonzero(tensor != OLD)) for tensor in found)
    share = written / sum(tensor.numel() for tensor in found)
    return digest(found), share, any(bool((tensor == LATER).any()) for tensor in found)


def land(rank: int) -> int:
    """Let what is still being read go on to its end, whoever has given it up. Gives how many reads."""
    fabric, this_rank().fabric = this_rank().fabric, None
    if fabric is None:
        return 0
    num_late = fabric.land()
    fabric.close()
    assert await_closed(timedelta(seconds=PATIENCE))
    assert fabric.num_open == 0
    return num_late


def wait_for(rank: int, peer: int) -> tuple[float, str]:
    """Wait for a message from a peer that sends none, as a collective would; gives seconds and error."""
    began = time.monotonic()
    try:
        this_rank().group.recv([torch.zeros(4)], peer, tag=1).wait(timedelta(seconds=20))
    except RuntimeError as exc:
        return time.monotonic() - began, str(exc)
    return time.monotonic() - began, ""


def allreduce(rank: int) -> float:
    """Add up a tensor over the training group; gives seconds."""
    began = time.monotonic()
    tensor = torch.full((1000,), float(rank))
    this_rank().group.allreduce([tensor], AllreduceOptions()).wait(timedelta(seconds=10))
    assert tensor.tolist() == [float(sum(range(SIZE)))] * 1000
    return time.monotonic() - began


def residue_of(rank: int) -> Residue:
    return residue()


def quiet_residue_of(rank: int) -> tuple[float, Residue]:
    """What is left, and the processor time taken in 0.2 s in which nothing was asked for."""
    spent = quiet(0.2)
    return spent, residue()


def send_wrongly(dst_ranks: list[int]) -> str:
    """What the error says; nothing has been sent."""
    transport = PGTransport[Any](this_rank().group, timedelta(seconds=DEADLINE), torch.device("cpu"))
    with pytest.raises(LocalProtocolError) as info:
        transport.send_checkpoint(dst_ranks, STEP, {"a": 1}, timedelta(seconds=DEADLINE))
    report = transport.last_report
    assert report is not None
    assert report.nbytes_wire == 0
    return str(info.value)
