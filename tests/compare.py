"""This checkout against another commit: the same heals, turn by turn, in one run.

    make compare BASE=25beb74
    python tests/compare.py 25beb74 --states small --over lanes --rounds 6 --starts 4

For each start a source and a destination of either build, four processes with the same hash seed, all alive at once,
the other build's first each time: so the number of starts should be even. They heal in turn, and each round begins with
the other build: what else the machine does meets both. Ratios are of mean times of the destination's
``recv_checkpoint``, above 1 where this checkout is faster; those of single starts say how much chance there is in it.
CPU is the processor time of both sides, in calls and beside them, and its ratio this checkout's to the other's. What
arrived last is compared with what was sent, path by path and bit by bit.

Runs itself by its path, with either build first on ``PYTHONPATH``: imports nothing but what both have.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = timedelta(seconds=120)
STEP = 7


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("base", help="the commit to compare with")
    add("--states", default="gpt2-adam,small", help="comma-separated, of ft_transport.bench (%(default)s)")
    add("--over", default="lanes,group", help="comma-separated: lanes, lanes-tcp, group (%(default)s)")
    add("--rounds", type=int, default=6, help="heals of each build in each start (%(default)s)")
    add("--starts", type=int, default=4, help="with new processes and a new hash seed (%(default)s)")
    add("--fresh", action="store_true", help="receive into new memory, and not in place")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ft_compare_") as folder:
        archive = subprocess.run(["git", "archive", options.base], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        builds = {"base": Path(folder), "this": ROOT}
        print(f"{'state':<12}{'over':<10}{options.base[:10]:>12}{'this':>12}  ratio  CPU  (of each start)")
        for state in options.states.split(","):
            for over in options.over.split(","):
                compare(builds, state, over, options)
    return 0


def compare(builds: dict[str, Path], state: str, over: str, options: argparse.Namespace) -> None:
    """Measure one state over one transport, and print a line."""
    times: dict[str, list[float]] = {name: [] for name in builds}
    spent = dict.fromkeys(builds, 0.0)
    ratios = []
    for start in range(options.starts):
        own: dict[str, list[float]] = {name: [] for name in builds}
        with contextlib.ExitStack() as stack:
            # By turns here as well: whose memory is taken first has some that is a tenth slower, seen between two pairs
            # of one build in a virtual machine.
            pairs = {
                name: stack.enter_context(pair(builds[name], state, over, start, options.fresh))
                for name in sorted(builds, reverse=start % 2 == 1)
            }
            for turn in range(options.rounds + 1):
                for name in sorted(builds, reverse=(start + turn) % 2 == 1):
                    seconds, cpu_seconds = heal(*pairs[name])
                    if turn:  # the first one warms up
                        own[name].append(seconds)
                        spent[name] += cpu_seconds
            for source, destination in pairs.values():
                assert ask(source, "fingerprint") == ask(destination, "fingerprint"), (
                    "what arrived is not what was sent"
                )
        ratios.append(statistics.mean(own["base"]) / statistics.mean(own["this"]))
        for name in builds:
            times[name] += own[name]
    base, this = (statistics.mean(times[name]) for name in ("base", "this"))
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    cpu = spent["this"] / spent["base"]
    row = f"{state:<12}{over:<10}{base * 1e3:>9.1f} ms{this * 1e3:>9.1f} ms  {base / this:.2f}   {cpu:.2f} ({each})"
    print(row, flush=True)


# ---------------------------------------------------------------------------------- the parent's side

Process = subprocess.Popen[str]


@contextlib.contextmanager
def pair(build: Path, state: str, over: str, seed: int, fresh: bool) -> Iterator[tuple[Process, Process]]:
    """A source and a destination that are ready."""
    environment = {**os.environ, "PYTHONPATH": str(build), "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    started: list[Process] = []
    try:
        for rank in (0, 1):
            command = [sys.executable, __file__, "--worker", str(rank), state, over, str(int(fresh))]
            started.append(
                subprocess.Popen(
                    command, env=environment, cwd=build, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
        source, destination = started
        port = hear(source)
        for process in started:
            tell(process, port)
        for process in started:
            where = hear(process)
            assert Path(where).is_relative_to(build), f"expected the build in {build}, got {where}"
        yield source, destination
        for process in started:
            ask(process, "end")
            process.wait(30)
    finally:
        for process in started:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()


def heal(source: Process, destination: Process) -> tuple[float, float]:
    """One heal; the destination's seconds, and the processor's on both sides."""
    metadata = ask(source, "metadata")
    tell(source, "send")
    tell(destination, ["receive", metadata])
    seconds, cpu_there = hear(destination)
    return float(seconds), float(cpu_there) + float(hear(source))


def tell(process: Process, what: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.flush()


def hear(process: Process) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a worker ended; see above")
    return json.loads(line)


def ask(process: Process, what: Any) -> Any:
    tell(process, what)
    return hear(process)


# ---------------------------------------------------------------------------------- a worker's side


def work(rank: int, name: str, over: str, fresh: bool) -> None:
    import torch
    from torch.distributed import TCPStore
    from torchft.process_group import ProcessGroupGloo

    import ft_transport
    from ft_transport.bench.check import fingerprint
    from ft_transport.bench.states import build, fill_random

    torch.set_num_threads(1)
    say = sys.stdout
    sys.stdout = sys.stderr

    def answer(what: Any) -> None:
        say.write(json.dumps(what) + "\n")
        say.flush()

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    if store is not None:
        answer(store.port)
    port = json.loads(sys.stdin.readline())

    state = build(name, 1.0, STEP)
    fill_random(state, rank)
    user = state["user"]["default"]
    template = (lambda: user) if rank == 1 and not fresh else None
    transport: Any
    if over.startswith("lanes"):
        known = inspect.signature(ft_transport.LaneTransport).parameters
        fabric = {"fabric": "tcp"} if over == "lanes-tcp" and "fabric" in known else {}
        transport = ft_transport.LaneTransport(TIMEOUT, torch.device("cpu"), template, **fabric)
    else:
        group = ProcessGroupGloo(timeout=TIMEOUT)
        group.configure(f"localhost:{port}/compare", str(rank), rank, 2)
        transport = ft_transport.PGTransport(group, TIMEOUT, torch.device("cpu"), template)
    answer(ft_transport.__file__)
    received: Any = state
    for line in sys.stdin:
        what = json.loads(line)
        if what == "metadata":
            answer(transport.metadata())
        elif what == "send":
            before = time.process_time()
            transport.send_checkpoint([1], STEP, state, TIMEOUT)
            transport.disallow_checkpoint()
            answer(time.process_time() - before)
        elif what == "fingerprint":
            answer(fingerprint(received))
        elif what == "end":
            transport.shutdown()
            answer("ended")
            return
        else:
            received = None
            gc.collect()
            began, before = time.perf_counter(), time.process_time()
            received = transport.recv_checkpoint(0, what[1], STEP, TIMEOUT)
            answer([time.perf_counter() - began, time.process_time() - before])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5] == "1")
        # Nothing of interpreter's end matters here, and a group's threads may take their time.
        os._exit(0)
    sys.exit(main())
