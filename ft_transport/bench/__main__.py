"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.status import Status
from rich.text import Text

import ft_transport
from ft_transport.bench.groups import torchft_version
from ft_transport.bench.growth import Growth, growths, points
from ft_transport.bench.measure import free_nbytes
from ft_transport.bench.plan import MODES, Case, Options, Turn
from ft_transport.bench.results import Row, exit_status
from ft_transport.bench.run import Site, follow, lead
from ft_transport.bench.states import STATES, parse_size
from ft_transport.bench.subjects import REFERENCE, SUBJECTS
from ft_transport.bench.table import LEGEND, WIDTH, render, render_growth

DESCRIPTION = """\
Moves the same states by several transports, turn by turn, and checks every byte. What bounds them (memmove, raw
process_vm_readv, TCP, Gloo) takes turns with them. Warm, unless --cold: the machine has memory ready for what arrives.

Without --address all ranks run on this machine. On two machines or more give all of them the same command with
the --address of the first, where rank 0 serves, and to each its --rank; the options of rank 0 count. Groups and
the HTTP server use the interface that the host name resolves to (for gloo, GLOO_SOCKET_IFNAME says another)."""

# How far states grow, and by which transports unless others are named.
GROWTH = (100_000, 8 * 10**9)
GROWING = ["lanes", "group", REFERENCE]

EPILOG = """\
exit status: 0, or 1 if a state arrived wrong, or 3 if a transport failed.
Other traffic over the loopback interface is counted with a transport's; in a namespace of its own there is none:
  unshare --user --map-root-user --net sh -c 'ip link set lo up; exec python -m ft_transport.bench'"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.rank and arguments.address is None:
        parser.error("--rank: expected --address with it, where rank 0 runs")
    if arguments.rank > arguments.receivers:
        parser.error(f"--rank {arguments.rank}: the ranks are 0 to {arguments.receivers}, see --receivers")
    options = _options(arguments)
    # Never narrower than the table: rich would cut numbers off, and a log file, which has no width, counts as 80.
    console = Console(width=max(WIDTH, Console().width), highlight=False)
    # Before anything runs: a folder that cannot be made should not cost half an hour of measuring first.
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        return _run(arguments, options, console)
    except KeyboardInterrupt:
        console.print("interrupted")
        # 128 + SIGINT, as a shell would say of a process that the signal has ended.
        return 130


def _run(arguments: argparse.Namespace, options: Options, console: Console) -> int:
    host, port, ranks = _place(arguments)
    site = Site((host, port), ranks, 1 + options.receivers, arguments.output)
    if 0 not in ranks:
        console.print(f"rank {ranks[0]}: the results are shown where rank 0 runs")
        follow(site)
        return 0
    console.print(_conditions(options), style="dim")
    if arguments.growth:
        options, left_out = _grown(arguments, options, len(ranks))
        without = f"; no memory for {', '.join(left_out)}" if left_out else ""
        console.print(f"{len(options.states)} states: {', '.join(options.states)}{without}")
    console.print()

    def on_case(rows: list[Row]) -> None:
        # Dozens of tables of two rows or three say less than the one at the end.
        if not arguments.growth or exit_status(rows):
            console.print(render(rows, options.cold is not None), "")

    with console.status("starting") as status:
        rows = lead(site, options, _show_turn(status, options), on_case)
    growth = growths(rows) if arguments.growth else []
    console.print(render_growth(growth) if growth else Text(LEGEND, "dim"))
    console.print(f"written: {', '.join(_write(arguments.output, rows, options, growth))}")
    return exit_status(rows)


def _grown(arguments: argparse.Namespace, options: Options, num_ranks: int) -> tuple[Options, list[str]]:
    """With the states of a growth, and those that there is no memory for."""
    states, left_out = points(arguments.growth, num_ranks, free_nbytes())
    transports = arguments.transports or GROWING
    return dataclasses.replace(options, states=states, transports=transports, limits=False), left_out


def _place(arguments: argparse.Namespace) -> tuple[str, int, list[int]]:
    """Host and port of the store, and the ranks that run here."""
    if arguments.address is None:
        # Port 0: the system chooses one that is free, so that two benchmarks on one machine do not meet.
        return "127.0.0.1", 0, list(range(1 + arguments.receivers))
    host, port = arguments.address
    return host, port, [arguments.rank]


def _show_turn(status: Status, options: Options) -> Callable[[Case, Turn], None]:
    def show(case: Case, turn: Turn) -> None:
        counted = f"round {turn.round} of {options.rounds}" if turn.round else "warm-up"
        status.update(f"{case}, {counted}: {turn.transport}")

    return show


def _write(folder: Path, rows: list[Row], options: Options, growth: list[Growth]) -> list[str]:
    """Write the results; gives the files' names."""
    results = {
        "environment": environment(),
        "options": vars(options),
        "rows": [row.as_dict() for row in rows],
        "growth": [dataclasses.asdict(each) for each in growth],
    }
    (folder / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    if growth:
        return [f"{folder}/bench.json"]
    # Not at the top: the worker processes import this module too, and have no use for it.
    # It takes matplotlib half a second and 30 MB to be there, with which a worker's memory would then begin.
    from ft_transport.bench.plot import draw

    draw(rows, folder / "bench.png", _conditions(options))
    return [f"{folder}/bench.json", "bench.png"]


def environment() -> dict[str, Any]:
    """What a reader must know to compare the figures with others."""
    return {
        "ft_transport": ft_transport.__version__,
        "torch": torch.__version__,
        "torchft": torchft_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        # Not os.cpu_count(): in a container or under taskset it counts cores that this process may not use.
        "cores": len(os.sched_getaffinity(0)),
        "command": shlex.join(["python", "-m", "ft_transport.bench", *sys.argv[1:]]),
    }


def _conditions(options: Options) -> str:
    about = environment()
    receivers = "one receiver" if options.receivers == 1 else f"{options.receivers} receivers"
    shrunk = "" if options.scale == 1 else f", states scaled by {options.scale:g}"
    cold = "" if options.cold is None else f", cold (new processes, {options.cold:g} s after the last ones)"
    return (
        f"{receivers}, {about['cores']} cores, medians of {options.rounds} rounds{shrunk}{cold}; "
        f"torch {about['torch']}, torchft {about['torchft']}, ft_transport {about['ft_transport']}"
    )


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        states=arguments.states,
        modes=arguments.modes,
        transports=arguments.transports or list(SUBJECTS),
        rounds=arguments.rounds,
        receivers=arguments.receivers,
        scale=arguments.scale,
        seed=arguments.seed,
        timeout_seconds=arguments.timeout,
        device=arguments.device,
        cold=arguments.cold,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ft_transport.bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    states = f"comma-separated, of: {', '.join(STATES)}; or LEAVESxSIZE, as 1000x10MB"
    add("--states", type=_some_of(STATES, parse_size), default=list(STATES), help=states)
    add("--modes", type=_some_of(MODES), default=list(MODES), help=f"comma-separated, of: {', '.join(MODES)}")
    add("--transports", type=_some_of(SUBJECTS), help=f"comma-separated, of: {', '.join(SUBJECTS)}")
    add("--rounds", type=_number(int, 1), default=5, help="rounds that count, after the warm-up (%(default)s)")
    cold = "new processes for each turn, SECONDS (5) after the last ones, and nothing warmed up"
    add("--cold", type=_number(float, 0), nargs="?", const=5.0, metavar="SECONDS", help=cold)
    growth = (
        "in place of --states: from 10 leaves and 1 MB up to this (100000x8GB), and what was fixed, for each leaf, for "
        f"each byte; by {', '.join(GROWING[:-1])} and {GROWING[-1]} unless --transports says others"
    )
    add("--growth", type=_size, nargs="?", const=GROWTH, metavar="LEAVESxSIZE", help=growth)
    add("--receivers", type=_number(int, 1), default=1, help="ranks that receive at once (%(default)s)")
    add("--scale", type=_number(float, 0, 1), default=1.0, help="shrink the states, 0 to 1 (%(default)g)")
    add("--seed", type=int, default=0, help="seed of the values (%(default)s)")
    add("--timeout", type=_number(float, 0, 86_400), default=60.0, help="seconds for one transfer (%(default)g)")
    add("--device", type=_device, default="cpu", help="where the states are, at both ends: cpu, cuda, … (%(default)s)")
    add("--output", type=Path, default=Path("bench-output"), help="folder for JSON, picture, logs (%(default)s)")
    add("--address", type=_address, metavar="HOST:PORT", help="where rank 0 runs; a free port there")
    add("--rank", type=_number(int, 0), default=0, help="with --address: this machine's rank (%(default)s)")
    return parser


def _some_of(
    names: Sequence[str] | dict[str, Any], also: Callable[[str], object] | None = None
) -> Callable[[str], list[str]]:
    def known(name: str) -> bool:
        try:
            return name in names or (also is not None and bool(also(name)))
        except ValueError:
            return False

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        unknown = [name for name in chosen if not known(name)]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are: {', '.join(names)}")
        # A transport named twice would take two turns in a round under one name, and be its own neighbour.
        return list(dict.fromkeys(chosen))

    return parse


def _size(text: str) -> tuple[int, int]:
    try:
        leaves, nbytes = parse_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    if leaves < 100 or nbytes < 10**7:
        raise argparse.ArgumentTypeError(f"expected 100x10MB or more, got {text}")
    return leaves, nbytes


def _number(kind: type[int] | type[float], least: float, most: float = float("inf")) -> Callable[[str], float]:
    """A number from ``least`` to ``most``; a float must be more than ``least``, and not infinite."""

    def parse(text: str) -> float:
        value = kind(text)
        # The other way round NaN would pass, which is in no order to anything.
        if not (least <= value <= most and value < float("inf")) or (kind is float and value == least):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    return parse


def _device(text: str) -> str:
    found = torch.accelerator.current_accelerator()
    here = ["cpu"] if found is None else ["cpu", found.type]
    if text not in here:
        raise argparse.ArgumentTypeError(f"no {text} here; there are: {', '.join(here)}")
    return text


def _address(text: str) -> tuple[str, int]:
    # From the right: an IPv6 address has colons of its own.
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, got {text}")
    return host, int(port)


if __name__ == "__main__":
    sys.exit(main())
