"""The wire, byte for byte: golden files of every frame are read as they were meant, and written as they were.

If today's encoder gives other bytes, the wire has changed, which needs a new version: see ``tests/golden.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import golden
import pytest
import torch
from helpers import Config
from hostile import ALLOWED, WARNINGS, land, process_group
from torch.distributed.device_mesh import DeviceMesh
from wire.manifests import same

from ft_transport import RemoteProtocolError
from ft_transport._state.describe import describe
from ft_transport._state.kinds.base import Surroundings, unflatten_leaf
from ft_transport._state.manifest import Manifest
from ft_transport._wire.decode import decode_manifest
from ft_transport._wire.frames import VERSION, Frame, decode_frame, encode_frame

MANIFESTS = ["small", "everything", *golden.KINDS, "dtensor", "sharded"]

pytestmark = pytest.mark.filterwarnings(*WARNINGS)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with process_group() as mesh, torch.serialization.safe_globals(ALLOWED):
        yield mesh


def read(name: str) -> bytes:
    return (golden.DATA / f"v{VERSION}_{name.replace(' ', '_')}.bin").read_bytes()


def manifest_of(name: str) -> Manifest:
    kind, body = decode_frame(read(f"manifest_{name}"))
    assert kind is Frame.MANIFEST
    manifest, header = decode_manifest(body)
    assert header == golden.HEADER
    return manifest


@pytest.mark.parametrize("kind", golden.BODIES)
def test_frames_are_read_and_written_as_they_were(kind: Frame) -> None:
    data = read(kind.name.lower())
    assert decode_frame(data) == (kind, golden.BODIES[kind])
    assert encode_frame(kind, golden.BODIES[kind]) == data


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_written_as_they_were(name: str, mesh: DeviceMesh) -> None:
    if name not in golden.NOT_COMPARED:
        assert golden.encode(golden.manifests(mesh)[name]) == read(f"manifest_{name}")


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_read_as_they_were_meant(name: str, mesh: DeviceMesh) -> None:
    expected, _ = describe(golden.manifests(mesh)[name])
    got = manifest_of(name)
    if name not in golden.NOT_COMPARED:
        assert same(got, expected)
    for leaf, other in zip(got.leaves, expected.leaves, strict=True):
        assert leaf.kind == other.kind
    land(decode_frame(read(f"manifest_{name}"))[1])


def test_every_golden_file_is_tested_and_every_kind_of_frame_has_one(mesh: DeviceMesh) -> None:
    ours = {path.name for path in golden.DATA.glob(f"v{VERSION}_*.bin")}
    ours.add(golden.lane_frames_file().name)  # see test_conversation
    assert ours == set(golden.frames(mesh))
    assert set(golden.manifests(mesh)) == set(MANIFESTS)
    assert {*golden.BODIES, Frame.MANIFEST} == set(Frame)


def test_the_small_manifest_says_what_it_must() -> None:
    """Against the text of docs/protocol.md, without today's encoder."""
    header, nodes, shapes, views, leaves, storages, shared = decode_frame(read("manifest_small"))[1]
    assert header == (11, (1 << 20, 4 << 20, 1 << 10, 8, 4), "xxh3", -1)
    assert nodes[:3] == (
        ("dict", 5, ("model", "gaps", "empty", "scalar", 7), 0, None),
        ("OrderedDict", 3, ("weight", "tied", "_metadata"), 1, None),
        None,
    )
    assert nodes.count(None) == 21
    assert shapes == (
        ("float32", (3, 4), (4, 1)),
        ("float32", (4,), (1,)),
        ("float32", (2, 3), (8, 1)),
        ("int8", (0,), (1,)),
        ("bfloat16", (), ()),
    )
    # weight, tied and gaps are of one storage, empty is of none, scalar of one of its own.
    assert views == (5, b"\x01\x01\x01\xff\x00", b"\x00\x01\x02\x03\x04", b"\x00\x04\x10\x00\x00")
    assert storages == (2, b"\x00\x01", ((2, "cpu"), (108, "cpu")))
    # The parameter, then the values; tied, gaps, empty and scalar are plain tensors, of which no more is to be said.
    assert leaves[:4] == ((0, ("tensor", 1, ("()", True, True), ())), (2, (2,)), (6, (None,)), (7, (True,)))
    assert [index for index, _ in leaves] == [0, 2, *range(6, 21)]
    assert shared == ()


def test_the_small_manifest_is_read_as_it_was_meant() -> None:
    manifest = manifest_of("small")
    assert manifest.paths[:5] == [
        ("model", "weight"), ("model", "tied"), ("model", "_metadata", "version"), ("gaps",), ("empty",)
    ]  # fmt: skip
    values = [leaf.context for leaf in manifest.leaves if leaf.kind == "value"]
    assert values[:9] == [2, None, True, -1, 1 << 64, 0.5, "text", b"bytes", 1j]
    assert values[9:] == [1, 2, {3}, slice(1), range(2), torch.int8, ...]
    weight, tied, gaps = (manifest.leaves[i].views[0] for i in (0, 1, 3))
    assert (weight.geometry.shape, weight.geometry.stride) == ((3, 4), (4, 1))
    assert weight.storage == tied.storage
    assert (weight.offset, tied.offset) == (0, 4)
    assert (gaps.geometry.stride, gaps.storage) == ((8, 1), weight.storage)
    assert manifest.leaves[0].context == (True, True)


@pytest.mark.parametrize("version", range(1, VERSION))
def test_earlier_versions_are_refused_by_name(version: int) -> None:
    data = (golden.DATA / f"v{version}_manifest_small.bin").read_bytes()
    with pytest.raises(RemoteProtocolError, match=f"expected version {VERSION} of the wire, got {version}"):
        decode_frame(data)


def test_objects_come_back_as_they_were(mesh: DeviceMesh) -> None:
    config, holder, _ = cast(Any, land(decode_frame(read("manifest_objects"))[1]).build(_built("objects")))
    assert config == Config()
    assert vars(holder) == {"a": 1, "b": (2, 1j)}


def _built(name: str) -> list[object]:
    """The leaves of a state whose objects hold no tensors; None for others."""
    return [
        unflatten_leaf(leaf.part, iter(()), Surroundings()) if not leaf.views else None
        for leaf in manifest_of(name).leaves
    ]
