"""The table of faults with real processes, over real Gloo and over lanes: every cell ends as it says, in time.

One source, rank 0, and three destinations. Bytes of the state are below 100, of an untouched template 200, and the
source overwrites its state with 255 once its call is over: every byte tells where it came from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from faults.table import (
    DESTINATION,
    GROUP,
    HEALED,
    LANES,
    LATE,
    LATE_BY,
    MOVE,
    NETWORK,
    NOTICE,
    SOURCE,
    TORN,
    UNTOUCHED,
    AtDestination,
    AtSource,
    Cell,
    Row,
    cells,
)

from . import fault_ranks as ranks_
from .fault_ranks import CMA, DEADLINE, DESTINATIONS, ONE_SIDED, SIZE, STALL, TCP, VICTIM, Case, Outcome
from .harness import Residue, Workers, store_address, workers


class Stage:
    """The four ranks and their meeting point."""

    def __init__(self, ranks: Workers) -> None:
        self.ranks = ranks
        self.store = ranks_.new_meeting()
        self._number = 0
        self._stale = True  # whether the group must be configured anew
        self._baselines: dict[int | None, Residue] = {}
        ranks.each(ranks_.meet, self.store.port)

    def case(self, **kwargs: Any) -> Case:
        """A new case, over a new group where the last one has broken it."""
        for rank in range(SIZE):
            if not self.ranks[rank].idle:  # killed, or left over by a test that failed
                self.ranks.replace(rank)
                self.ranks[rank].call(ranks_.meet, rank, self.store.port)
                self._stale = True
        self._number += 1
        if self._stale:
            self.ranks.each(ranks_.configure, store_address(self.store, f"group {self._number}"))
        self._stale = True  # unless it turns out to work
        return Case(self._number, **kwargs)

    def assert_nothing_kept(self) -> None:
        """Over a new group, each rank has no more threads and descriptors than when it was new.

        Errors of the case before are still kept, and what they hold is seen here.
        """
        self.case()
        for rank, left in enumerate(self.ranks.each(ranks_.residue_of)):
            first = self._baselines.setdefault(self.ranks[rank].process.pid, left)
            assert left.native_threads <= first.native_threads, f"rank {rank}: {first}, {left}"
            assert left.descriptors <= first.descriptors, f"rank {rank}: {first}, {left}"

    def start(self, case: Case) -> None:
        for rank in range(SIZE):
            self.ranks[rank].start(ranks_.transfer, rank, case)

    def results(self, ranks: list[int]) -> dict[int, Outcome]:
        return {rank: self.ranks[rank].result() for rank in ranks}

    def assert_group_works(self) -> None:
        """An allreduce over the training group succeeds at once."""
        for seconds in self.ranks.each(ranks_.allreduce):
            assert seconds < NOTICE[GROUP]
        self._stale = False

    def assert_nothing_left(self, ranks: list[int]) -> None:
        for rank, left in zip(ranks, self.ranks.each(ranks_.quiet_residue_of, ranks=ranks), strict=True):
            spent, residue = left
            assert spent < 0.15, f"rank {rank} spins: {spent:.2f} s of processor time in 0.2 s"
            assert residue.threads == ["MainThread"], f"rank {rank}"
            assert residue.children == [], f"rank {rank}"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with workers(SIZE) as ranks:
        yield Stage(ranks)


# ------------------------------------------------------------------------------------------- a cell


def topologies(cell: Cell) -> list[str]:
    """The order of the destinations matters only once bytes move, and only to their deaths."""
    if cell.row.wire == GROUP:
        return [""]
    both = cell.phase == MOVE and cell.row.who != NETWORK and cell.fault in ("killed", "stopped", "slow")
    return ["star", "chain"] if both else ["star"]


# What happens to the wire is TCP's, but for these: a lane may be lost while messages go past it.
PAST_THE_LANE = ("cut", "frozen")
# What is not slow by itself could be made so only by a proxy, which would be TCP.
NOT_READ = ("slow", "clock jumps")


def fabrics(cell: Cell) -> list[str]:
    """By what messages move, where a cell has come to that."""
    if cell.row.wire == GROUP:
        return [""]
    if cell.phase not in LATE:
        return [CMA]  # as "auto" says
    past = cell.fault in PAST_THE_LANE if cell.row.who == NETWORK else cell.fault not in NOT_READ
    return [TCP, CMA, ONE_SIDED] if past else [TCP]


def often(cell: Cell, topology: str, fabric: str) -> bool:
    """Whether a cell runs every time: the others differ from their neighbours in one thing that hardly matters."""
    if cell.fault == "terminated":
        return cell.phase == MOVE and fabric == TCP
    if fabric in (CMA, ONE_SIDED) and cell.phase in LATE:
        if cell.fault == "frozen":
            return fabric == ONE_SIDED
        struck = {"killed": SOURCE, "stopped": cell.row.who, "changing": SOURCE, "disallowed": SOURCE, "cut": NETWORK}
        return topology == "star" and cell.phase == MOVE and struck.get(cell.fault) == cell.row.who
    return not (topology == "chain" and (cell.fault, cell.row.who) == ("stopped", SOURCE))


CELLS = [
    pytest.param(
        cell,
        topology,
        fabric,
        id="-".join(filter(None, (str(cell), topology, fabric))),
        marks=[] if often(cell, topology, fabric) else [pytest.mark.thorough],
    )
    for cell in cells()
    if ranks_.real(cell.row.wire, cell.row.who, cell.fault, cell.phase)
    for topology in topologies(cell)
    for fabric in fabrics(cell)
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("cell", "topology", "fabric"), CELLS)
def test_cell(stage: Stage, cell: Cell, topology: str, fabric: str) -> None:
    row = cell.row
    case = stage.case(
        who=row.who,
        fault=cell.fault,
        phase=cell.phase,
        topology=topology,
        fabric=fabric,
        patience=patience(cell),
        victims=victims(cell),
    )
    stage.start(case)
    fault_at = time_of_fault(stage, case)
    stopped = case.fault == "stopped"
    gone = [] if not (stopped or case.kills) else list(case.victims)
    if case.fault == "two killed" and row.who == SOURCE:
        stage.ranks[1].end()
        gone.append(1)
    alive = [rank for rank in range(SIZE) if rank not in gone]
    outcomes = stage.results(alive)
    show(outcomes, fault_at)
    check(cell, case, outcomes, fault_at)
    receivers = [rank for rank in alive if rank]
    before = stage.ranks.each(ranks_.template_bytes, ranks=receivers)
    for rank, (_, share, _) in zip(receivers, before, strict=True):
        check_template(row, case, rank, share)
    if stopped:
        alive += wake(stage, cell, case)
    # Whoever has given a read up, or is given up, has it land only now.
    stage.ranks.each(ranks_.land, ranks=sorted(alive))
    if row.wire == GROUP and row.source is not None and row.source.outcome in ("refused", "failed"):
        if row.who == DESTINATION:
            # It takes no part in the step: the others must not wait for it there.
            for seconds, error in stage.ranks.each(ranks_.wait_for, VICTIM, ranks=[0, 1, 3]):
                assert error
                assert seconds < NOTICE[GROUP]
    elif row.wire == LANES and not case.kills:
        stage.assert_group_works()
    stage.assert_nothing_left(sorted(alive))
    assert stage.ranks.each(ranks_.template_bytes, ranks=receivers) == before, "something still writes"
    if case.reads and not any(outcomes[rank].report["peers"][0]["nbytes_direct"] for rank in receivers):
        pytest.skip("this system lets nobody read another process's memory: TCP has served")


def patience(cell: Cell) -> dict[int, float]:
    """Seconds that each rank gives its call."""
    row = cell.row
    if row.when == "deadline":
        given = dict.fromkeys(range(SIZE), DEADLINE)
        if cell.fault in ("deadline", "callback blocks"):
            given = {**dict.fromkeys(DESTINATIONS, 20.0), 0: DEADLINE}
    else:
        given = dict.fromkeys(range(SIZE), 20.0)
    if cell.fault == "stopped" and row.who == DESTINATION:
        given[VICTIM] = 60.0  # it shall find out by itself, not by its own deadline
    return given


def victims(cell: Cell) -> tuple[int, ...]:
    first = 0 if cell.row.who == SOURCE else VICTIM
    return (first, 1) if cell.fault == "two killed" and first else (first,)


def time_of_fault(stage: Stage, case: Case) -> float:
    """When the first victim had its fault, 0 where that cannot be said."""
    if not (case.signals or case.fault == "stopped"):
        return 0.0
    times = []
    for rank in case.victims:
        times.append(stage.ranks[rank].event("fault").time)
        if case.fault == "stopped":
            stage.ranks[rank].wait_stopped()
        elif case.kills:
            stage.ranks[rank].wait_ended()
    return max(times)


def check(cell: Cell, case: Case, outcomes: dict[int, Outcome], fault_at: float) -> None:
    row = cell.row
    hit = DESTINATIONS if row.who == SOURCE else [VICTIM]
    for rank, outcome in outcomes.items():
        seconds = case.patience[rank]
        if rank == 0 and cell.fault == "nothing to send":
            continue
        if cell.fault != "callback blocks" or rank != VICTIM:
            assert outcome.seconds <= seconds + LATE_BY
        if rank == 0:
            check_source(row, case, outcome, hit)
        elif rank in hit and row.destination is not None:
            check_destination(row.destination, outcome)
        elif rank not in case.victims:
            check_destination(AtDestination(HEALED), outcome)
    if fault_at:
        check_notice(cell, case, outcomes, fault_at)
    elif row.when in ("at once", "silent", "absent"):
        assert all(outcome.seconds <= STALL + 2 * LATE_BY for outcome in outcomes.values())


def check_source(row: Row, case: Case, outcome: Outcome, hit: list[int]) -> None:
    assert row.source is not None, "it is dead, or stopped"
    assert outcome.raised == row.source.raises
    for rank in hit:
        assert outcome.peer(rank)["outcome"] in row.source.outcome, outcome.peer(rank)
    for rank in DESTINATIONS:
        if row.who != SOURCE and rank not in (*case.victims, *hit):
            assert outcome.peer(rank)["outcome"] == "complete"


def check_destination(expected: AtDestination, outcome: Outcome) -> None:
    if not expected.raises:
        assert outcome.error is None
    else:
        assert outcome.raised in expected.raises
    assert outcome.sound is (expected.template == HEALED)
    assert outcome.report["torn"] is (expected.template == TORN)
    assert outcome.torn is (expected.template == TORN)


def check_template(row: Row, case: Case, rank: int, share: float) -> None:
    hit = rank in DESTINATIONS if row.who == SOURCE else rank == VICTIM
    template = row.destination.template if hit and row.destination is not None else HEALED
    if template == UNTOUCHED or case.fresh(rank):
        assert share == 0.0
    else:
        assert share > 0.0


def check_notice(cell: Cell, case: Case, outcomes: dict[int, Outcome], fault_at: float) -> None:
    """Whoever lives has noticed soon enough, or as soon as it was done with the others."""
    row = cell.row
    served = [o.ended for rank, o in outcomes.items() if rank and o.error is None and row.who == DESTINATION]
    limit = {
        "at once": NOTICE[row.wire],
        "silent": STALL + LATE_BY,
        "absent": STALL + LATE_BY,
        "deadline": DEADLINE + LATE_BY,
        "in time": 20.0,
    }[row.when]
    for outcome in outcomes.values():
        assert outcome.ended <= max(fault_at, *served, 0.0) + limit, f"{outcome.ended - fault_at:.2f} s"


def wake(stage: Stage, cell: Cell, case: Case) -> list[int]:
    """Let the stopped one go on: the others have given up, and the source has overwritten its state."""
    (rank,) = case.victims
    expected = cell.row.woken
    resumed = time.monotonic()
    stage.ranks[rank].resume()
    late = stage.ranks[rank].result()
    stage.ranks[rank].call(ranks_.land, rank)
    show({rank: late}, resumed)
    assert late.ended - resumed < NOTICE[GROUP]
    if isinstance(expected, AtSource):
        if not expected.raises:
            assert late.error is None
        assert not late.report["complete"] or cell.phase == "verify"
    else:
        assert isinstance(expected, AtDestination)
        check_destination(expected, late)
        _, share, written_late = stage.ranks[rank].call(ranks_.template_bytes, rank)
        # Its read of the source's memory may be the next thing that it does: that is torn, and digests say what it is.
        assert not written_late or case.fabric == CMA, "bytes of a later state"
        assert (share > 0) is (expected.template != UNTOUCHED)
    return [rank]


def show(outcomes: dict[int, Outcome], fault_at: float = 0.0) -> None:
    """What was seen, for whoever reads a failed test."""
    for rank, outcome in outcomes.items():
        after = f", {outcome.ended - fault_at:.3f} s after the fault" if fault_at else ""
        peers = [(peer["outcome"], peer["reason"]) for peer in outcome.report["peers"]]
        print(f"rank {rank}: {outcome.seconds:.3f} s{after}: {outcome.raised} {outcome.error!r} {peers}")


# ------------------------------------------------------------------------------- what is in no cell


@pytest.mark.timeout(60)
def test_two_frozen_destinations(stage: Stage) -> None:
    """Whichever wait expires first closes the pairs of the other."""
    case = stage.case(
        who=DESTINATION, fault="stopped", phase=MOVE, victims=(2, 1), patience={0: DEADLINE, 1: 60.0, 2: 60.0}
    )
    stage.start(case)
    time_of_fault(stage, case)
    outcomes = stage.results([0, 3])
    show(outcomes)
    assert outcomes[3].sound
    assert outcomes[0].raised == "TransferTimeout"
    assert outcomes[0].seconds <= DEADLINE + LATE_BY
    assert outcomes[0].peer(3)["outcome"] == "complete"
    for rank in case.victims:
        assert outcomes[0].peer(rank)["outcome"] in ("timed out", "failed")
        stage.ranks[rank].resume()
        assert stage.ranks[rank].result().raised == "PeerFailure"
    stage.assert_nothing_left(list(range(SIZE)))


@pytest.mark.timeout(60)
def test_progress(stage: Stage) -> None:
    case = stage.case(who=DESTINATION)
    stage.start(case)
    outcomes = stage.results(list(range(SIZE)))
    show(outcomes)
    source = outcomes[0]
    assert source.report["complete"]
    for rank in DESTINATIONS:
        outcome = outcomes[rank]
        assert outcome.sound
        assert outcome.report["in_place_share"] == (0.0 if case.fresh(rank) else 1.0)
        for role, seen in (("source", source), ("destination", outcome)):
            peer = rank if role == "source" else 0
            steps = [now for now in seen.progress if now.peer_rank == peer]
            done = [now.nbytes_done for now in steps]
            assert len(done) >= 2
            assert done == sorted(set(done))
            assert done[-1] == seen.report["nbytes_total"] == sum(ranks_.LARGE) + sum(ranks_.SMALL)
            assert {(now.role, now.step, now.nbytes_total) for now in steps} == {(role, ranks_.STEP, done[-1])}
    stage.assert_nothing_left(list(range(SIZE)))


@pytest.mark.timeout(60)
def test_wrong_rank(stage: Stage) -> None:
    case = stage.case(who=DESTINATION)
    for dst_ranks, reason in (([1, SIZE], f"rank {SIZE}"), ([-1], "rank -1"), ([0, 1], "own"), ([1, 2, 1], "once")):
        assert reason in stage.ranks[0].call(ranks_.send_wrongly, dst_ranks)
    # Nothing was sent: the same group moves a state.
    stage.start(case)
    assert all(outcome.sound for rank, outcome in stage.results(list(range(SIZE))).items() if rank)


def test_nothing_is_kept_by_all_of_them(stage: Stage) -> None:
    stage.assert_nothing_kept()
    stage.assert_nothing_kept()
