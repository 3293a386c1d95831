"""The story as one picture: each replica's loss over time, what each did, and where a recovery's time went."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from recovery.show import REPLICA_COLORS, STANDBY_COLOR
from recovery.story import LossPoint, Recovery, Row, Story

__all__ = ["draw"]

INK = "#1f2937"
MUTED = "#6b7280"
KILL = "#d1242f"
HEAL = "#1a7f37"
PAPER = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1.0}  # behind text that lines cross
SMOOTHING = 7  # steps in the mean that the bold lines show
STRETCHES = {  # name in Recovery.durations() to label and color
    "restart": ("restart", "#7f1d1d"),
    "interpreter": ("interpreter", "#b45309"),
    "imports": ("imports", "#f0b429"),
    "model_and_manager": ("model, Manager", "#f7d774"),
    "quorum": ("quorum", "#9aa5b1"),
    "transfer": ("transfer", "#0891b2"),
    "first_commit": ("first commit", "#57b894"),
}
ANNOTATION_STEP = 0.1  # of the panel's height: each annotation stands below the one before it
MAX_ANNOTATIONS = 3  # recoveries whose annotations stand below each other before the top is used again
EARLY_SHARE = 0.2  # of the time of training: there is no room to the left of an earlier kill
MIN_LABELLED_SHARE = 0.06  # of a bar's length; narrower stretches are named by the legend alone


def draw(story: Story, path: Path) -> None:
    """Write the picture as PNG."""
    num_rows, num_recoveries = len(story.rows), len(story.recoveries)
    heights = [4.6, 0.34 * (num_rows + bool(story.standbys)) + 0.25] + (
        [0.42 * num_recoveries + 0.25] if num_recoveries else []
    )
    with rc_context({"font.size": 10, "text.color": INK, "axes.edgecolor": MUTED}):
        figure = Figure(figsize=(12, sum(heights) + 2.2), layout="constrained")
        axes = figure.subplots(len(heights), 1, height_ratios=heights)
        figure.suptitle(_title(story), fontsize=15, fontweight="bold", x=0.012, ha="left")
        _draw_losses(axes[0], story)
        _draw_timeline(axes[1], story)
        axes[1].sharex(axes[0])
        axes[0].tick_params(labelbottom=False)
        if num_recoveries:
            _draw_recoveries(axes[2], story.recoveries)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(colors=MUTED, labelcolor=INK)
        figure.savefig(path, dpi=150, facecolor="white")


def _title(story: Story) -> str:
    healed = [recovery for recovery in story.recoveries if recovery.durations()]
    if not healed:
        return f"{len(story.rows)} replicas train"
    times = ", ".join(
        f"{recovery.durations()['total']:.1f} s" + (" (standby)" if recovery.standby else "") for recovery in healed
    )
    killed = "a replica is killed and heals" if len(healed) == 1 else f"{len(healed)} kills, {len(healed)} heals"
    return f"{len(story.rows)} replicas train; {killed}: {times} from SIGKILL to the first commit"


def _color(replica: int) -> str:
    return REPLICA_COLORS[replica % len(REPLICA_COLORS)]


def _lives(row: Row, story: Story) -> list[list[LossPoint]]:
    """The replica's losses, cut where it was dead."""
    kills = [recovery.killed for recovery in story.recoveries if recovery.replica == row.replica]
    # Its last step before a kill may be told a moment after it: the next life begins with the heal.
    begins = [r.ready or r.killed for r in story.recoveries if r.replica == row.replica]
    assert len(kills) == len(begins)
    bounds = [float("-inf"), *begins, float("inf")]
    return [[point for point in row.losses if begin < point.time <= end] for begin, end in pairwise(bounds)]


def _smooth(points: list[LossPoint]) -> list[float]:
    """Mean of each loss and its neighbours, ``SMOOTHING`` in all, fewer at the ends."""
    half = SMOOTHING // 2
    losses = [point.loss for point in points]
    return [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def _draw_losses(axis: Axes, story: Story) -> None:
    for row in story.rows:
        for index, life in enumerate(_lives(row, story)):
            times = [point.time for point in life]
            axis.plot(times, [p.loss for p in life], color=_color(row.replica), alpha=0.35, lw=0.9)
            label = f"replica {row.replica}" if index == 0 else None
            axis.plot(times, _smooth(life), color=_color(row.replica), lw=2.2, label=label)
    for recovery in story.recoveries:
        _mark_recovery(axis, recovery, story)
    axis.set_ylabel(f"loss in nats per character\n(bold: mean of {SMOOTHING} steps)")
    axis.grid(axis="y", color="#e5e7eb", lw=0.8)
    axis.set_axisbelow(True)
    axis.legend(loc="lower left", frameon=False)


def _mark_recovery(axis: Axes, recovery: Recovery, story: Story) -> None:
    lives = _lives(story.rows[recovery.replica], story)
    index = [r for r in story.recoveries if r.replica == recovery.replica].index(recovery)
    before, after = lives[index], lives[index + 1]
    top = axis.get_xaxis_transform()
    end = recovery.healed if recovery.healed is not None else recovery.killed
    axis.axvspan(recovery.killed, end, color=KILL, alpha=0.06, lw=0)
    axis.axvline(recovery.killed, color=KILL, lw=1.2, ls=(0, (4, 3)))
    height = 0.98 - 2 * ANNOTATION_STEP * (story.recoveries.index(recovery) % MAX_ANNOTATIONS)
    killed = f" replica {recovery.replica} killed \n {recovery.killed:.1f} s, after step {recovery.killed_after_step} "
    commits = [commit for row in story.rows for commit in row.commits]
    early = recovery.killed < min(commits) + EARLY_SHARE * (max(commits) - min(commits))
    side = "left" if early else "right"
    axis.text(recovery.killed, height, killed, transform=top, color=KILL, ha=side, va="top", bbox=PAPER)
    if before:
        axis.plot(recovery.killed, _smooth(before)[-1], "X", color=KILL, ms=11, mec="white", zorder=5)
    if recovery.healed is None:
        return
    axis.axvline(recovery.healed, color=HEAL, lw=1.2, ls=(0, (4, 3)))
    healed = f" replica {recovery.replica} healed\n {recovery.healed:.1f} s, with step {recovery.healed_at_step}"
    axis.text(
        recovery.healed, height - ANNOTATION_STEP, healed, transform=top, color=HEAL, ha="left", va="top", bbox=PAPER
    )
    if after:
        axis.plot(recovery.healed, _smooth(after)[0], "o", color=HEAL, ms=10, mec="white", zorder=5)


def _draw_timeline(axis: Axes, story: Story) -> None:
    for row in story.rows:
        _draw_steps(axis, row, story)
        for recovery in story.recoveries:
            if recovery.replica == row.replica:
                _draw_stretches(axis, recovery, row.replica, recovery.killed)
    names = [f"replica {row.replica}" for row in story.rows]
    if story.standbys:
        _draw_standbys(axis, story)
        names.append("standby")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.45, -0.55)
    axis.set_xlabel("seconds since the start; one tick for each committed step")


def _draw_steps(axis: Axes, row: Row, story: Story) -> None:
    bounds = [(r.killed, r.healed or float("inf")) for r in story.recoveries if r.replica == row.replica]
    begins = [row.commits[0], *(healed for _, healed in bounds)] if row.commits else []
    ends = [*(killed for killed, _ in bounds), row.commits[-1]] if row.commits else []
    spans = [(begin, end - begin) for begin, end in zip(begins, ends, strict=True) if end > begin]
    axis.broken_barh(spans, (row.replica - 0.32, 0.64), color=_color(row.replica), alpha=0.3, lw=0)
    axis.vlines(row.commits, row.replica - 0.32, row.replica + 0.32, color=_color(row.replica), lw=1.3)


def _draw_standbys(axis: Axes, story: Story) -> None:
    """In a row of their own below the replicas: what each imported and built ahead of time, and how long it waited."""
    height = len(story.rows)
    last = max(commit for row in story.rows for commit in row.commits)
    for standby in story.standbys:
        moments = [standby.started, standby.interpreter, standby.imported, standby.waiting]
        names = ["interpreter", "imports", "model_and_manager"]
        for name, begin, end in zip(names, moments, moments[1:], strict=False):
            if begin is not None and end is not None:
                axis.barh(height, end - begin, left=begin, height=0.64, color=STRETCHES[name][1], alpha=0.45, lw=0)
        if standby.waiting is None:
            continue
        end = standby.handed_over if standby.handed_over is not None else last
        width = end - standby.waiting
        axis.barh(height, width, left=standby.waiting, height=0.64, color=STANDBY_COLOR, alpha=0.4, lw=0)
        axis.text(end, height, f"  waited {width:.1f} s", va="center", fontsize=9, color=INK)
        if standby.replica is not None:
            axis.annotate(
                "",
                (end, standby.replica + 0.36),
                (end, height),
                arrowprops={"arrowstyle": "->", "color": INK, "lw": 1.4},
            )


def _draw_stretches(axis: Axes, recovery: Recovery, height: float, begin: float) -> None:
    durations = recovery.durations()
    for name, (_, color) in STRETCHES.items():
        if name in durations:
            axis.barh(height, durations[name], left=begin, height=0.64, color=color, lw=0)
            begin += durations[name]


def _draw_recoveries(axis: Axes, recoveries: list[Recovery]) -> None:
    longest = max((recovery.durations().get("total", 0.0) for recovery in recoveries), default=0.0)
    for index, recovery in enumerate(recoveries):
        _draw_stretches(axis, recovery, index, 0.0)
        _label_stretches(axis, recovery, index, longest)
    shown = [name for name in STRETCHES if any(recovery.durations().get(name, 1.0) for recovery in recoveries)]
    handles = [Patch(color=STRETCHES[name][1]) for name in shown]
    labels = [_legend_label(recoveries, name) for name in shown]
    axis.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.55 / len(recoveries)), frameon=False,
        ncols=len(labels), handlelength=1.0, columnspacing=1.2, fontsize=9,
    )  # fmt: skip
    names = [f"replica {recovery.replica}" + ("\nfrom standby" if recovery.standby else "") for recovery in recoveries]
    axis.set_yticks(range(len(recoveries)), names)
    axis.set_ylim(len(recoveries) - 0.45, -0.55)
    axis.set_xlim(0, longest * 1.42 or 1.0)
    axis.set_title("Where the time from SIGKILL to the first commit went, in seconds", loc="left", fontsize=11)


def _legend_label(recoveries: list[Recovery], name: str) -> str:
    label = STRETCHES[name][0]
    if len(recoveries) == 1 and name in recoveries[0].durations():
        return f"{label} {recoveries[0].durations()[name]:.2f}"
    return label


def _label_stretches(axis: Axes, recovery: Recovery, height: float, longest: float) -> None:
    durations = recovery.durations()
    if not durations:
        return
    begin = 0.0
    for name in STRETCHES:
        if durations[name] > MIN_LABELLED_SHARE * longest:
            center = begin + durations[name] / 2
            axis.text(center, height, f"{durations[name]:.2f}", ha="center", va="center", fontsize=9)
        begin += durations[name]
    moved = (
        f"  {durations['total']:.2f} s; {recovery.transfer['nbytes'] / 1e6:.1f} MB moved in "
        f"{durations['transfer'] * 1e3:.0f} ms, {recovery.in_place_share:.0%} in place"
    )
    axis.text(begin, height, moved, va="center", color=INK)
