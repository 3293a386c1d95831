"""What a receive that broke has left in the template, for the next one. No I/O.

Strategy: what was sound is noted by message. A source cuts the same state differently for one destination and for a
chain, so what is left is also known by byte range: a message all of whose bytes had landed is offered again, whatever
it was called. Nothing rests on this: the digests of what the memory holds then decide. So the state may be described
otherwise by now, as when a dataloader has gone on while the step failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ft_transport._state.geometry import merge
from ft_transport._wire.layout import Layout, Piece

__all__ = ["PartialReceive"]


class PartialReceive(NamedTuple):
    """What a receive has left.

    Attributes:
        step: Of the state.
        layout: How the source had cut it.
        digests: Of the messages that were sound; None where it is still to be taken.
    """

    step: int
    layout: Layout
    digests: Mapping[int, int | None]

    def left_for(self, step: int, layout: Layout) -> dict[int, int | None]:
        """The messages of a state, as its source cuts it now, that may be here; none if it is of another step."""
        # Although most of its bytes may be equal: ``skip_unchanged`` is for that.
        if step != self.step:
            return {}
        if layout.messages == self.layout.messages:
            return dict(self.digests)
        # Only the slow way: a source that is asked for a chain cuts smaller messages than one that serves a single
        # destination.
        extents: dict[int, list[tuple[int, int]]] = {}
        for message in self.digests:
            for storage, begin, end in self.layout.messages[message]:
                extents.setdefault(storage, []).append((begin, end))
        ranges = {storage: _joined(merge(found)) for storage, found in extents.items()}

        def here(piece: Piece) -> bool:
            return any(begin <= piece.begin and piece.end <= end for begin, end in ranges.get(piece.storage, ()))

        return {m: None for m, pieces in enumerate(layout.messages) if all(map(here, pieces))}


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Adjacent ranges as one."""
    joined: list[tuple[int, int]] = []
    for begin, end in ranges:
        if joined and begin == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined
