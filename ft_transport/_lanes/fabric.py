"""Messages that are read where they lie, in the place of being sent: by which fabrics, and what each asks of a lane.

Strategy: a lane asks a supplier's side one thing, *where is this message*, and a destination's another, *read it from
there into here*. Both sides say on the lane by which fabric; who lacks it says so, and the lane goes on without. What a
fabric tells the other side is bytes to everybody else. There are two:

* ``"cma"``: memory of a process on the same machine (``_net.cma``). A read is a call that has ended when it returns.
* a one-sided transport of torch's, by its name (``_net.one_sided``). A read is under way for as long as the peer likes,
  and so the lane is listened to meanwhile: whoever supplies says there that it lives. It lands in memory of the
  endpoint's and is copied from there, so what lands late lands nowhere else.

Not here: what is said on a lane, and in which order (``_lanes.session``, ``_lanes.lane``, ``_lanes.supplier``).
"""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

from ft_transport._lanes.protocol import MAX_BODY_BYTES
from ft_transport._net.cma import PeerMemory, ShownToken, new_token
from ft_transport._net.one_sided import Endpoint, Job
from ft_transport._plan.blocks import Held
from ft_transport._plan.lent import Readers, readers_of
from ft_transport._process import address_of
from ft_transport.errors import LocalProtocolError

__all__ = ["CMA", "OPENING", "Reader", "Shown", "Wait", "new_reader", "new_shown"]

logger = logging.getLogger("ft_transport")

# How memory that is read within a machine goes by on the wire. Every other name is of a one-sided transport.
CMA = "cma"
# How long a fabric may take to begin on either side: to look for networks takes seconds. One that takes longer is none.
OPENING = timedelta(seconds=10)
# How long the end of a lane waits until nobody can read any more. Longer than it was seen to take, since what follows
# is the optimizer's step; a backend that takes longer may be read by a peer that has given up, and nobody is misled.
_CLOSING = timedelta(seconds=2)
# Beside a place in its frame: what msgpack puts before it.
_MAX_PLACE_BYTES = MAX_BODY_BYTES - 64
_ADDRESS = struct.Struct("<Q")
_TOKEN_AT = struct.Struct("<QQ")

# Returns once a job is done; raises what the lane raises meanwhile.
Wait = Callable[[Job[Any]], None]
Read = Callable[[memoryview], object]


class Reader(Protocol):
    """A destination's side. For one lane, and its thread.

    Attributes:
        waits: Whether a read takes as long as the peer lets it: then the lane has one question at a time, and is
            listened to.
    """

    waits: bool

    def hello(self, wait: Wait) -> bytes:
        """What the supplier's :meth:`Shown.answer` is to get; raises OSError where there is no such fabric."""
        ...

    def reach(self, answer: bytes, wait: Wait) -> None:
        """Take what that has given; raises OSError if memory cannot be read."""
        ...

    def read_from(self, place: bytes, nbytes: int, held: Held | None, wait: Wait) -> Read:
        """What fills, piece by piece, memory with the ``nbytes`` that are there.

        Args:
            place: What :meth:`Shown.place` gave.
            nbytes: How many.
            held: What the memory is of that is filled, if it is of a user's.
            wait: As above.

        Raises:
            OSError: It cannot be read (any more); also from what is returned.
            LocalProtocolError: What is held was taken away; also from what is returned.
        """
        ...

    def close(self) -> None:
        """Nothing is read any more; what is under way lands nowhere that anybody sees. Returns at once."""
        ...


class Shown(Protocol):
    """A supplier's side. For one lane, and its thread.

    Attributes:
        waits: As of :class:`Reader`: then this side says again and again that it is there.
    """

    waits: bool

    def answer(self, hello: bytes, wait: Wait) -> bytes:
        """What a destination needs that has said this; raises OSError where there is no such fabric."""
        ...

    def place(self, view: memoryview, held: Held | None, wait: Wait) -> bytes | None:
        """Where a message is, None if the fabric cannot take it: from now on the other side may read it.

        Raises:
            OSError: The fabric does not work any more.
            LocalProtocolError: What is held was taken away.
        """
        ...

    def close(self) -> None:
        """Begin to let nobody read any more. Returns at once."""
        ...

    def await_closed(self) -> None:
        """Wait until nobody can, but not for long."""
        ...


def new_reader(fabric: str, room: int) -> Reader:
    """A destination's side of a fabric, for messages of so many bytes at the most; raises OSError."""
    return _MemoryReader() if fabric == CMA else _OneSidedReader(fabric, room)


def new_shown(fabric: str) -> Shown:
    """A supplier's side; raises OSError."""
    return _ShownMemory() if fabric == CMA else _OneSidedShown(fabric)


# ---------------------------------------------------------------------------------- within a machine


class _MemoryReader:
    waits = False

    def __init__(self) -> None:
        self._token = new_token()
        self._memory: PeerMemory | None = None

    def hello(self, wait: Wait) -> bytes:
        return self._token

    def reach(self, answer: bytes, wait: Wait) -> None:
        pid, address = _unpacked(_TOKEN_AT, answer)
        self._memory = PeerMemory(pid, address, self._token)

    def read_from(self, place: bytes, nbytes: int, held: Held | None, wait: Wait) -> Read:
        memory, (address,) = self._memory, _unpacked(_ADDRESS, place)
        assert memory is not None, "reached first"

        def read(piece: memoryview) -> None:
            nonlocal address
            memory.read_into(address, piece)
            address += len(piece)

        # The system refuses what is not there, but not what is somebody else's by then.
        return read if held is None else held.reads(read)

    def close(self) -> None:
        self._memory = None


class _ShownMemory:
    waits = False

    def answer(self, hello: bytes, wait: Wait) -> bytes:
        # Kept until the lane ends: the one who asks looks for it there.
        self._token = token = ShownToken(hello)
        return _TOKEN_AT.pack(token.pid, token.address)

    def place(self, view: memoryview, held: Held | None, wait: Wait) -> bytes:
        return _ADDRESS.pack(address_of(view))

    def close(self) -> None:
        pass

    def await_closed(self) -> None:
        pass


def _unpacked(form: struct.Struct, data: bytes) -> tuple[int, ...]:
    try:
        return form.unpack(data)
    except struct.error as exc:
        raise OSError(f"not a place: {exc}") from None


# ------------------------------------------------------------------------ one-sided transports of torch's


class _OneSidedReader:
    waits = True

    def __init__(self, backend: str, room: int) -> None:
        self._endpoint = Endpoint(backend, room)

    def hello(self, wait: Wait) -> bytes:
        return bytes(_done(self._endpoint.bind(), wait))

    def reach(self, answer: bytes, wait: Wait) -> None:
        _done(self._endpoint.connect(answer), wait)

    def read_from(self, place: bytes, nbytes: int, held: Held | None, wait: Wait) -> Read:
        landed = _done(self._endpoint.read(place, nbytes), wait)
        address = address_of(landed)

        def copy(piece: memoryview) -> None:
            nonlocal address
            ctypes.memmove(address_of(piece), address, len(piece))
            address += len(piece)

        # Not the system copies here but this process: memory that a user gives back meanwhile would end it.
        return copy if held is None else held.reads(copy)

    def close(self) -> None:
        self._endpoint.close()


class _OneSidedShown:
    waits = True

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._endpoint = Endpoint(backend)
        self._lent: set[Readers] = set()

    def answer(self, hello: bytes, wait: Wait) -> bytes:
        answer = bytes(_done(self._endpoint.bind(), wait))
        _done(self._endpoint.connect(hello), wait)
        return answer

    def place(self, view: memoryview, held: Held | None, wait: Wait) -> bytes | None:
        # Copies of small tensors, which share messages, and what was staged: they have no tensor of their own, or not
        # for long.
        if held is None:
            return None
        self._lend(held)
        # The leaf's own memory, by its tensor: so whatever device it is on is the backend's business.
        place = bytes(_done(self._endpoint.show(held.block.bytes(held.begin, held.end)), wait))
        return place if len(place) <= _MAX_PLACE_BYTES else None

    def _lend(self, held: Held) -> None:
        """Have whoever takes this memory away wait until nobody reads it any more."""
        held.check()
        # A backend may have this very process read for the peer, and a read of memory that is gone would end it.
        storage = held.block.storage
        if storage is None or (readers := readers_of(storage)) in self._lent:
            return
        readers.enter(self)
        try:
            held.reads(lambda piece: None)  # whether it is there
        except LocalProtocolError:
            readers.leave()
            raise
        self._lent.add(readers)
        self._endpoint.when_closed(readers.leave)

    def close(self) -> None:
        self._endpoint.close()

    def await_closed(self) -> None:
        if not self._endpoint.await_closed(_CLOSING):
            logger.warning("%s is still closing: a destination that has given up may yet read the state", self._backend)


def _done(job: Job[Any], wait: Wait) -> Any:
    wait(job)
    return job.result()
