"""``python -m ft_transport.bench`` from end to end: real processes, real transports, a real kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ft_transport.bench.limits import limits_of
from ft_transport.bench.subjects import SUBJECTS

LIMIT_SECONDS = 110


@contextmanager
def bench(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The benchmark at work in its own process group, of which nothing is left afterwards."""
    command = [sys.executable, "-m", "ft_transport.bench", "--output", str(folder), "--timeout", "20", *arguments]
    # Loopback by its own name: the checks shall not depend on what the host name resolves to.
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        yield process
        process.communicate(timeout=LIMIT_SECONDS)
    finally:
        process.kill()
        process.wait()
        left = still_there(process.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left


def still_there(session: int, patience: float = 5.0) -> list[int]:
    """Processes of the session that do not end by themselves soon."""
    limit = time.monotonic() + patience
    while (pids := [pid for pid, fields in processes() if int(fields[3]) == session]) and time.monotonic() < limit:
        time.sleep(0.05)
    return pids


def processes() -> Iterator[tuple[int, list[str]]]:
    """Process ids with what /proc/<pid>/stat says behind the name: state, parent, group, session …"""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            yield int(path.parent.name), path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue


def workers_of(bench_pid: int, number: int) -> list[int]:
    """The worker processes, grandchildren of the benchmark, once there are ``number`` of them."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        parents = {pid: int(fields[1]) for pid, fields in processes()}
        found = sorted(pid for pid, parent in parents.items() if parents.get(parent) == bench_pid)
        if len(found) == number:
            return found
        time.sleep(0.01)
    raise TimeoutError(f"no {number} workers")


def results(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "bench.json").read_text())
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("state", ["gpt2-adam", pytest.param("views", marks=pytest.mark.thorough)])
def test_all_transports_bring_a_state_over(tmp_path: Path, state: str) -> None:
    arguments = ["--states", state, "--scale", "0.02", "--rounds", "1"]
    with bench(tmp_path, *arguments) as process:
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, out + err
    found = results(tmp_path)
    rows = {(row["state"], row["mode"], row["transport"]): row for row in found["rows"]}
    limits = limits_of(SUBJECTS, one_machine=True, device="cpu")
    assert list(dict.fromkeys(transport for _, _, transport in rows)) == [*limits, *SUBJECTS]
    assert len(rows) == 2 * len([*limits, *SUBJECTS])
    for (_, mode, transport), row in rows.items():
        if mode == "in-place" and transport in SUBJECTS and not SUBJECTS[transport].in_place:
            assert row["status"] == "unsupported"
            continue
        # A machine may forbid it, and then lanes go over TCP.
        if transport == "raw process_vm_readv" and row["status"] == "unsupported":
            continue
        assert row["status"] == ("limit" if transport in limits else "equal"), row
        assert len(row["seconds"]) == 1
        assert len(row["samples"]) == 2
        assert row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"]
        assert row["reference"] == "torchft PGTransport"
        assert row["of_memmove"] > 0
        assert row["cpu_seconds_source"] > 0
        assert row["cpu_seconds_receiver"] > 0
        if transport in SUBJECTS:
            assert row["in_place_share"] == (1.0 if mode == "in-place" else None)
            assert row["limit"] in SUBJECTS[transport].limits
            assert row["of_limit"] > 0
            # Of the loopback's; lanes read memory, where the system lets them.
            assert row["nbytes_wire"] >= row["nbytes"] or row["limit"] == "raw process_vm_readv"
            assert row["nbytes_wire"] >= row["nbytes"] or transport.startswith("lanes")
    assert found["environment"].keys() >= {"torch", "torchft", "ft_transport", "python", "cores", "command"}
    assert found["options"]["scale"] == 0.02
    assert out.count("equal") - out.count("equal.") >= len(SUBJECTS)
    assert "\x1b" not in out


def test_a_cold_run_counts_its_first_transfers(tmp_path: Path) -> None:
    arguments = ["--states", "tiny", "--modes", "in-place", "--scale", "0.1", "--rounds", "2", "--transports", "lanes"]
    arguments += ["--cold", "0.1"]
    with bench(tmp_path, *arguments) as process:
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, out + err
    rows = [row for row in results(tmp_path)["rows"] if row["transport"] == "lanes"]
    assert [(row["mode"], row["status"], len(row["samples"])) for row in rows] == [("in-place", "equal", 2)]
    assert "tiny · in-place · cold" in out


def test_growth_is_fitted_and_shown(tmp_path: Path) -> None:
    arguments = ["--growth", "100x10MB", "--modes", "in-place", "--transports", "lanes", "--rounds", "1"]
    with bench(tmp_path, *arguments) as process:
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, out + err
    found = json.loads((tmp_path / "bench.json").read_text())
    (growth,) = found["growth"]
    assert [point["state"] for point in growth["points"]] == ["10x1MB", "10x10MB", "100x1MB", "100x10MB"]
    assert [len(fit["off"]) for fit in growth["fits"]] == [4, 4, 4]
    assert "growth · in-place · lanes" in out
    assert "each leaf" in out
    assert "4 states: 10x1MB, 10x10MB, 100x1MB, 100x10MB\n" in out


def test_a_killed_worker_costs_one_row_and_not_the_run(tmp_path: Path) -> None:
    transports = "torchft PGTransport,torch _pg_transport"
    arguments = [
        "--states",
        "large",
        "--modes",
        "fresh",
        "--scale",
        "0.05",
        "--rounds",
        "1",
        "--transports",
        transports,
    ]
    with bench(tmp_path, *arguments) as process:
        os.kill(workers_of(process.pid, 2)[1], signal.SIGKILL)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 3, out + err
    *_, killed, other = results(tmp_path)["rows"]
    assert (killed["status"], other["status"]) == ("failed", "equal")
    assert "SIGKILL" in killed["note"]
    assert other["reference"] == "torch _pg_transport"


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    with bench(tmp_path, "--states", "tiny") as process:
        workers_of(process.pid, 2)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err


@pytest.mark.thorough
def test_workers_leave_with_their_parent(tmp_path: Path) -> None:
    with bench(tmp_path, "--states", "tiny") as process:
        workers_of(process.pid, 2)
        process.kill()


def test_ranks_on_several_machines(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--address", f"127.0.0.1:{port}", "--receivers", "2"]
    chosen = ["--states", "large", "--scale", "0.01", "--rounds", "1", "--transports", "group,torchft HTTP"]
    with (
        bench(tmp_path / "1", *arguments, "--rank", "1") as first,
        bench(tmp_path / "2", *arguments, "--rank", "2") as second,
        bench(tmp_path / "0", *arguments, *chosen) as leader,
    ):
        out, err = leader.communicate(timeout=LIMIT_SECONDS)
        assert leader.returncode == 0, out + err
        for follower in (first, second):
            _, err = follower.communicate(timeout=20)
            assert follower.returncode == 0, err
    rows = results(tmp_path / "0")["rows"]
    of = ["memmove", "raw TCP", "raw Gloo", "group", "torchft HTTP"]
    assert [row["transport"] for row in rows] == of * 2
    assert [row["status"] for row in rows] == [*["limit"] * 3, "equal", "equal", *["limit"] * 3, "equal", "unsupported"]
    assert [len(of_turn) for of_turn in rows[3]["samples"]] == [3, 3]
    assert rows[3]["nbytes_wire"] is None


@pytest.mark.parametrize("arguments", [["--states", "nothing"], ["--rank", "3"]])
def test_wrong_arguments_start_nothing(tmp_path: Path, arguments: list[str]) -> None:
    with bench(tmp_path, *arguments) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "usage" in err
