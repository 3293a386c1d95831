"""Who is supplied by whom, who is to blame for slowness, and what follows when a supplier has ended. No I/O.

Strategy: destinations form a line, in the order in which they have agreed to the state, and each fetches from the
nearest one before it that is well. So the source's link carries the state about once, however many destinations there
are: star, broadcast and chain were measured with one source and three destinations behind 1 Gbit/s, where one copy
takes 0.54 s, as 1.68, 1.64 and 0.57 s. A tree would halve the link of whoever has two below it.

What can be decided at one place is. The source alone knows the line, so it names suppliers (:func:`supplier_of`), and
a destination only says who has failed it. A destination alone knows what has landed, so it says what follows
(:data:`AFTER`) when its lanes have ended. And whoever is called slow has not been convicted: it may be waiting itself
(:func:`is_to_blame`).

Not here: connections, threads and locks. Whoever shares a :class:`DestinationState` between threads sees to that.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import NamedTuple

from ft_transport._deadline import Deadline
from ft_transport._net.endpoint import Endpoint
from ft_transport._telemetry.report import PeerReport

__all__ = ["AFTER", "MAX_BREAKS", "DestinationState", "Ended", "Next", "Route", "after", "is_to_blame", "supplier_of"]

# ---------------------------------------------------------------------------- the source: who is supplied by whom


@dataclass
class DestinationState:
    """One destination that has come, as far as it matters to the others.

    Attributes:
        peer: Its line in the report: how far it is, and whether it is still there.
        attempt: Which receive of its this is, counted by it.
        metadata: Where those behind it can fetch from it, empty if they cannot.
        relay: By which they ask for its supplier there.
        ident: By which it asks for its own supplier at the source.
        before: The destination that supplies it, None for the source.
        settling: Until when it need not be as fast as its supplier lets it be.
        avoided: Suppliers, as ``relay``, that have failed it, or are too slow.
    """

    peer: PeerReport
    attempt: int = 0
    metadata: str = ""
    relay: bytes = b""
    ident: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    before: DestinationState | None = None
    settling: Deadline | None = None
    avoided: set[bytes] = field(default_factory=set)

    def follow(self, supplier: DestinationState | None, stall: timedelta) -> None:
        """Be supplied by somebody else from now on; whoever is named again goes on where it was."""
        if self.settling is None or supplier is not self.before:
            self.before, self.settling = supplier, Deadline(stall)

    def turn_away(self, failed: bytes, *, slow: bool) -> bool:
        """It has said that its supplier has failed it, or is much slower than the source; gives whether that counts."""
        before = self.before
        if slow and not is_to_blame(before):
            return False
        # Only the one that it was told to fetch from: of others one could name any number, and make us keep them.
        if before is not None and failed == before.relay:
            self.avoided.add(failed)
        return True


def supplier_of(state: DestinationState, line: Sequence[DestinationState]) -> DestinationState | None:
    """Whom a destination fetches from, of those in line; None for the source itself.

    The nearest before it, which is the one that has the least to do: nobody else fetches from it, unless somebody in
    between has failed. Who is complete goes on supplying until its own step is over, and then its lanes end.
    """
    for other in reversed(line[: line.index(state)]):
        alive = other.peer.outcome in ("pending", "complete")
        if alive and other.metadata and other.relay not in state.avoided:
            return other
    return None


def is_to_blame(slow: DestinationState | None) -> bool:
    """Whether a slow destination is slow itself, and not for want of what those before it have not passed on yet.

    A slow link makes all behind it slow, and each of them finds that the source would be quicker. If all were believed,
    they would turn to the source together, and share a link that the chain was there to spare. So only the first one
    that holds the others up is left out.
    """
    if slow is None or slow.settling is None or not slow.settling.expired():
        return False
    if slow.before is None:
        return True
    before = slow.before.peer
    # Twice, since what lies between two that are equally quick is as much as the layout's messages let it be.
    return before.outcome == "complete" or before.nbytes > 2 * slow.peer.nbytes + _AHEAD_BYTES


# Bytes that a destination may lag behind the one before it, whatever the speed: what is on its way between them (a
# message of up to 4 MiB on each of sixteen lanes, which counts once it has landed).
_AHEAD_BYTES = 64 << 20


# ------------------------------------------------------------------- a destination: what follows when a supplier ends


class Route(NamedTuple):
    """Where to fetch.

    Attributes:
        endpoint: The supplier's.
        ident: Of the supplier there.
        from_source: Whether it is the source's own.
    """

    endpoint: Endpoint
    ident: bytes
    from_source: bool

    @property
    def label(self) -> str:
        """The supplier, for messages."""
        return "the source" if self.from_source else "the destination before this one"


class Ended(NamedTuple):
    """How fetching from one supplier has ended. Its lanes are closed, and nothing lands any more.

    Attributes:
        complete: Every message was here.
        overwritten: Forward has written to some of them since, which so are fetched once more.
        named: The source has named another supplier meanwhile.
        from_source: It was the source's own.
        source_lost: The source cannot be heard any more: nobody can name another supplier, but who is known may go on.
        hopeless: New lanes to the same one would end as these did: it was silent, or what it sends is always damaged.
        breaks: How often all lanes to the source have ended in this receive, this time counted.
    """

    complete: bool
    overwritten: bool
    named: bool
    from_source: bool
    source_lost: bool
    hopeless: bool
    breaks: int


class Next(Enum):
    """What a destination does then."""

    FINISH = "everything is here"
    NAMED = "fetch from the supplier that the source has named"
    SAME = "open lanes to the same supplier again"
    ANOTHER = "ask the source for another supplier"
    GIVE_UP = "the receive fails"


# How often all lanes to the source may break before the receive does. A switch that restarts breaks them once; what
# breaks them three times will break them again, and the deadline is too late to find out.
MAX_BREAKS = 3

# What follows what: the first line all of whose words are true. What is not in it fails.
AFTER: tuple[tuple[Mapping[str, bool], Next], ...] = (
    ({"complete": True, "overwritten": False}, Next.FINISH),
    ({"named": True}, Next.NAMED),
    ({"complete": True}, Next.SAME),
    # Without the source nobody can say who else has the state, and whoever was named has just ended.
    ({"source_lost": True}, Next.GIVE_UP),
    ({"from_source": False}, Next.ANOTHER),
    # The source can be heard, so it lives, and lanes break for reasons of their own (a middlebox, a port's reset).
    ({"hopeless": False}, Next.SAME),
)


def after(ended: Ended) -> Next:
    """What follows, by :data:`AFTER`."""
    found = ended._asdict() | {"hopeless": ended.hopeless or ended.breaks >= MAX_BREAKS}
    matching = (follows for words, follows in AFTER if all(found[word] is value for word, value in words.items()))
    return next(matching, Next.GIVE_UP)
