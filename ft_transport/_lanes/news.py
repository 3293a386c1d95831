"""What a source's transfer tells: how far each destination is, a line now and then, and how it ended.

Strategy: the caller's callbacks and the log's handlers are foreign code, which may block or raise, and a source serves
many: so nothing of this is done by a thread that serves. It is left to the teller, and of what comes quicker than it
can be told, only the newest is.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta
from functools import partial

from ft_transport._deadline import Deadline
from ft_transport._options import LaneOptions
from ft_transport._telemetry.events import publish
from ft_transport._telemetry.progress import Watch, report_progress
from ft_transport._telemetry.report import PeerReport, Progress, TransferReport
from ft_transport._telemetry.teller import Teller
from ft_transport.errors import LocalProtocolError

__all__ = ["News"]

logger = logging.getLogger("ft_transport")

# How long whoever ends a transfer waits for callbacks that are told of it: training waits for it, too. What takes
# longer goes on behind its back.
_TELLING = timedelta(seconds=2)


class News:
    """What one transfer tells. Any thread.

    Args:
        report: Of the transfer.
        options: With the caller's callbacks.
        deadline: Of the transfer.
        teller: Calls them.
    """

    def __init__(self, report: TransferReport, options: LaneOptions, deadline: Deadline, teller: Teller) -> None:
        self._report = report
        self._options = options
        self._teller = teller
        self._begin = time.perf_counter()
        self._watch = Watch(report, deadline)
        self._is_watching = False
        self._lock = threading.Lock()
        self._untold: dict[int, Progress] = {}  # of peers, that the progress callback has not been told yet

    def progress(self, peer: PeerReport, nbytes: int) -> None:
        """Note how far a destination says that it is: no further than there are bytes."""
        total = self._report.nbytes_total
        # It is the peer's word, and goes into sums, bars and metrics.
        nbytes = min(nbytes, total)
        if nbytes == peer.nbytes:
            return
        peer.nbytes = nbytes
        if self._options.on_progress is None:
            return
        now = Progress("source", self._report.step, peer.rank, nbytes, total, peer.name)
        with self._lock:
            # By identity: several destinations may have the same rank, -1.
            is_new, self._untold[id(peer)] = id(peer) not in self._untold, now
        if is_new:
            self._teller.leave(partial(self._tell_progress, id(peer)))

    def _tell_progress(self, peer: int) -> None:
        """Tell the newest that is known of a peer: a callback that takes its time misses what was between."""
        with self._lock:
            now = self._untold.pop(peer)
        report_progress(self._options.on_progress, now)

    def refused(self, name: str, address: str, reason: str) -> None:
        """Somebody was not let in."""
        self._teller.leave(partial(logger.warning, "%s at %s is not served: %s", name, address, reason))

    def look(self) -> None:
        """Write the lines that are due. Does not block."""
        # Two at once would write each line twice.
        if self._watch.is_due and not self._is_watching:
            self._is_watching = True
            self._teller.leave(self._look)

    def _look(self) -> None:
        self._watch.tick()
        self._is_watching = False

    def over(self, error: LocalProtocolError | None) -> None:
        """The transfer has ended; the report is complete when this returns."""
        if self._report.finish(time.perf_counter() - self._begin, error):
            self._teller.leave(partial(publish, self._report, self._options.on_event))

    def drain(self) -> None:
        """Wait until all of it is told, for a moment."""
        self._teller.drain(Deadline(_TELLING))
