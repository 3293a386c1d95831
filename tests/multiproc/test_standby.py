"""examples/standby.py: real processes, real kills, a real Lighthouse; it runs examples/train_ddp.py, or a few lines."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from .test_examples import (
    MARKER,
    REPORT,
    ROOT,
    STARTUP_TIMEOUT,
    TRAIN_DDP,
    Example,
    lighthouse,
    marked_processes,
    marker,
    started,
    wait_until_none,
)

__all__ = ["lighthouse", "marker"]

STANDBY = ROOT / "examples" / "standby.py"
TRAINS = r"standby\.py: process (\d+) trains"
READY = r"process (\d+) is ready"
READY_AND_TRAIN = f"""
import os, signal, sys, time
sys.path.insert(0, {str(STANDBY.parent)!r})
from standby import until_needed

until_needed()
# Ranks share one pipe, and ``print`` may write a line in pieces.
os.write(1, b"training in %d\\n" % os.getpid())
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names a pipe by /proc, as the example does")


def train_ddp(index: int, lighthouse: str) -> dict[str, str]:
    """The environment of one of two replicas."""
    return {
        "TORCHFT_LIGHTHOUSE": lighthouse,
        "REPLICA_GROUP_ID": str(index),
        "NUM_REPLICA_GROUPS": "2",
        "NUM_STEPS": "1000000",
        "WIDTH": "64",
        "STANDBY_DELAY": "0.5",
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_standby_heals_in_place_and_so_does_the_next(tmp_path: Path, marker: str, lighthouse: str) -> None:
    environment = {**train_ddp(1, lighthouse), MARKER: marker}
    with (
        started(TRAIN_DDP, cwd=tmp_path, **train_ddp(0, lighthouse)) as survivor,
        started(STANDBY, str(TRAIN_DDP), cwd=tmp_path, **environment) as supervised,
    ):
        survivor.wait_for(REPORT, STARTUP_TIMEOUT)
        active = int(supervised.wait_for(TRAINS, STARTUP_TIMEOUT)[1])
        trained: list[int] = []
        for _ in range(2):
            trained.append(active)
            standby = wait_for_a_ready_standby(supervised, *trained)
            os.kill(active, signal.SIGKILL)
            supervised.wait_for(rf"process {active} ended with -9", 10.0)
            active = int(supervised.wait_for(TRAINS, 10.0)[1])
            assert active == standby
            healed = supervised.wait_for(r"step (\d+) from rank \d complete.*100% in place", STARTUP_TIMEOUT)
            step, digest = supervised.wait_for(REPORT, STARTUP_TIMEOUT).groups()
            assert int(step) > int(healed[1])
            assert survivor.wait_for(rf"step {step} loss .* replicas 2 state (\w+)", STARTUP_TIMEOUT)[1] == digest
        supervised.process.terminate()
        assert supervised.wait(15.0) == 128 + signal.SIGTERM, supervised.output
        assert marked_processes(marker) == []


def wait_for_a_ready_standby(supervised: Example, *others: int) -> int:
    """The process that says, or has said, that it is ready, and is none of ``others``."""
    while not (ready := {int(pid) for pid in re.findall(READY, supervised.output)} - set(others)):
        supervised.wait_for(READY, STARTUP_TIMEOUT)
    (standby,) = ready
    return standby


def supervise(folder: Path, marker: str, script: str, **environment: str) -> contextlib.AbstractContextManager[Example]:
    path = folder / "train.py"
    path.write_text(READY_AND_TRAIN + script)
    return started(STANDBY, str(path), cwd=folder, **{MARKER: marker, "STANDBY_DELAY": "0.1", **environment})


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("script", "status"), [("", 0), ("sys.exit(3)", 3), ("os.abort()", 134)])
def test_its_status_is_the_trainings(tmp_path: Path, marker: str, script: str, status: int) -> None:
    with supervise(tmp_path, marker, script, MAX_RESTARTS="0") as supervised:
        assert supervised.wait(30.0) == status, supervised.output
        assert marked_processes(marker) == []


@pytest.mark.timeout(60)
def test_a_training_that_always_fails_ends(tmp_path: Path, marker: str) -> None:
    with supervise(tmp_path, marker, "sys.exit(3)", MAX_RESTARTS="2") as supervised:
        assert supervised.wait(30.0) == 3
        assert len(re.findall(r"training in \d+", supervised.output)) == 3
        assert marked_processes(marker) == []


@pytest.mark.timeout(60)
def test_nothing_trains_before_its_time(tmp_path: Path, marker: str) -> None:
    with supervise(tmp_path, marker, "time.sleep(1000)") as supervised:
        active = int(supervised.wait_for(r"training in (\d+)", 30.0)[1])
        standby = wait_for_a_ready_standby(supervised, active)
        assert set(marked_processes(marker)) == {supervised.process.pid, active, standby}
        os.kill(standby, signal.SIGKILL)  # one that dies while it waits is replaced, and training goes on
        again = wait_for_a_ready_standby(supervised, active, standby)
        os.kill(active, signal.SIGKILL)
        assert int(supervised.wait_for(r"training in (\d+)", 30.0)[1]) == again
        assert len(re.findall(r"training in", supervised.output)) == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 5), (signal.SIGTERM, 5), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_signal_ends_all(tmp_path: Path, marker: str, signum: int, status: int) -> None:
    handler = "for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda *_: sys.exit(5))\n"
    with supervise(tmp_path, marker, handler + "print('in training', flush=True)\ntime.sleep(1000)") as supervised:
        active = int(supervised.wait_for(r"training in (\d+)", 30.0)[1])
        supervised.wait_for("in training", 30.0)
        wait_for_a_ready_standby(supervised, active)
        supervised.process.send_signal(signum)
        assert supervised.wait(15.0) == status, supervised.output
        assert len(re.findall("in training", supervised.output)) == 1, "the standby began to train"
        assert wait_until_none(marker, 5.0 if signum == signal.SIGKILL else 0.0) == []


@pytest.mark.timeout(60)
def test_a_standby_that_is_not_ready_yet_ends_with_training(tmp_path: Path, marker: str) -> None:
    path = tmp_path / "train.py"
    path.write_text(
        "import os, time\n"
        "if os.path.exists('first'):\n"
        "    open('second', 'w').close()\n"
        "    time.sleep(1000)\n"
        "open('first', 'w').close()\n" + READY_AND_TRAIN + "while not os.path.exists('second'): time.sleep(0.01)\n"
    )
    with started(STANDBY, str(path), cwd=tmp_path, **{MARKER: marker, "STANDBY_DELAY": "0.1"}) as supervised:
        assert supervised.wait(30.0) == 0, supervised.output
        assert marked_processes(marker) == []


@pytest.mark.timeout(60)
def test_ranks_below_a_launcher_wait_and_end_with_it(tmp_path: Path, marker: str) -> None:
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import subprocess, sys\n"
        "ranks = [subprocess.Popen([sys.executable, 'train.py'], start_new_session=True) for _ in range(2)]\n"
        "sys.exit(max(abs(rank.wait()) for rank in ranks))\n"
    )
    (tmp_path / "train.py").write_text(READY_AND_TRAIN + "time.sleep(1000)")
    environment = {MARKER: marker, "STANDBY_DELAY": "0.1"}
    with started(STANDBY, str(launcher), cwd=tmp_path, **environment) as supervised:
        active = {int(supervised.wait_for(r"training in (\d+)", 30.0)[1]) for _ in range(2)}
        while len(set(re.findall(READY, supervised.output)) - set(map(str, active))) < 2:
            supervised.wait_for(READY, 30.0)
        standbys = {int(pid) for pid in re.findall(READY, supervised.output)} - active
        os.kill(
            int(re.findall(TRAINS, supervised.output)[0]), signal.SIGKILL
        )  # the launcher; its ranks see the pipe's end
        assert {int(supervised.wait_for(r"training in (\d+)", 30.0)[1]) for _ in range(2)} == standbys
        deadline = time.monotonic() + 10.0
        while active & set(marked_processes(marker)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not active & set(marked_processes(marker))
        supervised.process.kill()
        assert wait_until_none(marker, 10.0) == []
