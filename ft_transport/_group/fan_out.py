"""Several destinations at once, and how the transfer with one of them ends.

Strategy: a wait blocks its thread, and Gloo offers nothing to wait for several operations with. So each destination has
a thread of its own, which shares nothing with the others but the state and its digests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from ft_transport._device import NO_STREAMS, Streams
from ft_transport._group.channel import Channel
from ft_transport._group.control import Control
from ft_transport._telemetry.report import PeerReport, outcome_of
from ft_transport._threads import ThreadGroup
from ft_transport.errors import PeerFailure, TransferTimeout, reason_of

__all__ = ["close_failed", "in_parallel"]

logger = logging.getLogger("ft_transport")


def close_failed(control: Control, peer: PeerReport, exc: BaseException, *, can_speak: bool = True) -> None:
    """Note how a transfer ended, tell the peer where it still listens, leave nothing that could touch memory.

    Args:
        can_speak: Whether the peer would take a word of this side's for one; else the channel breaks without.
    """
    # Before anything is said to the peer: that may take its time, and whoever looks at the report sees why.
    peer.reason = reason_of(exc)
    peer.outcome = outcome_of(exc, cancelled=control.channel.broken)
    if control.peer_gave_up:
        # In mid-flight its receives are still posted, and so are this side's sends: what is in them may yet move.
        if peer.phase == "move" and not isinstance(exc, TransferTimeout):
            control.await_closure()
    elif not (control.is_over or isinstance(exc, _NOBODY_LISTENS) or peer.phase == "rebuild"):
        # In "rebuild" the source has its DONE, and listens no more.
        if can_speak:
            control.last_words(peer.reason)
        else:
            control.channel.abort()
    elif peer.phase == "move" and isinstance(exc, TransferTimeout) and not control.channel.broken:
        # It was no wait of the group that has expired, but one for this side's own device: what is posted would go on.
        control.channel.abort()


# Who is out of time, or gone. After a wait that has expired every pair of the group is closed anyway.
_NOBODY_LISTENS = (TransferTimeout, PeerFailure)


def in_parallel(
    channels: Sequence[Channel], run: Callable[[int], None], streams: Streams = NO_STREAMS
) -> list[BaseException | None]:
    """Run ``run(index)`` for every channel at once, each in its own thread; gives what each raised.

    A single channel is served in the caller's thread. All copy in these streams.
    """
    errors: list[BaseException | None] = [None] * len(channels)

    def guarded(index: int, *, ours: bool = False) -> None:
        try:
            with streams.use(for_good=ours):
                run(index)
        except BaseException as exc:
            # A traceback kept here would keep the frames of this thread, and with them the group.
            errors[index] = exc.with_traceback(None)

    # The common case costs no thread; and if this is the main one, Ctrl-C, which Python raises there alone, reaches it.
    if len(channels) == 1:
        guarded(0)
        return errors
    threads = ThreadGroup()
    try:
        for index, channel in enumerate(channels):
            threads.start(f"rank{channel.peer_rank}", partial(guarded, index, ours=True))
        threads.attend()
    except BaseException:
        # Ctrl-C, or no more threads to be had: nothing may move once this call is over.
        for channel in channels:
            # So that every thread that waits is woken, by its pair that closes.
            channel.abort()
        raise
    finally:
        threads.join()
    return errors
