"""The results to read."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ft_transport.bench.results import Row

__all__ = [
    "COLUMNS",
    "LEGEND",
    "WIDTH",
    "cells",
    "describe_bytes",
    "describe_rate",
    "describe_ratio",
    "describe_seconds",
    "describe_size",
    "render",
    "render_bounds",
]

# Headings and widths in characters: the same for each case, so that the tables stand under one another.
COLUMNS = {
    "transport": 24,
    "median": 8,
    "min … max": 17,
    "speed": 9,
    "ratio": 8,
    "wire": 8,
    "/ state": 7,
    "memory +": 8,
    "in place": 8,
    "state": 11,
}

# What the tables need, in characters.
WIDTH = sum(COLUMNS.values()) + 2 * len(COLUMNS)

_STYLES = {"equal": "green", "WRONG": "bold white on red", "failed": "red", "unsupported": "dim"}

LEGEND = """\
Turn by turn in one run, after a warm-up round. Times are the receiver's, from a barrier to the return of the call.
ratio: median over the rounds of how many times as fast as the reference in the same round.  wire: bytes over the
loopback interface, headers and other processes' traffic included, least of all rounds.  memory +: resident memory
of the receiver at the peak, beyond that before.  in place: tensors at the template's own addresses.
state: every received state against the source's, bit for bit."""


def render(rows: Sequence[Row]) -> RenderableType:
    """The rows of one case as a table, with what there is to say about some of them below."""
    case = rows[0].case
    reference = next((row.reference for row in rows if row.reference), "")
    title = Text(f"{case.state} · {case.mode}", style="bold")
    about = [describe_size(rows), f"ratio to {reference}" if reference else ""]
    title.append("   " + ", ".join(part for part in about if part), style="not bold dim")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading, width in COLUMNS.items():
        left = heading in ("transport", "state")
        table.add_column(heading, min_width=width, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        *numbers, status = cells(row)
        table.add_row(*numbers, Text(status, style=_STYLES[row.status]), style=_style(row))
    # Each note once: when the network is down, all transports say the same.
    notes: dict[str, list[Row]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(row.note, []).append(row)
    below = [Text(f"{', '.join(row.transport for row in of)}: {note}", _style(of[0])) for note, of in notes.items()]
    return Group(title, table, *below)


def render_bounds(bounds: dict[str, float]) -> RenderableType:
    """What the machine can do, bytes per second by name, as a table."""
    title = Text("this machine", style="bold")
    title.append("   what the bytes of a state pass, alone", style="not bold dim")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(min_width=COLUMNS["transport"] + COLUMNS["median"])
    table.add_column(justify="right")
    for name, nbytes_per_second in bounds.items():
        table.add_row(name, describe_rate(nbytes_per_second / 1e9))
    return Group(title, table)


def cells(row: Row) -> list[str]:
    """One row's text in each of ``COLUMNS``."""
    if not row.seconds:
        return [row.transport, *["-"] * (len(COLUMNS) - 2), row.status]
    # Above 1 what a transport adds (or sends twice), below 1 what it leaves out: the one column that no machine
    # changes.
    share = row.nbytes_wire / row.size.nbytes if row.nbytes_wire is not None and row.size.nbytes else None
    return [
        row.transport,
        describe_seconds(row.median_seconds),
        f"{describe_seconds(min(row.seconds))} … {describe_seconds(max(row.seconds))}",
        describe_rate(row.gigabytes_per_second),
        "-" if row.ratio is None else describe_ratio(row.ratio),
        "-" if row.nbytes_wire is None else describe_bytes(row.nbytes_wire),
        "-" if share is None else f"{share:.3f}" if share < 10 else _three_digits(share),
        "-" if row.nbytes_memory_receiver is None else describe_bytes(row.nbytes_memory_receiver),
        "-" if row.in_place_share is None else f"{row.in_place_share:.0%}",
        row.status,
    ]


def describe_rate(gigabytes_per_second: float) -> str:
    """Three digits and a decimal unit: ``4.41 GB/s``, ``12.3 MB/s``."""
    value, unit = gigabytes_per_second, "GB/s"
    for smaller in ("MB/s", "kB/s"):
        if value >= 1:
            break
        value, unit = value * 1000, smaller
    return f"{_three_digits(value)} {unit}"


def describe_size(rows: Sequence[Row]) -> str:
    """How large the state of a case is, empty where no transport could tell."""
    size = next((row.size for row in rows if row.size.num_tensors), None)
    if size is None:
        return ""
    tensors = f"{size.num_tensors:,} tensors"
    if size.num_storages != size.num_tensors:
        tensors += f" in {size.num_storages:,} storage{'s' if size.num_storages > 1 else ''}"
    return f"{tensors}, {describe_bytes(size.nbytes)}"


def describe_ratio(ratio: float) -> str:
    """Three digits: ``1.05x``, ``13.1x``."""
    return f"{_three_digits(ratio)}x"


def describe_seconds(seconds: float) -> str:
    """Three digits and a unit: ``1.23 s``, ``45.6 ms``."""
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{_three_digits(value)} {unit}"


def describe_bytes(nbytes: int) -> str:
    """Three digits and a decimal unit: ``1.49 GB``, ``16.0 kB``."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    if unit == "B":
        return f"{nbytes} B"
    return f"{_three_digits(value)} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _style(row: Row) -> str:
    return {"equal": "", "unsupported": "dim"}.get(row.status, "red")
