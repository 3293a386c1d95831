"""The examples of sharded training and of DiLoCo: real ranks under torchrun, a real Lighthouse, real kills."""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .test_examples import MARKER, ROOT, Example, lighthouse, marked_processes, marker, started  # noqa: F401

TRAIN_DILOCO = ROOT / "examples" / "train_diloco.py"
TRAIN_FSDP2 = ROOT / "examples" / "train_fsdp2.py"
TRAIN_HSDP = ROOT / "examples" / "train_hsdp.py"
STARTUP_TIMEOUT = 90.0  # seconds for torchrun and its ranks, and for the first quorum, on a busy machine
# Ranks share an output: what one prints may end up behind what another one has printed, in the same line.
DIGEST = r"([0-9a-f]{12})"
DILOCO_REPORT = r"step (\d+) loss \d+\.\d+ replicas 2 fragments " + DIGEST
REPORT = r"rank (\d) step (\d+) loss \d+\.\d+ replicas 2 state " + DIGEST
HEALED = r"step (\d+) from rank \d .*complete.* 100% in place, 0\.0 MB fresh"
# What breaks where a state dict is taken or loaded under a running forward.
BROKEN_FORWARD = re.compile(r"mixed torch\.Tensor and DTensor|setStorage")


class Replica(Example):
    """torchrun with the ranks of one replica."""

    def __init__(self, script: Path, index: int, num_ranks: int, max_restarts: int, **keywords: object) -> None:
        # With exactly as many restarts as there are kills, a rank that fails by itself ends the replica, and the test.
        super().__init__(
            Path("-m"),
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={num_ranks}",
            f"--max-restarts={max_restarts}",
            "--monitor-interval=0.1",
            str(script),
            REPLICA_GROUP_ID=str(index),
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            **keywords,  # type: ignore[arg-type]
        )
        self.num_ranks = num_ranks

    def kill(self, rank: int) -> None:
        """SIGKILL for one rank; torchrun ends the others and starts all of them again."""
        self._rank(rank).kill()

    def _rank(self, rank: int) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if child.environ().get("RANK") == str(rank):
                    return child
        raise AssertionError(f"no process of rank {rank}; output:\n{self.output}")

    def wait_for_heal(self) -> int:
        """The step that every rank has fetched, all of it in place."""
        steps = {int(self.wait_for(HEALED, STARTUP_TIMEOUT)[1]) for _ in range(self.num_ranks)}
        assert len(steps) == 1, self.output
        return steps.pop()

    def wait_for_reports(self, beyond: int) -> None:
        """Until every rank has told its digest at a step beyond this one, with both replicas at work."""
        seen: set[str] = set()
        while len(seen) < self.num_ranks:
            rank, step, _ = self.wait_for(REPORT, STARTUP_TIMEOUT).groups()
            if int(step) > beyond:
                seen.add(rank)


@contextlib.contextmanager
def two_replicas(
    script: Path, folder: Path, num_ranks: int, kills: tuple[int, int], **environment: str
) -> Iterator[list[Replica]]:
    with contextlib.ExitStack() as stack:
        replicas = []
        for index in range(2):
            replica = Replica(script, index, num_ranks, kills[index], cwd=folder, **environment)
            stack.callback(replica.end)
            replicas.append(replica)
        yield replicas
        for replica in replicas:
            assert replica.process.poll() is None, replica.output
            replica.process.terminate()  # torchrun passes it on, and waits for its ranks
        for replica in replicas:
            replica.process.wait(30.0)


def check_equal(replicas: list[Replica], num_shards: int) -> None:
    """Ranks that hold the same shard have told the same digest at equal steps, whichever replica they are of."""
    digests: dict[tuple[int, str], list[str]] = defaultdict(list)
    for replica in replicas:
        # The last one, where a step has been told twice: it was told before a kill, and again after a heal.
        told = {(int(m[1]), m[2]): m[3] for m in re.finditer(REPORT, replica.output)}
        for (rank, step), digest in told.items():
            digests[rank % num_shards, step].append(digest)
    compared = {key: found for key, found in digests.items() if len(found) > replicas[0].num_ranks // num_shards}
    assert len(compared) >= num_shards
    assert {key: found for key, found in compared.items() if len(set(found)) > 1} == {}
    assert len({found[0] for found in compared.values()}) == len(compared), "shards differ, and each step changes them"


def environment(lighthouse: str, marker: str) -> dict[str, str]:  # noqa: F811
    return {
        "TORCHFT_LIGHTHOUSE": lighthouse,
        "NUM_REPLICA_GROUPS": "2",
        "NUM_STEPS": "1000000",
        "WIDTH": "64",
        MARKER: marker,
    }


def heal_one_after_the_other(replicas: list[Replica], kills: int, num_shards: int) -> None:
    """Kill a rank of one replica, then of the other, and so on; each time the replica heals and goes on."""
    for replica in replicas:
        replica.wait_for_reports(0)
    for kill in range(kills):
        victim, survivor = replicas[1 - kill % 2], replicas[kill % 2]
        victim.kill((kill // 2 + 1) % victim.num_ranks)
        healed = victim.wait_for_heal()
        for replica in (victim, survivor):
            replica.wait_for_reports(healed)
    for replica in replicas:
        assert not BROKEN_FORWARD.search(replica.output), replica.output
    check_equal(replicas, num_shards)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_train_fsdp2_heals_again_and_again(tmp_path: Path, lighthouse: str, marker: str) -> None:  # noqa: F811
    """Under an asynchronous quorum, so state dicts are taken and filled while forward runs.

    ``FT_TRANSPORT_HEALS=20`` for twenty heals in a row, which take some minutes.
    """
    kills = int(os.environ.get("FT_TRANSPORT_HEALS", "1"))
    with two_replicas(
        TRAIN_FSDP2, tmp_path, 2, (kills // 2, (kills + 1) // 2), **environment(lighthouse, marker)
    ) as replicas:
        heal_one_after_the_other(replicas, kills, 2)
    assert marked_processes(marker) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_train_hsdp_heals_a_replica_that_was_killed(
    tmp_path: Path,
    lighthouse: str,  # noqa: F811
    marker: str,  # noqa: F811
    num_ranks: int,
) -> None:
    """Two ranks hold a model; two or four are a replica: DTensors on a mesh of two dimensions."""
    settings = environment(lighthouse, marker)
    with two_replicas(TRAIN_HSDP, tmp_path, num_ranks, (0, 1), **settings, SHARD="2") as replicas:
        heal_one_after_the_other(replicas, 1, 2)
    assert marked_processes(marker) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_train_diloco_heals_a_replica_that_was_killed(tmp_path: Path, lighthouse: str, marker: str) -> None:  # noqa: F811
    """Killed between two syncs, and healed within the round of the next fragment, which the survivor goes on with."""

    def replica(index: int) -> contextlib.AbstractContextManager[Example]:
        settings = environment(lighthouse, marker)
        return started(TRAIN_DILOCO, cwd=tmp_path, REPLICA_GROUP_ID=str(index), **settings)

    with replica(0) as survivor:
        with replica(1) as victim:
            survivor.wait_for(DILOCO_REPORT, STARTUP_TIMEOUT)
            killed_at = int(victim.wait_for(DILOCO_REPORT, STARTUP_TIMEOUT)[1])
            victim.process.kill()
            victim.process.wait(10.0)
        with replica(1) as again:
            healed = int(again.wait_for(r"step (\d+) from rank \d .*complete.* 100% in place", STARTUP_TIMEOUT)[1])
            assert healed >= killed_at
            # Each of the fragments is averaged once more, with what was healed.
            for step in (healed + 1, healed + 2):
                again.wait_for(rf"step {step} loss .* replicas 2 ", STARTUP_TIMEOUT)
                survivor.wait_for(rf"step {step} loss .* replicas 2 ", STARTUP_TIMEOUT)
    told = [dict(re.findall(DILOCO_REPORT, example.output)) for example in (survivor, again)]
    compared = told[0].keys() & told[1].keys()
    assert {str(healed + 1), str(healed + 2)} <= compared
    assert {step: [each[step] for each in told] for step in compared if told[0][step] != told[1][step]} == {}
