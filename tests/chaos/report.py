"""What a run leaves: its figures as JSON, a page in Markdown, and a picture."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from typing import Any

from .checks import Promise
from .figures import REASONS
from .schedule import Plan, draw
from .settings import Settings

__all__ = ["page", "replay", "summary"]


def replay(plan: Plan, settings: Settings) -> str:
    """The command that runs the same schedule again."""
    more = f" --transport {settings.transport}" if settings.transport != Settings.transport else ""
    more += "" if settings.async_quorum else " --sync-quorum"
    more += "" if settings.metric else " --fixed-shapes"
    more += f" --layers {settings.layers}" if settings.layers != Settings.layers else ""
    more += f" --gap {plan.gap:g}" if plan.gap != Plan.gap else ""
    return f"python -m tests.chaos --seed {plan.seed} --minutes {plan.seconds / 60:g}{more}"


def summary(found: dict[str, Any], plan: Plan, settings: Settings, promises: list[Promise], *, whole: bool) -> str:
    """Everything, as JSON."""
    import torch
    import torchft

    everything = {
        "kept": all(promise.kept for promise in promises),
        "whole": whole,
        "replay": replay(plan, settings),
        "promises": {p.name: {"kept": p.kept, "checked": p.checked, "broken": p.broken} for p in promises},
        "figures": found,
        "plan": dataclasses.asdict(plan),
        "settings": dataclasses.asdict(settings),
        "machine": {"cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchft": getattr(torchft, "__version__", "unknown"),
        },
    }
    return json.dumps(everything, indent=2) + "\n"


def page(found: dict[str, Any], plan: Plan, settings: Settings, promises: list[Promise], *, whole: bool) -> str:
    """The report for people, in Markdown."""
    moved = sum(sum(kinds.values()) for kinds in found["by phase"].get("move", {}).values())
    struck = sum(found["strikes"].values())
    parts = [
        "# Chaos: the last report",
        f"{settings.replicas} replicas that train over `{_transport(settings)}`, {found['seconds'] / 60:.1f} minutes"
        f"{'' if whole else ', interrupted'}, {found['kills and stops']} kills and stops, {found['cuts']} cuts; "
        f"{moved} of {struck} struck while bytes moved. State: {_megabytes(_nbytes(found))}. {_machine()}. To replay:",
        f"    {replay(plan, settings)}",
        "![What each replica did when](chaos.png)",
        "## Promises",
        _promises(promises),
        "## Strikes, by what was going on and who was struck",
        _strikes(found["by phase"]),
        "## Figures",
        _figures(found, plan, promises),
        "## Steps that a replica did not commit, by what broke them",
        _lost(found["steps"]["lost by a replica"]),
    ]
    return "\n\n".join(parts) + "\n"


def _transport(settings: Settings) -> str:
    return "LaneTransport" if settings.transport == "lanes" else "PGTransport"


def _nbytes(found: dict[str, Any]) -> int:
    heals = found["heals"]
    return int(heals["nbytes_total"] / heals["complete"]) if heals["complete"] else 0


def _machine() -> str:
    return f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _promises(promises: list[Promise]) -> str:
    rows = []
    for promise in promises:
        verdict = "kept" if promise.kept else f"**broken {len(promise.broken)} times**: {promise.broken[0]}"
        rows.append([promise.text, str(promise.checked), verdict])
    return _table(["promise", "looked at", ""], rows)


def _strikes(by_phase: dict[str, dict[str, dict[str, int]]]) -> str:
    phases = {
        "agree": "before bytes move",
        "move": "while bytes move",
        "done": "received, not yet committed",
        "train": "no heal",
    }
    rows = []
    for phase, name in phases.items():
        for role, kinds in sorted(by_phase.get(phase, {}).items()):
            cuts = kinds.get("cut one", 0) + kinds.get("cut all", 0)
            numbers = [kinds.get("kill", 0), kinds.get("stop", 0), kinds.get("stop and kill", 0), cuts]
            rows.append([name, role, *map(str, numbers)])
    return _table(["what was going on", "struck", "killed", "stopped", "stopped, then killed", "cut off"], rows)


def _figures(found: dict[str, Any], plan: Plan, promises: list[Promise]) -> str:
    heals, recover, steps = found["heals"], found["seconds to recover"], found["steps"]
    resumed = f"{heals['resumed']}"
    if heals["resumed"]:
        kept, total = heals["resumed nbytes_kept"], heals["resumed nbytes_total"]
        resumed += f"; {_megabytes(kept)} of their {_megabytes(total)} ({kept / total:.0%}) were in place already"
    failed = ", ".join(f"{number} {outcome}" for outcome, number in sorted(heals["failed"].items())) or "none"
    wrong = sum(len(promise.broken) for promise in promises if promise.name in ("agreement", "wrong states accepted"))
    planned, struck, withheld = len(draw(plan)), found["faults struck"], found["faults withheld"]
    rows = [
        ["wrong states accepted", str(wrong)],
        [
            "faults of the schedule",
            f"{planned}; {struck} struck, {withheld} withheld, {planned - struck - withheld} found no heal in time",
        ],
        ["heals begun", f"{heals['begun']}; {heals['complete']} complete, {heals['ended by a kill']} ended by a kill"],
        ["receives that failed, by outcome", failed],
        ["left the destination torn", f"{heals['torn']}; {found['stopped torn']} of them stopped, the others healed"],
        ["resumed", resumed],
        ["seconds of a complete receive: median / p99 / longest", _seconds(heals["seconds"])],
        ["seconds from a kill to the first commit: median / p99 / longest", _seconds(recover)],
        ["steps committed", str(steps["committed"])],
        ["attempts at a step that nobody committed", str(steps["attempts that nobody committed"])],
    ]
    for name, longest in found["longest calls"].items():
        rows.append([f"longest call: {name}", f"{longest['seconds']:.2f} s; its time-out: {longest['time-out']:g} s"])
    return _table(["", ""], rows)


def _seconds(spread: dict[str, Any]) -> str:
    if not spread["number"]:
        return "none"
    return f"{spread['median']:.2f} / {spread['p99']:.2f} / {spread['longest']:.2f} (of {spread['number']})"


def _lost(lost: dict[str, int]) -> str:
    return _table(["what broke it", "steps of a replica"], [[reason, str(lost[reason])] for reason in REASONS])
