"""The examples, run as a reader runs them: real processes, a real Lighthouse, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECOVER = ROOT / "examples" / "recover.py"
TRAIN_DDP = ROOT / "examples" / "train_ddp.py"
MARKER = "FT_TRANSPORT_TEST_RUN"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
STARTUP_TIMEOUT = 60.0  # seconds for interpreters, imports and the first quorum on a busy machine
ENDLESS = ["--steps", "100000", "--kill-step", "50000"]

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


class Example:
    """An example in a process of its own, its output line by line."""

    def __init__(self, script: Path, *arguments: str, cwd: Path, **environment: str) -> None:
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
        inherited = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=cwd,
            env={**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RUST_LOG": "warn", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def wait_for(self, pattern: str, timeout: float) -> re.Match[str]:
        """The next line that ``pattern`` is found in."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no {pattern!r} in {timeout:g} s; output so far:\n{self.output}")
            if line is None:
                pytest.fail(f"ended without {pattern!r}; output:\n{self.output}")
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match

    def wait(self, timeout: float) -> int:
        """The exit status, once all output has been read."""
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        self.lines += [line for line in iter(self._queue.get_nowait, None) if line is not None]
        return status

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10.0)
        self._reader.join(10.0)


@pytest.fixture
def marker() -> Iterator[str]:
    """A value for the environment variable ``MARKER``; what still carries it at the end is killed."""
    value = uuid.uuid4().hex
    yield value
    for pid in marked_processes(value):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked_processes(marker: str) -> list[int]:
    """Processes that live, are no zombies, and were started with the marker in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        # An entry may vanish while it is read; a zombie's environment is empty.
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and f"{MARKER}={marker}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def wait_until_none(marker: str, timeout: float) -> list[int]:
    """What is left of the marked processes after at most ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while (left := marked_processes(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@contextlib.contextmanager
def started(*arguments: object, **keywords: object) -> Iterator[Example]:
    example = Example(*arguments, **keywords)  # type: ignore[arg-type]
    try:
        yield example
    finally:
        example.end()


def small_demo(folder: Path, marker: str, *arguments: str) -> contextlib.AbstractContextManager[Example]:
    options = ["--replicas", "2", "--width", "64", "--output", str(folder / "output"), *arguments]
    return started(RECOVER, *options, cwd=folder, **{MARKER: marker})


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("transport", "placement", "in_place"),
    [
        pytest.param("ft_transport", "--no-in-place", None, marks=pytest.mark.thorough),
        ("lanes", "--in-place", True),
        pytest.param("torchft-pg", "--in-place", True, marks=pytest.mark.thorough),
        pytest.param("torchft-http", "--in-place", None, marks=pytest.mark.thorough),
    ],
)
def test_recover_ends_with_equal_replicas(
    tmp_path: Path, marker: str, transport: str, placement: str, in_place: bool | None
) -> None:
    steps = ["--steps", "24", "--kill-step", "8", "--timeout", "120"]
    with small_demo(tmp_path, marker, "--transport", transport, placement, *steps) as demo:
        status = demo.wait(150.0)
        left = marked_processes(marker)
    assert status == 0, demo.output
    assert left == []
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert summary["passed"] is True
    assert summary["equal"] is True
    assert summary["in_place"] is in_place
    check_recovery(summary, in_place)
    assert (tmp_path / "output" / "recovery.png").read_bytes().startswith(PNG_SIGNATURE)
    assert "\x1b[" not in demo.output
    check_events(tmp_path / "output" / "events.jsonl")


def check_recovery(summary: dict[str, Any], in_place: bool | None) -> None:
    (recovery,) = summary["recoveries"]
    durations = recovery["durations"]
    total = durations.pop("total")
    assert all(seconds > 0 for seconds in durations.values())
    assert sum(durations.values()) == pytest.approx(total)
    assert recovery["transfer"]["nbytes"] == summary["finals"][0]["nbytes"]
    assert recovery["in_place_share"] == (1.0 if in_place else 0.0)
    digests = [final["digest"] for final in summary["finals"]]
    assert len(set(digests)) == 1


def check_events(path: Path) -> None:
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    killed = [event for event in events if event["event"] == "killed"]
    healed = [event for event in events if event["event"] == "healed" and event["incarnation"] == 1]
    assert len(killed) == len(healed) == 1
    assert killed[0]["replica"] == healed[0]["replica"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_recover_compares_a_heal_without_a_standby_and_one_with(tmp_path: Path, marker: str) -> None:
    steps = ["--steps", "24", "--kill-step", "8", "--timeout", "160"]
    with small_demo(tmp_path, marker, "--compare", *steps) as demo:
        status = demo.wait(190.0)
        left = marked_processes(marker)
    assert status == 0, demo.output
    assert left == []
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert (summary["passed"], summary["equal"], summary["in_place"]) == (True, True, True)
    cold, warm = summary["recoveries"]
    assert (cold["standby"], warm["standby"]) == (False, True)
    check_durations(cold, set())
    check_durations(warm, {"interpreter", "imports"})
    totals = [recovery["durations"]["total"] for recovery in (warm, cold)]
    assert summary["standby_share"]["share"] == pytest.approx(totals[0] / totals[1])
    assert re.search(r"\d+\.\d+ s with a standby, \d+\.\d+ s without: \d+%", demo.output)
    check_standby_events(tmp_path / "output" / "events.jsonl")


def check_durations(recovery: dict[str, Any], before_the_kill: set[str]) -> None:
    durations = dict(recovery["durations"])
    total = durations.pop("total")
    assert {name for name, seconds in durations.items() if seconds == 0} == before_the_kill
    assert sum(durations.values()) == pytest.approx(total)
    assert recovery["in_place_share"] == 1.0


def check_standby_events(path: Path) -> None:
    """One process waited, was handed over, and is the replica from then on; its Manager came after."""
    events = [json.loads(line) for line in path.read_text().splitlines()]
    first, second = (event for event in events if event["event"] == "killed")
    own = [event["event"] for event in events if event["replica"] is None]
    assert own == ["started", "interpreter", "imported", "waiting"]
    after = [event for event in events if event["replica"] == second["replica"] and event["incarnation"] == 1]
    assert [event["event"] for event in after][:3] == ["handed_over", "ready", "receiving"]
    waiting = next(event for event in events if event["event"] == "waiting")
    assert first["time"] < waiting["time"] < second["time"] < after[0]["time"]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("signum", "status"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.thorough),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.thorough),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_recover_leaves_no_standby_behind(tmp_path: Path, marker: str, signum: int, status: int) -> None:
    with small_demo(tmp_path, marker, "--standby", *ENDLESS) as demo:
        demo.wait_for(r"standby .* waits for a replica to die", 2 * STARTUP_TIMEOUT)
        assert len(marked_processes(marker)) == 4
        demo.process.send_signal(signum)
        assert demo.wait(15.0) == status, demo.output
        assert wait_until_none(marker, 5.0 if signum == signal.SIGKILL else 0.0) == []


@pytest.mark.timeout(200)
def test_recover_tells_when_the_standby_fails(tmp_path: Path, marker: str) -> None:
    with small_demo(tmp_path, marker, "--standby", *ENDLESS) as demo:
        demo.wait_for(r"standby .* waits for a replica to die", 2 * STARTUP_TIMEOUT)
        os.kill(newest(marked_processes(marker)), signal.SIGKILL)
        assert demo.wait(15.0) == 1
        assert "failed: the standby ended by itself" in demo.output
        assert marked_processes(marker) == []


def newest(pids: list[int]) -> int:
    """The process that was started last."""
    return max(pids, key=lambda pid: int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("signum", "status"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.thorough),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.thorough),
    ],
)
def test_recover_leaves_no_process_behind(tmp_path: Path, marker: str, signum: int, status: int) -> None:
    with small_demo(tmp_path, marker, "--transport", "torchft-pg", *ENDLESS) as demo:
        demo.wait_for(r"step \d+ +loss", STARTUP_TIMEOUT)
        assert len(marked_processes(marker)) == 3
        demo.process.send_signal(signum)
        assert demo.wait(15.0) == status, demo.output
        # Only where the parent could not see to it itself may they need a moment.
        assert wait_until_none(marker, 5.0 if signum == signal.SIGKILL else 0.0) == []


@pytest.mark.timeout(120)
def test_recover_tells_when_a_replica_fails(tmp_path: Path, marker: str) -> None:
    with small_demo(tmp_path, marker, "--transport", "torchft-pg", *ENDLESS) as demo:
        demo.wait_for(r"step \d+ +loss", STARTUP_TIMEOUT)
        replica = next(pid for pid in marked_processes(marker) if pid != demo.process.pid)
        os.kill(replica, signal.SIGKILL)
        assert demo.wait(15.0) == 1
        assert re.search(r"failed: replica \d ended by itself", demo.output)
        assert marked_processes(marker) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "arguments",
    [["--replicas", "1"], ["--width", "100"], ["--kill-step", "80"], ["--kills", "-1"], ["--compare", "--standby"]],
)
def test_recover_refuses_options_that_cannot_work(tmp_path: Path, arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, str(RECOVER), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=50
    )
    assert result.returncode == 2
    assert arguments[0] in result.stderr


@pytest.fixture
def lighthouse() -> Iterator[str]:
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=2000, heartbeat_timeout_ms=1500)
    yield server.address()
    server.shutdown()


REPORT = r"step (\d+) loss \d+\.\d+ replicas 2 state (\w+)"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_train_ddp_heals_a_replica_that_was_killed(tmp_path: Path, lighthouse: str) -> None:
    def replica(index: int) -> contextlib.AbstractContextManager[Example]:
        environment = {
            "TORCHFT_LIGHTHOUSE": lighthouse,
            "REPLICA_GROUP_ID": str(index),
            "NUM_REPLICA_GROUPS": "2",
            "NUM_STEPS": "1000000",
            "WIDTH": "64",
        }
        return started(TRAIN_DDP, cwd=tmp_path, **environment)

    with replica(0) as survivor:
        with replica(1) as victim:
            survivor.wait_for(REPORT, STARTUP_TIMEOUT)
            killed_at = int(victim.wait_for(REPORT, STARTUP_TIMEOUT)[1])
            victim.process.kill()
            victim.process.wait(10.0)
        with replica(1) as again:
            healed = again.wait_for(r"step (\d+) from rank \d complete.*100% in place", STARTUP_TIMEOUT)
            step, digest = again.wait_for(REPORT, 30.0).groups()
            assert int(step) > int(healed[1]) >= killed_at
            assert survivor.wait_for(rf"step {step} loss .* replicas 2 state (\w+)", 30.0)[1] == digest
