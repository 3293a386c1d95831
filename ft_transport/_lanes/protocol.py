"""What two ranks say to each other over lanes: frames, and a table of who may send which one when. No I/O.

Strategy: a destination opens one *control* connection to the source, on which the two agree, and several *lanes* to
whoever supplies it, the source or a destination before it in the chain. On a lane the destination asks and the
supplier answers, in the order of the questions. So what is already there, what came damaged and what a broken lane
still owed need no bookkeeping on the supplier's side: they are asked for, or not.

The whole protocol is :data:`TABLE` and :data:`BODIES`. ``docs/protocol.md`` shows the same, and a test compares.
Not here: how a stranger is told from a peer (``_net.handshake``), and anything that touches a socket
(``_net.connection``).
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Generator
from enum import Enum, IntEnum
from itertools import islice
from typing import Any, NamedTuple

import msgpack

from ft_transport._wire.digest import digest_bytes
from ft_transport.errors import LocalProtocolError, RemoteProtocolError

__all__ = [
    "BODIES",
    "HEADER_BYTES",
    "MAX_BODY_BYTES",
    "MAX_LONG_BODY_BYTES",
    "MAX_MANIFEST_BYTES",
    "MAX_RUN",
    "TABLE",
    "TRAILER",
    "LaneProtocol",
    "LaneFrame",
    "LaneHeader",
    "Role",
    "State",
    "FirstFrame",
    "decode_body",
    "decode_header",
    "encode",
    "encode_header",
    "first_frame",
    "max_body_bytes",
    "num_messages",
]

MAGIC = b"FTLN"
# Peers of two versions refuse each other by name, and nothing is negotiated: the replicas of one job run one version,
# but for the minutes in which it is replaced.
VERSION = 5
# Magic, version, frame, attempt, step, number, bytes of the body, digest of the body, digest of all before it.
# The header has a digest of its own, since its length is believed before a byte of the body is here. Attempt and step
# in each frame: what an earlier receive has asked for cannot be taken for an answer to this one, whatever is between
# the two sides.
_HEADER = struct.Struct("<4sBB2xIqQQQQ")
_CHECKED = _HEADER.size - 8
HEADER_BYTES = _HEADER.size
# Follows the body of a MESSAGE or PLACE, for each message: its digest, which is known only once its last byte has been
# read.
TRAILER = struct.Struct("<Q")

# Bound what a peer can make us allocate, in bytes of a body; all but a manifest is read by a source, too. Reasons name
# every path of a state: what goes beyond is cut by the one who gives them.
MAX_MANIFEST_BYTES = 256 << 20
MAX_LONG_BODY_BYTES = 1 << 20
MAX_BODY_BYTES = 64 << 10
# Of how many messages one frame may be, which bounds what a peer can make us remember.
MAX_RUN = 64
# Of a text that is not among reasons, in bytes. The longest that must be whole is a metadata.
_MAX_TEXT_BYTES = 16 << 10
# What msgpack puts before a text, and before an array, at most.
_LENGTH_BYTES = 10


class Role(Enum):
    """The two sides. On a lane between two destinations, the one that supplies is the source."""

    SOURCE = "source"
    DESTINATION = "destination"


class LaneFrame(IntEnum):
    """What a frame is for."""

    HELLO = 1
    WAIT = 2
    MANIFEST = 3
    READY = 4
    REFUSE = 5
    ROUTE = 6
    PROGRESS = 7
    REROUTE = 8
    DONE = 9
    BYE = 10
    FAILED = 11
    ATTACH = 12
    WANT = 13
    CHECK = 14
    MESSAGE = 15
    SAME = 16
    LOCATE = 17
    LOCATION = 18
    DIRECT = 19
    PLACE = 20


class State(Enum):
    """Where a connection is. A lane is LANE to its end, or DIRECT from when its destination reads memory."""

    OPEN = "open"
    WAITING = "waiting"
    PLANNING = "planning"
    ROUTING = "routing"
    MOVING = "moving"
    DONE = "done"
    LANE = "lane"
    LOCATING = "locating"
    DIRECT = "direct"
    CLOSED = "closed"


_S, _D = Role.SOURCE, Role.DESTINATION

# Who may send what in which state, and which state follows.
TABLE: dict[State, dict[tuple[Role, LaneFrame], State]] = {
    State.OPEN: {(_D, LaneFrame.HELLO): State.WAITING, (_D, LaneFrame.ATTACH): State.LANE},
    State.WAITING: {
        (_S, LaneFrame.WAIT): State.WAITING,
        (_S, LaneFrame.MANIFEST): State.PLANNING,
        (_S, LaneFrame.FAILED): State.CLOSED,
    },
    State.PLANNING: {
        (_D, LaneFrame.PROGRESS): State.PLANNING,
        (_D, LaneFrame.READY): State.ROUTING,
        (_D, LaneFrame.REFUSE): State.CLOSED,
        (_S, LaneFrame.FAILED): State.CLOSED,
    },
    State.ROUTING: {
        # PROGRESS and WAIT may be on their way when the other side moves on: see the test of frames that cross.
        (_S, LaneFrame.ROUTE): State.MOVING,
        (_S, LaneFrame.WAIT): State.ROUTING,
        (_S, LaneFrame.FAILED): State.CLOSED,
        (_D, LaneFrame.PROGRESS): State.ROUTING,
        (_D, LaneFrame.FAILED): State.CLOSED,
    },
    State.MOVING: {
        (_D, LaneFrame.PROGRESS): State.MOVING,
        # Lanes go on meanwhile: a destination that finds its supplier slow does not stand still for the answer.
        (_D, LaneFrame.REROUTE): State.ROUTING,
        (_D, LaneFrame.DONE): State.DONE,
        (_D, LaneFrame.FAILED): State.CLOSED,
        (_S, LaneFrame.WAIT): State.MOVING,
        (_S, LaneFrame.FAILED): State.CLOSED,
    },
    State.DONE: {
        # FAILED in this place means that the state has changed: what the destination has is whole, and nobody's state.
        (_S, LaneFrame.BYE): State.CLOSED,
        (_S, LaneFrame.WAIT): State.DONE,
        (_S, LaneFrame.FAILED): State.CLOSED,
    },
    # No FAILED here: a lane that ends says all there is to say, and why is said on the control connection.
    State.LANE: {
        (_D, LaneFrame.WANT): State.LANE,
        (_D, LaneFrame.CHECK): State.LANE,
        (_S, LaneFrame.MESSAGE): State.LANE,
        (_S, LaneFrame.SAME): State.LANE,
        (_S, LaneFrame.WAIT): State.LANE,
        (_D, LaneFrame.LOCATE): State.LOCATING,
        (_D, LaneFrame.DIRECT): State.DIRECT,
    },
    State.LOCATING: {
        (_S, LaneFrame.LOCATION): State.LANE,
        (_S, LaneFrame.WAIT): State.LOCATING,
    },
    # Entered on the destination's word alone: whether it can read the supplier's memory, it has found out. WAIT also
    # where nothing is owed: reads go past the lane, on which the supplier says that it lives.
    State.DIRECT: {
        (_D, LaneFrame.WANT): State.DIRECT,
        (_D, LaneFrame.CHECK): State.DIRECT,
        (_S, LaneFrame.PLACE): State.DIRECT,
        (_S, LaneFrame.MESSAGE): State.DIRECT,
        (_S, LaneFrame.SAME): State.DIRECT,
        (_S, LaneFrame.WAIT): State.DIRECT,
    },
    State.CLOSED: {},
}

_ASKS = (LaneFrame.WANT, LaneFrame.CHECK)
_ANSWERS = (LaneFrame.MESSAGE, LaneFrame.PLACE, LaneFrame.SAME)

# Of several messages, one behind the other: to ask for each, and to say where each is, costs as much as to copy 1 MiB.
_OF_SEVERAL = (LaneFrame.WANT, LaneFrame.PLACE)

# The body of each frame: the types of an array's entries, one type for an array of any number of such, None for none.
# MANIFEST and MESSAGE are not here: their bodies are bytes as they are.
BODIES: dict[LaneFrame, tuple[tuple[type, ...], ...] | type[str | bytes] | None] = {
    LaneFrame.HELLO: ((bytes,), (str,)),
    LaneFrame.WAIT: None,
    LaneFrame.READY: ((str,), (bytes,)),
    LaneFrame.REFUSE: str,
    LaneFrame.ROUTE: ((str, type(None)), (bytes,), (bytes,)),
    LaneFrame.PROGRESS: None,
    LaneFrame.REROUTE: ((bytes,), (str,), (bool,)),
    LaneFrame.DONE: None,
    LaneFrame.BYE: None,
    LaneFrame.FAILED: str,
    LaneFrame.ATTACH: ((bytes,),),
    LaneFrame.WANT: ((int,),),
    LaneFrame.CHECK: ((int,),),
    LaneFrame.SAME: None,
    LaneFrame.LOCATE: ((str,), (bytes,)),
    LaneFrame.LOCATION: ((bytes,),),
    LaneFrame.DIRECT: None,
    LaneFrame.PLACE: bytes,
}

_LONG = (LaneFrame.REFUSE, LaneFrame.FAILED)


def max_body_bytes(frame: LaneFrame) -> int:
    """How long the body of a frame may be. A message's is bounded by the layout."""
    if frame is LaneFrame.MANIFEST:
        return MAX_MANIFEST_BYTES
    return MAX_LONG_BODY_BYTES if frame in _LONG else MAX_BODY_BYTES


class LaneHeader(NamedTuple):
    """What begins each frame.

    Attributes:
        frame: What it is.
        attempt: Which attempt of the destination this is, counted by it.
        step: The step that the destination asks for.
        number: Of the message (WANT, CHECK, MESSAGE, PLACE, SAME), or of the first one; or bytes that have landed
            (PROGRESS, DONE).
        nbytes: Length of the body.
        digest: Of the body; 0 for MESSAGE, whose digest follows its body.
    """

    frame: LaneFrame
    attempt: int
    step: int
    number: int = 0
    nbytes: int = 0
    digest: int = 0


def encode_header(header: LaneHeader) -> bytes:
    """The bytes of a header."""
    data = _HEADER.pack(
        MAGIC,
        VERSION,
        header.frame,
        header.attempt,
        header.step,
        header.number,
        header.nbytes,
        header.digest,
        0,
    )[:_CHECKED]
    return data + TRAILER.pack(digest_bytes(data))


def decode_header(data: bytes | bytearray) -> LaneHeader:
    """Read a header; its length of the body is within bounds then.

    Raises:
        RemoteProtocolError: The bytes are not a header of this version, or are damaged.
    """
    magic, version, frame, attempt, step, number, nbytes, digest, check = _HEADER.unpack(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"expected a frame with magic {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise RemoteProtocolError(f"expected version {VERSION} of the lanes' wire, got {version}")
    if check != digest_bytes(bytes(data[:_CHECKED])):
        raise RemoteProtocolError("a frame's header came damaged")
    try:
        frame = LaneFrame(frame)
    except ValueError:
        raise RemoteProtocolError(f"unknown frame {frame}") from None
    limit = max_body_bytes(frame)
    if frame is not LaneFrame.MESSAGE and nbytes > limit:
        raise RemoteProtocolError(f"{frame.name} of {nbytes} bytes, at most {limit} are accepted")
    return LaneHeader(frame, attempt, step, number, nbytes, digest)


def encode(frame: LaneFrame, attempt: int, step: int, number: int = 0, body: Any = None) -> bytes:
    """Header and body of any frame but MESSAGE. Reasons that are too long are cut."""
    assert frame is not LaneFrame.MESSAGE
    # Cut here and not where reasons are made: a state of 20,000 leaves that does not fit has as many paths to name.
    if isinstance(body, list):
        limit = MAX_LONG_BODY_BYTES // max(len(body), 1) - _LENGTH_BYTES if BODIES[frame] is str else _MAX_TEXT_BYTES
        body = [_fitting(entry, limit) if isinstance(entry, str) else entry for entry in body]
    data: bytes = body if frame is LaneFrame.MANIFEST else b"" if body is None else msgpack.packb(body)
    return encode_header(LaneHeader(frame, attempt, step, number, len(data), digest_bytes(data))) + data


def _fitting(text: str, nbytes: int) -> str:
    """A text as UTF-8 has it, cut to so many bytes."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) > nbytes:
        rest = f"… and {len(data) - nbytes} bytes more".encode()
        data = data[: nbytes - len(rest)] + rest
    return data.decode("utf-8", "ignore")


def decode_body(header: LaneHeader, data: bytes) -> Any:
    """The body of any frame but MESSAGE.

    Raises:
        RemoteProtocolError: It is damaged, or not of the types that :data:`BODIES` says.
    """
    name = header.frame.name
    if digest_bytes(data) != header.digest:
        raise RemoteProtocolError(f"{name} came damaged")
    if header.frame is LaneFrame.MANIFEST:
        return data
    expected = BODIES[header.frame]
    if expected is None:
        if data:
            raise RemoteProtocolError(f"{name} has {len(data)} bytes, expected none")
        return None
    try:
        # Tuples, so that nothing of it can be changed; bodies have no maps, and what nests is refused below.
        body = msgpack.unpackb(data, use_list=False, strict_map_key=True)
    except Exception as exc:
        raise RemoteProtocolError(f"damaged {name}: {type(exc).__name__}: {exc}") from None
    if not _is_of(body, expected):
        raise RemoteProtocolError(f"{name}: expected {expected}, got {_types(body)}")
    return body


def _types(body: Any) -> str:
    """What a body is: never as text, which of something nested deep cannot be made."""
    if not isinstance(body, tuple):
        return type(body).__name__
    return f"({', '.join(type(entry).__name__ for entry in body[:8])}{', …' if len(body) > 8 else ''})"


def num_messages(frame: LaneFrame, body: Any) -> int:
    """Of how many messages a frame is that is of any, from its number on."""
    return len(body) if frame is LaneFrame.PLACE else body[0] if frame is LaneFrame.WANT else 1


def _is_of(body: Any, expected: tuple[tuple[type, ...], ...] | type[str | bytes]) -> bool:
    if not isinstance(body, tuple):
        return False
    if not isinstance(expected, tuple):
        return all(type(entry) is expected for entry in body)
    return len(body) == len(expected) and all(type(entry) in types for entry, types in zip(body, expected, strict=True))


class LaneProtocol:
    """Holds one connection to the table.

    Args:
        role: This side.
        attempt: Goes into every header, and is expected in every header.
        step: As ``attempt``.

    Attributes:
        state: Where the connection is.
        asked: On a lane, the messages asked for and not yet answered, oldest first.
    """

    def __init__(self, role: Role, attempt: int, step: int) -> None:
        self.state = State.OPEN
        self.asked: deque[int] = deque()
        self._checked: set[int] = set()
        self.attempt = attempt
        self.step = step
        self._role = role

    def sent(self, frame: LaneFrame, number: int = 0, num: int = 1) -> None:
        """Note what this side is about to send, of so many messages.

        Raises:
            LocalProtocolError: It may not.
        """
        # Checked on our side, too: what the table forbids is our mistake, and the peer would only call us broken.
        if not self._advance(self._role, frame, number) or not self._follow(frame, number, num):
            raise LocalProtocolError(f"{frame.name} {number} cannot be sent in state {self.state.value}")

    def received(self, header: LaneHeader) -> None:
        """Note what the peer has sent; :meth:`received_body` follows, but for a MESSAGE.

        Raises:
            RemoteProtocolError: It may not.
        """
        if (header.attempt, header.step) != (self.attempt, self.step):
            raise RemoteProtocolError(
                f"expected a frame of step {self.step}, attempt {self.attempt}, got one of step {header.step}, "
                f"attempt {header.attempt}"
            )
        peer = _D if self._role is _S else _S
        if not self._advance(peer, header.frame, header.number):
            raise RemoteProtocolError(
                f"{header.frame.name} {header.number} is out of order in state {self.state.value}"
            )

    def received_body(self, header: LaneHeader, body: Any) -> None:
        """Note that the body is here as well, and of how many messages it is; raises as :meth:`received`."""
        num = num_messages(header.frame, body)
        if not self._follow(header.frame, header.number, num):
            raise RemoteProtocolError(f"{header.frame.name} {header.number} is of {num} messages")

    def _follow(self, frame: LaneFrame, number: int, num: int) -> bool:
        """Note that a frame, which is noted already, is of so many messages; gives whether it may."""
        if num != 1 and (frame not in _OF_SEVERAL or not 0 < num <= MAX_RUN):
            return False
        messages = range(number, number + num)
        if frame is LaneFrame.WANT:
            self.asked.extend(messages[1:])
        # Only now, and all or none: what is not answered after all is still owed.
        elif frame in _ANSWERS and frame is not LaneFrame.MESSAGE:
            if list(islice(self.asked, num)) != list(messages):
                return False
            self._answered(num)
        return True

    def _answered(self, num: int = 1) -> None:
        for _ in range(num):
            self._checked.discard(self.asked.popleft())

    def _advance(self, sender: Role, frame: LaneFrame, number: int) -> bool:
        following = TABLE[self.state].get((sender, frame))
        if following is None:
            return False
        if frame in _ASKS:
            self.asked.append(number)
            if frame is LaneFrame.CHECK:
                self._checked.add(number)
        # Answers in the order of the questions need no numbers of their own, and what is still owed is simply what is
        # left.
        elif frame in _ANSWERS:
            if not self.asked or self.asked[0] != number or (frame is LaneFrame.SAME and number not in self._checked):
                return False
            # The others have a body, which may not come.
            if frame is LaneFrame.MESSAGE:
                self._answered()
        self.state = following
        return True


# ------------------------------------------------------------------------------------- first frame

# Bounds the first frame of a connection. HELLO holds an identity and a name.
_MAX_FIRST_BODY = 4096


class FirstFrame(NamedTuple):
    """The first frame of a peer that has proved to be one."""

    header: LaneHeader
    body: tuple[bytes, ...]


def first_frame() -> Generator[int, bytes, FirstFrame]:
    """Reads the first frame of a connection: yields how many bytes it must have next, and returns the frame.

    Raises:
        RemoteProtocolError: It is none, or one that cannot come first.
    """
    header = decode_header((yield HEADER_BYTES))
    if header.frame not in (LaneFrame.HELLO, LaneFrame.ATTACH) or header.nbytes > _MAX_FIRST_BODY:
        raise RemoteProtocolError(f"{header.frame.name} of {header.nbytes} bytes cannot come first")
    return FirstFrame(header, decode_body(header, (yield header.nbytes)))
