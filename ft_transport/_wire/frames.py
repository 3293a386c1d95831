"""Frames: a fixed header and one msgpack value.

Strategy: the value is made of nil, booleans, integers, floats, strings, binary and arrays: no map, no extension,
nothing that names code. Before it is made its bytes are walked through once without making anything, since msgpack
makes an array as large as it claims to be. Whatever is wrong with a frame is a :class:`RemoteProtocolError`.

Not here: the manifest, which is the body of one frame (``_wire.encode``, ``_wire.decode``).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn

import msgpack

from ft_transport._wire.layout import Limits
from ft_transport.errors import RemoteProtocolError

__all__ = ["MAX_FRAME_BYTES", "Frame", "ManifestHeader", "decode_frame", "encode_frame", "pack", "unpack"]

# First of all bytes, so that another program on the same tags, or upstream's own transport, is told apart by name and
# not by a crash.
MAGIC = b"FTCT"
VERSION = 2
_HEADER = struct.Struct("<4sBB2x")

# Bounds what a peer can make us allocate for a frame. A leaf takes some 10 to 50 bytes, its key included, so this is
# room for millions.
MAX_FRAME_BYTES = 64 << 20


class Frame(IntEnum):
    """What a frame is for."""

    MANIFEST = 1
    READY = 2
    REFUSE = 3
    DIGESTS = 4
    DONE = 5
    FAILED = 6


class ManifestHeader(NamedTuple):
    """What both sides must agree on before anything else.

    Attributes:
        step: Step of the state, None where the API has none.
        limits: How the source cuts messages.
        digest: Algorithm of the messages' digests, empty for none.
        sample: Which block of large messages the digests read, -1 for all (see ``_wire.digest``).
    """

    step: int | None
    limits: Limits
    digest: str
    sample: int = -1


def encode_frame(kind: Frame, body: object) -> bytes:
    """ManifestHeader and msgpack of ``body``."""
    return _HEADER.pack(MAGIC, VERSION, kind) + pack(body)


def pack(value: object) -> bytes:
    """msgpack of a value, as in a frame."""
    # Keys and paths may be lone surrogates: file names and JSON bring them.
    packed: bytes = msgpack.packb(value, use_bin_type=True, unicode_errors="surrogatepass")
    return packed


def decode_frame(data: bytes) -> tuple[Frame, Any]:
    """Kind and body of a frame.

    Raises:
        RemoteProtocolError: The bytes are not a frame of this version.
    """
    if len(data) < _HEADER.size:
        raise RemoteProtocolError(f"expected a frame of at least {_HEADER.size} bytes, got {len(data)}")
    magic, version, kind = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"expected magic {MAGIC!r}, got {magic!r}: the peer is no ft_transport")
    if version != VERSION:
        raise RemoteProtocolError(f"expected version {VERSION} of the wire, got {version}")
    try:
        return Frame(kind), unpack(memoryview(data)[_HEADER.size :])
    except (ValueError, RecursionError, msgpack.UnpackException) as exc:
        raise RemoteProtocolError(f"damaged frame: {exc or type(exc).__name__}") from exc


def unpack(packed: bytes | memoryview) -> Any:
    """The value; in memory of at most some 30 times its bytes, because no array claims more than is there."""
    # Walks through without making anything. An array is made as large as it claims to be, and arrays nest.
    # ``skip`` goes through the C code that reads, and builds nothing: an array of 2^32 entries in five bytes ends here,
    # for want of entries.
    unpacker = msgpack.Unpacker(max_buffer_size=len(packed))
    unpacker.feed(packed)
    unpacker.skip()
    return msgpack.unpackb(
        packed,
        raw=False,
        use_list=False,
        unicode_errors="surrogatepass",
        object_pairs_hook=_refuse_map,
        max_ext_len=0,
        ext_hook=_refuse_extension,
    )


def _refuse_map(pairs: object) -> NoReturn:
    raise ValueError("a map: frames have none")


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension {code}: frames have none")
