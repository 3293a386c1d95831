"""Kinds of leaf: taken apart, described, compared, and put together again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import torch
import torch.distributed as dist
from helpers import difference, noise, raw_bytes, succeed, transfer
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ft_transport._options import Options
from ft_transport._state.classes import dtype_name
from ft_transport._state.geometry import geometry_of
from ft_transport._state.kinds.base import (
    KINDS,
    PLAIN,
    Kind,
    Part,
    Surroundings,
    check_parts,
    flatten_leaf,
    kind_of,
    plain,
    register_kind,
    unflatten_leaf,
)
from ft_transport._state.kinds.distributed import mesh_key, meshes_of
from ft_transport._state.values import decode_value, encode_value
from ft_transport.errors import LocalProtocolError

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


def over_the_wire(context: Any) -> Any:
    packed = msgpack.packb(encode_value(context), unicode_errors="surrogatepass")
    return decode_value(msgpack.unpackb(packed, use_list=False, unicode_errors="surrogatepass"))


def there_and_back(leaf: Any, here: Surroundings | None = None) -> Any:
    """Taken apart, described over the wire, checked, and put together from copies of the tensors."""
    part, tensors = flatten_leaf(leaf)
    again = Part(part.kind, over_the_wire(part.context), _over_the_wire(part.parts))
    assert again == part
    check_parts(again, iter([geometry_of(tensor) for tensor in tensors]))
    makers = [functools.partial(plain, tensor.detach().clone()) for tensor in tensors]
    return unflatten_leaf(again, iter(makers), here or Surroundings())


def _over_the_wire(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(Part(part.kind, over_the_wire(part.context), _over_the_wire(part.parts)) for part in parts)


# ---------------------------------------------------------------------------------------- plain tensors


def test_which_kind() -> None:
    assert flatten_leaf(torch.ones(1))[0] is PLAIN
    assert flatten_leaf(torch.nn.Parameter(torch.ones(1)))[0] == Part("tensor", (True, True))
    assert all(kind_of(value) is None for value in (1, "a", None, [torch.ones(1)], torch.float32))
    assert kind_of(object()) is KINDS["object"]


def test_kinds_are_asked_in_the_same_order_whichever_file_is_imported_first() -> None:
    """The newest that claims a leaf has it: those of torch.distributed before those that would take any subclass."""
    asked = list(reversed(KINDS))
    assert max(map(asked.index, ("dtensor", "sharded"))) < min(map(asked.index, ("wrapper", "python tensor", "object")))


def test_a_kind_cannot_take_the_name_of_another() -> None:
    class Other(Kind):
        name = "sparse"

    for kind in (Other(), Kind()):
        with pytest.raises(ValueError, match="name: expected one that no other kind has"):
            register_kind(kind)


def test_dtype_name() -> None:
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"


@pytest.mark.parametrize(
    "leaf",
    [
        noise(3, 1),
        noise(3, 1).requires_grad_(),
        torch.nn.Parameter(noise(3, 1)),
        torch.nn.Parameter(noise(3, 1), requires_grad=False),
        torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False),
    ],
)
def test_plain_tensors_come_back_as_they_were(leaf: torch.Tensor) -> None:
    _, (inner,) = flatten_leaf(leaf)
    assert inner is leaf
    again = there_and_back(leaf)
    assert difference(again, leaf) == ""
    assert again.is_leaf


def test_lazy_conjugates_and_negatives_travel_as_the_bytes_they_are_of() -> None:
    z = torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    for lazy in (z.conj(), z.conj().imag):
        _, (inner,) = flatten_leaf(lazy)
        assert not inner.is_conj()
        assert not inner.is_neg()
        assert inner.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()
        assert torch.equal(there_and_back(lazy), lazy)


# --------------------------------------------------------------------------------------------- DTensor


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


# --------------------------------------------------------------------------------------- ShardedTensor


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


# ---------------------------------------------------------------------- values beside bytes, found by a review


CONJUGATE = torch.tensor([1 + 2j, 3 - 4j]).conj()
LAZY = {
    "conjugate Parameter": torch.nn.Parameter(CONJUGATE),
    "negative Parameter": torch.nn.Parameter(CONJUGATE.imag),
    "conjugate that requires grad": torch.tensor([1 + 2j]).conj().repeat(2).conj().requires_grad_(),
    "negative that requires grad": CONJUGATE.imag.detach().requires_grad_(),
}


@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize("template", ["none", "plain", "lazy"])
def test_what_is_lazy_below_a_parameter_or_with_grad(name: str, template: str) -> None:
    """Its bytes are another's than its values: they land in nothing that reads them otherwise."""
    source = LAZY[name]
    assert source.is_conj() or source.is_neg()
    mine: torch.Tensor | None = None
    if template == "plain":
        mine = torch.zeros(2, dtype=source.dtype)
    elif template == "lazy":
        mine = torch.zeros(2, dtype=torch.complex64).conj()
        mine = mine if source.dtype.is_complex else mine.imag
    if mine is not None and isinstance(source, torch.nn.Parameter):
        mine = torch.nn.Parameter(mine)
    elif mine is not None:
        mine.requires_grad_()
    got = succeed({"w": source}, (lambda: {"w": mine}) if mine is not None else None).destination.result["w"]
    assert type(got) is type(source)
    assert got.requires_grad
    assert torch.equal(got.detach().resolve_conj().resolve_neg(), source.detach().resolve_conj().resolve_neg())
    assert (got is mine) == (template == "lazy")


def test_a_plain_parameter_does_not_land_in_a_conjugate_one() -> None:
    source = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 4j]))
    mine = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64).conj())
    ends = succeed({"w": source}, lambda: {"w": mine})
    assert torch.equal(ends.destination.result["w"].resolve_conj(), source)
    assert "lazy" in ends.destination.report.not_in_place["w"]


@pytest.mark.parametrize(("narrow", "wide"), [(torch.uint8, torch.float32), (torch.int16, torch.int64)])
@pytest.mark.parametrize("own", [False, True], ids=["missing", "its own"])
def test_a_view_of_another_dtype_where_the_template_begins_between_its_elements(
    narrow: torch.dtype, wide: torch.dtype, own: bool
) -> None:
    whole = noise(256, 1).to(torch.uint8).view(narrow) if narrow is torch.uint8 else torch.arange(64, dtype=narrow)
    source = {"a": whole, "b": whole.view(wide)}
    mine: dict[str, torch.Tensor] = {"a": torch.zeros(whole.numel() + 8, dtype=narrow)[1 : 1 + whole.numel()]}
    if own:
        mine["b"] = torch.zeros(source["b"].shape, dtype=wide)
    got = succeed(source, lambda: mine).destination.result
    assert got["a"] is mine["a"]
    assert not own or got["b"] is mine["b"]
    for name, tensor in source.items():
        assert raw_bytes(got[name]) == raw_bytes(tensor), name


QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
OF_A_BYTE = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and dtype.itemsize == 1}


@pytest.mark.parametrize("dtype", sorted(OF_A_BYTE - QUANTIZED, key=str), ids=str)
def test_every_dtype_of_a_byte_is_copied_bit_for_bit(dtype: torch.dtype) -> None:
    """Through shadow memory, and where one source tensor is two of the template's."""
    whole = torch.arange(256, dtype=torch.uint8).view(dtype)
    for source, options in (
        ({"w": whole}, Options(torch.device("cpu"), shadow=True)),
        ({"w": whole, "x": whole.view(16, 16)}, None),
    ):
        mine = {name: torch.zeros(tensor.shape, dtype=torch.uint8).view(dtype) for name, tensor in source.items()}
        ends = succeed(source, lambda mine=mine: mine, destination_options=options)
        for name, tensor in source.items():
            assert ends.destination.result[name] is mine[name]
            assert raw_bytes(mine[name]) == raw_bytes(tensor)


def test_an_attribute_that_hides_a_method_is_refused_at_the_source() -> None:
    """A receiver would refuse it, too, and not before all bytes have landed."""
    tensor = torch.ones(3)
    tensor.mean = 0.5  # type: ignore[assignment, method-assign]
    with pytest.raises(LocalProtocolError, match="w: an attribute of a tensor called mean"):
        transfer({"v": torch.ones(3), "w": tensor})
