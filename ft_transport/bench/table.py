"""The results to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ft_transport.bench.growth import Growth
from ft_transport.bench.results import Row
from ft_transport.bench.subjects import OURS

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
    "render_growth",
]

# Headings and widths in characters: the same for each case, so that the tables stand under one another.
COLUMNS = {
    "": 20,
    "ms\nmedian (range)": 18,
    "\nGB/s": 5,
    "\nratio": 5,
    "of its\nlimit": 6,
    "of\ncopy": 4,
    "CPU s/GB\nboth ends": 9,
    "memory +\nboth ends": 12,
    "wire /\nstate": 6,
    " ": 6,
}

# What the tables need, in characters.
WIDTH = sum(COLUMNS.values()) + len(COLUMNS) - 1

_STYLES = {"equal": "green", "limit": "dim", "WRONG": "bold white on red", "failed": "red", "unsupported": "dim"}
_SHORT = {"unsupported": "no"}

LEGEND = """\
Turn by turn in one run. Times are the destination's, from a barrier to the return of the call:
median and range of the rounds. Ratios and shares are medians of each round's.
ratio          how many times as fast as the reference
of its limit   share of the speed of what bounds it: raw process_vm_readv for lanes that read
               memory, raw Gloo for a group, else raw TCP; as many bytes in one flat tensor
of copy        likewise, of memmove
CPU s/GB       CPU seconds of all threads for each GB of the state: source + destination
memory +       resident memory at the peak, beside the state: source + destination
wire / state   bytes over the loopback interface for each of the state, other traffic included
equal          every state that arrived was the source's, bit for bit"""

GROWTH_LEGEND = """\
Medians of the rounds; CPU is of all threads of a side. Fitted to all states at once, by least
squares of relative errors: fixed + each leaf + each byte. Off: how much more that says than was
measured."""


def render(rows: Sequence[Row], cold: bool = False) -> RenderableType:
    """The rows of one case as a table, with what there is to say about some of them below."""
    case = rows[0].case
    reference = next((row.reference for row in rows if row.reference), "")
    title = Text(f"{case.state} · {case.mode}{' · cold' if cold else ''}", style="bold")
    about = [describe_size(rows), f"ratio to {reference}" if reference else ""]
    title.append("   " + ", ".join(part for part in about if part), style="not bold dim")
    table = _new_table()
    for heading, width in COLUMNS.items():
        justify: Literal["left", "right"] = "right" if heading.strip() else "left"
        table.add_column(heading, min_width=width, justify=justify, vertical="bottom", no_wrap=True)
    for row in rows:
        *numbers, status = cells(row)
        table.add_row(*numbers, Text(status, style=_STYLES[row.status]), style=_style(row))
    # Each note once: when the network is down, all transports say the same.
    notes: dict[str, list[Row]] = {}
    for row in rows:
        for note in filter(None, (row.note, _elsewhere(row))):
            notes.setdefault(note, []).append(row)
    below = [Text(f"{', '.join(row.transport for row in of)}: {note}", _style(of[0])) for note, of in notes.items()]
    return Group(title, table, *below)


def cells(row: Row) -> list[str]:
    """One row's text in each of ``COLUMNS``."""
    status = _SHORT.get(row.status, row.status)
    if not row.seconds:
        return [row.transport, *["-"] * (len(COLUMNS) - 2), status]
    # In seconds, and so called, where five digits would have no room.
    per_second, unit = (1e3, "") if max(row.seconds) < 9.999 else (1, " s")
    middle, least, most = (
        _three_digits(seconds * per_second) for seconds in (row.median_seconds, min(row.seconds), max(row.seconds))
    )
    # Above 1 what a transport adds (or sends twice), below 1 what it leaves out: the one column that no machine
    # changes.
    wire = row.nbytes_wire / row.size.nbytes if row.nbytes_wire is not None and row.size.nbytes else None
    cpu = (row.cpu_seconds_source, row.cpu_seconds_receiver)
    return [
        row.transport,
        f"{middle}{unit} ({least}…{most})",
        _three_digits(row.gigabytes_per_second),
        _or_dash(row.ratio, _three_digits),
        _or_dash(row.of_limit, "{:.0%}".format),
        _or_dash(row.of_memmove, "{:.0%}".format),
        "+".join(_or_dash(seconds, lambda of: _three_digits(of / row.size.nbytes * 1e9)) for seconds in cpu),
        _describe_both(row.nbytes_memory_source, row.nbytes_memory_receiver),
        _or_dash(wire, _three_digits),
        status,
    ]


def render_growth(growths: Sequence[Growth]) -> RenderableType:
    """What each point took, what was fitted to all, and how far that is off."""
    return Group(*(each for growth in growths for each in (_render_one(growth), "")), Text(GROWTH_LEGEND, style="dim"))


def _render_one(growth: Growth) -> RenderableType:
    title = Text(f"growth · {growth.mode} · {growth.transport}", style="bold")
    table = _new_table()
    table.add_column("leaves x size", min_width=16, no_wrap=True)
    for heading in ("time", "source CPU", "dest. CPU"):
        table.add_column(heading, min_width=12, justify="right", no_wrap=True)
        table.add_column("fit off by", min_width=10, justify="right", no_wrap=True)
    fits = growth.fits
    for index, point in enumerate(growth.points):
        shown = zip(point.costs, fits, strict=True)
        texts = [(describe_seconds(cost), f"{round(fit.off[index] * 100):+}%" if fit else "-") for cost, fit in shown]
        table.add_row(point.state, *(text for pair in texts for text in pair))
    if not all(fits):
        return Group(title, table, Text("too few points to fit", style="red"))
    for name, number, unit in (("fixed", 0, "ms"), ("each leaf", 1, "µs"), ("each byte", 2, "s/GB")):
        costs = [f"{_three_digits(fit.costs[number])} {unit}" for fit in fits if fit]
        table.add_row(name, *(text for cost in costs for text in (cost, "")), style="bold")
    rate = fits[0].costs[2] if fits[0] else 0.0
    if rate > 0:
        table.add_row("", describe_rate(1 / rate), style="bold")
    off = [f"{median(map(abs, fit.off)):.0%}, {max(map(abs, fit.off)):.0%}" for fit in fits if fit]
    table.add_row("median, most", *(text for each in off for text in ("", each)), style="dim")
    return Group(title, table)


def _new_table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")


def _elsewhere(row: Row) -> str:
    share = row.in_place_share
    return "" if share is None or share == 1 else f"{share:.0%} of the tensors landed at the template's addresses"


def _or_dash(value: float | None, describe: Callable[[float], str]) -> str:
    return "-" if value is None else describe(value)


def _describe_both(source: int | None, receiver: int | None) -> str:
    """In the unit of the larger one: ``8.39+21.0 MB``."""
    if source is None or receiver is None:
        return "-"
    exponent = 1 if max(source, receiver) < 10**6 else 2 if max(source, receiver) < 10**9 else 3
    values = (_three_digits(nbytes / 1000**exponent) for nbytes in (source, receiver))
    return f"{'+'.join(values)} {('kB', 'MB', 'GB')[exponent - 1]}"


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
    return {"equal": "bold" if row.transport in OURS else "", "limit": "dim", "unsupported": "dim"}.get(
        row.status, "red"
    )
