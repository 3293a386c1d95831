"""A run as one picture: what each replica did when, where it was struck, and how long it took to come back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, MultipleLocator

from .checks import Promise
from .events import Event, told
from .figures import recoveries, strikes
from .settings import Settings
from .spans import Span, spans

__all__ = ["draw"]

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
STATES = {
    "alive": ("waits for the others", "#d7dbe0"),
    "trains": ("trains", "#7fc79b"),
    "heals": ("receives the state", "#f0a02b"),
    "frozen": ("stopped", "#6aa5e3"),
}
MARKS = {
    "kill": ("killed (hollow: not in a heal)", "X", "#d1242f"),
    "stop": ("stopped", "s", "#1f6fc4"),
    "cut": ("connections cut", "D", "#8250df"),
}
ROLES = {"destination": "#d1242f", "source": "#0891b2", "bystander": "#9aa5b1"}
# Seconds in one stave, at least and at most; and its height in inches.
STAVE_SECONDS = (20.0, 300.0)
STAVE_HEIGHT = 1.55
MAX_TICKS = 14


def draw(events: list[Event], settings: Settings, promises: list[Promise], path: Path) -> None:
    """Write the picture as PNG."""
    end = max(events[-1].time, 1.0)
    stave = min(max(end / 3, STAVE_SECONDS[0]), STAVE_SECONDS[1])
    staves = max(1, int(-(-end // stave)))
    stave = end / staves
    with rc_context({"font.size": 9.5, "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": INK}):
        figure: Any = Figure(figsize=(14, STAVE_HEIGHT * staves + 5.2), layout="constrained")
        figure.suptitle(_title(events, settings, promises), fontsize=15, fontweight="bold", x=0.012, ha="left")
        upper, lower = figure.subfigures(2, 1, height_ratios=[STAVE_HEIGHT * staves + 0.9, 3.6])
        axes = upper.subplots(staves, 1, squeeze=False)[:, 0]
        rows = [spans(events, replica) for replica in range(settings.replicas)]
        for number, axis in enumerate(axes):
            _draw_stave(axis, rows, strikes(events), number * stave, (number + 1) * stave)
        upper.legend(handles=_handles(), loc="outside lower center", ncols=8, frameon=False)
        left, middle, right = lower.subplots(1, 3)
        _draw_recoveries(left, [seconds for _, seconds in recoveries(events)])
        _draw_shares(middle, events)
        _draw_steps(right, events)
        for axis in (*axes, left, middle, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(colors=MUTED, labelcolor=INK)
        figure.savefig(path, dpi=120, facecolor="white")


def _title(events: list[Event], settings: Settings, promises: list[Promise]) -> str:
    struck = strikes(events)
    cuts = sum(event["fault"]["kind"].startswith("cut") for event in struck)
    broken = [promise.name for promise in promises if not promise.kept]
    end = f"broken: {', '.join(broken)}" if broken else "every promise kept"
    return (
        f"{settings.replicas} replicas, {events[-1].time / 60:.1f} minutes, "
        f"{len(struck) - cuts} kills and stops, {cuts} cuts: {end}"
    )


def _draw_stave(axis: Axes, rows: list[dict[str, list[Span]]], struck: list[Event], begin: float, end: float) -> None:
    for replica, found in enumerate(rows):
        for name, (_, color) in STATES.items():
            bars = [(a, b - a) for a, b in found.get(name, []) if b > begin and a < end]
            axis.broken_barh(bars, (replica - 0.36, 0.72), color=color, lw=0)
    for event in struck:
        if begin <= event.time < end:
            _, mark, color = MARKS[_sort(event)]
            # Hollow: while the job trained; filled: in a heal.
            inside = color if event["phase"] != "train" else "white"
            axis.plot(event.time, event.replica, mark, color=color, ms=6.5, mec=color, mfc=inside, mew=1.1, zorder=5)
    axis.set_yticks(range(len(rows)), [f"replica {replica}" for replica in range(len(rows))])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(begin, end)
    apart = next((step for step in (5, 10, 15, 30) if (end - begin) / step <= MAX_TICKS), 60)
    axis.xaxis.set_major_locator(MultipleLocator(apart))
    axis.xaxis.set_major_formatter(lambda seconds, _: f"{int(seconds) // 60}:{int(seconds) % 60:02}")


def _sort(event: Event) -> str:
    kind = str(event["fault"]["kind"])
    return kind.split()[0]


def _handles() -> Sequence[Patch | Line2D]:
    patches = [Patch(color=color, label=label) for label, color in STATES.values()]
    patches.append(Patch(facecolor="white", edgecolor=MUTED, lw=0.6, label="dead, or starts"))
    marks = [Line2D([], [], marker=mark, color=color, lw=0, ms=7, label=label) for label, mark, color in MARKS.values()]
    return [*patches, *marks]


def _draw_recoveries(axis: Axes, seconds: list[float]) -> None:
    axis.set_title("Seconds from a kill to the first commit", loc="left", fontsize=11)
    if not seconds:
        return
    ordered = sorted(seconds)
    axis.ecdf(ordered, color="#1a7f37", lw=2)
    for share, name in ((0.5, "median"), (0.99, "p99")):
        at = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        axis.plot(at, share, "o", color="#1a7f37", ms=7, mec="white")
        axis.annotate(f"{name} {at:.1f} s", (at, share), (7, -13), textcoords="offset points")
    axis.set_xlim(0, ordered[-1] * 1.25)
    axis.set_ylim(0, 1.03)
    axis.set_ylabel(f"share of {len(ordered)} kills")
    axis.grid(color=GRID, lw=0.8)
    axis.set_axisbelow(True)


def _draw_shares(axis: Axes, events: list[Event]) -> None:
    moved = [event for event in strikes(events) if event["phase"] == "move"]
    axis.set_title(f"Where in a heal: {len(moved)} strikes while bytes moved, at the …", loc="left", fontsize=11)
    groups = {role: [event["share"] for event in moved if event["role"] == role] for role in ROLES}
    labels = [f"{role} ({len(shares)})" for role, shares in groups.items()]
    counts, _, _ = axis.hist(
        list(groups.values()), bins=10, range=(0, 1), stacked=True, color=list(ROLES.values()), label=labels, rwidth=0.9
    )
    axis.set_ylim(0, max(1.0, 1.35 * max(counts[-1])))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("share of the state's bytes that had moved")
    axis.set_ylabel("strikes")
    axis.set_xlim(0, 1)
    axis.legend(frameon=False, loc="upper left", ncols=3, columnspacing=1.0, handlelength=1.0, fontsize=9)


def _draw_steps(axis: Axes, events: list[Event]) -> None:
    axis.set_title("Steps that the job committed", loc="left", fontsize=11)
    best, times, steps = 0, [0.0], [0]
    for event in told(events, "commit"):
        if event["step"] > best:
            best = event["step"]
            times.append(event.time / 60)
            steps.append(best)
    axis.plot(times, steps, color="#1a7f37", lw=1.8)
    axis.set_xlabel("minutes")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(color=GRID, lw=0.8)
    axis.set_axisbelow(True)
