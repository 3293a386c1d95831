"""Kinds of leaf: how each is taken apart into plain strided tensors, and put together again.

A kind knows three things: the *inner* tensors whose bytes travel, a *context* of plain values that travels
in the manifest, and how to rebuild the leaf from both. What no kind claims and is no tensor is a plain
value. To teach the package a new leaf, write one :class:`Kind` and add it to ``KINDS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

__all__ = ["DTYPES", "KINDS", "Kind", "Meshes", "dtype_name", "kind_of", "mesh_key", "meshes_of"]

# A mesh by what describes it: device type, shape, ranks, names of the dimensions.
MeshKey = tuple[str, tuple[int, ...], tuple[int, ...], tuple[str, ...] | None]
Meshes = dict[MeshKey, DeviceMesh]


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


DTYPES: dict[str, torch.dtype] = {
    dtype_name(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}


class Kind:
    """One kind of leaf. Subclasses override everything but ``name``'s type.

    Attributes:
        name: How the manifest calls it. Part of the wire.
        is_tried: Whether :meth:`rebuild` finds more wrong with a context than :meth:`check`, whatever bytes the tensors
            hold. Then it is tried before the first byte lands.
    """

    name: str = ""
    is_tried: bool = False

    def inner(self, leaf: Any) -> tuple[torch.Tensor, ...]:
        """The plain strided tensors whose bytes travel, in a fixed order.

        Raises:
            ValueError: This leaf cannot travel; the text says why.
        """
        raise NotImplementedError

    def context(self, leaf: Any) -> Any:
        """What else is needed to rebuild it: None, numbers, strings, and tuples of these."""
        raise NotImplementedError

    def check(self, dtypes: Sequence[torch.dtype], context: Any) -> None:
        """Check what a peer sent, before a byte lands: :meth:`rebuild` must not fail on it later.

        Args:
            dtypes: Of the inner tensors.
            context: What claims to be a context of this kind.

        Raises:
            TypeError, ValueError: It is none.
        """
        raise NotImplementedError

    def disagreement(self, context: Any, template: Any) -> str:
        """Why ``template`` cannot take such a leaf, beyond shape and dtype; empty if it can."""
        raise NotImplementedError

    def rebuild(self, tensors: Sequence[torch.Tensor], context: Any, meshes: Meshes) -> Any:
        """A new leaf that owns ``tensors``."""
        raise NotImplementedError


class PlainTensor(Kind):
    """``torch.Tensor`` and ``torch.nn.Parameter``, strided. Context: None, or (is parameter, requires grad)."""

    name = "tensor"

    def inner(self, leaf: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if leaf.layout != torch.strided:
            raise ValueError(f"a tensor of layout {leaf.layout} cannot travel yet, expected torch.strided")
        if leaf.is_quantized or leaf.is_nested or leaf.is_meta:
            what = "quantized" if leaf.is_quantized else "nested" if leaf.is_nested else "meta"
            raise ValueError(f"a {what} tensor cannot travel yet, expected a plain one")
        if leaf.is_conj() or leaf.is_neg():
            return (leaf.detach().resolve_conj().resolve_neg(),)
        return (leaf,)

    def context(self, leaf: torch.Tensor) -> Any:
        is_parameter = isinstance(leaf, torch.nn.Parameter)
        return (is_parameter, leaf.requires_grad) if is_parameter or leaf.requires_grad else None

    def check(self, dtypes: Sequence[torch.dtype], context: Any) -> None:
        (dtype,) = dtypes
        if context is not None:
            _, requires_grad = map(_a(bool), context)
            _check_grad(dtype, requires_grad)

    def disagreement(self, context: Any, template: Any) -> str:
        return ""

    def rebuild(self, tensors: Sequence[torch.Tensor], context: Any, meshes: Meshes) -> Any:
        (tensor,) = tensors
        if context is None:
            return tensor
        is_parameter, requires_grad = context
        if is_parameter:
            return torch.nn.Parameter(tensor, requires_grad=requires_grad)
        return tensor.requires_grad_(requires_grad)


class DTensorKind(Kind):
    """``torch.distributed.tensor.DTensor``: the local tensor travels, the mesh is the receiver's own.

    Context: (mesh, placements, global shape, global stride, requires grad, is parameter).
    """

    name = "dtensor"
    is_tried = True

    def inner(self, leaf: DTensor) -> tuple[torch.Tensor, ...]:
        local = leaf._local_tensor
        if type(local) is not torch.Tensor:
            raise ValueError(f"a DTensor whose local tensor is a {type(local).__name__} cannot travel yet")
        return (local,)

    def context(self, leaf: DTensor) -> Any:
        return (
            mesh_key(leaf.device_mesh),
            tuple(_describe_placement(placement) for placement in leaf.placements),
            tuple(leaf.shape),
            tuple(leaf.stride()),
            leaf.requires_grad,
            isinstance(leaf, torch.nn.Parameter),
        )

    def check(self, dtypes: Sequence[torch.dtype], context: Any) -> None:
        (dtype,) = dtypes
        (device_type, mesh_shape, ranks, names), placements, shape, stride, requires_grad, is_parameter = context
        _a(bool)(is_parameter)
        _check_grad(dtype, _a(bool)(requires_grad))
        torch.device(_a(str)(device_type))
        if not len(mesh_shape) == len(placements) <= 64:
            raise ValueError(f"a mesh of shape {mesh_shape} with placements {placements}")
        if math.prod(_sizes(mesh_shape)) != len(_sizes(ranks)) or len(set(ranks)) != len(ranks) or not ranks:
            raise ValueError(f"a mesh of shape {mesh_shape} with ranks {ranks}")
        if names is not None and len([_a(str)(name) for name in names]) != len(mesh_shape):
            raise ValueError(f"a mesh of shape {mesh_shape} with names {names}")
        for placement in placements:
            _make_placement(placement)
        if len(_sizes(shape)) != len(_sizes(stride)):
            raise ValueError(f"a global shape {shape} with strides {stride}")

    def disagreement(self, context: Any, template: DTensor) -> str:
        mine = self.context(template)
        expected, got = (f"global shape {c[2]} with placements {c[1]}" for c in (mine, context))
        return "" if expected == got else f"expected DTensor of {expected}, source has {got}"

    def rebuild(self, tensors: Sequence[torch.Tensor], context: Any, meshes: Meshes) -> Any:
        (local,) = tensors
        key, placements, shape, stride, requires_grad, is_parameter = context
        if key not in meshes:
            device_type, mesh_shape, ranks, names = key
            meshes[key] = DeviceMesh(
                device_type,
                torch.tensor(ranks, dtype=torch.int).reshape(mesh_shape),
                mesh_dim_names=names,
                # Groups would have to be created together with the other ranks of the mesh.
                _init_backend=False,
            )
        meta = TensorMeta(torch.Size(shape), tuple(stride), local.dtype)
        spec = DTensorSpec(meshes[key], tuple(map(_make_placement, placements)), tensor_meta=meta)
        leaf = DTensor(local, spec, requires_grad=requires_grad and not is_parameter)  # type: ignore[no-untyped-call]
        return torch.nn.Parameter(leaf, requires_grad=requires_grad) if is_parameter else leaf


def mesh_key(mesh: DeviceMesh) -> MeshKey:
    """What describes a mesh, comparable across processes."""
    ranks, names = mesh.mesh, mesh.mesh_dim_names
    return mesh.device_type, tuple(ranks.shape), tuple(ranks.flatten().tolist()), tuple(names) if names else None


def meshes_of(leaves: Sequence[object]) -> Meshes:
    """The meshes that the template's DTensors live on: new leaves are rebuilt on them."""
    return {mesh_key(leaf.device_mesh): leaf.device_mesh for leaf in leaves if isinstance(leaf, DTensor)}


def _describe_placement(placement: Placement) -> tuple[Any, ...]:
    if isinstance(placement, _StridedShard):
        return "strided shard", placement.dim, placement.split_factor
    if isinstance(placement, Shard):
        return "shard", placement.dim
    if isinstance(placement, Replicate):
        return ("replicate",)
    if isinstance(placement, Partial):
        return "partial", placement.reduce_op
    raise ValueError(f"a DTensor with placement {placement!r} cannot travel yet")


def _make_placement(description: Sequence[Any]) -> Placement:
    match description:
        case ("strided shard", int(dim), int(split_factor)):
            return _StridedShard(dim, split_factor=split_factor)
        case ("shard", int(dim)):
            return Shard(dim)
        case ("partial", str(reduce_op)):
            return Partial(reduce_op)
        case ("replicate",):
            return Replicate()
    raise ValueError(f"unknown placement {description!r}")


# --------------------------------------------------------------------------------------------- checks


def _a(cls: type) -> Callable[[Any], Any]:
    """A check that a value is of exactly this type; gives the value."""

    def check(value: Any) -> Any:
        if type(value) is not cls:
            raise TypeError(f"expected {cls.__name__}, got {value!r}")
        return value

    return check


def _sizes(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or any(type(value) is not int or not 0 <= value < 1 << 62 for value in values):
        raise ValueError(f"expected sizes, got {values!r}")
    return values


def _check_grad(dtype: torch.dtype, requires_grad: bool) -> None:
    if requires_grad and not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"a tensor of {dtype} requires grad")


class ShardedTensorKind(Kind):
    """``ShardedTensor``: all local shards travel.

    Context: (global size, dtype, requires grad, pin memory, all shards, which of them are local), a shard
    being (offsets, sizes, placement).
    """

    name = "sharded"
    is_tried = True

    def inner(self, leaf: ShardedTensor) -> tuple[torch.Tensor, ...]:
        return tuple(shard.tensor for shard in leaf.local_shards())

    def context(self, leaf: ShardedTensor) -> Any:
        metadata = leaf.metadata()
        properties = metadata.tensor_properties
        return (
            tuple(metadata.size),
            dtype_name(properties.dtype),
            properties.requires_grad,
            properties.pin_memory,
            tuple(_describe_shard(shard) for shard in metadata.shards_metadata),
            tuple(_describe_shard(shard.metadata) for shard in leaf.local_shards()),
        )

    def check(self, dtypes: Sequence[torch.dtype], context: Any) -> None:
        size, dtype, requires_grad, pin_memory, shards, local = context
        _a(bool)(pin_memory)
        if any(dtype_name(found) != dtype for found in dtypes):
            raise ValueError(f"a ShardedTensor of {dtype} with shards of {dtypes}")
        _check_grad(DTYPES[dtype], _a(bool)(requires_grad))
        if len(local) != len(dtypes) or not shards:
            raise ValueError(f"a ShardedTensor of {len(shards)} shards, {len(local)} of them local, with {len(dtypes)}")
        for offsets, sizes, placement in (*shards, *local):
            if not len(_sizes(offsets)) == len(_sizes(sizes)) == len(_sizes(size)):
                raise ValueError(f"a shard at {offsets} of {sizes} in {size}")
            _make_shard(offsets, sizes, _a(str)(placement))

    def disagreement(self, context: Any, template: ShardedTensor) -> str:
        mine = self.context(template)
        expected, got = (
            f"global size {c[0]} with local shards at {[shard[:2] for shard in c[5]]}" for c in (mine, context)
        )
        return "" if expected == got else f"expected ShardedTensor of {expected}, source has {got}"

    def rebuild(self, tensors: Sequence[torch.Tensor], context: Any, meshes: Meshes) -> Any:
        size, dtype, requires_grad, pin_memory, shards, local = context
        properties = TensorProperties(DTYPES[dtype], torch.strided, requires_grad, pin_memory=pin_memory)
        metadata = ShardedTensorMetadata([_make_shard(*shard) for shard in shards], torch.Size(size), properties)
        rank = torch.distributed.get_rank()
        local_shards = [
            # The bytes live on this rank now, wherever they came from.
            LocalShard(tensor, _make_shard(offsets, sizes, f"rank:{rank}/{tensor.device}"))
            for tensor, (offsets, sizes, _) in zip(tensors, local, strict=True)
        ]
        return ShardedTensor._init_from_local_shards_and_global_metadata(local_shards, metadata)


def _describe_shard(shard: ShardMetadata) -> tuple[Any, ...]:
    return tuple(shard.shard_offsets), tuple(shard.shard_sizes), str(shard.placement)


def _make_shard(offsets: Sequence[int], sizes: Sequence[int], placement: str) -> ShardMetadata:
    return ShardMetadata(list(offsets), list(sizes), placement)


KINDS: dict[str, Kind] = {kind.name: kind for kind in (PlainTensor(), DTensorKind(), ShardedTensorKind())}
_BY_TYPE: dict[type, Kind] = {
    torch.Tensor: KINDS["tensor"],
    torch.nn.Parameter: KINDS["tensor"],
    DTensor: KINDS["dtensor"],
    ShardedTensor: KINDS["sharded"],
}


def kind_of(leaf: object) -> Kind | None:
    """The kind of a leaf, None for a plain value.

    Raises:
        ValueError: A tensor of a class that no kind claims.
    """
    kind = _BY_TYPE.get(type(leaf))
    if kind is not None or not isinstance(leaf, torch.Tensor):
        return kind
    for cls in (DTensor, ShardedTensor):
        if isinstance(leaf, cls):
            return _BY_TYPE[cls]
    raise ValueError(f"a tensor of class {type(leaf).__qualname__} cannot travel yet")
