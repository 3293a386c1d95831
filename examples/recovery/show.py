"""The story on a terminal: a live view, plain lines where there is no terminal, and the tables at the end."""

from __future__ import annotations

import statistics
from collections import deque
from types import TracebackType
from typing import Protocol

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from recovery.cluster import Event
from recovery.story import LossPoint, Recovery, Row, Story

__all__ = ["REPLICA_COLORS", "STANDBY_COLOR", "LiveView", "PlainView", "View", "narrate", "print_result", "sparkline"]

REPLICA_COLORS = ["#4c9be8", "#f2a541", "#57b894", "#c678dd", "#e06c75", "#98a2b3"]
STANDBY_COLOR = "#d8b4fe"
STATE_STYLES = {
    "starting": "yellow",
    "ready": "yellow",
    "syncing": "cyan",
    "training": "green",
    "waiting": "black on bright_yellow",
    "handed over": "dim",
    "dead": "bold white on red",
    "healing": "bold black on cyan",
    "healed": "bold black on green",
    "finished": "bold green",
}
BARS = "▁▂▃▄▅▆▇█"
BAR_WIDTH = 8
OTHER_COLUMNS_WIDTH = 92  # what a row needs beside the sparkline
MIN_SPARK_WIDTH, MAX_SPARK_WIDTH = 10, 48
NUM_LINES = 9  # of the story, below the live table
PLAIN_STEP_INTERVAL = 10  # steps between two plain lines about the loss
REFRESH_RATE = 12  # redraws per second


class View(Protocol):
    """Shows the story while it happens."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, event: Event | None, now: float) -> None:
        """Show ``event``, which the story has already taken in; None when only time has passed."""


def narrate(event: Event, story: Story) -> Text | None:
    """One line for an event worth telling, else None."""
    told = _tell(event, story)
    if told is None:
        return None
    what, style = told
    line = Text(f"{event.time:8.2f} s  ")
    if event.replica is None:
        line.append("standby  ", style=STANDBY_COLOR)
    else:
        line.append(f"replica {event.replica}", style=REPLICA_COLORS[event.replica % len(REPLICA_COLORS)])
    return line.append("  ").append(what, style=style)


def _tell(event: Event, story: Story) -> tuple[str, str] | None:
    fields, again = event.fields, event.incarnation > 0
    match event.event:
        case "started":
            return ("started again", "yellow") if again else ("started", "dim")
        case "ready":
            return ("ready to train" if not again else "its Manager asks for a quorum", "dim")
        case "waiting":
            return "has imported and built everything, and waits for a replica to die", "yellow"
        case "handed_over":
            return "the standby takes its place", "bold yellow"
        case "killed":
            assert event.replica is not None
            return f"killed with SIGKILL after step {story.rows[event.replica].step}", "bold red"
        case "discarded":
            return f"step not committed: {fields['error'] or 'too few replicas'}"[:110], "yellow"
        case "transfer_failed":
            return f"transfer failed as {fields['role']}: {fields['error']}"[:160], "bold red"
        case "sending" if fields["step"] > 0:
            return f"serves its state of step {fields['step']}", "dim"
        case "received":
            return _tell_received(fields), "cyan"
        case "healed" if again:
            return f"healed: committed step {fields['step']} with the others", "bold green"
        case "finished":
            return f"finished step {fields['step']}, sha256 {fields['digest'][:12]}", "green"
    return None


def _tell_received(fields: dict[str, float]) -> str:
    share = fields["in_place_nbytes"] / fields["nbytes"]
    rate = fields["nbytes"] / fields["seconds"] / 1e9
    what = "the first weights" if fields["step"] == 0 else f"the state of step {fields['step']}"
    return (
        f"received {what}: {megabytes(fields['nbytes'])} in {fields['seconds'] * 1e3:.0f} ms "
        f"({rate:.2f} GB/s), {share:.0%} in place"
    )


def megabytes(nbytes: float) -> str:
    """Bytes in MB (10^6)."""
    return f"{nbytes / 1e6:.1f} MB"


def sparkline(points: list[LossPoint], num_steps: int, low: float, high: float, width: int) -> str:
    """Losses over steps 1 to ``num_steps`` in ``width`` characters; a dot where no step was taken part in."""
    columns: list[list[float]] = [[] for _ in range(width)]
    for point in points:
        columns[min(width - 1, (point.step - 1) * width // num_steps)].append(point.loss)
    last = max((index for index, losses in enumerate(columns) if losses), default=-1)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        BARS[round((statistics.fmean(losses) - low) * scale)] if losses else "·" for losses in columns[: last + 1]
    )


class PlainView:
    """Lines that read well in a log file."""

    def __init__(self, console: Console, story: Story, title: str) -> None:
        self._console = console
        self._story = story
        self._title = title
        self._told_step = 0

    def __enter__(self) -> PlainView:
        self._console.print(self._title, highlight=False, soft_wrap=True)
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, event: Event | None, now: float) -> None:
        if event is None:
            return
        line = narrate(event, self._story)
        if line is not None:
            self._console.print(line, highlight=False, soft_wrap=True)
        if event.event == "committed" and self._story.step >= self._told_step + PLAIN_STEP_INTERVAL:
            self._told_step = self._story.step
            self._console.print(self._progress(now), highlight=False, soft_wrap=True)

    def _progress(self, now: float) -> str:
        rows = self._story.rows
        losses = "  ".join(
            f"{row.losses[-1].loss:.3f}" if row.losses and row.state != "dead" else "  -  " for row in rows
        )
        participants = max(row.participants for row in rows)
        return f"{now:8.2f} s  step {self._story.step:<5} loss {losses}   ({participants} taking part)"


class LiveView:
    """One row for each replica, redrawn in place, and below it the story so far."""

    def __init__(self, console: Console, story: Story, title: str, num_steps: int) -> None:
        self._story = story
        self._title = title
        self._num_steps = num_steps
        self._lines: deque[Text] = deque(maxlen=NUM_LINES)
        self._now = 0.0
        self._spark_width = min(MAX_SPARK_WIDTH, max(MIN_SPARK_WIDTH, console.width - OTHER_COLUMNS_WIDTH))
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=REFRESH_RATE, transient=False
        )

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def update(self, event: Event | None, now: float) -> None:
        self._now = now
        if event is not None:
            line = narrate(event, self._story)
            if line is not None:
                line.no_wrap, line.overflow = True, "ellipsis"
                self._lines.append(line)

    def _render(self) -> Panel:
        table = Table(box=SIMPLE_HEAD, expand=True, pad_edge=False)
        for name, width in [("replica", 9), ("state", 13), ("step", 4), ("loss", 5)]:
            table.add_column(name, min_width=width, no_wrap=True)
        table.add_column("loss so far", width=self._spark_width, no_wrap=True)
        table.add_column("last transfer", ratio=1, no_wrap=True)
        losses = [point.loss for row in self._story.rows for point in row.losses]
        low, high = min(losses, default=0.0), max(losses, default=1.0)
        for row in self._story.rows:
            table.add_row(*self._cells(row, low, high))
        if self._story.standbys:
            state = self._story.standbys[-1].state
            table.add_row(Text("● standby", style=STANDBY_COLOR), Text(f" {state} ", style=STATE_STYLES[state]))
        step, total = self._story.step, max(self._num_steps, self._story.step)
        subtitle = f"step {step} of {total} · {self._now:.0f} s"
        return Panel(Group(table, *self._lines), title=self._title, subtitle=subtitle, box=ROUNDED)

    def _cells(self, row: Row, low: float, high: float) -> list[Text]:
        color = REPLICA_COLORS[row.replica % len(REPLICA_COLORS)]
        loss = f"{row.losses[-1].loss:.3f}" if row.losses else ""
        num_steps = max(self._num_steps, self._story.step)
        return [
            Text(f"● {row.replica}", style=color),
            Text(f" {row.state} ", style=STATE_STYLES[row.state]),
            Text(str(row.step) if row.step else ""),
            Text(loss if row.state != "dead" else "-"),
            Text(sparkline(row.losses, num_steps, low, high, self._spark_width), style=color),
            _transfer_cell(row),
        ]


def _transfer_cell(row: Row) -> Text:
    if not row.nbytes_total:
        return Text("")
    done = round(BAR_WIDTH * row.nbytes_done / row.nbytes_total)
    cell = Text("━" * done, style="cyan").append("━" * (BAR_WIDTH - done), style="bright_black")
    cell.append(f" {megabytes(row.nbytes_done)}", style="default")
    if row.received is not None:
        rate = row.received["nbytes"] / row.received["seconds"] / 1e9
        share = row.received["in_place_nbytes"] / row.received["nbytes"]
        cell.append(f" {rate:.2f} GB/s {share:.0%} in place", style="default")
    return cell


def print_result(console: Console, story: Story) -> None:
    """The tables: one column for each recovery, then the checks."""
    if story.recoveries:
        console.print(_recovery_table(story.recoveries))
    if shares := story.standby_share():
        text = f" SIGKILL to first commit: {shares[0]:.2f} s with a standby, {shares[1]:.2f} s without: "
        console.print(Text(text).append(f"{shares[0] / shares[1]:.0%}\n", "bold"), soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, title="Checks", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("check")
    table.add_column("measured", overflow="fold")
    marks = {True: Text("✔", "bold green"), False: Text("✘", "bold red"), None: Text("-", "dim")}
    for check in story.checks():
        table.add_row(marks[check.passed], check.name, check.detail)
    console.print(table)


def _recovery_table(recoveries: list[Recovery]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Recovery", title_justify="left", title_style="bold")
    table.add_column("")
    for recovery in recoveries:
        name = f"replica {recovery.replica}" + (", standby" if recovery.standby else "")
        table.add_column(name, justify="right")
    columns = [_recovery_column(recovery) for recovery in recoveries]
    for name in columns[0]:
        style = "bold" if name.startswith("SIGKILL") else ""
        end = name in ("healed at", "SIGKILL to first commit")
        table.add_row(name, *(column.get(name, "-") for column in columns), style=style, end_section=end)
    return table


def _recovery_column(recovery: Recovery) -> dict[str, str]:
    """Row name to cell."""
    durations = recovery.durations()
    column = {
        "killed at": f"{recovery.killed:.2f} s, after step {recovery.killed_after_step}",
        "back at": _at(recovery.started),
        "healed at": _at(recovery.healed) + f", with step {recovery.healed_at_step}",
    }
    if not durations:
        return {**column, "healed at": "not healed"}
    start = durations["interpreter"] + durations["imports"] + durations["model_and_manager"]
    report = recovery.transfer.get("report")
    return {
        **column,
        "noticed, started again": _seconds(durations["restart"]),
        "process start": _seconds(start),
        "  interpreter": "before the kill" if recovery.standby else _seconds(durations["interpreter"]),
        "  imports": "before the kill" if recovery.standby else _seconds(durations["imports"]),
        "  model and Manager": _seconds(durations["model_and_manager"]),
        "quorum, process group": _seconds(durations["quorum"]),
        "transfer": _seconds(durations["transfer"]),
        "first commit": _seconds(durations["first_commit"]),
        "SIGKILL to first commit": _seconds(durations["total"]),
        "state": megabytes(recovery.transfer["nbytes"]),
        "transfer rate": f"{recovery.gigabytes_per_second:.2f} GB/s",
        "landed in place": f"{recovery.in_place_share:.1%}",
        **({"transfer's phases": _phases(report["seconds"])} if report else {}),
        "survivors' pause at the kill": _seconds(recovery.pause_at_kill),
        "survivors' pause at the heal": _seconds(recovery.pause_at_heal),
    }


def _phases(seconds: dict[str, float]) -> str:
    return "\n".join(f"{name} {duration * 1e3:.0f} ms" for name, duration in seconds.items())


def _at(moment: float | None) -> str:
    return "-" if moment is None else f"{moment:.2f} s"


def _seconds(duration: float) -> str:
    return f"{duration:.3f} s"
