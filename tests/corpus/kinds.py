"""Kinds of tensor beyond the plain strided one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import noise
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

from corpus.case import Table

__all__ = ["CASES", "Named", "Scaled", "dtensor", "mesh", "sharded"]

CASES = Table("kinds")


def _values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers that are none of zero, nan or infinite."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


# -------------------------------------------------------------------------------------------- sparse


def _mask(shape: tuple[int, ...]) -> torch.Tensor:
    # The same for every seed: as many entries in the source's as in the template's.
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) > 0.6


@CASES.case()
def coo(seed: int) -> Any:
    return {"sparse": (_values((5, 6), seed) * _mask((5, 6))).to_sparse(), "dense": noise(3, seed)}


@CASES.case()
def coo_not_coalesced(seed: int) -> Any:
    indices = torch.tensor([[0, 2, 0, 1], [1, 1, 1, 0]])
    return {"sparse": torch.sparse_coo_tensor(indices, noise(4, seed), (3, 2), check_invariants=True)}


@CASES.case()
def coo_with_dense_dimensions(seed: int) -> Any:
    return {
        "sparse": torch.sparse_coo_tensor(torch.tensor([[0, 3, 1]]), noise((3, 4), seed), (5, 4), check_invariants=True)
    }


@CASES.case()
def coo_empty(seed: int) -> Any:
    return {"sparse": torch.sparse_coo_tensor(size=(3, 4), check_invariants=True), "dense": noise(2, seed)}


@CASES.case()
def coo_of_another_dtype(seed: int) -> Any:
    values = noise(3, seed, torch.complex64)
    return {
        "sparse": torch.sparse_coo_tensor(
            torch.tensor([[0, 3, 1]]), values, (5,), is_coalesced=False, check_invariants=True
        )
    }


@CASES.case()
def coo_with_more_entries_than_the_template(seed: int) -> Any:
    count = 3 if seed == 1 else 2
    return {
        "sparse": torch.sparse_coo_tensor(torch.arange(count)[None], noise(count, seed), (5,), check_invariants=True),
        "n": noise(2, seed),
    }


@CASES.case()
def coo_parameter(seed: int) -> Any:
    return {"sparse": torch.nn.Parameter((_values((4, 4), seed) * _mask((4, 4))).to_sparse())}


_COMPRESSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "csr": lambda t: t.to_sparse_csr(),
    "csc": lambda t: t.to_sparse_csc(),
    "bsr": lambda t: t.to_sparse_bsr((2, 3)),
    "bsc": lambda t: t.to_sparse_bsc((2, 3)),
}


def _compressed(make: Callable[[torch.Tensor], torch.Tensor], seed: int) -> Any:
    return {"sparse": make(_values((6, 6), seed) * _mask((6, 6))), "dense": noise(3, seed)}


def _batched(make: Callable[[torch.Tensor], torch.Tensor], seed: int) -> Any:
    return {"sparse": make(_values((2, 4, 6), seed))}


for _name, _make in _COMPRESSED.items():
    CASES.add(_name, functools.partial(_compressed, _make))
    CASES.add(f"{_name} batched", functools.partial(_batched, _make))


@CASES.case()
def csr_of_int32(seed: int) -> Any:
    crow, col = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 1, 1], dtype=torch.int32)
    return {"sparse": torch.sparse_csr_tensor(crow, col, noise(3, seed, torch.float64), (2, 2), check_invariants=True)}


@CASES.case()
def one_sparse_twice(seed: int) -> Any:
    sparse = (_values((4, 4), seed) * _mask((4, 4))).to_sparse()
    return {"a": sparse, "b": sparse}


# ---------------------------------------------------------------------------------- nested, quantized


@CASES.case()
def jagged(seed: int) -> Any:
    rows = [_values((2, 3), seed), _values((4, 3), seed + 1), _values((1, 3), seed + 2)]
    return {"nested": torch.nested.nested_tensor(rows, layout=torch.jagged), "dense": noise(2, seed)}


@CASES.case()
def jagged_from_tied_values(seed: int) -> Any:
    values, offsets = noise((7, 3), seed), torch.tensor([0, 2, 6, 7])
    return {"nested": torch.nested.nested_tensor_from_jagged(values, offsets), "values": values, "offsets": offsets}


@CASES.case()
def jagged_with_holes(seed: int) -> Any:
    values, offsets, lengths = noise((9, 2), seed), torch.tensor([0, 3, 7, 9]), torch.tensor([2, 3, 1])
    return {"nested": torch.nested.nested_tensor_from_jagged(values, offsets, lengths)}


@CASES.case()
def jagged_that_requires_grad(seed: int) -> Any:
    rows = [_values((2, 3), seed), _values((4, 3), seed + 1)]
    return {"nested": torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)}


@CASES.case(either=True)
def nested_of_the_old_layout(seed: int) -> Any:
    return {"nested": torch.nested.nested_tensor([noise((2, 3), seed), noise((4, 3), seed + 1)]), "n": noise(2, seed)}


@CASES.case()
def one_quantized_twice(seed: int) -> Any:
    quantized = torch.quantize_per_tensor(_values((3, 4), seed), 0.1, 3, torch.quint8)
    return {"a": quantized, "b": quantized, "dense": noise(2, seed)}


# ---------------------------------------------------------------------------------------- meta, lazy


@CASES.case(varies=False)
def meta(seed: int) -> Any:
    return {
        "tensor": torch.empty((1 << 20, 1 << 10), device="meta"),
        "strided": torch.empty((4, 6), device="meta", dtype=torch.int8).t(),
        "parameter": torch.nn.Parameter(torch.empty(3, device="meta")),
        "scalar": torch.empty((), device="meta"),
    }


@CASES.case()
def meta_beside_plain(seed: int) -> Any:
    return {"meta": torch.empty(5, device="meta"), "plain": noise(5, seed)}


@CASES.case(either=True)
def uninitialized_parameter(seed: int) -> Any:
    return {"weight": torch.nn.UninitializedParameter(), "plain": noise(2, seed)}


# ----------------------------------------------------------------------------------------- subclasses


class Scaled(torch.Tensor):
    """A traceable wrapper subclass: bytes and what they are multiplied with."""

    data8: torch.Tensor
    scale: torch.Tensor
    block: int

    @staticmethod
    def __new__(cls, data8: torch.Tensor, scale: torch.Tensor, block: int) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, data8.shape, dtype=torch.float32, device=data8.device
        )

    def __init__(self, data8: torch.Tensor, scale: torch.Tensor, block: int) -> None:
        self.data8, self.scale, self.block = data8, scale, block

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data8", "scale"], {"block": self.block}

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["data8"], inner["scale"], context["block"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            (found,) = args
            return Scaled(found.data8.detach(), found.scale.detach(), found.block)
        raise NotImplementedError(f"{func} of a Scaled")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Scaled({tuple(self.shape)})"


class Named(torch.Tensor):
    """A subclass that only adds an attribute."""

    origin: str


def _scaled(seed: int) -> Scaled:
    return Scaled(noise((4, 6), seed, torch.int8), noise(4, seed + 1), 6)


@CASES.case(allow=[Scaled])
def wrapper_subclass(seed: int) -> Any:
    return {"scaled": _scaled(seed), "plain": noise(3, seed)}


@CASES.case(allow=[Scaled])
def wrapper_subclass_in_a_parameter(seed: int) -> Any:
    return {"scaled": torch.nn.Parameter(_scaled(seed), requires_grad=False)}


@CASES.case(allow=[Scaled])
def one_wrapper_subclass_twice(seed: int) -> Any:
    scaled = _scaled(seed)
    return {"a": scaled, "b": scaled}


@CASES.case(allow=[Scaled])
def wrapper_subclass_with_tied_parts(seed: int) -> Any:
    scale = noise((2, 4), seed + 1)
    a, b = (Scaled(noise((4, 6), seed + i, torch.int8), scale[i], 6) for i in range(2))
    return {"a": a, "b": b, "scale": scale}


@CASES.case(allow=[Scaled])
def wrapper_subclass_in_a_wrapper_subclass(seed: int) -> Any:
    return {"outer": Scaled(_scaled(seed), noise(2, seed + 5), 3)}


@CASES.case(allow=[Named], either=True)
def plain_subclass(seed: int) -> Any:
    named = noise((2, 3), seed).as_subclass(Named)
    named.origin = f"n{seed}"
    return {"named": named, "plain": noise(2, seed)}


def _torchao(config: Callable[[Any], Any], seed: int) -> Any:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 32)).to(torch.bfloat16)
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(_values(tuple(parameter.shape), seed + i))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an older torchao's, of the next version of its layout
        quantization.quantize_(model, config(quantization))
    return model.state_dict()


CASES.add("torchao int8 weights", functools.partial(_torchao, lambda q: q.Int8WeightOnlyConfig()))
CASES.add(
    "torchao int8 weights and activations",
    functools.partial(_torchao, lambda q: q.Int8DynamicActivationInt8WeightConfig()),
)


# ------------------------------------------------------------------------------------------- DTensor


@functools.cache
def mesh(shape: tuple[int, ...] = (1,), names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh without groups, in which this process is rank 0."""
    ranks = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return DeviceMesh("cpu", ranks, mesh_dim_names=names, _init_backend=False)


def dtensor(
    local: torch.Tensor, on: DeviceMesh, placements: tuple[Placement, ...], shape: tuple[int, ...], grad: bool = False
) -> DTensor:
    """A DTensor of this local tensor, whatever the other ranks have."""
    stride = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(on, placements, tensor_meta=TensorMeta(torch.Size(shape), stride, local.dtype))
    return DTensor(local, spec, requires_grad=grad)  # type: ignore[no-untyped-call]


_PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...], tuple[int, ...], tuple[int, ...]]] = {
    # Shape of the mesh, placements, local shape, global shape.
    "shard": ((1,), (Shard(0),), (4, 6), (4, 6)),
    "shard of the second dimension": ((2,), (Shard(1),), (4, 3), (4, 6)),
    "shard of the last dimension": ((2,), (Shard(2),), (2, 4, 3), (2, 4, 6)),
    "replicate": ((2,), (Replicate(),), (4, 6), (4, 6)),
    "partial": ((2,), (Partial(),), (4, 6), (4, 6)),
    "partial maximum": ((2,), (Partial("max"),), (4, 6), (4, 6)),
    "uneven shard": ((3,), (Shard(0),), (3, 2), (7, 2)),
    "empty shard": ((4,), (Shard(0),), (0, 3), (0, 3)),
    "shard and replicate": ((2, 2), (Shard(0), Replicate()), (3, 4), (5, 4)),
    "shard twice": ((2, 2), (Shard(0), Shard(1)), (3, 2), (5, 4)),
    "shard of a shard": ((2, 2), (Shard(0), Shard(0)), (2, 4), (5, 4)),
    "strided shard": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0)), (2, 4), (8, 4)),
    "partial and shard": ((2, 2), (Partial("avg"), Shard(1)), (5, 2), (5, 4)),
    "3d mesh": ((2, 1, 2), (Shard(0), Replicate(), Partial()), (3, 4), (6, 4)),
    "scalar": ((2,), (Replicate(),), (), ()),
}


def _distributed(spec: Any, seed: int) -> Any:
    mesh_shape, placements, local, shape = spec
    return {"dtensor": dtensor(noise(local, seed), mesh(mesh_shape), placements, shape), "plain": noise(3, seed)}


for _name, _spec in _PLACEMENTS.items():
    CASES.add(f"dtensor {_name}", functools.partial(_distributed, _spec), varies=True)


@CASES.case()
def dtensor_on_a_mesh_with_names(seed: int) -> Any:
    on = mesh((2, 2), ("replicate", "shard"))
    return {"w": dtensor(noise((3, 4), seed), on, (Replicate(), Shard(0)), (6, 4))}


@CASES.case()
def dtensor_parameter(seed: int) -> Any:
    local = noise((4, 6), seed)
    return {
        "weight": torch.nn.Parameter(dtensor(local, mesh((2,)), (Shard(0),), (8, 6))),
        "frozen": torch.nn.Parameter(dtensor(local[:2], mesh((2,)), (Shard(0),), (4, 6)), requires_grad=False),
    }


@CASES.case()
def dtensor_that_requires_grad(seed: int) -> Any:
    return {"t": dtensor(noise((4, 6), seed), mesh((2,)), (Shard(0),), (8, 6), grad=True)}


@CASES.case()
def one_dtensor_twice(seed: int) -> Any:
    weight = torch.nn.Parameter(dtensor(noise((4, 6), seed), mesh((2,)), (Shard(0),), (8, 6)))
    return {"a": weight, "b": weight, "deep": [weight]}


@CASES.case(torch_keeps=False)
def dtensors_of_one_flat_buffer(seed: int) -> Any:
    flat = noise(40, seed)
    a = dtensor(flat[:24].view(4, 6), mesh((2,)), (Shard(0),), (8, 6))
    return {"a": a, "b": dtensor(flat[24:], mesh((2,)), (Shard(0),), (32,)), "flat": flat}


@CASES.case(torch_keeps=False)
def dtensor_with_strided_local(seed: int) -> Any:
    return {"t": dtensor(noise((4, 9), seed)[:, 2:5], mesh((2,)), (Shard(0),), (8, 3))}


@CASES.case(allow=[Scaled])
def dtensor_of_a_wrapper_subclass(seed: int) -> Any:
    return {"t": dtensor(_scaled(seed), mesh((2,)), (Shard(0),), (8, 6))}


@CASES.case()
def dtensor_of_bfloat16(seed: int) -> Any:
    return {"t": dtensor(noise((4, 6), seed, torch.bfloat16), mesh((2,)), (Shard(0),), (8, 6))}


# ------------------------------------------------------------------------------------- ShardedTensor


def sharded(
    tensors: list[torch.Tensor], offsets: list[list[int]], shape: tuple[int, ...], others: int = 0
) -> ShardedTensor:
    """A ShardedTensor with these local shards, and ``others`` more rows of two that another rank has."""
    shards = [
        LocalShard(tensor, ShardMetadata(offset, list(tensor.shape), "rank:0/cpu"))
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]
    if not others:
        return sharded_tensor.init_from_local_shards(shards, shape)
    away = [ShardMetadata([shape[0] - others, 0], [others, *shape[1:]], "rank:1/cpu")]
    everything = [*(shard.metadata for shard in shards), *away]
    properties = TensorProperties(dtype=tensors[0].dtype)
    metadata = ShardedTensorMetadata(everything, torch.Size(shape), properties)
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)


@CASES.case()
def sharded_tensor_of_one_shard(seed: int) -> Any:
    return {"sharded": sharded([noise((3, 4), seed)], [[0, 0]], (3, 4)), "plain": noise(2, seed)}


@CASES.case()
def sharded_tensor_of_several_shards(seed: int) -> Any:
    pieces = [noise((rows, 4), seed + rows) for rows in (1, 2, 3)]
    return {"sharded": sharded(pieces, [[0, 0], [1, 0], [3, 0]], (6, 4))}


@CASES.case()
def sharded_tensor_of_a_grid(seed: int) -> Any:
    pieces = [noise((2, 3), seed + i) for i in range(4)]
    return {"sharded": sharded(pieces, [[0, 0], [0, 3], [2, 0], [2, 3]], (4, 6))}


@CASES.case()
def one_sharded_tensor_twice(seed: int) -> Any:
    tensor = sharded([noise((3, 4), seed)], [[0, 0]], (3, 4))
    return {"a": tensor, "b": tensor}


@CASES.case()
def sharded_tensor_tied_to_a_plain_one(seed: int) -> Any:
    flat = noise((5, 4), seed)
    return {"flat": flat, "sharded": sharded([flat[:2], flat[2:]], [[0, 0], [2, 0]], (5, 4))}
