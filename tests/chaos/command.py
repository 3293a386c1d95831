"""The command line: one run from start to report."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from pathlib import Path

from .schedule import Plan, draw, spared
from .settings import Settings

__all__ = ["main", "parse"]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kill replicas while they heal.")
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="how long faults come (default: %(default)s)")
    add("--seed", type=int, help="of the schedule; one is chosen, and printed, if there is none")
    add("--gap", type=float, default=Plan.gap, help="mean seconds for each fault (%(default)s)")
    add("--transport", choices=("lanes", "pg"), default="lanes", help="what moves the states (%(default)s)")
    add("--sync-quorum", action="store_true", help="heal before forward, and not beside it")
    add("--layers", type=int, default=Settings.layers, help="size of the state, 12.6 MB each (%(default)s)")
    add("--fixed-shapes", action="store_true", help="no metric that grows with each step")
    add("--output", type=Path, default=Path("chaos-output"), help="folder for everything it writes (%(default)s)")
    add("--plan", action="store_true", help="print the schedule, and run nothing")
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.gap <= 0:
        parser.error("--minutes and --gap: expected more than 0")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(10**6)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    plan = Plan(options.seed, 60 * options.minutes, Settings.replicas, options.gap, options.transport == "lanes")
    if options.plan:
        for fault in draw(plan):
            print(f"{fault}  (spared: replica {spared(plan, fault.at)})")
        return 0
    settings = Settings(
        transport=options.transport,
        async_quorum=not options.sync_quorum,
        layers=options.layers,
        metric=not options.fixed_shapes,
    )
    return _run(plan, settings, options.output)


def _run(plan: Plan, settings: Settings, output: Path) -> int:
    output.mkdir(parents=True, exist_ok=True)
    for name in ("chaos.json", "chaos.png", "chaos-report.md", "events.jsonl", "lighthouse.log", "replica_*.log"):
        for old in output.glob(name):
            old.unlink()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    print(f"seed {plan.seed}: {plan.seconds:g} s, {len(draw(plan))} faults planned, {settings.transport}", flush=True)
    _divert(output / "lighthouse.log")
    from .stage import play

    return play(plan, settings, output)


def _divert(path: Path) -> None:
    """Native code (the Lighthouse logs every quorum) writes to a file; Python keeps the stderr that it had."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with path.open("wb") as log:
        os.dup2(log.fileno(), 2)
