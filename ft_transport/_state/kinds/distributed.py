"""The kinds of leaf of ``torch.distributed``: DTensor and ShardedTensor. What a rank holds of them travels.

Strategy: the local tensor travels, and what places it: mesh and placements are described by numbers and names, never by
the objects, since process groups mean nothing to another process. The receiver puts it onto its own mesh.

Both come with modules of torch that take a second and more to import. So these are imported by whoever has such a leaf,
or is sent one, and not by this file. One who is sent one and has none pays for it before the first byte; a process that
trains has DTensor's anyway, since torch imports it with the first optimizer that is made.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch

from ft_transport._state.classes import dtype_name, dtype_of, expect, if_imported
from ft_transport._state.geometry import Geometry
from ft_transport._state.kinds.base import Kind, Surroundings, check_grad
from ft_transport._state.kinds.python import KeepsAttributes, sizes

__all__ = ["DTensorKind", "Meshes", "ShardedTensorKind", "mesh_key", "meshes_of"]

if TYPE_CHECKING:
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

# A mesh by what describes it: device type, shape, ranks, names of the dimensions; and True where its groups keep the
# order of their ranks, which torch before 2.15 does not know.
MeshKey = tuple[Any, ...]
Meshes = dict[MeshKey, "DeviceMesh"]

_DTENSOR = ("torch.distributed.tensor", "DTensor")


class DTensorKind(KeepsAttributes):
    """``torch.distributed.tensor.DTensor``: the local tensor travels, the mesh is the receiver's own.

    Context: (mesh, placements, global shape, global stride, requires grad, is parameter), and, where it is not what the
    placements alone say, the order of shards: (whether strided shards stand for it, ((dim, dims of the mesh), …) or
    None).
    """

    name = "dtensor"
    not_compared = (3, 4, 5)
    is_tried = True
    late_types = (_DTENSOR,)

    def claims(self, leaf: torch.Tensor) -> bool:
        cls = _dtensor()
        return cls is not None and isinstance(leaf, cls)

    def flatten_bare(self, leaf: DTensor) -> tuple[Sequence[Any], Any]:
        return [leaf._local_tensor], (
            mesh_key(leaf.device_mesh),
            tuple(_describe_placement(placement) for placement in leaf.placements),
            tuple(leaf.shape),
            tuple(leaf.stride()),
            leaf.requires_grad,
            isinstance(leaf, torch.nn.Parameter),
            *_describe_order(leaf._spec),
        )

    def check_bare(self, inner: Sequence[Geometry | None], context: Any) -> None:
        key, placements, shape, stride, requires_grad, is_parameter, *order = context
        device_type, mesh_shape, ranks, names, *keeps_order = key
        expect(bool, is_parameter)
        expect(bool, requires_grad)
        if len(inner) != 1:
            raise ValueError(f"{len(inner)} local tensors")
        if inner[0] is not None:
            check_grad(inner[0].dtype, requires_grad)
        # Made, to see that it can be; torch has the list of device types.
        torch.device(expect(str, device_type))
        # More dimensions than torch allows a tensor no mesh needs.
        if not len(mesh_shape) == len(placements) <= 64:
            raise ValueError(f"a mesh of shape {mesh_shape} with placements {placements}")
        if math.prod(sizes(mesh_shape)) != len(sizes(ranks)) or len(set(ranks)) != len(ranks) or not ranks:
            raise ValueError(f"a mesh of shape {mesh_shape} with ranks {str(ranks)[:80]}")
        if names is not None and len([expect(str, name) for name in names]) != len(mesh_shape):
            raise ValueError(f"a mesh of shape {mesh_shape} with names {names}")
        if keeps_order and not (len(keeps_order) == 1 and keeps_order[0] is True):
            raise ValueError(f"a mesh of shape {mesh_shape} with {keeps_order!r:.80}")
        for placement in placements:
            _make_placement(placement)
        if len(sizes(shape)) != len(sizes(stride)):
            raise ValueError(f"a global shape {shape} with strides {stride}")
        _check_order(order, placements, len(shape))

    def disagreement(self, context: Any, mine: Any) -> str:
        expected, got = (f"global shape {c[2]} with placements {c[1]}{_order_in(c)}" for c in (mine, context))
        return "" if expected == got else f"expected DTensor of {expected}, source has {got}"

    def unflatten_bare(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        (local,) = inner
        key, placements, shape, stride, requires_grad, is_parameter, *order = context
        meta = TensorMeta(torch.Size(shape), tuple(stride), local.dtype)
        how = _make_order(*order)
        spec = DTensorSpec(_mesh_like(key, here.meshes), tuple(map(_make_placement, placements)), meta, **how)
        leaf = DTensor(local, spec, requires_grad=requires_grad and not is_parameter)  # type: ignore[no-untyped-call]
        return torch.nn.Parameter(leaf, requires_grad=requires_grad) if is_parameter else leaf

    def refresh(self, mine: Any, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        return self.with_attributes(mine, inner, context, here)  # on the receiver's own mesh


def _mesh_like(key: MeshKey, meshes: Meshes) -> DeviceMesh:
    """The receiver's mesh for a DTensor that the template lacks: the template's of the same ranks,
    or of the same form, the process's own, or a new one without groups."""
    # In this order: the very mesh that the template has; one that differs in its ranks alone (the other replica's group
    # of the same form), if there is no choice; one that this process has made for itself; and at last a mesh without
    # groups, on which one can compute nothing, but from which the local tensor can be taken.
    if key not in meshes:
        alike = [mesh for other, mesh in meshes.items() if (*other[:2], *other[3:]) == (*key[:2], *key[3:])]
        meshes[key] = alike[0] if len(alike) == 1 else _own_mesh(key) or _new_mesh(key)
    return meshes[key]


def _own_mesh(key: MeshKey) -> DeviceMesh | None:
    """A mesh that this process has anyway, with these ranks and with groups: nobody else needs to be asked for it."""
    import torch.distributed.distributed_c10d as c10d
    from torch.distributed.device_mesh import DeviceMesh

    # torch keeps no list of them. Of several the one whose groups were made first, which is so on every rank.
    created: dict[str, int] = {}
    if torch.distributed.is_initialized():
        created = {name: place for place, name in enumerate(c10d._world.pg_names.values())}
    found: list[tuple[list[int], DeviceMesh]] = []
    # Slow, some tens of milliseconds, and only for a DTensor that the template lacks. ``issubclass(type(...))``, since
    # ``isinstance`` would ask ``__class__`` of every lazy proxy in the process.
    for mesh in [each for each in gc.get_objects() if issubclass(type(each), DeviceMesh)]:
        try:
            if mesh_key(mesh) == key and mesh.get_coordinate() is not None:
                groups = [created[group.group_name] for group in mesh.get_all_groups()]
                found.append((groups, mesh))
        except Exception:  # one that is half made, or whose groups are gone
            continue
    return min(found, key=itemgetter(0))[1] if found else None


def _new_mesh(key: MeshKey) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    device_type, shape, ranks, names, *keeps_order = key
    mesh = DeviceMesh(
        device_type,
        torch.tensor(ranks, dtype=torch.int).reshape(shape),
        mesh_dim_names=names,
        # Groups would have to be created together with the other ranks of the mesh.
        _init_backend=False,
    )
    # Part of what makes two meshes equal. Not by the constructor: an older torch's has no such argument, and no groups
    # hang on it here.
    if keeps_order:
        mesh._preserve_rank_order = True  # type: ignore[attr-defined]
    return mesh


def mesh_key(mesh: DeviceMesh) -> MeshKey:
    """What describes a mesh, comparable across processes."""
    # Not the mesh's hash: that is kept and pickled, so equal meshes of two processes may differ in it (seen with torch
    # 2.13).
    ranks, names = mesh.mesh, mesh.mesh_dim_names
    key = mesh.device_type, tuple(ranks.shape), tuple(ranks.flatten().tolist()), tuple(names) if names else None
    return (*key, True) if getattr(mesh, "_preserve_rank_order", False) else key


def meshes_of(leaves: Sequence[object]) -> Meshes:
    """The meshes that the template's DTensors live on: new leaves are rebuilt on them."""
    cls = _dtensor()
    if cls is None:
        return {}
    return {mesh_key(leaf.device_mesh): leaf.device_mesh for leaf in leaves if isinstance(leaf, cls)}


def _dtensor() -> Any:
    return if_imported(*_DTENSOR)


def _norm_partial() -> Any:
    """torch's class of partial norms; None where torch has none: then none of its DTensors has one."""
    try:
        from torch.distributed.tensor._ops._math_ops import _NormPartial
    except ImportError:
        return None
    return _NormPartial


def _describe_placement(placement: Placement) -> tuple[Any, ...]:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    # Of exactly these classes: what one derived from them means, another would take for something else.
    cls = type(placement)
    if cls is _StridedShard:
        return "strided shard", placement.dim, placement.split_factor  # type: ignore[attr-defined]
    if cls is Shard:
        return "shard", placement.dim  # type: ignore[attr-defined]
    if cls is Replicate:
        return ("replicate",)
    if cls is Partial:
        return "partial", placement.reduce_op  # type: ignore[attr-defined]
    if cls is _norm_partial():
        return "norm partial", placement.norm_type  # type: ignore[attr-defined]
    raise ValueError(f"a DTensor with placement {placement!r} of class {cls.__qualname__} cannot travel")


def _make_placement(description: Sequence[Any]) -> Placement:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    match description:
        case ("strided shard", int(dim), int(split_factor)):
            return _StridedShard(dim, split_factor=split_factor)
        case ("shard", int(dim)):
            return Shard(dim)
        case ("partial", str(reduce_op)):
            return Partial(reduce_op)
        case ("norm partial", int(norm_type) | float(norm_type)) if norm_type:
            # By name: torch 2.9 has another one in the first place.
            made: Placement = _norm_partial()(norm_type=norm_type)
            return made
        case ("replicate",):
            return Replicate()
    raise ValueError(f"unknown placement {description!r}")


def _order(spec: DTensorSpec) -> tuple[Any, Any]:
    # Neither is known to the oldest torch that is supported.
    strided = getattr(spec, "use_strided_shard_as_shard_order", None)
    # The default order follows from the placements; only another one has to be told.
    order = None if strided else getattr(spec, "shard_order", None)
    return strided, order and tuple((entry.tensor_dim, tuple(entry.mesh_dims)) for entry in order)


def _describe_order(spec: DTensorSpec) -> tuple[Any, ...]:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    order = _order(spec)
    return () if order == _order(DTensorSpec(spec.mesh, spec.placements)) else (order,)


def _order_in(context: Any) -> str:
    orders = [more for more in context[6:] if len(more) == 2]
    return f" in the order {orders[0]}" if orders else ""


def _order_entry() -> Any:
    """torch's class of an entry in an order of shards; None of a version that knows no such order."""
    try:
        from torch.distributed.tensor._dtensor_spec import ShardOrderEntry
    except ImportError:
        return None
    return ShardOrderEntry


def _make_order(order: Any = None) -> dict[str, Any]:
    if order is None:
        return {}
    strided, entries = order
    made = entries and tuple(_order_entry()(dim, dims) for dim, dims in entries)
    return {"use_strided_shard_as_shard_order": strided, "shard_order": made}


def _check_order(order: Sequence[Any], placements: Sequence[Any], num_dims: int) -> None:
    """Whether an order names each dimension of the mesh that shards, once, with the dimension that it shards."""
    if not order:
        return
    ((strided, entries),) = order
    if _order_entry() is None:
        raise ValueError("an order of shards, which this version of torch does not know")
    if strided is not None:
        expect(bool, strided)
    named = [(expect(int, dim), expect(int, mesh_dim)) for dim, dims in entries or () for mesh_dim in dims]
    sharded = [(each[1] % max(num_dims, 1), place) for place, each in enumerate(placements) if "shard" in each[0]]
    if entries and sorted((place, dim) for dim, place in named) != sorted((place, dim) for dim, place in sharded):
        raise ValueError(f"an order of shards {entries!r} of placements {placements!r}")
    if strided and entries:
        raise ValueError("an order of shards beside strided shards that stand for one")


class ShardedTensorKind(Kind):
    """``ShardedTensor``: all local shards travel.

    Context: (global size, dtype, requires grad, pin memory, all shards, which of them are local), a shard
    being (offsets, sizes, placement).
    """

    name = "sharded"
    not_compared = (2, 3)
    is_tried = True
    late_types = (("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"),)
    claims_subclasses = True

    def flatten(self, leaf: ShardedTensor) -> tuple[Sequence[Any], Any]:
        metadata = leaf.metadata()
        properties = metadata.tensor_properties
        return [shard.tensor for shard in leaf.local_shards()], (
            tuple(metadata.size),
            dtype_name(properties.dtype),
            properties.requires_grad,
            properties.pin_memory,
            tuple(_describe_shard(shard) for shard in metadata.shards_metadata),
            tuple(_describe_shard(shard.metadata) for shard in leaf.local_shards()),
        )

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        size, dtype, requires_grad, pin_memory, shards, local = context
        expect(bool, pin_memory)
        if any(part is not None and part.dtype is not dtype_of(dtype) for part in inner):
            raise ValueError(f"a ShardedTensor of {dtype} with shards of {inner}")
        check_grad(dtype_of(dtype), requires_grad)
        if len(local) != len(inner) or not shards:
            raise ValueError(f"a ShardedTensor of {len(shards)} shards, {len(local)} of them local, with {len(inner)}")
        for offsets, lengths, placement in (*shards, *local):
            if not len(sizes(offsets)) == len(sizes(lengths)) == len(sizes(size)):
                raise ValueError(f"a shard at {offsets} of {lengths} in {size}")
            _make_shard(offsets, lengths, expect(str, placement))

    def disagreement(self, context: Any, mine: Any) -> str:
        expected, got = (
            f"global size {c[0]} with local shards at {[shard[:2] for shard in c[5]]}" for c in (mine, context)
        )
        return "" if expected == got else f"expected ShardedTensor of {expected}, source has {got}"

    def unflatten(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        from torch.distributed._shard.sharded_tensor.api import ShardedTensor
        from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
        from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard

        size, dtype, requires_grad, pin_memory, shards, local = context
        properties = TensorProperties(dtype_of(dtype), torch.strided, requires_grad, pin_memory=pin_memory)
        metadata = ShardedTensorMetadata([_make_shard(*shard) for shard in shards], torch.Size(size), properties)
        rank = torch.distributed.get_rank()
        local_shards = [
            # The bytes live on this rank now, wherever they came from.
            # A placement is ``rank:N/device``. The source's rank means nothing here.
            LocalShard(tensor, _make_shard(offsets, lengths, f"rank:{rank}/{tensor.device}"))
            for tensor, (offsets, lengths, _) in zip(inner, local, strict=True)
        ]
        return ShardedTensor._init_from_local_shards_and_global_metadata(local_shards, metadata)

    def refresh(self, mine: Any, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        return mine


def _describe_shard(shard: ShardMetadata) -> tuple[Any, ...]:
    return tuple(shard.shard_offsets), tuple(shard.shard_sizes), str(shard.placement)


def _make_shard(offsets: Sequence[int], sizes: Sequence[int], placement: str) -> ShardMetadata:
    from torch.distributed._shard.metadata import ShardMetadata

    return ShardMetadata(list(offsets), list(sizes), placement)
