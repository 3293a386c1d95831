"""The command line of the matrix."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .cells import PARTS, cells
from .run import ROOT, Folder
from .table import describe, render, replaced

PAGE = ROOT / "docs" / "versions.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Run cells, or write the table. Returns the exit status: 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="Run the tests with other versions.")
    parser.add_argument("words", nargs="*", help="run the cells with all of these in their names: py3.11 torch2.15")
    parser.add_argument("--folder", type=Path, default=ROOT / "matrix-output", help="for environments and results")
    parser.add_argument("--minutes", type=int, default=60, help="that each of a cell's two parts may take")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--keep", action="store_true", help="keep the environments, some gigabytes each")
    parser.add_argument("--table", action="store_true", help="run nothing; write the results into docs/versions.md")
    options = parser.parse_args(argv)
    folder = Folder(options.folder, 60 * options.minutes)
    if options.table:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(replaced(page, render(list(cells([])), folder.result_of, page)), "utf-8")
        return 0
    chosen = list(cells(options.words))
    if options.again:
        for cell in chosen:
            folder.forget(cell)
    waiting = [cell for cell in chosen if not folder.is_done(cell)]
    if waiting:
        folder.build()
    status = 0
    for number, cell in enumerate(waiting, 1):
        print(f"{cell.name} ({number} of {len(waiting)})", flush=True)
        result = folder.run(cell)
        for part in PARTS:
            print(f"  {part}: {result.get('install') or describe(result.get(part))}", flush=True)
            status |= bool(result.get(part, {}).get("failed"))
        # Those that follow may need it as well.
        if not options.keep and not any(cell.environment == other.environment for other in waiting[number:]):
            folder.remove(cell)
    return status


if __name__ == "__main__":
    sys.exit(main())
