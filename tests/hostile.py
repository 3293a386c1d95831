"""What a receiver does with bytes from a peer it does not trust, up to the result: shared by the tests and the fuzzer.

:func:`receive` goes the way of a receive (frame, manifest, layout, template, landing, rebuild) without a channel.
The one kind of exception that may come of any bytes is :class:`RemoteProtocolError`, which it turns into its text.
:func:`hear` does the same with a frame of lanes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import itertools
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from helpers import Config, Point, noise
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils import _pytree as pytree

from ft_transport import PeerFailure, RemoteProtocolError, TransferReport
from ft_transport._deadline import Deadline
from ft_transport._group.control import Control
from ft_transport._group.destination import _check_header, _verify
from ft_transport._lanes import protocol as lanes
from ft_transport._net.endpoint import Endpoint
from ft_transport._plan.compare import compare
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.template import match_template
from ft_transport._state.kinds.base import Part
from ft_transport._state.manifest import Manifest
from ft_transport._wire.decode import decode_manifest
from ft_transport._wire.digest import digest_bytes
from ft_transport._wire.frames import MAX_FRAME_BYTES, Frame
from ft_transport._wire.layout import Layout, lay_out
from ft_transport.testing import memory_channels

CPU = torch.device("cpu")
# Landing is tried for states up to this size: it takes the memory that an accepted manifest asks for.
MAX_LANDED_BYTES = 1 << 20


# --------------------------------------------------------------------------------------- honest states


@dataclasses.dataclass
class Moments:
    """A dataclass with tensors, one under a name that mappings have."""

    mean: Any
    items: Any


class Holder:
    """Pickled, but for the tensors in it."""

    def __init__(self, **attrs: Any) -> None:
        self.__dict__.update(attrs)


class Table(dict):  # type: ignore[type-arg]
    """A user's dict."""


class Rows(list):  # type: ignore[type-arg]
    """A user's list."""


class Labelled(Point):
    """A namedtuple with room for attributes."""


class Node(Holder):
    """A node of torch's pytree."""


class Color(enum.Flag):
    """Flags."""

    RED = 1
    BLUE = 2


class Scaled(torch.Tensor):
    """A user's class of tensor."""


pytree.register_pytree_node(
    Node,
    lambda node: ([node.weight], node.name),
    lambda children, name: Node(weight=next(iter(children)), name=name),
    serialized_type_name="hostile.Node",
)


def _with_attributes() -> list[Any]:
    tensor = noise(2, 3)
    tensor.scale, tensor.history = noise(1, 4), [Config(), 2]  # type: ignore[attr-defined]
    return [torch.nn.Buffer(noise(2, 5)), tensor, noise(2, 6).as_subclass(Scaled)]


def _labelled() -> Labelled:
    labelled = Labelled(noise(1, 4), 2)
    labelled.label = noise(2, 5)  # type: ignore[attr-defined]
    return labelled


def _quantized() -> list[Any]:
    values, points = torch.arange(6.0).view(2, 3), torch.zeros(2, dtype=torch.int64)
    per_channel = torch.quantize_per_channel(values, torch.ones(2, dtype=torch.float64), points, 0, torch.qint8)
    return [torch.quantize_per_tensor(values, 0.5, 3, torch.quint8), per_channel]


def _without_bytes() -> list[Any]:
    return [
        torch.empty((2, 3), device="meta"),
        torch.nn.UninitializedParameter(),
        torch.conj(noise(2, 7, torch.complex64)),
        torch._neg_view(noise(2, 8)),
    ]


def _shared() -> list[Any]:
    tensor, inner = noise(3, 9), [noise(2, 10)]
    table = {"t": tensor, "l": inner}
    return [table, table, tensor, inner, Holder(t=tensor)]


def make_states() -> dict[str, Any]:
    base = noise(40, 1)
    rows = [noise((2, 2), 1), noise((1, 2), 2)]
    return {
        "tensors": {"w": base[:6].view(2, 3), "tied": base[3:9], "t": noise((3, 2), 2).t(), "empty": base[:0]},
        "parameters": [torch.nn.Parameter(noise(2, 3)), torch.nn.Parameter(noise(2, 4), requires_grad=False)],
        "containers": {"p": Point([1, ()], {3: None}), "s": torch.Size([2]), b"b": [[[]]]},
        "values": [1 << 70, 1j, slice(1), range(3), {1, 2}, torch.int8, torch.device("cpu"), b"x", "\udcff"],
        "objects": [Config(), Holder(a=1, b=(2, 1j)), torch.Generator()],
        "more values": [
            datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.timezone.utc), datetime.timedelta(1),
            Color.RED | Color.BLUE, decimal.Decimal("1.5"), fractions.Fraction(1, 3), uuid.UUID(int=5),
            PurePosixPath("/a"), int, np.float32(1.5), np.dtype("i4"), torch.strided, bytearray(b"x"),
            {frozenset({1}): (...,)}, Counter("ab"),
        ],
        "sparse": [torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr(), torch.eye(4).to_sparse_bsr((2, 2))],
        "nested": torch.nested.nested_tensor(rows),
        "jagged": torch.nested.nested_tensor(rows, layout=torch.jagged),
        "quantized": _quantized(),
        "numpy": [
            np.arange(6, dtype="i2").reshape(2, 3), np.array([None, 1, "a"]), np.zeros(2, [("a", "u1"), ("b", "f4")])
        ],
        "tensors in objects": [
            Holder(w=noise(2, 3), n=5, array=np.ones(2)), Holder(inner=Holder(w=torch.eye(2).to_sparse()))
        ],
        "nodes": [Moments(noise(2, 1), 5), Node(weight=noise(2, 2), name="n"), Table(a=1, b=noise(1, 3)), Rows([1])],
        "labelled": _labelled(),
        "shared": _shared(),
        "attributes": _with_attributes(),
        "without bytes": _without_bytes(),
    }  # fmt: skip


# Classes that the states below need.
ALLOWED = [Config, Point, Moments, Holder, Table, Rows, Labelled, Color, Scaled]
# Small ones with everything in them, to be attacked at every place.
with warnings.catch_warnings():  # torch calls some kinds beta
    warnings.simplefilter("ignore")
    STATES = make_states()
# What torch warns of when it makes such things, for pytest.
WARNINGS = [
    "ignore:ComplexHalf support is experimental",
    "ignore:torch.quantize_per_tensor",
    "ignore:Sparse .* tensor support is in beta state",
    "ignore:The PyTorch API of nested tensors is in prototype stage",
    "ignore:Please use .* to create a quantized tensor",
    "ignore:TypedStorage is deprecated",
    "ignore::FutureWarning",
    "ignore:.*ShardedTensor.*",
]
# Kinds that look at the bytes that have landed, which are any here: what they raise then is the transport's to report.
LOOK_AT_BYTES = {"sparse", "wrapper", "generator", "object", "python tensor"}


@contextlib.contextmanager
def process_group() -> Iterator[DeviceMesh]:
    """A process group of this process alone, and a mesh of it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield DeviceMesh("cpu", [0], mesh_dim_names=("rank",))
    finally:
        dist.destroy_process_group()


def distributed(mesh: DeviceMesh) -> dict[str, Any]:
    """States that need a process group."""
    local = LocalShard.from_tensor_and_offsets(noise((3, 4), 1), [0, 0], 0)
    tensor = DTensor.from_local(noise((4, 6), 1), mesh, [Shard(0)], run_check=False)
    replicated = DTensor.from_local(noise(4, 2), mesh, [Replicate()], run_check=False)
    return {
        "dtensor": {"d": tensor, "p": torch.nn.Parameter(replicated)},
        "sharded": {"s": ShardedTensor._init_from_local_shards([local], 3, 4)},
    }


# ------------------------------------------------------------------------------------------- a receive


# Of mutations that there are tens of thousands of, the suite tries one in so many; `make fuzz` tries all.
ONE_IN = 1 if os.environ.get("FT_TRANSPORT_ALL_MUTATIONS") else 5


def some(mutations: Iterable[Any]) -> Iterator[Any]:
    """Every so-many-th mutation, so that over many places each variant is tried somewhere."""
    return itertools.islice(mutations, 0, None, ONE_IN)


def receive(data: bytes, template: object = None) -> str:
    """Read a frame as every reader of frames does. Gives what was refused, empty if something was accepted.

    Raises:
        Exception: Of any other kind than a refusal: a hole.
    """
    refusals = [_refusal(_read, kind, data, template) for kind in (Frame.MANIFEST, Frame.DIGESTS, Frame.DONE)]
    return refusals[0] if all(refusals) else ""


def _refusal(read: Any, *args: Any) -> str:
    try:
        read(*args)
    except (PeerFailure, RemoteProtocolError) as exc:
        reason = str(exc)
    else:
        return ""
    assert 0 < len(reason) <= MAX_FRAME_BYTES // 8, "a refusal that is too long to be sent"
    return reason


def hear(data: bytes) -> str:
    """Read a frame of lanes as whoever hears it, in every state of a conversation; gives what was refused.

    Both its digests are made right first: whoever lies about the rest gets these right as well.

    Raises:
        Exception: Of any other kind than a refusal: a hole.
    """
    return _refusal(_hear, data)


def _hear(data: bytes) -> None:
    body = data[lanes.HEADER_BYTES :]
    # Bytes of the body, and its digest, lie before the digest of the whole header.
    before, check = lanes.HEADER_BYTES - 24, lanes.HEADER_BYTES - 8
    head = data[:before].ljust(before, b"\0") + len(body).to_bytes(8, "little")
    head += digest_bytes(body).to_bytes(8, "little")
    assert len(head) == check
    header = lanes.decode_header(head + lanes.TRAILER.pack(digest_bytes(head)))
    for role in lanes.Role:
        for state in lanes.State:
            protocol = lanes.LaneProtocol(role, header.attempt, header.step)
            protocol.state = state
            protocol.asked.append(0)
            with contextlib.suppress(RemoteProtocolError):
                protocol.received(header)
    if header.frame is not lanes.LaneFrame.MESSAGE:
        heard = lanes.decode_body(header, body)
        if header.frame is lanes.LaneFrame.ROUTE and heard[0] is not None:
            Endpoint.decode(heard[0])


def _read(expected: Frame, data: bytes, template: object) -> None:
    channel, _ = memory_channels()
    body = Control(channel, CPU, Deadline(timedelta(seconds=1))).check(expected, data)
    if expected is Frame.DIGESTS:
        _verify([1, 2], body)
    if expected is Frame.MANIFEST:
        land(body, template)


def land(body: Any, template: object = None) -> Manifest:
    """From the body of a manifest to the rebuilt state, with whatever bytes the memory holds."""
    manifest, header = decode_manifest(body)
    _check_header(header, header.step)
    layout = lay_out(manifest, header.limits)
    check_layout(manifest, layout, header.limits.message_bytes, header.limits.flight_bytes)
    report = TransferReport("destination", "test", header.step)
    matched = match_template(manifest, template, report) if template is not None else {}
    targets, disagreements = compare(manifest, matched, report)
    if disagreements:
        raise RemoteProtocolError("; ".join(disagreements))
    if layout.nbytes <= MAX_LANDED_BYTES:
        landing = DestinationPlan(manifest, layout, matched, targets, CPU, report)
        looking = any(_kinds_in(leaf.part) & LOOK_AT_BYTES for leaf in manifest.leaves)
        with contextlib.suppress(Exception) if looking else contextlib.nullcontext():
            landing.rebuild()
    return manifest


def _kinds_in(part: Part) -> set[str]:
    return {part.kind}.union(*map(_kinds_in, part.parts))


def check_layout(manifest: Manifest, layout: Layout, message_bytes: int, flight_bytes: int) -> None:
    """What is accepted lies inside its own storages, in messages of the promised size."""
    for leaf in manifest.leaves:
        for view in leaf.views:
            assert view.storage < len(manifest.storages)
            if view.storage >= 0:
                assert 0 <= view.begin < view.end <= manifest.storages[view.storage].nbytes
    assert sum(layout.sizes) == layout.nbytes <= sum(storage.nbytes for storage in manifest.storages)
    assert all(0 < size <= message_bytes for size in layout.sizes)
    assert all(sum(layout.sizes[m] for m in flight) <= flight_bytes for flight in layout.flights)
