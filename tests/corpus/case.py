"""What a case of the corpus is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Case", "Table"]


@dataclass(frozen=True)
class Case:
    """One state, and what a transfer of it must do.

    Attributes:
        name: For the test's id.
        build: Makes the state from a seed: the same bytes for the same seed, others of the same structure for
            another.
        allow: Classes and functions that a receiver must allow first.
        torch_keeps: Whether ``torch.save`` and ``torch.load`` keep it; they cannot save, or load, some.
        varies: Whether another seed gives something else.
        fresh: Paths of tensors that must not land in place, beyond those whose kind never does.
        either: Whether tensors may land in place or not, as long as the report says which.
    """

    name: str
    build: Callable[[int], Any]
    allow: tuple[Any, ...] = ()
    torch_keeps: bool = True
    varies: bool = True
    fresh: tuple[str, ...] = ()
    either: bool = False

    def __repr__(self) -> str:
        return self.name


class Table(list[Case]):
    """The cases of one theme."""

    def __init__(self, theme: str) -> None:
        super().__init__()
        self._theme = theme

    def add(self, name: str, build: Callable[[int], Any], *, allow: Sequence[Any] = (), **flags: Any) -> None:
        """Add a case."""
        self.append(Case(f"{self._theme}: {name}", build, tuple(allow), **flags))

    def case(self, **flags: Any) -> Callable[[Callable[[int], Any]], Callable[[int], Any]]:
        """Make a function a case that is called as the function is."""

        def decorate(build: Callable[[int], Any]) -> Callable[[int], Any]:
            self.add(build.__name__.strip("_").replace("_", " "), build, **flags)
            return build

        return decorate
