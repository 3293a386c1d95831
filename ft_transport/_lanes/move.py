"""Fetches a whole state, from whomever it takes.

Strategy: one supplier at a time, until its lanes have ended or the source has named a better one; what follows is a
table in ``_lanes.chain``. Whatever has landed stays, whoever it came from: digests are the source's in any case. This
drives, and is the only one to know of lanes and of the control connection at the same time.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from functools import partial
from typing import NamedTuple

from ft_transport._lanes.chain import Ended, Next, Route, after
from ft_transport._lanes.control import ControlConnection
from ft_transport._lanes.fetch import Fetcher
from ft_transport._lanes.probe import PROBE_MESSAGES, SourceProbe
from ft_transport._lanes.sink import Sink
from ft_transport._net.handshake_io import SslContexts
from ft_transport._options import LaneOptions
from ft_transport.errors import PeerFailure, TransferError

__all__ = ["Mover"]

logger = logging.getLogger("ft_transport")

# Whoever ends the lanes may have said why on the control connection: the two race, and so long the reason may take.
_REASON = timedelta(milliseconds=1)


class _Fetched(NamedTuple):
    """What came of one supplier: why its lanes have ended, and whom the source has named meanwhile."""

    error: TransferError
    hopeless: bool
    named: Route | None


class Mover:
    """Fetches everything.

    Args:
        control: To the source.
        sink: Where messages land.
        options: The caller's choices.
        contexts: For TLS, None without.

    Attributes:
        nbytes_wire: All bytes of the lanes, those of probes among them.
        nbytes_direct: How many of them were read from a supplier's memory.
        num_lanes: How many there were at most, with one supplier.
    """

    def __init__(
        self, control: ControlConnection, sink: Sink, options: LaneOptions, contexts: SslContexts | None
    ) -> None:
        self.nbytes_wire = self.nbytes_direct = self.num_lanes = 0
        self._control = control
        self._sink = sink
        self._options = options
        self._contexts = contexts
        protocol = control.session.protocol
        self._new = partial(Fetcher, sink, control.wakeup, options, protocol.attempt, protocol.step)

    def run(self) -> None:
        """Fetch until every message is here and sound.

        Raises:
            TransferError: It cannot be. No lane is open any more.
        """
        control, pending, breaks = self._control, self._sink.pending, 0
        # Also if there is nothing to fetch: DONE may only follow a ROUTE.
        route = control.await_route()
        while not pending.complete:
            fetched = self._fetch(route)
            ended = self._ended(route, fetched, breaks + 1)
            follows = after(ended)
            if follows is Next.GIVE_UP:
                # What the caller is told is the cause: of a supplier that ended after the source was lost, the loss.
                raise fetched.error if route.from_source or control.lost is None else control.lost
            if follows is Next.SAME and not ended.complete:
                breaks += 1
                logger.warning("the lanes are opened again: %s", fetched.error)
            route = self._next(follows, route, fetched)

    def _ended(self, route: Route, fetched: _Fetched, breaks: int) -> Ended:
        complete = self._sink.pending.complete
        return Ended(
            complete=complete,
            # Looked for only now: forward goes on writing, and what is fetched again lands aside from then on.
            overwritten=complete and self._sink.fetch_written_again(),
            named=fetched.named is not None,
            from_source=route.from_source,
            source_lost=self._control.lost is not None,
            hopeless=fetched.hopeless,
            breaks=breaks,
        )

    def _next(self, follows: Next, route: Route, fetched: _Fetched) -> Route:
        """Whom to fetch from now."""
        if follows is Next.NAMED and fetched.named is not None:
            return fetched.named
        if follows is Next.ANOTHER:
            # What the one before has damaged is not held against the one who comes.
            self._sink.pending.forgive()
            return self._control.ask(route, fetched.error.message, slow=False) or route
        return route

    def _fetch(self, route: Route) -> _Fetched:
        """Fetch from one supplier until everything is here, its lanes have ended, or somebody better is named."""
        control, fetcher, named = self._control, self._new(), None
        probe = SourceProbe(fetcher, self._try_source, self._options.stall)
        try:
            self._open(fetcher, route)
            while named is None and not self._sink.pending.complete and fetcher.alive:
                control.pump()
                if fetcher.fatal is not None:
                    raise fetcher.fatal
                fetcher.look()
                # Whom the source would name is not known before it is asked, but that it is worth asking is: its own
                # link is quicker.
                if not route.from_source and control.lost is None and probe.look():
                    named = control.ask(route, "it is much slower than the source", slow=True)
        finally:
            try:
                # Both, whatever the first raises (Ctrl-C): nothing may land once this has returned.
                probe.close()
            finally:
                fetcher.close()
            self.nbytes_wire += fetcher.nbytes_wire + probe.nbytes_wire
            self.nbytes_direct += fetcher.nbytes_direct + probe.nbytes_direct
            self.num_lanes = max(self.num_lanes, fetcher.num_lanes)
            if fetcher.unreadable:
                self._new = partial(self._new, direct=False)
        if fetcher.fatal is not None:
            raise fetcher.fatal
        if not self._sink.pending.complete:
            control.pump(_REASON)
        error = fetcher.error or PeerFailure(f"{route.label} has ended its lanes")
        return _Fetched(error, fetcher.hopeless, named)

    def _try_source(self) -> Fetcher:
        """Begin to fetch some messages from the source itself."""
        fetcher = self._new(num_messages=PROBE_MESSAGES)
        self._open(fetcher, self._control.from_source)
        return fetcher

    def _open(self, fetcher: Fetcher, route: Route) -> None:
        # Whoever does not answer is waited for as long as the source waits for a word from here.
        with self._control.heartbeats():
            fetcher.open(route, self._contexts, self._control.timer)
