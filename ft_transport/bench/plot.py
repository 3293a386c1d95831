"""The results to look at: one panel for each case, one bar for each transport."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ft_transport.bench.plan import MODES
from ft_transport.bench.results import Row
from ft_transport.bench.subjects import OURS, REFERENCE
from ft_transport.bench.table import describe_rate, describe_ratio, describe_seconds, describe_size

__all__ = ["draw", "shown"]

# Opaque, so that it reads alike on a light and a dark page.
PAPER, INK, FAINT = "#ffffff", "#1f2328", "#59636e"
OUR_COLORS = ("#0f766e", "#2f8f86", "#4fa99f", "#0e5a8a", "#3f83ac", "#6fa3c4")
REFERENCE_COLOR, PEER_COLOR, WRONG_COLOR, LIMIT_COLOR = "#6b7685", "#b4bcc6", "#c0262d", "#e6e2d6"

_HEADINGS = {"fresh": "fresh: into newly allocated memory", "in-place": "in place: into the receiver's own tensors"}

# Inches.
_WIDTH_OF_NAMES, _WIDTH_OF_PANEL, _HEIGHT_OF_BAR, _HEIGHT_OF_TITLE, _TOP, _BOTTOM = 2.05, 4.9, 0.22, 0.46, 1.05, 0.25

# How much longer an axis is than its longest bar, which leaves room for what is written behind it.
_ROOM = 1.75


def draw(rows: Sequence[Row], path: Path, subtitle: str) -> None:
    """Draw all rows into a PNG file: states from top to bottom, modes side by side.

    The length of a bar is the speed. Panels of one state have one scale, panels of different states do not.
    """
    rows = shown(rows)
    states = list(dict.fromkeys(row.case.state for row in rows))
    modes = [mode for mode in MODES if any(row.case.mode == mode for row in rows)]
    num_bars = len({row.transport for row in rows})
    height_of_panel = num_bars * _HEIGHT_OF_BAR + _HEIGHT_OF_TITLE
    width = _WIDTH_OF_NAMES + _WIDTH_OF_PANEL * len(modes)
    height = _TOP + height_of_panel * len(states) + _BOTTOM
    # Without pyplot, which keeps every figure in a global list, and looks for a display.
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    _head(figure, modes, width, height, subtitle)
    for down, state in enumerate(states):
        of_state = [row for row in rows if row.case.state == state]
        # One scale for each state: upstream moves large tensors forty times as fast as 20,000 small ones, and on one
        # axis the small ones' bars would be lines.
        scale = max((max(_rates(row)) for row in of_state if row.seconds), default=1.0) * _ROOM
        bottom = height - _TOP - (down + 1) * height_of_panel
        _state_title(figure, state, of_state, (bottom + height_of_panel - 0.34) / height)
        for across, mode in enumerate(modes):
            left = _WIDTH_OF_NAMES + across * _WIDTH_OF_PANEL
            box = (left / width, bottom / height, (_WIDTH_OF_PANEL - 0.2) / width, num_bars * _HEIGHT_OF_BAR / height)
            axes = figure.add_axes(box)
            _panel(axes, [row for row in of_state if row.case.mode == mode], scale, names=across == 0)
    figure.savefig(path, dpi=160)


def shown(rows: Sequence[Row]) -> list[Row]:
    """Without limits that no transport is next to: a copy's bar would leave the others no length."""
    nearest = {row.limit for row in rows}
    return [row for row in rows if row.status != "limit" or row.transport in nearest]


def _head(figure: Figure, modes: Sequence[str], width: float, height: float, subtitle: str) -> None:
    left = 0.15 / width
    figure.text(left, 1 - 0.3 / height, "Moving a state dict: how fast", size=14, weight="bold", color=INK)
    legend = f"2x: twice as fast as {REFERENCE} in the same round. Thin line: slowest to fastest round."
    figure.text(left, 1 - 0.52 / height, subtitle, size=8, color=FAINT)
    figure.text(left, 1 - 0.69 / height, legend, size=8, color=FAINT)
    for across, mode in enumerate(modes):
        x = (_WIDTH_OF_NAMES + across * _WIDTH_OF_PANEL) / width
        figure.text(x, 1 - 1.03 / height, _HEADINGS[mode], size=9.5, weight="bold", color=INK)


def _state_title(figure: Figure, state: str, rows: Sequence[Row], y: float) -> None:
    width = figure.get_size_inches()[0]
    figure.text(0.15 / width, y, state, size=9.5, weight="bold", color=INK)
    figure.text(_WIDTH_OF_NAMES / width, y, describe_size(rows), size=8, color=FAINT)


def _panel(axes: Any, rows: Sequence[Row], scale: float, names: bool) -> None:
    # From 0, or lengths would not be speeds. Upside down: matplotlib counts upwards, a list is read downwards. No
    # ticks: each bar has its number behind it.
    axes.set(xlim=(0, scale), ylim=(len(rows) - 0.5, -0.5), xticks=[], facecolor=PAPER)
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows] if names else [], size=8.5, color=INK)
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(PEER_COLOR)
    for y, row in enumerate(rows):
        _bar(axes, y, row, scale)


def _bar(axes: Any, y: int, row: Row, scale: float) -> None:
    gap = scale * 0.012
    if not row.seconds:
        color = FAINT if row.status == "unsupported" else WRONG_COLOR
        # Why one has failed is in the table: an error of three lines has no room here.
        text = row.note if row.status == "unsupported" else row.status
        axes.text(gap, y, text, va="center", size=8, color=color, style="italic")
        return
    slowest, fastest = min(_rates(row)), max(_rates(row))
    axes.barh(y, row.gigabytes_per_second, height=0.74, color=_color(row))
    axes.plot([slowest, fastest], [y, y], color=INK, linewidth=0.8, alpha=0.7, solid_capstyle="butt")
    weight = "bold" if row.transport in OURS else "normal"
    # Behind the thin line, not the bar: text over a line cannot be read.
    axes.text(fastest + gap, y, _label(row), va="center", size=8, color=INK, weight=weight)


def _label(row: Row) -> str:
    if row.status == "WRONG":
        # No speed: a transport that loses bytes is quick, and a reader who does not see red would take it for the
        # best.
        return "WRONG"
    parts = [describe_rate(row.gigabytes_per_second), describe_seconds(row.median_seconds)]
    if row.ratio is not None and row.transport != row.reference:
        other = "" if row.reference == REFERENCE else f" {row.reference}"
        parts.append(describe_ratio(row.ratio) + other)
    return "   ".join(parts)


def _name(row: Row) -> str:
    return f"ft_transport {row.transport}" if row.transport in OURS else row.transport


def _color(row: Row) -> str:
    if row.status == "WRONG":
        return WRONG_COLOR
    if row.status == "limit":
        return LIMIT_COLOR
    if row.transport in OURS:
        return OUR_COLORS[OURS.index(row.transport)]
    return REFERENCE_COLOR if row.transport == REFERENCE else PEER_COLOR


def _rates(row: Row) -> list[float]:
    """GB/s of each counted round."""
    return [row.size.nbytes / seconds / 1e9 for seconds in row.seconds]
