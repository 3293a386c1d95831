"""A short run with a schedule of its own seed: real Lighthouse, real Managers, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "tests.chaos", "--output", str(output), *more]


def processes(output: Path) -> list[str]:
    """Replicas of the run that are still there."""
    pids = [json.loads(line).get("pid") for line in (output / "events.jsonl").read_text().splitlines()]
    return [pid for pid in filter(None, pids) if Path(f"/proc/{pid}").exists()]


def result(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "chaos.json").read_text())
    assert (output / "chaos.png").stat().st_size > 10_000
    assert "wrong states accepted" in (output / "chaos-report.md").read_text()
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_promise_is_kept(tmp_path: Path) -> None:
    run = command(tmp_path / "out", "--minutes", "0.4", "--seed", "1", "--gap", "2", "--layers", "2")
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = result(tmp_path / "out")
    assert found["kept"]
    assert found["whole"]
    assert found["figures"]["kills and stops"] >= 4
    assert found["figures"]["heals"]["complete"] >= 4
    assert processes(tmp_path / "out") == []


@pytest.mark.timeout(200)
def test_interrupted_it_leaves_no_process_and_a_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = subprocess.Popen(
        command(out, "--seed", "1"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        limit = time.monotonic() + 60.0
        while not (out / "events.jsonl").exists() or '"commit"' not in (out / "events.jsonl").read_text():
            assert time.monotonic() < limit
            time.sleep(0.1)
        # As a terminal does: to all of them.
        os.killpg(run.pid, signal.SIGINT)
        text, _ = run.communicate(timeout=60.0)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 130, text.decode()[-2000:]
    assert not result(out)["whole"]
    assert processes(out) == []
