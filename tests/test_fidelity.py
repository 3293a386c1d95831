"""What arrives is what was sent, or it is refused by path before the first byte: kinds that once came as others."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from corpus.kinds import dtensor, mesh
from helpers import noise, raw_bytes, succeed, transfer
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, _dtensor_spec
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils import _pytree as pytree

from ft_transport import LaneTransport, LocalProtocolError, state_digest

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in ("Sparse .* tensor support is in beta state", "torch.quantize_per", "TypedStorage is deprecated")
] + [pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")]


class Ordered(OrderedDict):  # type: ignore[type-arg]
    """A user's OrderedDict."""


class Table(dict):  # type: ignore[type-arg]
    """A user's dict."""


class AttrDict(dict):  # type: ignore[type-arg]
    """The usual way to write ``d.lr`` for ``d["lr"]``."""

    def __init__(self, *args: Any, **items: Any) -> None:
        super().__init__(*args, **items)
        self.__dict__ = self


class Holder:
    """Pickled, but for the tensors in it."""

    def __init__(self, **attrs: Any) -> None:
        self.__dict__.update(attrs)


class WantsMore:
    """Cannot be built from what it is pickled as."""

    def __init__(self, tensor: Any, more: int) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return WantsMore, (self.tensor,)


class Sceptic:
    """Looks at the bytes when it is built."""

    def __init__(self, tensor: Any) -> None:
        if not tensor.all():
            raise ValueError("zeros")
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return Sceptic, (self.tensor,)


@pytest.fixture(autouse=True)
def _allowed() -> Iterator[None]:
    with torch.serialization.safe_globals([Ordered, Table, AttrDict, Holder, WantsMore, Sceptic, _constructor]):
        yield


def arrived(value: Any) -> Any:
    """What a value is at a destination without a template."""
    return succeed({"a": value}).destination.result["a"]


def refused(value: Any) -> str:
    """Why the source refuses a value, before it sends anything."""
    with pytest.raises(LocalProtocolError) as caught:
        transfer({"a": value, "b": torch.ones(2)})
    return caught.value.message


# ---------------------------------------------------------------------------------- objects and mappings


def test_a_subclass_of_ordered_dict_travels_in_its_own_order() -> None:
    sent = Ordered(x=noise(3, 1), y=1, z=noise(2, 2))
    sent.move_to_end("x")
    sent.tag = "t"  # type: ignore[attr-defined]
    got = arrived(sent)
    assert type(got) is Ordered
    assert list(got) == ["y", "z", "x"]
    assert got.tag == "t"
    assert got.popitem(last=False) == ("y", 1)
    assert raw_bytes(got["x"]) == raw_bytes(sent["x"])
    template = Ordered(y=0, z=torch.zeros(2), x=torch.zeros(3))
    ends = succeed({"a": sent}, lambda: {"a": template})
    assert ends.destination.result["a"]["x"] is template["x"]


def test_what_no_receiver_can_build_is_refused_at_the_source() -> None:
    assert refused(Holder(inside=Ordered(x=torch.ones(2)))).startswith("a: a object cannot be encoded: a pickle")


def test_what_its_class_cannot_build_is_refused_before_a_byte_lands() -> None:
    template = torch.zeros(4)
    ends = transfer({"t": torch.ones(4), "w": WantsMore(torch.ones(2), 1)}, lambda: {"t": template})
    assert "w: it cannot be built: TypeError" in ends.destination.text
    assert not template.any()


def test_what_is_built_of_certain_bytes_only_is_not_refused_for_those_that_stood_in() -> None:
    assert arrived(Sceptic(torch.ones(3))).tensor.all()


def test_an_item_and_an_attribute_of_one_name_are_both_kept() -> None:
    for cls in (Table, OrderedDict, Ordered):
        sent: Any = cls(lr=torch.ones(2), n=1)
        sent.lr = torch.zeros(2)
        template: Any = cls(lr=torch.empty(2), n=0)
        template.lr = torch.empty(2)
        for callback in (None, lambda template=template: {"b": 1, "a": template}):
            got = succeed({"a": sent}, callback).destination.result["a"]
            assert type(got) is cls
            assert got["lr"].tolist() == [1, 1]
            assert got.lr.tolist() == [0, 0]
        assert (got["lr"], got.lr) == (template["lr"], template.lr) or got["lr"] is template["lr"]
        assert [path for path in state_digest({"a": sent}).by_path if "lr" in path] == ["a.lr", "a.__dict__.lr"]


def test_a_dict_that_is_its_own_attributes() -> None:
    got = arrived(AttrDict(lr=torch.ones(2), deep=AttrDict(x=1)))
    assert type(got) is type(got.deep) is AttrDict
    assert vars(got) is got
    assert got.lr is got["lr"]
    got.more = 2
    assert got["more"] == 2


def test_an_attribute_that_hides_a_method_is_refused_at_the_source() -> None:
    sent: Any = Table(x=1)
    sent.items = 3
    assert "name of an attribute out of range: 'items' hides" in refused(sent)


# ------------------------------------------------------------------------------------------------- NumPy


@pytest.mark.parametrize("value", [np.str_(""), np.bytes_(b""), np.void(b"")])
def test_empty_numpy_texts(value: Any) -> None:
    got = arrived(value)
    assert type(got) is type(value)
    assert got.tobytes() == value.tobytes()
    assert got.dtype == value.dtype


def test_a_numpy_dtype_of_somebody_else_is_that_dtype_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = np.dtype((np.record, [("x", "f4")]))  # NumPy describes it as another one
    assert "a: the NumPy dtype" in refused(np.zeros(3, pairs))
    assert "a: the NumPy dtype" in refused(np.zeros(3, [("deep", pairs)]))
    kept = np.zeros(3, [("x", "f4"), ("y", "i2", (2,))])
    assert arrived(kept).dtype == kept.dtype


def test_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    sent = np.arange(5).astype(ml_dtypes.bfloat16)
    assert arrived(sent).dtype == sent.dtype
    assert arrived(sent).tobytes() == sent.tobytes()
    assert "cannot travel" in refused(np.zeros(2, [("x", ml_dtypes.bfloat16)]))


# ---------------------------------------------------------------------------------- attributes of tensors


def _tensors() -> dict[str, Any]:
    return {
        "dtensor": torch.nn.Parameter(dtensor(noise((4, 3), 1), mesh((2,)), (Shard(0),), (8, 3))),
        "sparse": torch.nn.Parameter(torch.eye(3).to_sparse()),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "meta": torch.nn.Parameter(torch.empty(3, device="meta")),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.usefixtures("own_mesh")
@pytest.mark.parametrize("name", ["dtensor", "sparse", "csr", "quantized", "meta", "nested"])
def test_attributes_are_kept(name: str) -> None:
    sent = _tensors()[name]
    sent.tag, sent.scale = {"expert": 3}, noise(2, 3)
    got = arrived(sent)
    assert got.tag == {"expert": 3}
    assert raw_bytes(got.scale) == raw_bytes(sent.scale)
    del sent.scale
    template = _tensors()[name]
    assert succeed({"a": sent}, lambda: {"a": template}).destination.result["a"].tag == {"expert": 3}
    assert not vars(arrived(_tensors()[name])).keys() - {"_is_param"}


class Quantized(torch.nn.Parameter):
    """As bitsandbytes writes them: a state of its own, and a module that has the parameter."""

    def __getstate__(self) -> Any:
        return {**self.__dict__, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state: Any) -> None:
        self.data = state.pop("data")
        self.__dict__.update(state)


def test_a_parameter_that_is_inside_of_its_own_attribute() -> None:
    with torch.serialization.safe_globals([Quantized]):
        sent: Any = Quantized(torch.ones(4), requires_grad=False)
        sent.blocksize, sent.quant_state = 64, torch.full((2,), 3.0)
        got = arrived(sent)
        assert (got.blocksize, got.quant_state.tolist(), got.tolist()) == (64, [3, 3], [1] * 4)
        sent.module = Holder(weight=sent)
    assert refused(sent) == "a: a tensor of class Quantized cannot travel: its attribute 'module' refers back to it"


def test_a_parameter_that_is_inside_of_an_attribute_of_its_attribute() -> None:
    sent, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    sent.other, other.first = other, sent  # type: ignore[attr-defined]
    assert "what is inside of it refers back to it" in refused(sent)


# ------------------------------------------------------------------------------------------------- modes


class _Counts(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a transfer that this mode sees")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_modes_of_the_calling_thread_change_nothing() -> None:
    state = {
        "plain": noise(5, 1),
        "channels": torch.quantize_per_channel(torch.ones(2, 3), torch.ones(2), torch.zeros(2), 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "lazy": torch.nn.UninitializedParameter(),
        "wide": torch.nn.UninitializedBuffer(dtype=torch.float64),
        "sparse": torch.eye(3).to_sparse(),
    }
    whole = state_digest(state).whole
    timeout = timedelta(seconds=20)
    source: Any = LaneTransport(timeout, torch.device("cpu"))
    destination: Any = LaneTransport(timeout, torch.device("cpu"))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"), torch.inference_mode(), _Counts():
            source.send_checkpoint([1], 3, state, timeout)
            got = destination.recv_checkpoint(0, source.metadata(), 3, timeout)
            assert state_digest(got).whole == whole
    finally:
        torch.set_default_dtype(before)
        source.shutdown()
        destination.shutdown()
    assert not got["plain"].is_inference()
    assert got["plain"].device.type == got["lazy"].device.type == "cpu"
    assert torch.Tensor.dtype.__get__(got["lazy"]) is torch.float32  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------- DTensor


@pytest.fixture(scope="module")
def own_mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,), mesh_dim_names=("fidelity",))
    finally:
        dist.destroy_process_group()


def test_a_dtensor_that_no_template_has_is_put_on_the_process_own_mesh(own_mesh: DeviceMesh) -> None:
    got = arrived(DTensor.from_local(noise((4, 3), 1), own_mesh, [Shard(0)], run_check=False))
    assert got.device_mesh is own_mesh
    assert raw_bytes(got.full_tensor()) == raw_bytes(noise((4, 3), 1))


def test_a_norm_stays_one(own_mesh: DeviceMesh) -> None:
    norm = torch.linalg.vector_norm(DTensor.from_local(torch.ones(4), own_mesh, [Shard(0)], run_check=False), ord=3)
    got = arrived(norm)
    assert got.placements == norm.placements
    assert type(got.placements[0]) is type(norm.placements[0])
    local = norm.to_local()
    plain = DTensor.from_local(local, own_mesh, [Partial()], run_check=False)
    ends = transfer({"a": norm}, lambda: {"a": plain})
    assert "a: expected DTensor of global shape () with placements (('partial', 'sum'),)" in ends.destination.text
    kind = type(norm.placements[0])
    digests = {
        state_digest(DTensor.from_local(local, own_mesh, [placement], run_check=False)).whole
        for placement in (*(kind(norm_type=norm) for norm in (2, 3, 2.5)), Partial("sum"), Partial("avg"))
    }
    assert len(digests) == 5


def test_a_placement_of_a_class_that_nobody_knows_is_refused(own_mesh: DeviceMesh) -> None:
    class Odd(Partial):
        pass

    leaf = DTensor.from_local(torch.ones(4), own_mesh, [Partial()], run_check=False)
    leaf._spec.placements = (Odd(),)
    assert "a: a DTensor with placement" in refused(leaf)


@pytest.mark.usefixtures("own_mesh")
def test_the_order_of_shards_is_kept() -> None:
    order_entry = getattr(_dtensor_spec, "ShardOrderEntry", None)
    if order_entry is None:
        pytest.skip("this torch knows no order of shards")
    on = mesh((2, 2))
    order = (order_entry(0, (1, 0)),)
    meta = TensorMeta(torch.Size((8, 3)), (3, 1), torch.float32)
    spec = DTensorSpec(on, (Shard(0), Shard(0)), meta, shard_order=order)
    leaf = DTensor(noise((2, 3), 1), spec, requires_grad=False)  # type: ignore[no-untyped-call]
    assert arrived(leaf)._spec.shard_order == order
    default = dtensor(noise((2, 3), 1), on, (Shard(0), Shard(0)), (8, 3))
    assert "in the order" in transfer({"a": leaf}, lambda: {"a": default}).destination.text
    assert state_digest(leaf) != state_digest(default)


# ---------------------------------------------------------------------------------- nodes of torch's pytree


class Bag:
    """Registered with pytree as TensorDict is: a context with a private function, and a lock that pytree forgets."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.items, self.is_locked = items, False

    def lock_(self) -> Bag:
        self.is_locked = True
        return self


def _constructor(keys: Any, values: Any) -> Bag:
    return Bag(dict(zip(keys, values, strict=True)))


@pytest.fixture
def _bag() -> Iterator[None]:
    pytree.register_pytree_node(
        Bag,
        lambda bag: ([*bag.items.values()], {"keys": [*bag.items], "constructor": _constructor}),
        lambda values, context: context["constructor"](context["keys"], values),
    )
    yield
    pytree._deregister_pytree_node(Bag)


@pytest.mark.usefixtures("_bag")
def test_a_locked_node_comes_back_locked_and_in_place() -> None:
    template = Bag({"x": torch.zeros(2)})
    for sent in (Bag({"x": torch.ones(2)}), Bag({"x": torch.ones(2)}).lock_()):
        got = succeed({"a": sent}, lambda: {"a": template}).destination.result["a"]
        assert got.items["x"] is template.items["x"]
        assert got.is_locked is sent.is_locked


@pytest.mark.usefixtures("_bag")
def test_what_the_context_of_a_node_names_is_called_not_allowed() -> None:
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        text = transfer({"a": Bag({"x": torch.ones(2)})}).destination.text
    finally:
        torch.serialization.add_safe_globals(before)
    assert text.startswith("a: class test_fidelity._constructor is not allowed")
    assert "damaged" not in text


def test_tensordict() -> None:
    tensordict = pytest.importorskip("tensordict")
    made = [tensordict.TensorDict({"x": torch.full((3, 2), v)}, batch_size=[3]).lock_() for v in (1.0, 0.0)]
    private = sys.modules["tensordict._pytree"]
    assert isinstance(private, types.ModuleType)
    with torch.serialization.safe_globals([private._tensordict_constructor, private._PytreeBatchSize]):  # type: ignore[attr-defined]
        got = succeed({"a": made[0]}, lambda: {"a": made[1]}).destination.result["a"]
    assert got.is_locked
    assert got["x"] is made[1]["x"]
    assert got["x"].eq(1).all()
