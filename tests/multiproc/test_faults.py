"""One side of a heal dies or freezes at each phase: what the others get, when, and what is left.

Over real Gloo, and over lanes in a chain and in a star.

One source, rank 0, and three destinations. Bytes of the state are below 100, of an untouched template 200, and the
source overwrites its state with 255 once its call is over: every byte tells where it came from.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
from torch.distributed import TCPStore
from torchft.process_group import ProcessGroupGloo

from ft_transport import LaneTransport, PGTransport, TransferError
from ft_transport._channel import GroupChannel, Pending
from ft_transport._control import FRAME_TAG
from ft_transport._lanes import Connection, Patience
from ft_transport.errors import LocalProtocolError, PeerFailure, RemoteProtocolError, TransferTimeout
from ft_transport.report import Progress

from .harness import Residue, Workers, digest, quiet, residue, store_address, tell, wait_until, workers

SIZE = 4
DESTINATIONS = [1, 2, 3]
VICTIM = 2  # where a destination has the fault
STEP = 7
DEADLINE = 6.0
LATE = 1.0  # by how much a call may outlast its deadline
NOTICE = 2.0  # within which a death is known
ANSWER = 1.0  # within which the other side of a living channel knows
LANE_NOTICE = 0.5  # the same as NOTICE, over lanes
STALL = 1.5  # after which a frozen peer counts as gone, over lanes

MIB = 1 << 20
LARGE = [40 * MIB, 24 * MIB, 20 * MIB]  # several flights, so that there is a middle
SMALL = [1000 + 7 * i for i in range(30)]
OLD, LATER = 200, 255

PHASES = ["before", "manifest", "move", "verify"]
FAULTS = ["kill", "stop"]
# Where a fault strikes over lanes; the order of the destinations matters only once bytes move.
LANE_PHASES = [*((phase, "star") for phase in PHASES), ("move", "chain")]


# ---------------------------------------------------------------------------------- inside a worker


@dataclass(frozen=True)
class Case:
    """One heal, the same for all ranks.

    Attributes:
        number: Distinct for each case.
        phase: Where ``victim`` has the fault; "before" it sends or receives, in the middle of the "manifest", when the
            first bytes of the state have arrived ("move"), or when all have ("verify").
        second: A second victim of the same fault.
        fault: "kill", "stop", or "" for none.
        twist: What is wrong with the transfer itself: ``victim``'s "template" or "step" is another one, the state
            contains "code", or is "changing" all the time, past autograd's count too ("changing unseen").
        patience: Seconds that a rank gives its call, where that is not DEADLINE.
        topology: Of the lanes, or "" over the group.
    """

    number: int
    victim: int = -1
    second: int = -1
    phase: str = ""
    fault: str = ""
    twist: str = ""
    fresh: tuple[int, ...] = ()
    patience: dict[int, float] = field(default_factory=dict)
    topology: str = ""

    @property
    def victims(self) -> tuple[int, ...]:
        return (self.victim, self.second)

    def seconds(self, rank: int) -> float:
        return self.patience.get(rank, DEADLINE)

    @property
    def notes(self) -> int:
        """How many MiB of strings make the manifest large."""
        return 24 if self.phase == "manifest" else 0


@dataclass
class Outcome:
    """How a call ended in one rank; times of the monotonic clock."""

    began: float
    ended: float
    error: TransferError | None
    report: dict[str, Any]
    sound: bool  # the state is the source's, byte for byte
    progress: list[Progress]

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def peer(self, rank: int) -> dict[str, Any]:
        (found,) = [peer for peer in self.report["peers"] if peer["rank"] == rank]
        return dict(found)


class Rank:
    """What a worker keeps from case to case."""

    def __init__(self) -> None:
        self.group = ProcessGroupGloo(timeout=timedelta(seconds=60))
        self.template = make_state(old=True)
        self.progress: list[Progress] = []
        # As the Manager keeps it: with its traceback, whose frames hold whatever they hold.
        self.kept_error: BaseException | None = None
        self.meeting: TCPStore | None = None
        self.lock = threading.Lock()
        self.had_fault = -1


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


def configure(rank: int, address: str, size: int = SIZE) -> None:
    """As the Manager does before a transfer, on the same group object."""
    this_rank().group.configure(address, "0", rank, size)


def meet(rank: int, store: int) -> None:
    this_rank().meeting = TCPStore("localhost", store, is_master=False, wait_for_workers=False)


def arrive(case: Case, what: str, number: int = 1) -> int:
    """Count one more rank that has come so far; gives how many have."""
    meeting = this_rank().meeting
    assert meeting is not None
    return int(meeting.add(f"{case.number}/{what}", number))


def arrived(case: Case, what: str) -> int:
    """How many ranks have come so far."""
    return arrive(case, what, 0)


def have_fault(case: Case) -> None:
    """Die or freeze, here and now, once."""
    with this_rank().lock:
        if this_rank().had_fault == case.number:
            return
        this_rank().had_fault = case.number
        tell("fault")
        stopping = time.monotonic()
        os.kill(os.getpid(), signal.SIGKILL if case.fault == "kill" else signal.SIGSTOP)
        # A process that stops itself goes on for a moment.
        wait_until(lambda: time.monotonic() > stopping + 0.05)


def transfer(rank: int, case: Case) -> Outcome:
    """Send from rank 0, receive elsewhere, have the fault where it is due; the victim of a kill never returns."""
    this = this_rank()
    this.progress, this.kept_error = [], None
    for tensor in tensors(this.template):
        tensor.fill_(OLD)
    with pytest.MonkeyPatch.context() as patch:
        if case.phase == "manifest":
            (_fault_in_lane_manifest if case.topology else _fault_in_manifest)(patch, case, rank)
        over = threading.Event()
        watcher = threading.Thread(target=_fault_in_move, args=(case, rank, over))
        if case.phase == "move":
            watcher.start()
        try:
            return _send(case) if rank == 0 else _receive(rank, case)
        finally:
            over.set()
            if watcher.ident is not None:
                watcher.join()


def _send(case: Case) -> Outcome:
    transport = _transport(case, 0, None, _source_progress(case))
    state = make_state(notes=case.notes)
    meeting = this_rank().meeting
    assert meeting is not None
    meeting.set(f"{case.number}/metadata", transport.metadata())
    arrive(case, "source")
    wait_until(lambda: arrived(case, "destinations") == len(DESTINATIONS))
    if case.victim == 0 and case.phase == "before":
        have_fault(case)
    try:
        with _twisted(case, state):
            timeout = timedelta(seconds=case.seconds(0))
            outcome = _outcome(transport, lambda: transport.send_checkpoint(DESTINATIONS, STEP, state, timeout))
            _name_ranks(case, outcome)
            return outcome
    finally:
        for tensor in tensors(state):
            tensor.fill_(LATER)
        transport.shutdown()


def _name_ranks(case: Case, outcome: Outcome) -> None:
    """Lanes do not know which destination is which rank."""
    meeting = this_rank().meeting
    assert meeting is not None
    missing = set(DESTINATIONS)
    for peer in outcome.report["peers"] if case.topology else []:
        for rank in DESTINATIONS:
            if peer["name"].endswith(f"pid {int(meeting.get(f'{case.number}/pid {rank}'))}"):
                peer["rank"] = rank
                missing.discard(rank)
    for peer in outcome.report["peers"]:
        if peer["rank"] < 0:
            peer["rank"] = missing.pop()


def _receive(rank: int, case: Case) -> Outcome:
    template = this_rank().template
    step = STEP
    if rank in case.victims and case.twist == "template":
        template = {**template, "large": [torch.zeros(3, dtype=torch.uint8), *template["large"][1:]]}
    elif rank in case.victims and case.twist == "step":
        step += 1
    transport = _transport(case, rank, template, _destination_progress(case, rank))
    meeting = this_rank().meeting
    assert meeting is not None
    meeting.set(f"{case.number}/pid {rank}", str(os.getpid()))
    metadata = meeting.get(f"{case.number}/metadata").decode()
    arrive(case, "destinations")
    if rank in case.victims and case.phase == "before":
        # Not before the others wait for this rank already.
        wait_until(lambda: arrived(case, "destinations") == len(DESTINATIONS) and arrived(case, "source") == 1)
        have_fault(case)
    received: list[Any] = []
    timeout = timedelta(seconds=case.seconds(rank))

    def call() -> None:
        received.append(transport.recv_checkpoint(0, metadata, step, timeout))

    try:
        outcome = _outcome(transport, call)
        outcome.sound = bool(received) and digest(received[0]) == expected_digest(case.notes)
        transport.disallow_checkpoint()
        return outcome
    finally:
        transport.shutdown()


def _transport(
    case: Case, rank: int, template: dict[str, Any] | None, progress: Callable[[Progress], None]
) -> PGTransport[Any] | LaneTransport[Any]:
    if case.topology:
        return LaneTransport(
            timedelta(seconds=case.seconds(rank)),
            torch.device("cpu"),
            state_dict=None if template is None or rank in case.fresh else lambda: template,
            topology=cast(Any, case.topology),
            stall_timeout=timedelta(seconds=STALL),
            blocking=True,
            progress=progress,
        )
    return PGTransport(
        this_rank().group,
        timedelta(seconds=case.seconds(rank)),
        torch.device("cpu"),
        state_dict=None if template is None or rank in case.fresh else lambda: template,
        progress=progress,
    )


def _outcome(transport: PGTransport[Any] | LaneTransport[Any], call: Callable[[], None]) -> Outcome:
    began = time.monotonic()
    error = None
    try:
        call()
    except TransferError as exc:
        error = this_rank().kept_error = exc
    ended = time.monotonic()
    report = transport.last_report
    assert report is not None
    return Outcome(began, ended, error, report.as_dict(), False, this_rank().progress)


@contextmanager
def _twisted(case: Case, state: dict[str, Any]) -> Iterator[None]:
    """Make the state one that cannot travel ("code"), or change all of it again and again ("changing …")."""
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            for tensor in tensors(state):
                (tensor.data if case.twist == "changing unseen" else tensor).bitwise_xor_(1)

    if case.twist == "code":
        state["model"] = {"hook": lambda: None}
    thread = threading.Thread(target=change)
    if case.twist.startswith("changing"):
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


def _source_progress(case: Case) -> Callable[[Progress], None]:
    """Lets no destination get further than the fault."""
    this = this_rank()

    def progress(now: Progress) -> None:
        this.progress.append(now)
        if case.victim == 0 and case.phase == "move":
            wait_until(lambda: this.had_fault == case.number)
        elif case.victim == 0 and case.phase == "verify" and now.nbytes_done == now.nbytes_total:
            arrive(case, "verify")
            wait_until(lambda: arrived(case, "verify") == len(DESTINATIONS))
            have_fault(case)

    return progress


def _destination_progress(case: Case, rank: int) -> Callable[[Progress], None]:
    this = this_rank()

    def progress(now: Progress) -> None:
        this.progress.append(now)
        if rank in case.victims and case.phase == "verify" and now.nbytes_done == now.nbytes_total:
            have_fault(case)

    return progress


def _fault_in_move(case: Case, rank: int, over: threading.Event) -> None:
    """The victim has its fault when the first bytes have landed in its template; a source, in those of all."""
    first = this_rank().template["large"][0][0]

    def reached() -> bool:
        return arrived(case, "move") == len(DESTINATIONS) if rank == 0 else int(first) != OLD

    if rank not in case.fresh:
        wait_until(lambda: over.is_set() or reached())
    if rank != 0 and not over.is_set():
        arrive(case, "move")
    if rank in case.victims and not over.is_set():
        have_fault(case)


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
        if case.victim == 0 and tag == FRAME_TAG and tensor.numel() > MIB:
            wait_until(lambda: arrived(case, "manifest") == len(DESTINATIONS))
            have_fault(case)
        return pending

    patch.setattr(GroupChannel, "recv", patched_recv)
    patch.setattr(GroupChannel, "send", patched_send)


def _fault_in_lane_manifest(patch: pytest.MonkeyPatch, case: Case, rank: int) -> None:
    """As :func:`_fault_in_manifest`, over lanes."""
    read_into, write = Connection.read_into, Connection.write

    def patched_read(self: Connection, view: memoryview, patience: Patience) -> None:
        if len(view) > MIB:
            read_into(self, view[:MIB], patience)
            view = view[MIB:]
            arrive(case, "manifest")
            if rank in case.victims:
                have_fault(case)
        read_into(self, view, patience)

    def patched_write(self: Connection, parts: Any, patience: Patience) -> None:
        if case.victim == 0 and sum(map(len, parts)) > 4 * MIB:
            data = b"".join(parts)
            write(self, [data[: 2 * MIB]], patience)
            wait_until(lambda: arrived(case, "manifest") == len(DESTINATIONS))
            have_fault(case)
            parts = [data[2 * MIB :]]
        write(self, parts, patience)

    patch.setattr(Connection, "read_into", patched_read)
    patch.setattr(Connection, "write", patched_write)


def template_bytes(rank: int) -> tuple[str, float, bool]:
    """Fingerprint of the template, which share of it has been written to, and whether by anything changed since."""
    found = tensors(this_rank().template)
    written = sum(int((tensor != OLD).sum()) for tensor in found)
    share = written / sum(tensor.numel() for tensor in found)
    return digest(found), share, any(bool((tensor == LATER).any()) for tensor in found)


def wait_for(rank: int, peer: int) -> tuple[float, str]:
    """Wait for a message from a peer that sends none, as a collective would; gives seconds and error."""
    began = time.monotonic()
    try:
        this_rank().group.recv([torch.zeros(4)], peer, tag=1).wait(timedelta(seconds=20))
    except RuntimeError as exc:
        return time.monotonic() - began, str(exc)
    return time.monotonic() - began, ""


def residue_of(rank: int) -> Residue:
    return residue()


def quiet_of(rank: int, seconds: float) -> float:
    return quiet(seconds)


# ---------------------------------------------------------------------------------- inside the test


class Stage:
    """The four ranks and their meeting point."""

    def __init__(self, ranks: Workers) -> None:
        self.ranks = ranks
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._number = 0
        self._baselines: dict[int | None, Residue] = {}
        ranks.each(meet, self.store.port)

    def configure(self, ranks: list[int] | None = None) -> None:
        """A new group of all ranks, or of some."""
        chosen = list(range(SIZE)) if ranks is None else ranks
        self._number += 1
        address = store_address(self.store, f"group {self._number}")
        for position, rank in enumerate(chosen):
            self.ranks[rank].start(configure, position, address, len(chosen))
        for rank in chosen:
            self.ranks[rank].result()

    def case(self, **kwargs: Any) -> Case:
        """A new case over a new group."""
        for rank in range(SIZE):
            if not self.ranks[rank].idle:  # killed, or left over by a test that failed
                self.ranks.replace(rank)
                self.ranks[rank].call(meet, rank, self.store.port)
        self.assert_nothing_kept()
        return Case(self._number, **kwargs)

    def assert_nothing_kept(self) -> None:
        """Over a new group, each rank has no more threads and descriptors than when it was new.

        Errors of the case before are still kept, and what they hold is seen here.
        """
        self.configure()
        for rank, left in enumerate(self.ranks.each(residue_of)):
            first = self._baselines.setdefault(self.ranks[rank].process.pid, left)
            assert left.native_threads <= first.native_threads, f"rank {rank}: {first}, {left}"
            assert left.descriptors <= first.descriptors, f"rank {rank}: {first}, {left}"

    def start(self, case: Case) -> None:
        for rank in range(SIZE):
            self.ranks[rank].start(transfer, rank, case)

    def results(self, ranks: list[int]) -> dict[int, Outcome]:
        return {rank: self.ranks[rank].result() for rank in ranks}

    def run(self, case: Case) -> dict[int, Outcome]:
        self.start(case)
        return self.results(list(range(SIZE)))

    def fault(self, case: Case) -> float:
        """When the victim had its fault."""
        victim = self.ranks[case.victim]
        time_of_fault = victim.event("fault").time
        if case.fault == "kill":
            victim.wait_dead()
        else:
            victim.wait_stopped()
        return time_of_fault

    def assert_nothing_left(self, ranks: list[int]) -> None:
        """No thread, no spinning, and after the next ``configure`` no descriptor either."""
        for rank, spent in zip(ranks, self.ranks.each(quiet_of, 1.0, ranks=ranks), strict=True):
            assert spent < 0.3, f"rank {rank} spins: {spent:.2f} s of processor time in 1 s"
        for rank, left in zip(ranks, self.ranks.each(residue_of, ranks=ranks), strict=True):
            assert left.threads == ["MainThread"], f"rank {rank}"
            assert left.children == [], f"rank {rank}"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with workers(SIZE) as ranks:
        found = Stage(ranks)
        yield found
        found.case()


def show(case: Case, outcomes: dict[int, Outcome], time_of_fault: float = 0.0) -> None:
    """What was seen, for whoever reads a failed test."""
    for rank, outcome in outcomes.items():
        after = f", {outcome.ended - time_of_fault:.3f} s after the fault" if time_of_fault else ""
        print(f"{case}: rank {rank}: {outcome.seconds:.3f} s{after}: {outcome.error!r}")


def learned(source: Outcome, rank: int) -> float:
    """When the source was done with a destination."""
    before = source.report["seconds"].get("describe", 0.0)
    return source.began + float(before) + float(sum(source.peer(rank)["seconds"].values()))


# --------------------------------------------------------------------------------- a destination


@pytest.mark.timeout(120)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_destination(stage: Stage, fault: str, phase: str) -> None:
    # A frozen one shall find out by itself, not by its own deadline.
    case = stage.case(victim=VICTIM, phase=phase, fault=fault, fresh=(3,), patience={VICTIM: 60.0})
    stage.start(case)
    time_of_fault = stage.fault(case)
    others = [rank for rank in DESTINATIONS if rank != VICTIM]
    outcomes = stage.results([0, *others])
    show(case, outcomes, time_of_fault)

    source = outcomes[0]
    for rank in others:
        assert outcomes[rank].error is None
        assert outcomes[rank].sound
        assert source.peer(rank)["outcome"] == "complete"
    assert source.seconds <= DEADLINE + LATE
    if fault == "kill":
        served = max(outcomes[rank].ended for rank in others)
        assert source.error is None
        assert source.ended <= max(time_of_fault, served) + NOTICE
        assert learned(source, VICTIM) <= time_of_fault + NOTICE
        assert source.peer(VICTIM)["outcome"] == "dead"
    else:
        assert isinstance(source.error, TransferTimeout)
        assert source.error.peer_rank == VICTIM
        assert source.peer(VICTIM)["outcome"] == "timed out"

    alive = [0, *others]
    if fault == "stop":
        # The source has overwritten its state by now, and nothing of that may be seen here.
        resumed = time.monotonic()
        stage.ranks[VICTIM].resume()
        late = stage.ranks[VICTIM].result()
        show(case, {VICTIM: late}, resumed)
        assert isinstance(late.error, TransferError)
        assert not late.sound
        assert late.ended - resumed < NOTICE
        assert late.error.torn is (phase in ("move", "verify"))
        _, share, written_late = stage.ranks[VICTIM].call(template_bytes, VICTIM)
        print(f"{share:.1%} of the template written")
        assert not written_late
        assert (share > 0) is late.error.torn
        alive.append(VICTIM)
    stage.assert_nothing_left(alive)


@pytest.mark.timeout(60)
def test_two_frozen_destinations(stage: Stage) -> None:
    case = stage.case(victim=1, second=2, phase="move", fault="stop")
    stage.start(case)
    stage.fault(case)
    outcomes = stage.results([0, 3])
    show(case, outcomes)
    source = outcomes[0]
    assert outcomes[3].sound
    assert isinstance(source.error, TransferTimeout)
    assert source.seconds <= DEADLINE + LATE
    assert source.peer(3)["outcome"] == "complete"
    for rank in (1, 2):
        # Whichever wait expires first closes the pairs of the other.
        assert source.peer(rank)["outcome"] in ("timed out", "failed")
    for rank in (1, 2):
        stage.ranks[rank].resume()
        assert isinstance(stage.ranks[rank].result().error, TransferError)
    stage.assert_nothing_left([0, *DESTINATIONS])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("phase", "topology"), LANE_PHASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_destination_over_lanes(stage: Stage, fault: str, phase: str, topology: str) -> None:
    case = stage.case(
        victim=VICTIM, phase=phase, fault=fault, fresh=(3,), patience={VICTIM: 60.0, 0: 20.0}, topology=topology
    )
    stage.start(case)
    time_of_fault = stage.fault(case)
    others = [rank for rank in DESTINATIONS if rank != VICTIM]
    outcomes = stage.results([0, *others])
    show(case, outcomes, time_of_fault)

    source = outcomes[0]
    assert source.error is None
    for rank in others:
        assert outcomes[rank].error is None
        assert outcomes[rank].sound
        assert source.peer(rank)["outcome"] == "complete"
    served = max(outcomes[rank].ended for rank in others)
    if fault == "kill":
        # One who has not come yet is not known to be dead.
        notice = STALL + LATE if phase == "before" else LANE_NOTICE
        assert source.peer(VICTIM)["outcome"] == ("timed out" if phase == "before" else "dead")
    else:
        notice = STALL + LATE
        assert source.peer(VICTIM)["outcome"] == "timed out"
    assert source.ended <= max(time_of_fault, served) + notice

    alive = [0, *others]
    if fault == "stop":
        # The source has overwritten its state by now, and nothing of that may be seen here.
        resumed = time.monotonic()
        stage.ranks[VICTIM].resume()
        late = stage.ranks[VICTIM].result()
        show(case, {VICTIM: late}, resumed)
        assert late.ended - resumed < NOTICE
        _, share, written_late = stage.ranks[VICTIM].call(template_bytes, VICTIM)
        assert not written_late
        if phase == "verify":  # everything was there and agreed
            assert late.sound
        else:
            assert isinstance(late.error, TransferError)
            assert not late.sound
            assert (share > 0) is late.error.torn
        alive.append(VICTIM)
    stage.assert_nothing_left(alive)


# ------------------------------------------------------------------------------------- the source


@pytest.mark.timeout(120)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_source(stage: Stage, fault: str, phase: str) -> None:
    case = stage.case(victim=0, phase=phase, fault=fault)
    stage.start(case)
    time_of_fault = stage.fault(case)
    outcomes = stage.results(DESTINATIONS)
    show(case, outcomes, time_of_fault)

    torn = phase in ("move", "verify")
    for outcome in outcomes.values():
        assert outcome.error is not None
        assert not outcome.sound
        assert outcome.error.torn is torn
        assert outcome.report["torn"] is torn
        assert outcome.seconds <= DEADLINE + LATE
        if fault == "kill":
            assert isinstance(outcome.error, PeerFailure)
            assert outcome.ended <= time_of_fault + NOTICE
            assert outcome.peer(0)["outcome"] == "dead"
        else:
            assert isinstance(outcome.error, TransferTimeout)
            assert outcome.peer(0)["outcome"] == "timed out"

    before = stage.ranks.each(template_bytes, ranks=DESTINATIONS)
    shares = [share for _, share, _ in before]
    print("shares of the templates written:", *(f"{share:.1%}" for share in shares))
    assert [share > 0 for share in shares] == [torn] * len(DESTINATIONS)
    if fault == "stop":
        stage.ranks[0].resume()
    stage.configure(DESTINATIONS)  # as the Manager does, while the errors are still kept
    stage.assert_nothing_left(DESTINATIONS)
    if fault == "stop":
        late = stage.ranks[0].result()
        show(case, {0: late})
        assert late.report["complete"] is False
    stage.ranks.each(quiet_of, 1.0, ranks=DESTINATIONS)
    assert stage.ranks.each(template_bytes, ranks=DESTINATIONS) == before


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("phase", "topology"), LANE_PHASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_source_over_lanes(stage: Stage, fault: str, phase: str, topology: str) -> None:
    case = stage.case(victim=0, phase=phase, fault=fault, topology=topology, patience={1: 20.0, 2: 20.0, 3: 20.0})
    stage.start(case)
    time_of_fault = stage.fault(case)
    outcomes = stage.results(DESTINATIONS)
    show(case, outcomes, time_of_fault)
    limit = LANE_NOTICE if fault == "kill" else STALL + LATE
    for outcome in outcomes.values():
        assert outcome.ended <= time_of_fault + limit
        if phase == "verify":
            # Everything was there.
            assert outcome.error is None
            assert outcome.sound
            continue
        assert isinstance(outcome.error, PeerFailure)
        assert not outcome.sound
        assert outcome.error.torn is (phase == "move")
        assert outcome.peer(0)["outcome"] in (("dead",) if fault == "kill" else ("timed out", "dead"))

    before = stage.ranks.each(template_bytes, ranks=DESTINATIONS)
    assert [share > 0 for _, share, _ in before] == [phase in ("move", "verify")] * len(DESTINATIONS)
    if fault == "stop":
        stage.ranks[0].resume()
    stage.assert_nothing_left(DESTINATIONS)
    if fault == "stop":
        late = stage.ranks[0].result()
        assert late.error is None
    stage.ranks.each(quiet_of, 1.0, ranks=DESTINATIONS)
    assert stage.ranks.each(template_bytes, ranks=DESTINATIONS) == before


# ---------------------------------------------------------------------------------------- no fault


@pytest.mark.timeout(60)
def test_progress(stage: Stage) -> None:
    case = stage.case(fresh=(3,))
    outcomes = stage.run(case)
    show(case, outcomes)
    source = outcomes[0]
    assert source.error is None
    assert source.report["complete"]
    for rank in DESTINATIONS:
        outcome = outcomes[rank]
        assert outcome.error is None
        assert outcome.sound
        assert outcome.report["in_place_share"] == (0.0 if rank in case.fresh else 1.0)
        for role, seen in (("source", source), ("destination", outcome)):
            peer = rank if role == "source" else 0
            steps = [now for now in seen.progress if now.peer_rank == peer]
            done = [now.nbytes_done for now in steps]
            assert len(done) >= 2
            assert done == sorted(set(done))
            assert done[-1] == seen.report["nbytes_total"] == sum(LARGE) + sum(SMALL)
            assert {(now.role, now.step, now.nbytes_total) for now in steps} == {(role, STEP, done[-1])}
    stage.assert_nothing_left([0, *DESTINATIONS])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("twist", "reason"), [("template", "large.0: expected uint8 (3,)"), ("step", "expected step 8")]
)
def test_refusal(stage: Stage, twist: str, reason: str) -> None:
    case = stage.case(victim=VICTIM, twist=twist)
    outcomes = stage.run(case)
    show(case, outcomes)
    source, refusing = outcomes[0], outcomes[VICTIM]
    assert isinstance(refusing.error, RemoteProtocolError)
    assert reason in str(refusing.error)
    assert not refusing.error.torn
    assert stage.ranks[VICTIM].call(template_bytes, VICTIM)[1] == 0.0
    assert source.error is None
    assert source.peer(VICTIM)["outcome"] == "refused"
    assert reason in source.peer(VICTIM)["reason"]
    assert learned(source, VICTIM) <= refusing.ended + ANSWER
    for rank in (1, 3):
        assert outcomes[rank].sound
        assert source.peer(rank)["outcome"] == "complete"
    # The one that refused takes no part in the step: the others must not wait for it there.
    for seconds, error in stage.ranks.each(wait_for, VICTIM, ranks=[0, 1, 3]):
        assert error
        assert seconds < NOTICE
    stage.assert_nothing_left([0, *DESTINATIONS])


@pytest.mark.timeout(60)
def test_state_that_cannot_travel(stage: Stage) -> None:
    case = stage.case(twist="code")
    outcomes = stage.run(case)
    show(case, outcomes)
    source = outcomes[0]
    assert isinstance(source.error, LocalProtocolError)
    assert "model.hook" in source.error.message
    for rank in DESTINATIONS:
        error = outcomes[rank].error
        assert isinstance(error, PeerFailure)
        assert "model.hook" in error.message
        assert not error.torn
        assert outcomes[rank].ended <= source.ended + ANSWER
    stage.assert_nothing_left([0, *DESTINATIONS])


@pytest.mark.timeout(60)
def test_state_that_changes(stage: Stage) -> None:
    case = stage.case(twist="changing")
    outcomes = stage.run(case)
    show(case, outcomes)
    source = outcomes[0]
    assert isinstance(source.error, LocalProtocolError)
    assert "the state changed while it was sent: large.0" in source.error.message
    for rank in DESTINATIONS:
        error = outcomes[rank].error
        assert isinstance(error, PeerFailure)
        assert "the state changed while it was sent: large.0" in error.message
        assert error.torn
        assert source.peer(rank)["outcome"] == "failed"
        assert learned(source, rank) <= outcomes[rank].ended + ANSWER
    stage.assert_nothing_left([0, *DESTINATIONS])


@pytest.mark.timeout(60)
def test_state_that_changes_past_autograd(stage: Stage) -> None:
    case = stage.case(twist="changing unseen")
    outcomes = stage.run(case)
    show(case, outcomes)
    source = outcomes[0]
    assert source.error is None
    for rank in DESTINATIONS:
        error = outcomes[rank].error
        assert isinstance(error, RemoteProtocolError)
        assert "differ from what the source sent" in error.message
        assert error.torn
        assert source.peer(rank)["outcome"] == "failed"
        assert "differ from what the source sent" in source.peer(rank)["reason"]
        assert learned(source, rank) <= outcomes[rank].ended + ANSWER
    stage.assert_nothing_left([0, *DESTINATIONS])


def send_wrongly(dst_ranks: list[int]) -> str:
    transport = PGTransport[Any](this_rank().group, timedelta(seconds=DEADLINE), torch.device("cpu"))
    with pytest.raises(LocalProtocolError) as info:
        transport.send_checkpoint(dst_ranks, STEP, {"a": 1}, timedelta(seconds=DEADLINE))
    report = transport.last_report
    assert report is not None
    assert report.nbytes_wire == 0
    return str(info.value)


@pytest.mark.timeout(60)
def test_wrong_rank(stage: Stage) -> None:
    case = stage.case()
    for dst_ranks, reason in (([1, SIZE], f"rank {SIZE}"), ([-1], "rank -1"), ([0, 1], "own"), ([1, 2, 1], "once")):
        assert reason in stage.ranks[0].call(send_wrongly, dst_ranks)
    # Nothing was sent: the same group moves a state.
    outcomes = stage.run(case)
    assert [outcomes[rank].sound for rank in DESTINATIONS] == [True] * len(DESTINATIONS)
