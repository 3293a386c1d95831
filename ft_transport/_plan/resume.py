"""What a receive that broke has left in the template, for the next one. No I/O.

Strategy: what was sound is noted by message. A source cuts the same state differently for one destination and for a
chain, so what is left is also known by byte range: a message all of whose bytes had landed is offered again, whatever
it was called. Nothing rests on this: the digests of what the memory holds then decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgpack

from ft_transport._state.geometry import merge
from ft_transport._wire.digest import digest_bytes
from ft_transport._wire.layout import Layout, Piece

__all__ = ["PartialReceive", "manifest_fingerprint"]


def manifest_fingerprint(data: bytes, header: Any) -> int:
    """Fingerprint of what a MANIFEST frame says of the state, whatever its header says.

    Args:
        data: The frame.
        header: The first entry of its body.
    """
    # The header holds limits and step, in which two sources of one state may differ. What follows it (nodes, shapes,
    # leaves, storages) is the state's description, byte for byte the same from every replica that holds it.
    return digest_bytes(memoryview(data)[len(msgpack.packb(header)) :])


class PartialReceive(NamedTuple):
    """What a receive has left.

    Attributes:
        step: Of the state.
        state: See :func:`manifest_fingerprint`.
        layout: How the source had cut it.
        digests: Of the messages that were sound; None where it is still to be taken.
    """

    step: int
    state: int
    layout: Layout
    digests: Mapping[int, int | None]

    def left_for(self, step: int, state: int, layout: Layout) -> dict[int, int | None]:
        """The messages of a state, as its source cuts it now, that may be here; none if it is another state."""
        # Another step is another state, although most of its bytes may be equal: ``skip_unchanged`` is for that.
        if (step, state) != (self.step, self.state):
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
