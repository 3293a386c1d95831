"""Manifests to write, damage and read back."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgpack
import pytest
import torch
from helpers import Point, difference, noise

from ft_transport import RemoteProtocolError
from ft_transport._state.describe import describe
from ft_transport._state.manifest import Manifest
from ft_transport._wire.decode import decode_manifest
from ft_transport._wire.encode import encode_manifest
from ft_transport._wire.frames import Frame, ManifestHeader, decode_frame, encode_frame
from ft_transport._wire.layout import Limits, lay_out

HEADER = ManifestHeader(7, Limits(), "xxh3")


def encode(state: object, header: ManifestHeader = HEADER) -> bytes:
    return encode_manifest(describe(state)[0], header)


def decode(data: bytes) -> tuple[Manifest, ManifestHeader]:
    kind, body = decode_frame(data)
    assert kind is Frame.MANIFEST
    return decode_manifest(body)


def same(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests describe the same, types of plain values included."""
    if (one.nodes, one.paths, one.storages) != (other.nodes, other.paths, other.storages):
        return False
    kinds, other_kinds = ([(leaf.kind, views_of(leaf)) for leaf in manifest.leaves] for manifest in (one, other))
    values, other_values = (
        [leaf.context for leaf in manifest.leaves if leaf.kind == "value"] for manifest in (one, other)
    )
    return kinds == other_kinds and not difference(values, other_values)


def views_of(leaf: Any) -> list[tuple[Any, ...]]:
    return [(v.storage, v.geometry.dtype, v.geometry.shape, v.geometry.stride, v.offset) for v in leaf.views]


def small_frame() -> bytes:
    base = noise(20, 1)
    extra: OrderedDict[str, Any] = OrderedDict(w=base[:5], v=base[3:])
    extra._metadata = {"version": 1}  # type: ignore[attr-defined]
    point = Point(torch.nn.Parameter(base[8:10]), {1})
    return encode({"m": extra, 3: (1.5, [None, b"x"], torch.Size([2])), "p": point})


def read(data: bytes) -> None:
    """Read a frame as a receiver does. Only one kind of exception may come of it."""
    try:
        kind, body = decode_frame(data)
        if kind is Frame.MANIFEST:
            manifest, header = decode_manifest(body)
            assert lay_out(manifest, header.limits).nbytes < 1 << 62
    except RemoteProtocolError:
        pass


# The body of a manifest: [[step, limits, digest], nodes, shapes, leaves, storages].
def body_of(state: object) -> list[Any]:
    body: list[Any] = msgpack.unpackb(encode(state)[8:], strict_map_key=False, unicode_errors="surrogatepass")
    return body


def honest() -> list[Any]:
    return body_of({"w": noise((2, 3), 1), "p": torch.nn.Parameter(noise(2, 2)), "v": 1})


def read_body(body: Any) -> tuple[Manifest, ManifestHeader]:
    return decode(encode_frame(Frame.MANIFEST, body))


def refuses(body: Any, match: str | None = None) -> None:
    with pytest.raises(RemoteProtocolError, match=match):
        read_body(body)
