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


def render(cells: Sequence[Cell], result_of: Callable[[Cell], dict[str, Any] | None], page: str = "") -> str:
    """The table: a line for each cell, whether it was run or not.

    Args:
        cells: All that there are.
        result_of: What came of one; None where it was not run here.
        page: Has a table already, whose lines stay where nothing was run here.
    """
    lines = ["| Python | torch | torchft | commit | unit | heals under Managers |", "|---|---|---|---|---|---|"]
    failures: list[str] = []
    for cell in cells:
        result = result_of(cell)
        if result is None:
            line, failed = _earlier(cell, page)
        else:
            versions, torchft = result["versions"], cell.torchft.replace("==", " ")
            found = [versions.get("python", cell.python), versions.get("torch", cell.torch), torchft]
            line = f"| {' | '.join([*found, result.get('commit', ''), *_parts(result)])} |"
            failed = _listed([name for part in PARTS for name in (result.get(part) or {}).get("failures", [])])
        lines.append(line)
        if failed:
            failures += ["", f"Failed with {cell.name}:", "", *(f"* {each}" for each in failed)]
    return "\n".join([*lines, *failures])


def _listed(names: list[str]) -> list[str]:
    """The tests, each once: of those with several cases, how many have failed."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition("[")[0], []).append(name)
    return [f"`{of[0]}`" if len(of) == 1 else f"`{test}`, {len(of)} cases" for test, of in found.items()]


def _earlier(cell: Cell, page: str) -> tuple[str, list[str]]:
    """The line of a cell in a page, and what failed."""
    python, torch, torchft = map(re.escape, (cell.python, cell.torch, cell.torchft.replace("==", " ")))
    line = re.search(rf"^\| {python}(\.\d+)? \| {torch}(\+\w+)? \| {torchft} \|.*$", page, re.MULTILINE)
    failed = re.search(rf"^Failed with {re.escape(cell.name)}:\n\n((\* .*\n)+)", page, re.MULTILINE)
    nothing = f"| {cell.python} | {cell.torch} | {cell.torchft.replace('==', ' ')} |  | not run | not run |"
    return line[0] if line else nothing, re.findall(r"^\* (.*)$", failed[1], re.MULTILINE) if failed else []


def _parts(result: dict[str, Any]) -> list[str]:
    if "install" in result:  # why there is nothing to run
        return [result["install"], ""]
    return [describe(result.get(part)) for part in PARTS]


def replaced(page: str, table: str) -> str:
    """The page with another table.

    Raises:
        ValueError: It has no place for one.
    """
    found = re.subn(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", page, flags=re.DOTALL)
    if found[1] != 1:
        raise ValueError(f"expected {BEGIN} and {END}, once")
    return found[0]
