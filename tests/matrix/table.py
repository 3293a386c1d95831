"""Results as a page of the documentation. No processes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from .cells import PARTS, Cell

__all__ = ["BEGIN", "END", "describe", "render", "replaced"]

# What is between these lines of the page is written by ``python -m tests.matrix --table``.
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"


def describe(part: dict[str, Any] | None) -> str:
    """``"7,918 passed, 1 failed, 5 skipped"``; what was not run says so."""
    if part is None:
        return "not run"
    if part["outcome"] != "ran":
        return str(part["outcome"])
    passed, failed, skipped = (f"{part[name]:,} {name}" for name in ("passed", "failed", "skipped"))
    return ", ".join([passed, *([failed] if part["failed"] else []), *([skipped] if part["skipped"] else [])])


def render(cells: Sequence[Cell], result_of: Callable[[Cell], dict[str, Any] | None]) -> str:
    """The table: a line for each cell, whether it was run or not."""
    lines = ["| Python | torch | torchft | unit | heals under Managers |", "|---|---|---|---|---|"]
    for cell in cells:
        result = result_of(cell)
        versions = {} if result is None else result["versions"]
        torch, torchft = versions.get("torch", cell.torch), cell.torchft.replace("==", " ")
        parts = ["not run"] * 2 if result is None else _parts(result)
        lines.append(f"| {' | '.join([versions.get('python', cell.python), torch, torchft, *parts])} |")
    return "\n".join([*lines, *_failures(cells, result_of)])


def _parts(result: dict[str, Any]) -> list[str]:
    if "install" in result:  # why there is nothing to run
        return [result["install"], ""]
    return [describe(result.get(part)) for part in PARTS]


def _failures(cells: Sequence[Cell], result_of: Callable[[Cell], dict[str, Any] | None]) -> list[str]:
    """Every test that failed, under the table, by cell."""
    lines = []
    for cell in cells:
        result = result_of(cell) or {}
        failed = [name for part in PARTS for name in (result.get(part) or {}).get("failures", [])]
        if failed:
            lines += ["", f"Failed with {cell.name}:", "", *(f"* `{name}`" for name in failed)]
    return lines


def replaced(page: str, table: str) -> str:
    """The page with another table.

    Raises:
        ValueError: It has no place for one.
    """
    found = re.subn(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", page, flags=re.DOTALL)
    if found[1] != 1:
        raise ValueError(f"expected {BEGIN} and {END}, once")
    return found[0]
