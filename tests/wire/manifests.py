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
from ft_transport._wire.columns import pack_column, unpack_column
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


# ------------------------------------------------------------------------------------------ rows
#
# The body of a manifest says in columns what is edited more easily in rows: [header, nodes, shapes, leaves, storages,
# shared]. There a leaf is [storage, shape, offset], a view, for a plain tensor; [value]; [kind, views, context, parts];
# or the index of an earlier one. A storage is [bytes, device type].


def body_of(state: object) -> list[Any]:
    """The body as it travels, in lists."""
    return lists(encode(state)[8:])


def lists(packed: bytes) -> list[Any]:
    body: list[Any] = msgpack.unpackb(packed, strict_map_key=False, unicode_errors="surrogatepass")
    return body


def rows_of(state: object) -> list[Any]:
    return rows(body_of(state))


def rows(body: list[Any]) -> list[Any]:
    """An honest body in rows."""
    header, nodes, shapes, (count, *of_views), others, storages, shared = body
    views = map(list, zip(*(unpack_column(column, count) for column in of_views), strict=True))
    num_storages, numbers, distinct = storages
    listed = dict(others)
    leaves: list[Any] = []
    for index in range(nodes.count(None)):
        leaf = listed.get(index)
        if type(leaf) is list and len(leaf) == 4:
            leaf[1] = [next(views) for _ in range(leaf[1])]
        leaves.append(next(views) if leaf is None else leaf)
    assert not list(views)
    return [header, nodes, shapes, leaves, [list(distinct[n]) for n in unpack_column(numbers, num_storages)], shared]


def columns(rows: list[Any]) -> list[Any]:
    """The body that says what rows do.

    Raises:
        ValueError: No column can: of a view something is no integer of 64 bits.
    """
    header, nodes, shapes, leaves, storages, shared = rows
    views: list[Any] = []
    others: list[Any] = []
    for index, leaf in enumerate(leaves):
        if type(leaf) in (list, tuple) and len(leaf) == 3:
            views.append(leaf)
            continue
        if type(leaf) in (list, tuple) and len(leaf) == 4 and type(leaf[1]) in (list, tuple):
            views += leaf[1]
            leaf = [leaf[0], len(leaf[1]), *leaf[2:]]
        others.append([index, leaf])
    if not all(type(view) in (list, tuple) and len(view) == 3 for view in views):
        raise ValueError(f"no views: {views}")
    # By what they look like: True is not 1 here.
    distinct = {repr(storage): storage for storage in storages}
    numbers = {text: number for number, text in enumerate(distinct)}
    return [
        header,
        nodes,
        shapes,
        [len(views), *(_column([view[which] for view in views]) for which in range(3))],
        others,
        [len(storages), pack_column([numbers[repr(storage)] for storage in storages]), list(distinct.values())],
        shared,
    ]


def _column(values: list[Any]) -> bytes:
    if not all(type(value) is int and -(1 << 63) <= value < 1 << 63 for value in values):
        raise ValueError(f"no column of {values}")
    return pack_column(values)


def honest() -> list[Any]:
    """In rows."""
    return rows_of({"w": noise((2, 3), 1), "p": torch.nn.Parameter(noise(2, 2)), "v": 1})


def read_body(body: Any) -> tuple[Manifest, ManifestHeader]:
    return decode(encode_frame(Frame.MANIFEST, body))


def read_rows(rows: list[Any]) -> tuple[Manifest, ManifestHeader]:
    return read_body(columns(rows))


def refuses(rows: list[Any], match: str | None = None) -> None:
    refuses_body(columns(rows), match)


def refuses_body(body: Any, match: str | None = None) -> None:
    with pytest.raises(RemoteProtocolError, match=match):
        read_body(body)
