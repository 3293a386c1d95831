"""Who is supplied by whom, and who is too slow."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import NamedTuple

from ft_transport._deadline import Deadline
from ft_transport._lanes.session import Talk
from ft_transport._lanes.supplier import Supply
from ft_transport._net.endpoint import Invitation
from ft_transport._net.stall import Patience
from ft_transport._telemetry.report import PeerReport

__all__ = ["Guest", "Route", "is_to_blame"]


class Route(NamedTuple):
    """Where to fetch.

    Attributes:
        invitation: The supplier's.
        ident: Of the supply there.
        from_source: Whether it is the source's own.
    """

    invitation: Invitation
    ident: bytes
    from_source: bool

    @property
    def label(self) -> str:
        """The supplier, for messages."""
        return "the source" if self.from_source else "the destination before this one"


@dataclass
class Guest:
    """One destination that has come.

    Attributes:
        metadata: Where those behind it in the chain can fetch from it, empty if they cannot.
        relay: Identity of its supply there.
        ident: Identity of the supply that it has here.
        before: The destination that supplies it, None for the source.
        settling: Until when it need not be as fast as its supplier lets it be.
        avoided: Identities of supplies that have failed it, or are too slow.
        done: It has everything, and the state has not changed: whatever happens now, it is not told to discard it.
    """

    talk: Talk
    peer: PeerReport
    patience: Patience
    supply: Supply | None = None
    metadata: str = ""
    relay: bytes = b""
    ident: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    before: Guest | None = None
    settling: Deadline | None = None
    avoided: set[bytes] = field(default_factory=set)
    done: bool = False


def is_to_blame(slow: Guest | None) -> bool:
    """Whether a slow destination is slow itself, and not for want of what those before it have not passed on yet."""
    if slow is None or slow.settling is None or not slow.settling.expired():
        return False
    if slow.before is None:
        return True
    before = slow.before.peer
    return before.outcome == "complete" or before.nbytes > 2 * slow.peer.nbytes + _AHEAD_BYTES


# Bytes that a destination may lag behind the one before it, whatever the speed: what is on its way between them.
_AHEAD_BYTES = 32 << 20
