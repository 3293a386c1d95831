"""DTensors and ShardedTensors: their local shards travel, their mesh is the receiver's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import signature
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import noise, raw_bytes, succeed, transfer
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ft_transport._state.kinds.base import KINDS, Surroundings, flatten_leaf, kind_of
from ft_transport._state.kinds.distributed import mesh_key, meshes_of
from state.kinds.leaves import over_the_wire, there_and_back

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*ShardedTensor.*")


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield DeviceMesh("cpu", [0], mesh_dim_names=("replicate",))
    finally:
        dist.destroy_process_group()


def dtensor(mesh: DeviceMesh, seed: int, placement: Any = None, shape: tuple[int, ...] = (4, 6)) -> DTensor:
    return DTensor.from_local(noise(shape, seed), mesh, [placement or Shard(0)], run_check=False)


def sharded(seed: int) -> ShardedTensor:
    local = LocalShard.from_tensor_and_offsets(noise((3, 4), seed), [0, 0], 0)
    return ShardedTensor._init_from_local_shards([local], 3, 4)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate(), Partial(), Partial("max")])
@pytest.mark.parametrize("wrap", [False, True], ids=["tensor", "parameter"])
def test_dtensors_come_back_on_the_receivers_mesh(mesh: DeviceMesh, placement: Any, wrap: bool) -> None:
    leaf: Any = dtensor(mesh, 1, placement)
    if wrap:
        leaf = torch.nn.Parameter(leaf)
    assert kind_of(leaf) is KINDS["dtensor"]
    again = there_and_back(leaf, Surroundings(meshes_of([leaf])))
    assert type(again) is type(leaf) or isinstance(again, torch.nn.Parameter) == wrap
    assert again.placements == leaf.placements
    assert again.shape == leaf.shape
    assert again.stride() == leaf.stride()
    assert again.device_mesh is mesh
    assert again.requires_grad == leaf.requires_grad
    assert raw_bytes(again._local_tensor) == raw_bytes(leaf._local_tensor)


def test_a_mesh_that_the_receiver_lacks_is_made_without_groups(mesh: DeviceMesh) -> None:
    other = DeviceMesh("cpu", [[0]], mesh_dim_names=("a", "b"), _init_backend=False)
    leaf = DTensor.from_local(noise((4, 6), 1), other, [Shard(0), Replicate()], run_check=False)
    again = there_and_back(leaf, Surroundings({}))
    assert mesh_key(again.device_mesh) == mesh_key(other)
    assert again.device_mesh is not other


@pytest.mark.skipif("preserve_rank_order" not in signature(DeviceMesh).parameters, reason="torch is older than 2.15")
def test_a_mesh_whose_groups_keep_the_order_of_ranks_is_another_one(mesh: DeviceMesh) -> None:
    keeping = DeviceMesh("cpu", [0], mesh_dim_names=("replicate",), preserve_rank_order=True, _init_backend=False)
    assert keeping != mesh
    again = there_and_back(dtensor(keeping, 1), Surroundings(meshes_of([dtensor(mesh, 1)])))
    assert again.device_mesh == keeping
    assert again.device_mesh is not keeping


def test_an_older_torch_keeps_it_beside_the_mesh(mesh: DeviceMesh) -> None:
    other = DeviceMesh("cpu", [0], mesh_dim_names=("replicate",), _init_backend=False)
    plain = mesh_key(other)
    other._preserve_rank_order = True
    assert mesh_key(other) == (*plain, True)
    again = there_and_back(dtensor(other, 1), Surroundings(meshes_of([dtensor(mesh, 1)])))
    assert mesh_key(again.device_mesh) == mesh_key(other)


@pytest.mark.parametrize("more", [[False], [1], ["True"], [True, True]])
def test_what_else_is_said_of_a_mesh_is_refused(mesh: DeviceMesh, more: list[Any]) -> None:
    kind, (part, inner) = KINDS["dtensor"], flatten_leaf(dtensor(mesh, 1))
    key, *rest = part.context
    with pytest.raises(ValueError, match="a mesh of shape"):
        kind.check([None] * len(inner), ((*key, *more), *rest))


def test_while_another_thread_imports_dtensor_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does with the first optimizer; a module that is being imported is listed before it has its classes."""
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", ModuleType("torch.distributed.tensor"))
    leaf = torch.ones(2, 2).to_sparse()
    assert kind_of(leaf) is KINDS["sparse"]
    assert meshes_of([leaf, torch.ones(1), 3]) == {}


def test_dtensors_that_disagree_say_how(mesh: DeviceMesh) -> None:
    kind, (mine, _) = KINDS["dtensor"], flatten_leaf(dtensor(mesh, 1))
    assert kind.disagreement(over_the_wire(flatten_leaf(dtensor(mesh, 2))[0].context), mine.context) == ""
    for other in (dtensor(mesh, 2, Replicate()), dtensor(mesh, 2, shape=(5, 6)), dtensor(mesh, 2, Shard(1))):
        reason = kind.disagreement(over_the_wire(flatten_leaf(other)[0].context), mine.context)
        assert reason.startswith("expected DTensor of global shape")
        assert "source has" in reason


def test_dtensors_through_a_transfer(mesh: DeviceMesh) -> None:
    def make(seed: int) -> dict[str, Any]:
        return {"d": dtensor(mesh, seed), "p": torch.nn.Parameter(dtensor(mesh, seed + 1, Replicate()))}

    state, template = make(1), make(5)
    for receiver in (None, lambda: template):
        ends = succeed(state, receiver)
        result = ends.destination.result
        for name, leaf in state.items():
            assert isinstance(result[name], DTensor)
            assert result[name].placements == leaf.placements
            assert raw_bytes(result[name]._local_tensor) == raw_bytes(leaf._local_tensor)
    assert all(result[name] is template[name] for name in state)
    assert ends.destination.report.in_place_share == 1.0


def test_a_dtensor_and_a_tensor_disagree(mesh: DeviceMesh) -> None:
    ends = transfer({"a": dtensor(mesh, 1)}, lambda: {"a": noise((4, 6), 2)})
    assert "a: expected tensor float32 (4, 6), source has dtensor of float32 (4, 6)" in ends.source.text
    ends = transfer({"a": noise((4, 6), 1)}, lambda: {"a": dtensor(mesh, 2)})
    assert "a: expected dtensor of float32 (4, 6), source has tensor float32 (4, 6)" in ends.source.text


def test_sharded_tensors_come_back(mesh: DeviceMesh) -> None:
    leaf = sharded(1)
    assert kind_of(leaf) is KINDS["sharded"]
    again = there_and_back(leaf)
    assert isinstance(again, ShardedTensor)
    assert again.size() == leaf.size()
    assert raw_bytes(again.local_shards()[0].tensor) == raw_bytes(leaf.local_shards()[0].tensor)
    assert flatten_leaf(again)[0] == flatten_leaf(leaf)[0]


def test_sharded_tensors_through_a_transfer(mesh: DeviceMesh) -> None:
    state, template = {"s": sharded(1)}, {"s": sharded(2)}
    expected = raw_bytes(state["s"].local_shards()[0].tensor)
    assert raw_bytes(succeed(state).destination.result["s"].local_shards()[0].tensor) == expected
    ends = succeed(state, lambda: {**template, "other": noise(1, 1)})
    assert ends.destination.result["s"] is template["s"]
    assert raw_bytes(template["s"].local_shards()[0].tensor) == expected
    assert ends.destination.report.in_place_share == 1.0
