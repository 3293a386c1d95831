"""A line every few seconds on how far a transfer has come: a long one is watched by people.

Strategy: the report is filled in while bytes move, so it is enough to look at it now and then, from whatever thread
wakes up anyway. A transfer that stalls wakes up nobody who moves bytes, which is when the line is wanted most: where
all wait in one call each, a thread for that alone looks; a source over lanes is in no call: its listener looks whether
a line is due, and leaves the writing to another thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

from ft_transport._deadline import Deadline
from ft_transport._telemetry.events import PROGRESS, log_event
from ft_transport._telemetry.report import PeerReport, Progress, ProgressCallback, TransferReport, peer_label
from ft_transport._threads import periodically

__all__ = ["INTERVAL", "Watch", "progress_bar", "report_progress", "watching"]

logger = logging.getLogger("ft_transport")

# Between two lines about the same peer. Most transfers are over by then and have none.
INTERVAL = timedelta(seconds=5)


class _Seen:
    """What was seen of one peer when its newest line was written."""

    def __init__(self, peer: PeerReport, now: float) -> None:
        self.peer = peer
        self.nbytes = 0
        self.at = now
        self.moved_at = now


class Watch:
    """Follows one transfer.

    Args:
        report: Of the transfer; others fill it in.
        deadline: Of the whole call.
    """

    def __init__(self, report: TransferReport, deadline: Deadline) -> None:
        self._report = report
        self._deadline = deadline
        # The deadline's clock is the call's: nothing here reads another one.
        self._begin = deadline.elapsed()
        self._next = self._begin + INTERVAL.total_seconds()
        self._seen: dict[int, _Seen] = {}

    @property
    def is_due(self) -> bool:
        """Whether :meth:`tick` would write any. Any thread."""
        return self._deadline.elapsed() >= self._next

    def tick(self) -> None:
        """Write the lines that are due. Never raises; one thread at a time."""
        now = self._deadline.elapsed()
        if now < self._next:
            return
        # From now and not from when it was due: after a stall of the whole process one line is enough.
        self._next = now + INTERVAL.total_seconds()
        # A copy: a source over lanes replaces an entry when a destination comes again.
        for peer in list(self._report.peers):
            # Those that are served have their line in the summary.
            if peer.outcome == "pending":
                # The peer is kept, so its id is not given to another one meanwhile.
                seen = self._seen.setdefault(id(peer), _Seen(peer, self._begin))
                level, text, event = self._look(peer, seen, now)
                log_event(level, text, event)

    def _look(self, peer: PeerReport, seen: _Seen, now: float) -> tuple[int, str, dict[str, Any]]:
        report = self._report
        total, done = report.nbytes_total, peer.nbytes + report.nbytes_kept
        # Since the line before, and not since the begin: a transfer that has come to a crawl shall look like one.
        speed = (done - seen.nbytes) / (now - seen.at) if now > seen.at else 0.0
        if done != seen.nbytes:
            seen.moved_at = now
        stalled = now - seen.moved_at
        seen.nbytes, seen.at = done, now
        # None and not infinity, which JSON has no word for.
        left = (total - done) / speed if speed else None
        where = "to" if report.role == "source" else "from"
        step = "" if report.step is None else f"step {report.step} "
        says = self._says(peer.phase, done, stalled, speed, left)
        event = {
            "event": PROGRESS,
            "role": report.role,
            "transport": report.transport,
            "step": report.step,
            "phase": peer.phase,
            "peer_rank": peer.rank,
            "peer_name": peer.name,
            "peer_address": peer.address,
            "nbytes_done": done,
            "nbytes_total": total,
            "gigabytes_per_second": speed / 1e9,
            "seconds": now,
            "seconds_left": left,
            "seconds_stalled": stalled,
            "seconds_to_deadline": self._deadline.remaining().total_seconds(),
        }
        # A warning only while bytes should move: describing a state or building it again takes seconds, too, and moves
        # none.
        is_stalled = bool(stalled) and done < total and peer.phase == "move"
        return logging.WARNING if is_stalled else logging.INFO, f"{step}{where} {peer.label}: {says}", event

    def _says(self, phase: str, done: int, stalled: float, speed: float, left: float | None) -> str:
        total = self._report.nbytes_total
        rest = self._deadline.remaining().total_seconds()
        if left is not None and done < total:
            return f"{_of(done, total)}, {speed / 1e9:.2f} GB/s, {left:.0f} s left"
        if phase == "move" and done < total:
            return f"{_of(done, total)}, nothing has moved for {stalled:.0f} s, {rest:.0f} s to the deadline"
        if phase == "describe" and self._report.num_leaves:  # a source, which has described its state
            return f"it has not come yet, after {stalled:.0f} s; {rest:.0f} s to the deadline"
        return f"{_of(done, total)}, in phase {phase} for {stalled:.0f} s, {rest:.0f} s to the deadline"


def _of(done: int, total: int) -> str:
    # One unit for both numbers, and for the transfer's whole life.
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / unit:.1f} of {total / unit:.1f} {name}"


def watching(
    report: TransferReport, deadline: Deadline, later: Callable[[], object] = bool
) -> AbstractContextManager[None]:
    """Follow a transfer from a thread of its own, which has ended when this does.

    Args:
        report: Of the transfer.
        deadline: Of the whole call.
        later: Called after a second, and every second from then on. It gets no thread of its own: to begin one takes
            milliseconds where cores are busy. ``bool()`` does nothing.
    """
    watch = Watch(report, deadline)

    def tick() -> None:
        later()
        watch.tick()

    return periodically(tick, INTERVAL / 5, "progress")


def progress_bar(**options: Any) -> ProgressCallback:
    """A callback for ``on_progress=`` that draws a bar for each peer with tqdm, which must be installed.

    Args:
        options: For each ``tqdm.tqdm``, beside what is set here.

    Raises:
        ImportError: tqdm is not installed: ``pip install ft_transport[progress]``.
    """
    # Here, since tqdm is no dependency of ours.
    from tqdm import tqdm

    bars: dict[tuple[str, int | None, int, str], Any] = {}
    lock = threading.Lock()

    def show(now: Progress) -> None:
        key = now.role, now.step, now.peer_rank, now.peer_name
        where = "to" if now.role == "source" else "from"
        step = "" if now.step is None else f"step {now.step} "
        # A source calls from the threads of all its destinations.
        with lock:
            bar = bars.get(key)
            # The same peer and step again: a receive that broke and was begun anew counts from the start.
            if bar is None or bar.total != now.nbytes_total or bar.n > now.nbytes_done:
                if bar is not None:
                    bar.close()
                peer = peer_label(now.peer_rank, now.peer_name)
                how = {"unit": "B", "unit_scale": True, "desc": f"{step}{where} {peer}", **options}
                bar = bars[key] = tqdm(total=now.nbytes_total, **how)
            bar.update(now.nbytes_done - bar.n)
            if now.nbytes_done >= now.nbytes_total:
                # Or a training of a week would hold a bar for each heal.
                bars.pop(key).close()

    return show


def report_progress(callback: ProgressCallback | None, progress: Progress) -> None:
    """Call the user's callback; what it raises does not end the transfer."""
    if callback is None:
        return
    try:
        callback(progress)
    except Exception:
        logger.exception("the progress callback raised; the transfer goes on")
