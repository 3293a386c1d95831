"""Which cells there are. What a cell gave is in its result, see ``run.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ALSO", "PARTS", "PYTHONS", "TORCHES", "TORCHFTS", "Cell", "cells"]

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.9.1", "2.11.0", "2.13.0", "2.15.0")
# The release, and one nightly: each of them is another distribution, and both have the same files.
TORCHFTS = ("torchft==0.2.0", "torchft-nightly==2026.10.26")
# What an older torch needs of other packages that do not say so themselves.
ALSO = {"2.9.1": ["torchao==0.15.0"]}
# What is run in each cell.
PARTS = ("unit", "heal")


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        python: ``"3.11"``.
        torch: Its version.
        torchft: A requirement for pip.
    """

    python: str
    torch: str
    torchft: str

    @property
    def environment(self) -> str:
        """Names the virtual environment; cells that differ in torchft alone have it by turns."""
        return f"py{self.python}-torch{self.torch}"

    @property
    def name(self) -> str:
        return f"{self.environment}-{self.torchft.replace('==', '-')}"


def cells(words: list[str]) -> Iterator[Cell]:
    """The cells whose names have all the words in them, those of one environment one behind the other."""
    for python in PYTHONS:
        for torch in TORCHES:
            for torchft in TORCHFTS:
                cell = Cell(python, torch, torchft)
                if all(word in cell.name for word in words):
                    yield cell
