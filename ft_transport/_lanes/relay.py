"""Passes a state on, from the memory that it landed in, to the next destination in the chain.

Strategy: a message is passed on the moment it is sound, so a chain takes little longer than one transfer. It is the
template's own memory that is read, and training goes on with it: small messages are copied, since forward changes
buffers; for large ones the optimizer waits, in the hook that torch calls before each step; what forward overwrites is
kept by ``_plan.rewrite``. Of a state on an accelerator the host's copy is passed on, in which a message came, as long
as there is one: to read it back would cross the bus again. What slips through is found by the one who gets it, for whom
the digest does not agree.
"""

from __future__ import annotations

import secrets
import threading

import torch

from ft_transport._device import NO_STREAMS, Streams
from ft_transport._lanes.dispatcher import Dispatcher
from ft_transport._lanes.pending import PendingMessages
from ft_transport._lanes.supplier import Supplier
from ft_transport._net.stall import HEARTBEAT, StallTimer
from ft_transport._plan.blocks import Held
from ft_transport._plan.buffers import Bucket
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.rewrite import Rewrite
from ft_transport._plan.unchanged import Reading
from ft_transport._process import memory_at
from ft_transport._wire.layout import SMALL_BYTES, Layout
from ft_transport.errors import LocalProtocolError

__all__ = ["Relay"]

# Memory of the host that waits to be passed on, in place of what would be read back from an accelerator: sixteen
# messages of the size that a chain has. Whoever is behind asks for a message before it is here, and takes it at once.
_ON_THEIR_WAY_BYTES = 64 << 20


class Relay:
    """What has landed here and is sound, for whoever the source sends here. Is a ``_lanes.supplier.MessageStore``.

    A message is passed on with the digest that the source has given it, so what this side has done to its memory in the
    meantime is found by the one who gets it.

    Args:
        dispatcher: Leads the next one here.
        layout: The messages.
        landing: Where they land.
        pending: Which of them are here.
        verified: Whether messages have digests.
        fabric: By what those behind may read it from here themselves; empty for none.
        streams: To copy in.
        timer: Until when it waits for the others in :meth:`drain`.
        rewrite: Has messages as they came, too; None if nobody trains meanwhile.

    Attributes:
        ident: By which the next one asks for it.
    """

    is_whole_transfer = False  # what cannot be read here, the source still has

    def __init__(
        self,
        dispatcher: Dispatcher,
        layout: Layout,
        landing: DestinationPlan,
        pending: PendingMessages,
        timer: StallTimer,
        *,
        verified: bool,
        fabric: str = "",
        streams: Streams = NO_STREAMS,
        rewrite: Rewrite | None = None,
    ) -> None:
        # Keeps lanes that an earlier receive was asked for from being taken for this one's.
        self.ident = secrets.token_bytes(16)
        self.verified = verified
        self.fabric = fabric
        self._dispatcher = dispatcher
        self._landing = landing
        self._pending = pending
        self._rewrite = rewrite
        # Small messages as they came: training goes on once this side has the state, and changes small buffers.
        self._copies: dict[int, torch.Tensor] = {}
        # As many bytes as a source copies before it returns: these are the same messages.
        self._room = SMALL_BYTES
        self._on_their_way = _OnTheirWay()
        self._reading: Reading | None = None
        self._layout = layout
        self._supplier = Supplier(self, timer, streams)
        # From the beginning, with nothing here yet: whoever asks waits for each message, and so gets it the moment it
        # is sound.
        dispatcher.register(self.ident, self._supplier)

    @property
    def steady(self) -> bool:
        # Training goes on with this memory once this side has the state, whatever the next one still reads. Where
        # messages have digests, that one finds out.
        return self.verified

    @property
    def sizes(self) -> list[int]:
        return self._layout.sizes

    def keep(self, message: int, data: torch.Tensor) -> bool:
        """Copy a small message, if there is room, which the rewrite may have already; gives whether it was copied."""
        # No large one, though all are staged whose memory is on an accelerator or has gaps: a few would take the room
        # that the small ones need. The optimizer waits until those are read.
        fits = self._layout.is_small(message) and data.numel() <= self._room
        if fits:
            self._room -= data.numel()
            self._copies[message] = data.clone()
        return fits

    def keep_on_its_way(self, message: int, bucket: Bucket) -> None:
        """Have the memory in which a message has come that is on an accelerator now, if somebody fetches from here."""
        if self._supplier.num_lanes:
            self._on_their_way.put(message, bucket.give())

    def has(self, message: int) -> bool:
        return message in self._pending.digests

    def await_message(self, message: int) -> bool:
        return self._pending.await_message(message, HEARTBEAT)

    def view(self, message: int, bucket: Bucket) -> memoryview:
        here = self._here(message)
        if here is None and (flat := self._on_their_way.pop(message)) is not None:
            # The lane's bucket has it from now on: so it lives until the answer has gone, and no longer.
            here = bucket.adopt(flat, self.sizes[message])
        if here is None:
            return self._landing.placement.view(message, bucket)
        return memory_at(here.data_ptr(), here.numel())

    def held(self, message: int) -> Held | None:
        return None if self._here(message) is not None else self._landing.placement.held(message)

    def _here(self, message: int) -> torch.Tensor | None:
        """A message's bytes in memory that nobody else writes to."""
        copied = self._copies.get(message)
        return self._rewrite.kept(message) if copied is None and self._rewrite is not None else copied

    def note_error(self, error: LocalProtocolError) -> None:
        pass  # whoever is here turns to the source

    def digest(self, message: int) -> int | None:
        return self._pending.digests.get(message)

    def note_digest(self, message: int, digest: int) -> None:
        pass  # it has the source's

    def let_training_go_on(self) -> None:
        """This side has the state. From now on an optimizer waits before it changes what is read for others.

        Where one is in its step already, nothing is read any more when this returns.
        """
        reading = self._reading = Reading(
            self._layout, self._landing.placement.memory, lambda reading: self.end_reading(), self._copies
        )
        # Then nobody will call us before the next value is written: DiLoCo asks for a quorum from within its
        # optimizer's step.
        if reading.within_step():
            self.end_reading()

    def end_reading(self) -> None:
        """As :meth:`drain`, then as :meth:`close`."""
        self.drain()
        self.close()

    def drain(self) -> None:
        """Wait until those who fetch from here have everything, or have stalled. Never raises."""
        self._supplier.drain()

    def close(self) -> None:
        """When this returns, nothing reads the state any more. May be called twice."""
        # First, so that who comes now is sent away, and asks the source.
        self._dispatcher.unregister(self.ident)
        self._supplier.close()
        if self._reading is not None:
            self._reading.release()
        self._copies.clear()
        self._on_their_way.clear()


class _OnTheirWay:
    """Messages in the memory that they came in, each for the first who asks; the oldest one makes room.

    That is a source's word as it came, whatever has been done to the template since. Any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flat: dict[int, torch.Tensor] = {}
        self._nbytes = 0

    def put(self, message: int, flat: torch.Tensor) -> None:
        self.pop(message)
        with self._lock:
            self._flat[message] = flat
            self._nbytes += flat.numel()
            while self._nbytes > _ON_THEIR_WAY_BYTES:
                self._nbytes -= self._flat.pop(next(iter(self._flat))).numel()

    def pop(self, message: int) -> torch.Tensor | None:
        with self._lock:
            flat = self._flat.pop(message, None)
            self._nbytes -= flat.numel() if flat is not None else 0
            return flat

    def clear(self) -> None:
        with self._lock:
            self._flat.clear()
            self._nbytes = 0
