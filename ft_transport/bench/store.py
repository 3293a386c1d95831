"""The store through which all ranks and supervisors speak."""

from __future__ import annotations

import time

# torch binds these in C++ and does not list them, so a type checker does not see that they are public.
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

__all__ = ["POLL_SECONDS", "SET", "PrefixStore", "Store", "TCPStore", "barrier", "get_text", "poll_until", "set_text"]

# What a key holds that only needs to be there.
SET = "set"

# Between two looks, in seconds: rare enough to cost the ranks nothing.
POLL_SECONDS = 0.1


# Characters in one value. torch's store takes 8 MiB, and says of more only that a client is gone.
PIECE = 1 << 20


def set_text(store: Store, key: str, text: str) -> None:
    """Set a key to a text of any length, for :func:`get_text`."""
    pieces = [text[begin : begin + PIECE] for begin in range(0, len(text), PIECE)]
    for number, piece in enumerate(pieces):
        store.set(f"{key}/{number}", piece)
    store.set(f"{key}/pieces", str(len(pieces)))


def get_text(store: Store, key: str) -> str:
    """What :func:`set_text` has set, or will have."""
    return "".join(store.get(f"{key}/{number}").decode() for number in range(int(store.get(f"{key}/pieces"))))


def barrier(store: Store, name: str, world_size: int) -> None:
    """Wait until all ranks have come here. All leave within a message from the store, well under a millisecond.

    Raises:
        RuntimeError: The store's own time-out passed.
    """
    # Not a barrier of torch's: that needs a group, and a group that a broken transport has wedged would hold this up.
    if store.add(f"{name}/count", 1) == world_size:
        store.set(f"{name}/full", SET)
    store.wait([f"{name}/full"])


def poll_until(store: Store, keys: list[str], seconds: float) -> None:
    """Wait for keys without going deaf to Ctrl-C, as a wait inside the store would.

    Raises:
        TimeoutError: After ``seconds``.
    """
    limit = time.monotonic() + seconds
    # A clock of its own, since the store's time-out is made for ranks in mid-transfer, not for a machine yet to start.
    while keys and not store.check(keys):
        if time.monotonic() > limit:
            raise TimeoutError(f"no {', '.join(keys)} after {seconds:g} s: does the bench run on every machine?")
        time.sleep(POLL_SECONDS)
