"""Attacks on what crosses the wire, by hand and by machine: each is refused, costs little, and runs nothing.

``hostile.receive`` goes all the way of a receive and lets any exception through but a refusal. Where an attack is meant
to cost time, it is large enough that without its bound the test would not end; where memory, the peak is measured.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import pickle
import tempfile
import tracemalloc
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from helpers import noise
from hostile import ALLOWED, CPU, STATES, WARNINGS, Holder, distributed, process_group, receive, some
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from wire.manifests import columns, lists, rows

from ft_transport import TransferReport
from ft_transport._plan import destination as _destination
from ft_transport._plan.compare import Targets, compare
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.template import match_template
from ft_transport._process import Room, physical_bytes
from ft_transport._state import classes as _classes
from ft_transport._state import geometry as _geometry
from ft_transport._state import tree as _tree
from ft_transport._state.describe import describe
from ft_transport._state.manifest import Leaf, Leaves, Manifest
from ft_transport._state.tree import LEAF
from ft_transport._state.values import encode_value
from ft_transport._wire import decode as _decode
from ft_transport._wire.decode import decode_manifest
from ft_transport._wire.encode import encode_manifest
from ft_transport._wire.frames import Frame, ManifestHeader, decode_frame, encode_frame
from ft_transport._wire.layout import Limits, lay_out

HEADER = ManifestHeader(7, Limits(), "xxh3")

pytestmark = pytest.mark.filterwarnings(*WARNINGS)


@pytest.fixture(autouse=True)
def _allowed() -> Iterator[None]:
    with torch.serialization.safe_globals(ALLOWED):
        yield


# ---------------------------------------------------------------------------------------------- tools
#
# The body of a manifest: [header, nodes, shapes, views, leaves, storages, shared]. In rows (``wire.manifests``), which
# are edited more easily: [header, nodes, shapes, leaves, storages, shared].


def honest_frame(state: object, header: ManifestHeader = HEADER) -> bytes:
    return encode_manifest(describe(state)[0], header)


def body_of(state: object) -> list[Any]:
    return lists(honest_frame(state)[8:])


def rows_of(state: object) -> list[Any]:
    return rows(body_of(state))


def copies_of(body: Any) -> Iterator[Any]:
    """Copies of an honest body, without end. By msgpack, which is ten times as fast as ``deepcopy``."""
    data = encode_frame(Frame.MANIFEST, body)[8:]
    while True:
        yield lists(data)


def frame(body: Any, kind: Frame = Frame.MANIFEST) -> bytes:
    return encode_frame(kind, body)


def frame_of(rows: list[Any]) -> bytes:
    """The frame of a manifest in rows."""
    return frame(columns(rows))


def packed(data: bytes, kind: Frame = Frame.MANIFEST) -> bytes:
    """A frame with these bytes for msgpack."""
    return encode_frame(kind, None)[:8] + data


def array32(claimed: int) -> bytes:
    return b"\xdd" + claimed.to_bytes(4, "big")


def tree(nodes: list[Any], num_leaves: int = 1) -> bytes:
    """A frame of these nodes, with a plain value for each leaf."""
    body = rows_of(1)
    body[1], body[3] = nodes, [[1]] * num_leaves
    return frame_of(body)


def node(kind: Any, num_children: Any, keys: Any = (), num_attrs: Any = 0, extra: Any = None) -> list[Any]:
    return [kind, num_children, list(keys), num_attrs, extra]


def value(encoded: Any) -> bytes:
    """A frame whose state is one plain value, encoded like this."""
    body = rows_of(1)
    body[3] = [[encoded]]
    return frame_of(body)


def refused(data: bytes, *matches: str) -> None:
    reason = receive(data)
    assert reason
    for match in matches:
        assert match in reason


def peak_bytes(data: bytes) -> int:
    """What reading a frame takes at its peak."""
    tracemalloc.start()
    try:
        receive(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


MIB = 1 << 20
# Frames whose body is read; that of READY and DONE is not.
READ = [Frame.MANIFEST, Frame.DIGESTS, Frame.REFUSE, Frame.FAILED]


# --------------------------------------------------------------------------------------------- msgpack


@pytest.mark.parametrize("kind", READ)
def test_arrays_that_claim_more_than_is_there(kind: Frame) -> None:
    for claimed in (1 << 16, 100_000, (1 << 32) - 1):
        for depth in (1, 2, 900):
            bomb = packed(array32(claimed) * depth + b"\xc0" * 100_000, kind)
            refused(bomb)
            assert peak_bytes(bomb) < 24 * MIB


@pytest.mark.parametrize(
    "header",
    [b"\xdb", b"\xc6", b"\xdf", b"\xc9", b"\xd9", b"\xc4", b"\xc7", b"\xde", b"\xdc"],
    ids=["str32", "bin32", "map32", "ext32", "str8", "bin8", "ext8", "map16", "array16"],
)
def test_lengths_that_claim_more_than_is_there(header: bytes) -> None:
    for rest in (b"\xff" * 4, b"\xff" * 5, b"\x7f\xff\xff\xff", b"\xff" * 4 + b"a" * 1000):
        refused(packed(header + rest))
        refused(packed(b"\x95" + (header + rest) * 5))
        assert peak_bytes(packed(header + rest)) < MIB


def test_arrays_nested_without_end() -> None:
    for depth in (500, 1024, 5000, 1_000_000):
        refused(packed(b"\x91" * depth))
        refused(packed(b"\x91" * depth + b"\xc0"))
        refused(packed(b"\xdc\x00\x01" * depth + b"\xc0"))


@pytest.mark.parametrize("what", [{}, {"a": 1}, {1: {2: 3}}, msgpack.Timestamp(1, 2), msgpack.ExtType(5, b"x")])
def test_maps_and_extensions_are_in_no_frame(what: Any) -> None:
    for kind in Frame:
        refused(frame(what, kind), "damaged frame")
        refused(frame([what], kind), "damaged frame")
    refused(value(what), "damaged frame")
    refused(value(["[]", what]), "damaged frame")
    refused(tree([node("dict", 1, [what]), None]), "damaged frame")


def test_small_items_cost_memory_in_proportion() -> None:
    for item in (b"\xc0", b"\x90", b"\x91\xc0", b"\x80", b"\xa2ab", b"\xcd\x01\x01", b"\xcb" + b"x" * 8, b"\xc4\x02ab"):
        num_items = 200_000 // len(item)
        data = array32(num_items) + item * num_items
        assert peak_bytes(packed(data, Frame.DIGESTS)) < 40 * len(data) + MIB


@pytest.mark.parametrize(
    "text", [b"\xff", b"\xc3", b"\xed\xa0", b"\xf8\x88\x80\x80\x80", b"a\xc0\x80", b"\xf4\x90\x80\x80", b"\x80abc"]
)
def test_names_that_are_not_unicode(text: bytes) -> None:
    """As a key, a kind, a device, a digest and a value. Lone surrogates alone are kept, as Python's own strings do."""
    body = body_of({"keykey": noise(2, 1), "value": "valval"})
    for name in ("keykey", "dict", "xxh3", "cpu", "float32", "valval"):
        honest = frame(body)
        raw = b"%c%s" % (0xA0 + len(name), name.encode())
        assert raw in honest
        refused(honest.replace(raw, b"%c%s" % (0xA0 + len(text), text)), "damaged frame")


# ------------------------------------------------------------------------------------- every node, every byte


EVIL: list[Any] = [
    None, True, -1, 0, 1, 64, 1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63), 1.5, float("nan"),
    "", "x", "leaf", "tensor", "dict", "namedtuple", "pytree", "object", "float32", "quint4x2", "uint1", "cuda",
    "builtins.eval", "builtins.int", "os.system", "torch.load", "helpers.Point", "hostile.Node",
    "collections.namedtuple",
    "torch.nested._internal.nested_tensor.NestedTensor", "__class__", "../../etc/passwd", "\udcff", "%s%n{0}", b"",
    b"x", b"\x01\x02", b"\x80\x04N.", b"\x80\x02N.",
    [], [None], [1], [[]], ["()"], ["()", 1, 2], ["()", ["()", 1 << 40]], [0, 0, 0], [1, [0, 0, 0]],
    ["tensor", 0, None, []], ["tensor", 1, None, []], ["tensor", None, []],
    ["object", ["()", b"\x80\x02N.", ["()"]], []], [0, [1]], [1, 0], [1, b"\0", b"\0", b"\0"], [1, b"\0", [[8, "cpu"]]],
    ["object", b"\x80\x02cos\nsystem\n."], ["int", b"\xff" * 5000], ["range", 0, 1 << 62], ["slice", 1, 2, 3],
    ["device", "cuda:99"], ["dtype", "quint8"], ["{}", ["[]"], 1], ["set", ["[]"]], ["class", "builtins.int"],
    ["numpy", "O", b""], ["zone", "../../etc/passwd"], ["fraction", 1, 0], ["()", 0, 1, 1 << 59],
    {}, {"a": 1}, msgpack.Timestamp(1), msgpack.ExtType(5, b"x"),
]  # fmt: skip


def places(data: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    yield path
    if isinstance(data, list):
        for index, child in enumerate(data):
            yield from places(child, (*path, index))


def parent_of(body: Any, path: tuple[int, ...]) -> Any:
    for index in path[:-1]:
        body = body[index]
    return body


@pytest.mark.parametrize("name", STATES)
def test_every_node_replaced_by_every_evil(name: str) -> None:
    honest = body_of(STATES[name])
    assert receive(frame(honest), STATES[name]) == ""
    for (path, evil), body in zip(some(itertools.product(places(honest), EVIL)), copies_of(honest), strict=False):
        if path:
            parent_of(body, path)[path[-1]] = evil
        receive(frame(body if path else evil), STATES[name])


@pytest.mark.parametrize("name", STATES)
def test_every_number_of_a_column_replaced_by_every_other(name: str) -> None:
    honest = rows_of(STATES[name])
    numbers = [evil for evil in EVIL if type(evil) is int and -(1 << 63) <= evil < 1 << 63]
    views = [path for path in places(honest[3]) if path and type(parent_of(honest[3], path)[path[-1]]) is int]
    for path, evil in some(itertools.product(views, [*numbers, -2, -3, 2, 63, -64])):
        body = rows_of(STATES[name])
        parent_of(body[3], path)[path[-1]] = evil
        receive(frame_of(body), STATES[name])


@pytest.mark.parametrize("name", STATES)
def test_every_node_left_out_doubled_moved_and_swapped(name: str) -> None:
    honest = body_of(STATES[name])
    copies = copies_of(honest)
    for path in places(honest):
        if not path:
            continue
        for change in ("delete", "double", "reverse", "wrap", "inner"):
            body = next(copies)
            parent, index = parent_of(body, path), path[-1]
            found = parent[index]
            if change == "delete":
                del parent[index]
            elif change == "double":
                parent.insert(index, copy.deepcopy(found))
            elif change == "reverse":
                parent.reverse()
            elif change == "wrap":
                parent[index] = [found]
            else:
                parent[index] = copy.deepcopy(honest[index % 7])
            receive(frame(body), STATES[name])


@pytest.mark.parametrize("name", STATES)
def test_every_truncation_is_refused(name: str) -> None:
    data = honest_frame(STATES[name])
    for length in range(len(data)):
        refused(data[:length])


CHANGES: list[Callable[[int], int]] = [
    *(lambda byte, flip=flip: byte ^ flip for flip in (1, 0x80)),
    *(lambda byte, value=value: value for value in (0, 0xFF, 0xC0, 0xDD, 0xC6)),
    lambda byte: (byte + 1) % 256,
]


@pytest.mark.parametrize("name", STATES)
def test_every_byte_changed(name: str) -> None:
    data = honest_frame(STATES[name])
    for place, change in some(itertools.product(range(len(data)), CHANGES)):
        receive(data[:place] + bytes([change(data[place])]) + data[place + 1 :], STATES[name])


def test_frames_spliced_from_two() -> None:
    frames = [honest_frame(state) for state in STATES.values()]
    for one, other in itertools.product(frames, frames):
        for begin, more in some(itertools.product(range(0, min(len(one), len(other)), 7), (0, 1, 9))):
            receive(one[:begin] + other[begin + more :])
        refused(one + other)


# ------------------------------------------------------------------------------------------- other frames


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("depth", [10, 500, 1000])
def test_other_frames_nested_deep(kind: Frame, depth: int) -> None:
    body: Any = ()
    for _ in range(depth):
        body = (body,)
    refused(frame(body, kind))
    refused(frame((body, "why", body), kind), *(["why"] if kind in (Frame.REFUSE, Frame.FAILED) else []))


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("body", [None, 1, "why", b"why", [None], [[]], [1, 2, 3], ["a", 1], ["\udcff"], ["1", "2"]])
def test_other_frames_of_other_things(kind: Frame, body: Any) -> None:
    refused(frame(body, kind))


def test_digests_must_be_as_many_and_equal() -> None:
    assert receive(frame([1, 2], Frame.DIGESTS)) == ""
    for body in ([], [1], [2, 1], [1, 2, 2], [1, None], ["1", "2"], [1 << 63, 2], [[1, 2]], None, "12"):
        refused(frame(body, Frame.DIGESTS))


def test_reasons_take_no_more_memory_than_their_frame() -> None:
    body = [(1 << 63,) * 1000] * 20
    for kind in (Frame.REFUSE, Frame.FAILED):
        assert len(receive(frame(body, kind))) < 100


# --------------------------------------------------------------------------------------------- the tree

LIST = node("list", 1)


@pytest.mark.parametrize("depth", [1001, 5000, 100_000])
def test_trees_nested_too_deep(depth: int) -> None:
    data = tree([LIST] * depth + [None])
    refused(data, "nested deeper than 1000 levels")
    assert peak_bytes(data) < 40 * len(data) + 16 * MIB


def test_nodes_that_claim_more_children_than_there_are() -> None:
    for num_children in (3000, 1 << 20, 1 << 62):
        for num_nodes in (1, 2, 3000):
            data = tree([node("list", num_children)] * num_nodes + [None])
            refused(data, "the tree ends early")
            assert peak_bytes(data) < 8 * MIB


def test_many_leaves_far_down_or_below_long_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tree, "MAX_PATHS_BYTES", MIB)
    deep = [*[LIST] * 900, node("list", 1000), *[None] * 1000]
    long = [node("dict", 1, ["k" * 10_000]), node("list", 1000), *[None] * 1000]
    deep_keys = [node("dict", 1, [["()", "k" * 10_000]]), node("list", 1000), *[None] * 1000]
    for nodes in (deep, long, deep_keys):
        data = tree(nodes, 1000)
        reason = receive(data, {"a": 1})  # paths are made where a template is looked for
        assert "paths of more than" in reason
    assert receive(tree(deep[900:], 1000), {"a": 1}) == ""


def test_more_nodes_than_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_decode, "MAX_NODES", 100)
    assert receive(tree([node("list", 99)] + [None] * 99, 99)) == ""
    refused(tree([node("list", 100)] + [None] * 100, 100), "nodes, at most")


def test_a_million_leaves_in_ten_bytes() -> None:
    for num_children in (1_000_000, (1 << 32) - 1):
        body = b"\x97\xc0" + b"\x91\x95\xa4list" + msgpack.packb(num_children) + b"\x90\x00\xc0"
        refused(packed(body + b"\x90" * 5))
        refused(tree([node("list", num_children)]))
    refused(packed(b"\xdd\x00\x0f\x42\x40" + b"\x00" * 5))


@pytest.mark.parametrize(
    "nodes",
    [
        [node("dict", 2, ["a", "a"]), None, None],
        [node("dict", 2, [1, True]), None, None],
        [node("dict", 2, [1, 1.0]), None, None],
        [node("dict", 2, [["()", 1], ["()", True]]), None, None],
        [node("OrderedDict", 3, ["a", "a", "b"], 1), None, None, None],
        [node("OrderedDict", 3, ["a", "b", "b"], 2), None, None, None],
    ],
)
def test_duplicate_keys(nodes: list[Any]) -> None:
    refused(tree(nodes, len(nodes) - 1), "distinct keys")


# --------------------------------------------------------------------------------------------- the bytes


def with_view(shape: list[Any], stride: list[Any], nbytes: int, dtype: str = "uint8", **limits: int) -> bytes:
    """A frame of one tensor in one storage."""
    body = rows_of(noise(2, 1))
    body[0][1] = list(Limits()._replace(**limits))
    body[2], body[3], body[4] = [[dtype, shape, stride]], [[0, 0, 0]], [[nbytes, "cpu"]]
    return frame_of(body)


@pytest.mark.parametrize("size", [0, 1, 2, 1 << 62, (1 << 63) - 1])
@pytest.mark.parametrize("num_dims", [65, 1000, 300_000])
def test_shapes_of_too_many_dimensions(size: int, num_dims: int) -> None:
    data = with_view([size] * num_dims, [0] * num_dims, 1)
    refused(data, "dimensions, at most 64")
    refused(with_view([1 << 40] * 4, [0] * num_dims, 1))


def test_shapes_from_the_wire_do_not_stay() -> None:
    before = _geometry.geometry.cache_info().currsize
    assert receive(with_view([3, 7, 11, 13], [1001, 143, 13, 1], 3003)) == ""
    assert _geometry.geometry.cache_info().currsize == before


def test_honest_bytes_are_accepted() -> None:
    smallest = {"message_bytes": 64, "flight_bytes": 64, "pack_below": 0}
    for limits in ({}, smallest, {"pack_below": 4 << 20, "pack_from": 1}):
        assert receive(with_view([1000], [1], 1000, **limits)) == ""
        assert receive(with_view([10, 10], [100, 1], 910, "int8", **limits)) == ""
    assert receive(with_view([1 << 40], [1], 1 << 40)) == ""


@pytest.mark.parametrize("message_bytes", [64, 65, 127, 4 << 20])
def test_billions_of_messages_out_of_a_few_bytes(message_bytes: int) -> None:
    limits = {"message_bytes": message_bytes, "pack_below": 64}
    for nbytes in (1 << 45, 1 << 50, 1 << 58):
        data = with_view([nbytes], [1], nbytes, **limits)
        refused(data, "messages of")
        assert peak_bytes(data) < MIB
        refused(with_view([1 << 20, nbytes >> 20], [nbytes >> 20, 1], nbytes, **limits), "messages of")
        refused(with_view([1 << 10], [nbytes >> 10], (1023 * nbytes >> 10) + 1, **limits), "views with gaps")


def test_gaps_that_take_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    data = with_view([1 << 20], [2], (1 << 21) - 1)
    assert receive(data) == ""
    monkeypatch.setattr(_decode, "physical_bytes", lambda: 1 << 22)
    refused(data, "more than half of the memory")


def test_billions_of_messages_out_of_many_storages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_decode, "MAX_CUTS", 1000)
    body = rows_of([noise(2, i) for i in range(100)])
    body[0][1] = [64, 64, 0, 1, 1]
    body[2] = [["uint8", [640], [1]]]
    body[4] = [[640, "cpu"]] * 100
    assert receive(frame_of(body)) == ""
    body[2][0][1], body[4] = [640 + 64], [[640 + 64, "cpu"]] * 100
    refused(frame_of(body), "messages of")


@pytest.mark.parametrize(
    "limits",
    [
        {"flight_bytes": (1 << 30) + 1},
        {"flight_bytes": 1 << 62},
        {"window": 1025},
        {"window": 1 << 62},
        {"message_bytes": 1 << 62, "flight_bytes": 1 << 62},
        {"pack_below": 1 << 62},
        {"pack_from": 0},
        {"window": -1},
    ],
)
def test_limits_without_bound(limits: dict[str, int]) -> None:
    refused(with_view([8], [1], 8, **limits), "limits out of range")


def test_more_tensors_than_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_decode, "MAX_NODES", 3)
    body = rows_of([noise(2, 1), noise(2, 2)])
    assert receive(frame_of(body)) == ""
    shard = ["()", ["()", 0], ["()", 2], "rank:0/cpu"]
    context = ["()", ["()", 6], "float32", False, False, ["()", shard], ["()", *[shard] * 3]]
    body[3][0] = ["sharded", [body[3][0]] * 3, context, [None] * 3]
    refused(frame_of(body), "tensors, at most 3")


@pytest.mark.parametrize(
    ("shape", "stride", "nbytes"),
    [
        ([2], [1 << 40], (1 << 40) + 1),
        ([1 << 28, 1 << 28], [1, 1], (1 << 29) - 1),
        ([1 << 33], [2], (1 << 34) - 1),
        ([1 << 20, 1 << 20, 1 << 15], [0, 1, 1], (1 << 20) + (1 << 15) - 1),
    ],
)
def test_gaps_that_take_very_long_to_find(shape: list[int], stride: list[int], nbytes: int) -> None:
    refused(with_view(shape, stride, nbytes), "views with gaps that take")
    assert peak_bytes(with_view(shape, stride, nbytes)) < MIB


def test_large_storages_whose_gaps_are_none() -> None:
    body = rows_of([noise(2, 1), noise(2, 2)])
    body[2] = [["float32", [1 << 36], [1]], ["float32", [1 << 18, 3], [1 << 18, 1]]]
    body[3] = [[0, 0, 0], [0, 1, 0]]
    body[4] = [[4 << 36, "cpu"]]
    assert receive(frame_of(body)) == ""


def test_many_leaves_that_are_one_of_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_decode, "MAX_NODES", 1000)
    for num_leaves, accepted in ((2, True), (3, False), (500, False)):
        data = frame_of(rows_of([Holder(many=[noise(2, index) for index in range(500)])] * num_leaves))
        assert receive(data) == "" if accepted else "tensors, at most 1000" in receive(data)
    # Counted before they are repeated: 250,000 take six MiB in columns alone.
    assert peak_bytes(data) < MIB


def test_shared_nodes_are_compared_once_each() -> None:
    keys = [f"key {index}" for index in range(50_000)]
    table = node("dict", len(keys), keys)
    body = rows_of(1)
    body[1] = [node("list", 2), *([table, *[None] * len(keys)] * 2)]
    body[3] = [[1]] * (2 * len(keys))
    first, later = 1, len(keys) + 2
    body[5] = [[later, first]]
    assert receive(frame_of(body)) == ""
    for pairs in ([[later, first]] * 100_000, [[later, first], [1, 0]], [[later, first], [later, first]]):
        body[5] = pairs
        refused(frame_of(body), "comes after node")


@pytest.mark.parametrize("nbytes", [0, 1, 16, 1 << 40, (1 << 63) - 1])
def test_a_storage_that_nothing_refers_to(nbytes: int) -> None:
    body = rows_of(noise(2, 1))
    body[4].append([nbytes, "cpu"])
    refused(frame_of(body), "storages, of which 1 are referred to")


def test_many_tensors_of_one_storage() -> None:
    """Overlapping in every way there is: they travel once, and the plan is made in no more than sorting takes."""
    body = rows_of([0] * 30_000)
    body[2] = [["uint8", [length], [1]] for length in range(1, 3001)]
    body[3] = [[0, index % 3000, index // 10] for index in range(30_000)]
    body[4] = [[6000, "cpu"]]
    receive(frame_of(body))


@pytest.mark.parametrize(
    ("dtype", "shape", "stride", "nbytes"),
    [
        ("quint4x2", [8], [1], 4),
        ("quint2x4", [8], [1], 2),
        ("bits1x8", [8], [1], 1),
        ("uint1", [8], [1], 1),
        ("uint1", [8], [1], 0),
        ("int4", [1 << 62], [1], 1),
        ("float4_e2m1fn_x2", [8], [1], 4),
        ("complex128", [1 << 59], [1], 1 << 62),
        ("complex128", [1 << 58], [1], 1 << 62),
    ],
)
def test_dtypes_of_odd_sizes(dtype: str, shape: list[int], stride: list[int], nbytes: int) -> None:
    """They take no less than they say."""
    if hasattr(torch, dtype):
        refused(with_view(shape, stride, nbytes, dtype))


@pytest.mark.parametrize("dtype", sorted(set(_classes._DTYPES)))
def test_every_dtype_is_landed_or_refused(dtype: str) -> None:
    nbytes = 3 * _classes._DTYPES[dtype].itemsize
    receive(with_view([3], [1], nbytes, dtype))
    receive(with_view([3], [1], nbytes, dtype), noise(3, 1))


# ---------------------------------------------------------------------------------------------- keys
#
# Hashes of numbers are the numbers, those of tuples are made from them without a secret.


def ints_of_one_hash(count: int) -> list[Any]:
    modulus = (1 << 61) - 1
    return [["int", (modulus * ((1 << 20) + index)).to_bytes(16, "little")] for index in range(count)]


def pairs_of_one_hash(count: int) -> list[Any]:
    """Different pairs of integers of 64 bits whose tuples have the same hash."""
    one, two, mask = 11400714785074694791, 14029467366897019727, (1 << 64) - 1
    back_one, back_two = pow(one, -1, 1 << 64), pow(two, -1, 1 << 64)
    before = 123456789 * back_one & mask
    before = (before >> 31 | before << 33) & mask
    found: list[Any] = []
    first = 0
    while len(found) < count:
        first += 1
        state = 2870177450012600261 + first * two & mask
        state = (state << 31 | state >> 33) * one & mask
        second = (before - state) * back_two & mask
        if second < 1 << 60:
            found.append(["()", first, second])
    return found


def test_the_keys_collide() -> None:
    assert len({hash(int.from_bytes(number, "little")) for _, number in ints_of_one_hash(100)}) == 1
    assert len({hash((one, two)) for _, one, two in pairs_of_one_hash(100)}) == 1


@pytest.mark.parametrize("make", [ints_of_one_hash, pairs_of_one_hash])
def test_keys_that_a_dict_cannot_tell_apart(make: Any) -> None:
    keys = make((1 << 14) + 1)
    nodes = [node("dict", len(keys), keys), *[None] * len(keys)]
    refused(tree(nodes, len(keys)), "keys, at most")
    refused(value(["set", *keys]), "keys, at most")
    refused(value(["[]", ["frozenset", *keys]]), "keys, at most")
    refused(value(["{}", *(item for key in keys for item in (key, 1))]), "keys, at most")
    refused(tree([node("dict", 1, [["frozenset", *keys]]), None]), "keys, at most")


def test_many_numbers_as_keys() -> None:
    for keys in (range(70_000), [f"key {index}" for index in range(70_000)], range(5, 50_000)):
        assert receive(tree([node("dict", len(keys), keys), *[None] * len(keys)], len(keys))) == ""
    for keys in (range(1, 70_000), [*range(65_537), 70_000]):
        refused(tree([node("dict", len(keys), keys), *[None] * len(keys)], len(keys)), "keys, at most")
    refused(value(["set", *(index + 0.5 for index in range(65_537))]), "keys, at most")


class Key:
    """A key that a dict cannot tell from others by its hash; counts how often it had to compare."""

    num_compared = 0

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        Key.num_compared += 1
        return self is other


def test_paths_that_a_dict_cannot_tell_apart() -> None:
    """The caps above hold for one container; a path goes through many. The template's paths are what is looked up."""
    paths: list[Any] = [("other", Key(), 1) for _ in range(500)] + [("other", 1, Key()) for _ in range(500)] + [("w",)]
    manifest = Manifest([LEAF], Leaves.of([Leaf("value", (), 1)] * len(paths)), [], paths=paths)
    Key.num_compared = 0
    matched = match_template(manifest, {"w": 5}, TransferReport("destination", "test", 1))
    assert matched == {1000: 5}
    assert Key.num_compared < 10 * len(paths)


def test_very_many_places_for_the_template() -> None:
    """Each registered key of torchft's envelope is a place where the template may belong: not a hundred thousand."""
    template = {f"layer {index}": index for index in range(1000)}
    keys = [f"key {index}" for index in range(100_000)]
    nodes = [node("dict", 2, ["user", "torchft"]), node("dict", len(keys), keys), *[None] * len(keys), None]
    assert receive(tree(nodes, len(keys) + 1), template) == ""


# ------------------------------------------------------------------------------------------ what is said


def test_what_is_refused_is_not_quoted_at_length() -> None:
    long = "x" * 200_000
    bodies = [rows_of({"a": noise(2, 1)}) for _ in range(7)]
    bodies[0][0][2] = [long]
    bodies[1][1][0] = [long, 1, [], 0, None]
    bodies[2][2][0][0] = long
    bodies[3][3][0] = [long, [], None, None]
    bodies[4][4][0] = [long, "cpu"]
    bodies[5][1][0] = node("namedtuple", 1, [], 0, f"{long}:{long}")
    bodies[6][1][0], bodies[6][3] = node("dict", 1, [long]), [[["object", b""]]]
    for body in bodies:
        assert 0 < len(receive(frame_of(body))) < 5000


def test_a_template_that_matches_nothing_is_told_so_in_short() -> None:
    long = [f"{index} " + "x" * 100_000 for index in range(3)]
    state = {"user": {key: noise(2, 1) for key in long}, "torchft": {}}
    assert 0 < len(receive(honest_frame(state), {"w": noise(2, 1)})) < 5000


# --------------------------------------------------------------------------------------------- classes

MAPPINGS = {"dict": dict, "OrderedDict": OrderedDict, "defaultdict": defaultdict}


@pytest.mark.parametrize("kind", MAPPINGS)
@pytest.mark.parametrize("name", ["keys", "items", "get", "pop", "update", "default_factory", "copy", "__class__", ""])
def test_attributes_that_would_hide_what_a_mapping_has(kind: str, name: str) -> None:
    if kind != "OrderedDict" or name not in ("", "default_factory"):
        refused(tree([node(kind, 1, [name], 1), None]))
        refused(tree([node(kind, 2, ["a", name], 1, None), None, None], 2))


# --------------------------------------------------------------------------------------------- pickles

# What code from the wire would leave behind, if it ran here or in a shell.
ran: list[str] = []
TOUCHED = Path(tempfile.gettempdir()) / f"ft_transport-hostile-{os.getpid()}"


def run_code(*args: object) -> str:
    ran.append("code from the wire")
    return "ran"


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (run_code, ())


class EvilState:
    """Runs code when its state is set."""

    def __setstate__(self, state: object) -> None:
        run_code()


def leaf(kind: str, context: Any, parts: Any = (), views: Any = ()) -> bytes:
    """A frame whose state is one leaf of this kind."""
    body = rows_of(1)
    body[3] = [[kind, views, context, list(parts)]]
    return frame_of(body)


def of_object(data: bytes, *values: Any) -> list[bytes]:
    """Frames with a pickle where one may be: in an object, in a set and in the attributes of a tensor."""
    body = rows_of(torch.nn.Buffer(noise(2, 1)))
    body[3][0][2][4:] = [data, ["()", *values]]
    return [leaf("object", ["()", data, ["()", *values]]), value(["set", ["object", data, *values]]), frame_of(body)]


def raw_pickles() -> dict[str, bytes]:
    module, text = __name__.encode(), b"touch " + bytes(TOUCHED)
    found = {f"protocol {protocol}": pickle.dumps(Evil(), protocol) for protocol in range(6)}
    state = EvilState()
    state.__dict__["x"] = 1
    found |= {
        "state": pickle.dumps(state, 2),
        "inst": b"(i" + module + b"\nrun_code\n.",
        "obj": b"(c" + module + b"\nrun_code\no.",
        "newobj": b"\x80\x02c" + module + b"\nEvil\n)\x81.",
        "newobj_ex": b"\x80\x04c" + module + b"\nrun_code\n)}\x92.",
        "stack_global": b"\x80\x04\x8c%c%s\x8c\x08run_code\x93)R." % (len(module), module),
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x1bserialization.os.path.join.x\x93)R.",
        "ext": b"\x80\x02\x82\x01)R.",
        "persistent id": b"P0\n.",
        "binary persistent id": b"\x80\x02\x8c\x01xQ.",
        "buffers": b"\x80\x05\x97\x98.",
    }
    named = [
        "os system", "posix system", "nt system", "subprocess Popen", "builtins eval", "builtins exec",
        "builtins compile", "builtins __import__", "builtins getattr", "builtins open", "builtins breakpoint",
        "torch load", "torch.hub load", "torch.storage _load_from_bytes", "torch.serialization load",
        "functools partial", "operator attrgetter", "types FunctionType", "types CodeType", "pickle loads",
        "importlib import_module", "ctypes CDLL", "code interact", "pydoc locate", "torch.jit load",
        "torch.utils.cpp_extension load_inline", "torch._dynamo optimize", "os path.join", "__main__ run_code",
        "numpy.testing._private.utils runstring", "ft_transport._state.values imported_class",
    ]  # fmt: skip
    for name in named:
        where, what = (part.encode() for part in name.split())
        found[name] = b"\x80\x02c%s\n%s\nX%s%s\x85R." % (where, what, len(text).to_bytes(4, "little"), text)
    return found


PICKLES = raw_pickles()


@pytest.fixture
def nothing_runs() -> Iterator[None]:
    ran.clear()
    yield
    assert not TOUCHED.exists()
    assert ran == []


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_run_nothing(name: str) -> None:
    data = PICKLES[name]
    for attack in of_object(data):
        refused(attack, "<root>: ")
    refused(value(["[]", 1, ["()", ["object", data]]]), "<root>: ")
    refused(tree([node("dict", 1, [["object", data]]), None]))


def test_pickles_would_run_otherwise() -> None:
    ran.clear()
    for protocol in range(6):
        pickle.loads(PICKLES[f"protocol {protocol}"])
    for name in ("state", "inst", "obj", "stack_global"):
        pickle.loads(PICKLES[name])
    assert len(ran) == 10
    ran.clear()


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("name", STATES)
def test_pickles_in_every_field(name: str) -> None:
    honest = body_of(STATES[name])
    copies = copies_of(honest)
    payloads = [PICKLES["protocol 2"], PICKLES["protocol 4"]]
    for path in places(honest):
        for payload in (*payloads, *(["object", payload] for payload in payloads)):
            body = next(copies)
            if path:
                parent_of(body, path)[path[-1]] = payload
            receive(frame(body if path else payload), STATES[name])


def test_objects_that_claim_more_than_their_bytes() -> None:
    for claimed in (b"X\xff\xff\xff\x7fxxx.", b"\x8b\xff\xff\xff\x7fxxx.", b"r\xff\xff\xff\x7f."):
        for attack in of_object(b"\x80\x02" + claimed):
            refused(attack)
            assert peak_bytes(attack) < 4 * MIB


def laughs(end: bytes) -> bytes:
    """A tuple of twice a tuple of twice a tuple …, 60 times, and what is done with it."""
    twice = b"".join(b"h%c" % index * 2 + b"\x86q%c" % (index + 1) for index in range(60))
    return b"\x80\x02)q\x00" + twice + b"0" + end


@pytest.mark.parametrize("end", [b"}h\x3cK\x01s.", b"(h\x3cK\x01d.", b"}(K\x01K\x02h\x3cK\x01u.", b"}h\x3c\x85K\x01s."])
def test_objects_whose_keys_take_years(end: bytes) -> None:
    for attack in of_object(laughs(end)):
        refused(attack)


def test_objects_nested_so_deep_that_the_stack_would_overflow() -> None:
    deep = b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s."
    for attack in of_object(deep):
        refused(attack)


def test_objects_with_keys_that_a_dict_cannot_tell_apart() -> None:
    # Written by hand: a dict of them would take as long here.
    numbers = [int.from_bytes(number, "little") for _, number in ints_of_one_hash(20_000)]
    data = b"\x80\x02}(" + b"".join(pickle.dumps(number, 2)[2:-1] + b"K\x01" for number in numbers) + b"u."
    for attack in of_object(data):
        refused(attack)


ENDLESS = ["range", 0, 1 << 62]


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (b"\x80\x02ccollections\nCounter\nU\x010Q\x85R.", [ENDLESS]),
        (b"\x80\x02ccollections\nCounter\nK\x00Q\x85R.", [ENDLESS]),
        (b"\x80\x02ccollections\nCounter\nJ\xff\xff\xff\xffQ\x85R.", [ENDLESS]),
        (b"\x80\x02ccollections\nCounter\nJ\xff\xff\xff\xffQ\x85q\x00h\x00R.", [ENDLESS]),
        (b"\x80\x02ccollections\nOrderedDict\n]J\xff\xff\xff\xffQa\x85R.", [["range", 0, 1 << 40]]),
        (b"\x80\x02J\xff\xff\xff\xffQJ\xfe\xff\xff\xffQ\x85R.", [["class", "builtins.set"], ENDLESS]),
        (b"\x80\x02J\xff\xff\xff\xffQJ\xfe\xff\xff\xffQ\x85\x81.", [["class", "builtins.set"], ENDLESS]),
        (b"\x80\x02ccollections\nCounter\n}ccollections\nOrderedDict\n\x86R.", []),
        (b"\x80\x02c_codecs\nencode\nX\x02\x00\x00\x00abX\x08\x00\x00\x00punycode\x86R.", []),
        (b"\x80\x02c_codecs\nencode\nX\x02\x00\x00\x00ab\x85R.", []),
    ],
)
def test_harmless_functions_called_with_something_endless(data: bytes, values: list[Any]) -> None:
    for attack in of_object(data, *values):
        refused(attack, "<root>: ")


def test_pickles_that_change_a_tensor_they_were_given() -> None:
    state = Holder(w=noise(2, 3))
    body = rows_of([state, noise(2, 3)])
    data = b"\x80\x02K\x00Q(K\x00QK\x00J\x00\x00\x00\x7f\x85K\x01\x85tb."
    body[3][0][2][1] = data
    refused(frame_of(body), "changes what it was given")


@pytest.mark.parametrize("name", ["data", "grad", "backward", "__class__", "shape", "copy_", "_backward_hooks"])
def test_attributes_that_a_tensor_has_already(name: str) -> None:
    body = rows_of(torch.nn.Buffer(noise(2, 1)))
    body[3][0][2][4] = pickle.dumps({name: 1}, 2)
    manifest, header = decode_manifest(decode_frame(frame_of(body))[1])
    landing = DestinationPlan(
        manifest, lay_out(manifest, header.limits), {}, Targets.none(), CPU, TransferReport("destination", "test", 1)
    )
    with pytest.raises(ValueError, match="an attribute of a tensor called"):
        landing.rebuild()


@pytest.mark.parametrize("name", ["list", "tuple", "dict", "deque", "OrderedDict", "defaultdict", "namedtuple"])
def test_nodes_of_pytree_that_call_what_their_context_names(name: str) -> None:
    module = "builtins" if name in ("list", "tuple", "dict") else "collections"
    for context in (["class", "builtins.bytes"], ["class", "builtins.tuple"], None):
        refused(tree([node("pytree", 1, [], 0, [f"{module}.{name}", context]), None]), "is not registered")


# ----------------------------------------------------------------------------------------- kinds of leaf


def rebuild(state: object, offsets: list[int], template: object = None) -> object:
    """A jagged tensor received with these offsets."""
    manifest, header = decode_manifest(decode_frame(honest_frame(state))[1])
    layout, report = lay_out(manifest, header.limits), TransferReport("destination", "test", 1)
    matched = match_template(manifest, template, report) if template is not None else {}
    landing = DestinationPlan(manifest, layout, matched, compare(manifest, matched, report)[0], CPU, report)
    for index, piece in enumerate(layout.ranges):
        if piece.end - piece.begin == 8 * len(offsets):
            landing.placement.blocks[index].bytes(0, 8 * len(offsets)).copy_(torch.tensor(offsets).view(torch.uint8))
    return landing.rebuild()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("offsets", [[0, 2, 1 << 40], [0, 5, 3], [-1, 2, 3], [0, 2, 4], [3, 2, 1], [1 << 62, 0, 3]])
def test_jagged_rows_outside_of_their_tensor(offsets: list[int], in_place: bool) -> None:
    state = STATES["jagged"]
    template = copy.deepcopy(state) if in_place else None
    rebuild(state, [0, 2, 3], template)
    with pytest.raises(ValueError, match="rows outside of"):
        rebuild(state, offsets, template)


def reshaped(state: Any, which: int, shape: list[int], stride: list[int] | None = None, dtype: str = "") -> bytes:
    """A frame of one tensor that is made of several, one of which has another geometry."""
    body = rows_of(state)
    inner = body[2][body[3][0][1][which][1]]
    change = [dtype or inner[0], shape, torch.empty(shape, device="meta").stride() if stride is None else stride]
    body[2].append(change)
    body[3][0][1][which][1] = len(body[2]) - 1
    body[4][body[3][0][1][which][0]][0] = geometry_bytes(*change)
    return frame_of(body)


def geometry_bytes(dtype: str, shape: list[int], stride: list[int]) -> int:
    return _geometry.Geometry(getattr(torch, dtype), tuple(shape), tuple(stride)).span


EYE = torch.eye(4)


@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.parametrize(
    ("state", "which", "shape", "dtype"),
    [
        (EYE.to_sparse(), 0, [4], ""),
        (EYE.to_sparse(), 0, [1, 4], ""),
        (EYE.to_sparse(), 0, [2, 3], ""),
        (EYE.to_sparse(), 0, [2, 4], "float64"),
        (EYE.to_sparse(), 1, [4, 4], ""),
        (EYE.to_sparse_csr(), 0, [4], ""),
        (EYE.to_sparse_csr(), 0, [1, 5], ""),
        (EYE.to_sparse_csc(), 1, [3], ""),
        (EYE.to_sparse_csc(), 1, [], ""),
        (EYE.to_sparse_csr(), 1, [4], "int32"),
        (EYE.to_sparse_bsr((2, 2)), 2, [2, 3, 2], ""),
        (EYE.to_sparse_bsr((2, 2)), 2, [1, 2, 2], ""),
        (EYE.to_sparse_bsc((2, 2)), 2, [], ""),
    ],
)
def test_indices_and_values_that_make_no_sparse_tensor(
    state: torch.Tensor, which: int, shape: list[int], dtype: str
) -> None:
    refused(reshaped(state, which, shape, dtype=dtype), "[phase agree]")


@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.parametrize(("dtype", "per_byte"), [(torch.quint4x2, 2), (torch.quint2x4, 4)])
def test_quantized_elements_that_share_bytes(dtype: torch.dtype, per_byte: int) -> None:
    state = torch.quantize_per_tensor(torch.arange(24.0).view(4, 6), 1.0, 0, dtype)
    assert receive(reshaped(state, 0, [24 // per_byte])) == ""
    refused(reshaped(state, 0, [24 // per_byte - 1]), "a quantized tensor")
    refused(reshaped(state, 0, [24], [0]), "a quantized tensor")


def test_an_expanded_quantized_tensor_takes_no_more_than_its_bytes() -> None:
    flat = torch._make_per_tensor_quantized_tensor(torch.zeros(1, dtype=torch.int8), 0.5, 3)
    body = rows_of(flat)
    size = 1 << 44
    body[2] = [["int8", [size], [0]]]
    body[3][0][2][2:4] = [["()", size], ["()", 0]]
    assert receive(frame_of(body)) == ""


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with process_group() as mesh:
        yield mesh


@pytest.mark.parametrize("kind", ["dtensor", "sharded"])
def test_every_node_of_a_context_replaced_by_every_evil(kind: str, mesh: DeviceMesh) -> None:
    """What cannot be rebuilt is refused before a byte lands, whether the template has the leaf or not."""
    state = distributed(mesh)[kind]
    honest = body_of(state)
    copies = copies_of(honest)
    for template in (None, state, {"other": noise(2, 1), **state}):
        assert receive(frame(honest), template) == ""
        evils = (
            *EVIL,
            "shard",
            "partial",
            "rank:7/cpu",
            "worker/cuda:0",
            3,
            ["()", 0, 0],
            ["()", ["()", "shard", 99]],
        )
        for path, evil in some(itertools.product(places(honest), evils)):
            if path and path[0] in (2, 3, 4):
                body = next(copies)
                parent_of(body, path)[path[-1]] = evil
                receive(frame(body), template)


@pytest.mark.parametrize("kind", ["dtensor", "sharded"])
def test_a_context_of_one_kind_in_another(kind: str, mesh: DeviceMesh) -> None:
    honest = rows_of(distributed(mesh)[kind])
    for name in ("tensor", "dtensor", "sharded", "value", "leaf"):
        if name != kind:
            body = copy.deepcopy(honest)
            body[3][0][0] = name
            refused(frame_of(body))


@pytest.mark.parametrize("num_dims", [65, 200_000])
def test_meshes_and_shards_of_too_many_dimensions(num_dims: int) -> None:
    body = rows_of(torch.nn.Parameter(noise(2, 1)))
    views = body[3][0][1]
    large = (1 << 61,) * num_dims
    shard = (large, large, "rank:0/cpu")
    for kind, context in {
        "dtensor": (("cpu", large, (0,), None), (("replicate",),) * num_dims, (2,), (1,), False, False),
        "sharded": (large, "float32", False, False, (shard,), (shard,)),
    }.items():
        body[3][0] = [kind, views, encode_value(context), [None]]
        refused(frame_of(body))


@pytest.mark.parametrize("in_place", [[], ["before"], ["after"], ["before", "after"]], ids=" and ".join)
def test_an_array_of_objects_of_too_many_dimensions(in_place: list[str]) -> None:
    """It has no tensors of its own: what lands in place next to it says nothing of it."""
    body = rows_of({"before": noise(2, 1), "array": np.array([None]), "after": noise(2, 2)})
    template = {name: noise(2, 3) for name in in_place} or None
    assert receive(frame_of(body), template) == ""
    body[3][1][2] = encode_value((None, (1,) * 65, (None,)))
    assert "array: it cannot be rebuilt" in receive(frame_of(body), template)


@pytest.mark.parametrize("name", ["load", "Tensor", "_dynamo", "onnx", "__name__", "float33", ""])
def test_the_dtype_of_a_sharded_tensor_is_no_other_name_of_torch(name: str) -> None:
    body = rows_of(torch.nn.Parameter(noise(2, 1)))
    shard = ((0,), (2,), "rank:0/cpu")
    context = ((2,), name, False, False, (shard,), ())
    body[3][0], body[4] = ["sharded", [], encode_value(context), []], []
    refused(frame_of(body), "<root>: ", repr(name))


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "no such device"])
@pytest.mark.parametrize("num_storages", [1, 100])
def test_more_than_the_machine_has(device_type: str, num_storages: int) -> None:
    """No storage is taken that would not fit together with the ones before it, whatever device it claims."""
    nbytes = physical_bytes() * (2 if num_storages == 1 else 0.6) // 1
    body = rows_of([noise(2, index) for index in range(num_storages)])
    body[2] = [["uint8", [int(nbytes)], [1]]]
    body[4] = [[int(nbytes), device_type]] * num_storages
    manifest, header = decode_manifest(decode_frame(frame_of(body))[1])
    report = TransferReport("destination", "test", 1)
    with pytest.raises(MemoryError, match="more than this machine has"):
        DestinationPlan(manifest, lay_out(manifest, header.limits), {}, Targets.none(), torch.device("cpu"), report)


def test_more_than_the_memory_cgroup_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before any of it is taken; the kernel would kill the process when bytes land."""
    manifest, header = decode_manifest(decode_frame(frame_of(rows_of([noise(1000, 1), noise(1000, 2)])))[1])
    report, layout = TransferReport("destination", "test", 1), lay_out(manifest, header.limits)
    for left, fits in ((8000, True), (7999, False)):
        monkeypatch.setattr(_destination, "room", lambda left=left: Room(left, "the memory cgroup /a has left"))
        refused = pytest.raises(MemoryError, match="8000 bytes of fresh storages are more than the memory cgroup /a")
        with contextlib.nullcontext() if fits else refused:
            DestinationPlan(manifest, layout, {}, Targets.none(), torch.device("cpu"), report)


# ---------------------------------------------------------------------------------------- plain values


@pytest.mark.parametrize(
    "encoded",
    [
        ["int", "9"],
        ["int", b"\xff" * 65_537],
        ["int", 5],
        ["range", ["int", b"5" * 4000], 5, 0],
        ["range", 1.0],
        ["range", ["range", 1, 2], 3],
        ["fraction", 1, 0],
        ["fraction", 1.5, 2],
        ["device", "cpu:-1"],
        ["device", "cuda:99999999999"],
        ["device", "../cuda"],
        ["device", "x" * 100_000],
        ["dtype", "load"],
        ["dtype", "Tensor"],
        ["dtype", "__name__"],
        ["dtype", ["()"]],
        ["()", ["__reduce__"]],
        ["tuple", 1],
        ["__import__", "os"],
        ["builtins.eval", "1"],
        ["complex", "1", "2"],
        ["slice", 1, 2, 3, 4],
        ["bytearray", 1 << 40],
        ["frozenset", ["{}", 1, 2]],
        ["{}", 1],
        ["size", 1.5],
        ["zone", "../../../../etc/passwd"],
        ["zone", "/etc/passwd"],
        ["decimal", "x"],
        ["uuid", b"short"],
        ["path", "PosixPath", "/"],
        ["timezone", 5],
        ["datetime", 2020, 13, 1, 0, 0, 0, 0, None, 0],
        ["datetime", 2020, 1, 1, 0, 0, 0, 0, "zone", 0],
        ["class", "os.system"],
        ["class", "subprocess.Popen"],
        ["enum", "builtins.int", "x", 1],
        ["enum", "hostile.Color", "GREEN", 1 << 60],
        ["enum", "hostile.Color", ["[]"], "1"],
        ["numpy", "O", b"12345678"],
        ["numpy", ["[]", ["()", "a", "O"]], b"12345678"],
        ["numpy", "f8", b"short"],
        ["numpy", "V0", 7],
        ["numpy", "__import__('os')", b""],
        ["numpy dtype", "O"],
        ["torch", "load"],
    ],
)
def test_values_that_cannot_be(encoded: Any) -> None:
    refused(value(encoded))
    refused(value(["[]", 1, ["()", encoded]]))
    refused(tree([node("dict", 1, [encoded]), None]))


def test_values_that_look_large_are_small() -> None:
    large = ["int", b"\x7f" * 65_536]
    for encoded in (["range", 0, 1 << 63], ["slice", 0, 1 << 63, None], ["range", 0, large], large):
        assert receive(value(encoded)) == ""
        assert peak_bytes(value(encoded)) < MIB
    receive(tree([node("dict", 1, [["range", 0, 1 << 63]]), None]))


@pytest.mark.parametrize("tag", ["[]", "()", "set", "frozenset", "{}", "slice"])
def test_values_nested_deep(tag: str) -> None:
    nested: Any = 1
    for depth in range(1, 1000):
        nested = [tag, nested] if tag != "{}" else [tag, 1, nested]
        if depth in (30, 100, 300, 500, 999):
            receive(value(nested))
            receive(tree([node("dict", 1, [nested]), None]))


@pytest.mark.parametrize(
    "kind",
    [
        "namedtuple",
        "defaultdict",
        "deque",
        "dict",
        "list",
        "Size",
        "OrderedDict",
        "leaf",
        "dataclass",
        "subdict",
        "sublist",
    ],
)
@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "builtins.exec", "builtins.getattr", "builtins.type", "builtins.object", "os.system", ":", "a",
     "", "torch.load", "subprocess.Popen", "torch.nn.modules.module.Module.__call__", "builtins.int.__class__",
     "os.path.join", "test_hostile.Evil", "torch._utils._rebuild_tensor_v2", "collections.namedtuple", "\udcff.x"],
)  # fmt: skip
def test_classes_that_nobody_allowed(kind: str, name: str) -> None:
    refused(tree([node(kind, 1, ["a"] if kind in MAPPINGS else [], 0, name), None]))
    refused(tree([node(kind, 0, [], 0, name)], 0))


@pytest.mark.parametrize("name", ["builtins.int", "builtins.dict", "helpers.Config", "builtins.bytes"])
def test_allowed_classes_where_they_do_not_belong(name: str) -> None:
    for kind in ("namedtuple", "deque"):
        refused(tree([node(kind, 1, [], 0, name), None]))
    refused(tree([node("namedtuple", 2, [], 0, name), None, None], 2))


@pytest.mark.parametrize(
    ("keys", "num_attrs", "reason"),
    [
        (["x", "y", "label"], 1, ""),
        (["x", "z", "label"], 1, "has other fields"),
        (["x", "label"], 1, "has 1 of them"),
        (["x", "y", "label"], 2, "has 1 of them"),
        (["x", "y", "_replace"], 1, "name of an attribute"),
        (["x", "y", "__class__"], 1, "name of an attribute"),
        (["x", "y", "count"], 1, "name of an attribute"),
        (["x", "y"], 0, "distinct keys"),
        ([], 1, "distinct keys"),
    ],
)
def test_attributes_of_a_namedtuple(keys: list[str], num_attrs: int, reason: str) -> None:
    num_children = len(keys) or 3
    data = tree(
        [node("namedtuple", num_children, keys, num_attrs, "hostile.Labelled"), *[None] * num_children], num_children
    )
    assert reason in receive(data)
    assert bool(receive(data)) == bool(reason)


def test_attributes_of_a_namedtuple_that_has_no_room_for_them() -> None:
    refused(tree([node("namedtuple", 3, ["x", "y", "label"], 1, "helpers.Point"), None, None, None], 3))


# --------------------------------------------------------------------------------------- by the thousand
#
# Hypothesis with the suite's profile: the same examples on every run.

numbers = st.integers(-(1 << 63), (1 << 64) - 1) | st.sampled_from([0, 1, 2, 3, 63, 64, 1 << 31, 1 << 61, 1 << 62])
offsets = st.integers(-(1 << 63), (1 << 63) - 1) | st.sampled_from([0, 1, 2, 3, 63, 64, 1 << 31, 1 << 61, 1 << 62])
texts = st.sampled_from(["", "a", "dict", "list", "tensor", "leaf", "cpu", "float32", "int8", "namedtuple", "object"])
dtypes = st.sampled_from(sorted(_classes._DTYPES))
junk = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | texts | st.text(max_size=5) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=20,
)


@given(st.binary(max_size=400))
def test_random_bytes(data: bytes) -> None:
    receive(data)
    for kind in Frame:
        receive(packed(data, kind))


@given(st.sampled_from(sorted(STATES)), st.data())
def test_random_damage(name: str, data: st.DataObject) -> None:
    damaged = bytearray(honest_frame(STATES[name]))
    for _ in range(data.draw(st.integers(1, 5))):
        begin = data.draw(st.integers(0, len(damaged)))
        end = data.draw(st.integers(begin, min(begin + 8, len(damaged))))
        damaged[begin:end] = data.draw(st.binary(max_size=8))
    receive(bytes(damaged), STATES[name])


@given(st.lists(junk, max_size=6), st.sampled_from(list(Frame)))
def test_random_bodies(body: Any, kind: Frame) -> None:
    receive(frame(body, kind))


@given(st.sampled_from(sorted(STATES)), st.data())
def test_random_replacements(name: str, data: st.DataObject) -> None:
    body = body_of(STATES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from(sorted(places(body))[1:] or [(0,)]))
        parent_of(body, path)[path[-1]] = data.draw(junk)
        if not body:
            break
    receive(frame(body), STATES[name])


@given(
    st.lists(st.tuples(dtypes, st.lists(numbers, max_size=4), st.lists(numbers, max_size=4))),
    st.lists(st.tuples(st.integers(-2, 4), st.integers(-1, 4), offsets | st.integers(0, 40)), min_size=1, max_size=6),
    st.lists(st.tuples(numbers | st.integers(0, 200), texts), max_size=5),
    st.lists(st.integers(-1, 200) | numbers, min_size=5, max_size=5),
)
def test_random_numbers_in_the_right_shape(shapes: Any, views: Any, storages: Any, limits: Any) -> None:
    body = rows_of([0] * len(views))
    body[2:5] = [shapes, views, storages]
    receive(frame_of(body))
    body[0][1] = limits
    receive(frame_of(body), [noise(2, 1)] * len(views))


@given(st.data())
def test_random_small_views_that_mostly_fit(data: st.DataObject) -> None:
    """Near enough to the truth to be accepted now and then, and landed."""
    small = st.integers(0, 4)
    views, shapes = [], []
    storages = [[data.draw(st.integers(0, 64)), "cpu"] for _ in range(data.draw(st.integers(1, 2)))]
    for index in range(data.draw(st.integers(1, 4))):
        num_dims = data.draw(st.integers(0, 3))
        dims = st.lists(small, min_size=num_dims, max_size=num_dims)
        shapes.append([data.draw(st.sampled_from(["uint8", "int16", "float32"])), data.draw(dims), data.draw(dims)])
        views.append([data.draw(st.integers(-1, 1)), index, data.draw(st.integers(0, 8))])
    body = rows_of([0] * len(views))
    body[0][1] = [64, 64, data.draw(st.integers(0, 64)), data.draw(st.integers(1, 3)), 1]
    body[2:5] = [shapes, views, storages]
    receive(frame_of(body))
    receive(frame_of(body), [noise(2, 1)] * len(views))
