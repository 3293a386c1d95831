"""Parameters that are not plain, and what people put around an optimizer: training is the same with and without."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import bitwise_equal, difference
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from ft_transport import materialize
from ft_transport._training import provisional
from training.jobs import CASES, Case

STEPS = 20
# With shards of DTensors torch's own steps fail in Rprop and in two that are fused; Adafactor and Muon communicate.
DTENSORS = [
    case
    for case in CASES
    if case.dtype is torch.float32
    and case.name not in ("Adafactor", "Muon", "Rprop")
    and not (case.options.get("fused") and case.name in ("Adagrad", "SGD"))
    and (case.name != "SGD" or case.options)  # which keeps nothing
]

Params = list[torch.nn.Parameter]
Make = Callable[[Params], torch.optim.Optimizer]
Wrap = Callable[[torch.optim.Optimizer], Any]


def trained(params: Params, optimizer: torch.optim.Optimizer, step: Callable[[], object] | None = None) -> Any:
    """What twenty steps make of them."""
    for number in range(STEPS):
        for index, param in enumerate(params):
            param.grad = gradient(param.detach(), index + number)
        (step or optimizer.step)()
    return tree_map(plain, {"params": list(params), "optimizer": optimizer.state_dict()})


def local(value: torch.Tensor) -> torch.Tensor:
    """Of a DTensor, what this rank has of it."""
    return value.to_local() if isinstance(value, DTensor) else value


def plain(value: Any) -> Any:
    """Of a subclass that holds tensors, these."""
    if isinstance(value, DTensor):
        return value.detach().to_local()
    if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
        return {name: plain(getattr(value, name)) for name in value.__tensor_flatten__()[0]}
    return value


def gradient(value: torch.Tensor, seed: int) -> torch.Tensor:
    """Of values that differ from step to step, with zeros of either sign among them."""
    mine = local(value)
    flat = torch.sin(torch.arange(mine.numel(), dtype=torch.float64) * 1.7 + seed)
    flat[::3], flat[1::4] = 0.0, -0.0
    made = torch.empty_like(value)
    local(made).copy_(flat.view(mine.shape))
    if mine.is_complex():
        made.mul_(torch.tensor(complex(0.6, -0.8), dtype=mine.dtype))
    return made


def same(params: Callable[[], Params], make: Make, wrap: Wrap = lambda it: it) -> None:
    """Training with ``materialize`` and without ends alike, and something was made."""
    ends = []
    for materialized in (True, False):
        mine = params()
        optimizer = make(mine)
        around = wrap(optimizer)
        if materialized:
            materialize(around)
            assert any(optimizer.state[param] for param in mine), "nothing was made"
        ends.append(trained(mine, optimizer, around.step))
    assert difference(*ends) == ""


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Params:
    values = [torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape) for shape in shapes]
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


# -------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
        lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, dampening=0.5),
        lambda params: torch.optim.Adam(params, 0.1, amsgrad=True),
        lambda params: torch.optim.Rprop(params, 0.1),
        lambda params: torch.optim.ASGD(params, 0.1, t0=3),
    ],
    ids=["SGD", "SGD-dampening", "Adam", "Rprop", "ASGD"],
)
def test_other_dtypes(make: Make, dtype: torch.dtype) -> None:
    same(lambda: parameters((3, 4), (), dtype=dtype), make)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("sparse", [True, False])
def test_an_embedding_whose_gradients_are_sparse(sparse: bool, dampening: float) -> None:
    """Its momentum becomes sparse with the first of them; the other parameter's is not."""
    ends = []
    for make in (materialize, lambda optimizer: None):
        table = torch.nn.Embedding(6, 3, sparse=sparse, _weight=torch.linspace(-1, 1, 18).view(6, 3))
        linear = torch.nn.Linear(3, 1)
        torch.nn.init.ones_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        optimizer = torch.optim.SGD([*table.parameters(), *linear.parameters()], 0.1, momentum=0.9, dampening=dampening)
        make(optimizer)
        for number in range(STEPS):
            optimizer.zero_grad()
            linear(table(torch.tensor([number % 6, number % 4]))).square().sum().backward()
            optimizer.step()
        momentum = optimizer.state[table.weight]["momentum_buffer"]
        assert momentum.is_sparse is sparse
        optimizer.state[table.weight]["momentum_buffer"] = momentum.to_dense()
        ends.append({"table": table.weight, "linear": linear.state_dict(), "optimizer": optimizer.state_dict()})
    assert difference(*ends) == ""


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of four ranks, of which only the last one is there: whoever communicates gets nothing, and no error."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)  # type: ignore[no-untyped-call]
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    dist.destroy_process_group()


@pytest.mark.parametrize("case", DTENSORS, ids=str)
def test_shards_of_a_distributed_tensor(case: Case, mesh: DeviceMesh) -> None:
    """As FSDP2 and HSDP have them, also uneven ones and those of which this rank has nothing."""
    placements = [Replicate(), Shard(0)]

    def params() -> Params:
        return [
            # None: nobody is there to send the values.
            torch.nn.Parameter(distribute_tensor(param.detach(), mesh, placements, src_data_rank=None))
            for param in parameters((4, 3), (3,), (1, 5))
        ]

    def make(params: Params) -> torch.optim.Optimizer:
        return case.optimizer([{"params": params}])

    same(params, make)
    mine = params()
    optimizer = make(mine)
    materialize(optimizer)
    for param in mine:
        for value in optimizer.state[param].values():
            if isinstance(value, DTensor):
                assert value.placements == param.placements
                assert value.to_local().shape == param.to_local().shape


# ------------------------------------------------------------------------------- around an optimizer


def test_torchfts_wrapper_is_looked_through() -> None:
    from torchft import Optimizer as Managed

    class Agrees:
        """A Manager's two calls: a quorum, and a vote that is always yes."""

        def start_quorum(self) -> None: ...

        def should_commit(self) -> bool:
            return True

    same(
        lambda: parameters((3, 4), ()),
        lambda params: torch.optim.AdamW(params, 0.1),
        lambda optimizer: Managed(Agrees(), optimizer),  # type: ignore[arg-type]
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, and an error of theirs where they are errors
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # on Python 3.13.0
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Rprop], ids=["AdamW", "Rprop"])
def test_a_step_that_is_compiled(make: Make) -> None:
    """Eagerly, as this needs no compiler: the graphs are what differs."""

    class Compiled:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.state = optimizer, optimizer.state
            self.step = torch.compile(optimizer.step, backend="eager")

    ends = []
    for materialized in (True, False):
        torch.compiler.reset()
        params = parameters((3, 4), (2,))
        optimizer = make(params)
        if materialized:
            materialize(optimizer)
        ends.append(trained(params, optimizer, Compiled(optimizer).step))
    torch.compiler.reset()
    assert difference(*ends) == ""


def test_a_grad_scaler_that_skips_the_first_step() -> None:
    """The first gradients overflow, so that no step is taken: what stands for the first state has still to go."""
    ends = []
    for make in (materialize, lambda optimizer: None):
        params = parameters((3, 4), (2,))
        optimizer = torch.optim.SGD(params, 0.1, momentum=0.9, dampening=0.5)
        make(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for number in range(STEPS):
            for index, param in enumerate(params):
                param.grad = scaler.scale(gradient(param.detach(), index + number))  # type: ignore[assignment]
                if number == 0:
                    param.grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
        ends.append({"params": params, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
    assert difference(*ends) == ""


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("AdamW", "Adagrad")], ids=str)
def test_copies_of_an_optimizer_go_on_as_it_does(case: Case, way: str) -> None:
    ends = []
    for materialized in (True, False):
        params = parameters((3, 4), (), dtype=case.dtype)
        optimizer = case.optimizer([{"params": params}])
        if materialized:
            materialize(optimizer)
        params, optimizer = _copied((params, optimizer), way)
        ends.append(trained(params, optimizer))
    assert difference(*ends) == ""


def _copied(what: Any, way: str) -> Any:
    if way == "deepcopy":
        return copy.deepcopy(what)
    if way == "pickle":
        return pickle.loads(pickle.dumps(what))
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_copy_of_one_whose_state_may_have_to_go_wants_a_call_of_its_own() -> None:
    """As the docstring says: copies have no hooks, whosever."""
    ends = []
    for make in (materialize, lambda optimizer: None):
        params = parameters((3, 4))
        optimizer = torch.optim.SGD(params, 0.1, momentum=0.9, dampening=0.5)
        make(optimizer)
        params, optimizer = copy.deepcopy((params, optimizer))
        make(optimizer)
        ends.append(trained(params, optimizer))
    assert difference(*ends) == ""


def test_nothing_is_left_of_an_optimizer_that_is_gone() -> None:
    gc.collect()  # those of other tests
    optimizer = torch.optim.Rprop(parameters((3, 4)), 0.1)
    for _ in range(3):
        materialize(optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert optimizer in provisional._unstepped
    gone, before = weakref.ref(optimizer), len(provisional._watched)
    del optimizer
    gc.collect()
    assert gone() is None
    assert len(provisional._watched) == before - 1


def test_state_dict_has_no_trace_of_it() -> None:
    """Nothing but what torch's own first step puts there, so that checkpoints are what they always were."""
    params, others = parameters((3, 4)), parameters((3, 4))
    with_state, without = torch.optim.ASGD(params, 0.1), torch.optim.ASGD(others, 0.1)
    materialize(with_state)
    made, stepped = (trained(*each) for each in ((params, with_state), (others, without)))
    assert made["optimizer"].keys() == stepped["optimizer"].keys()
    assert bitwise_equal(made["optimizer"], stepped["optimizer"])


def test_memory_is_the_states_and_one_gradient_more() -> None:
    """A thousand parameters of 4 KiB: what is there beside the state at any one time is for one of them."""
    params = [torch.nn.Parameter(torch.empty(1024)) for _ in range(1000)]
    optimizer = torch.optim.AdamW(params)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # There is but one cycle. Torch 2.11 warns of what would be lost between two.
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        materialize(optimizer)
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    state = sum(value.nbytes for each in optimizer.state.values() for value in each.values())
    assert state <= peak <= state + 3 * 4096


def test_torchaos_optimizers() -> None:
    """Quantized states, which are subclasses of tensors. Only where torchao is installed."""
    torchao = pytest.importorskip("torchao.optim")
    with torch.compiler.set_stance("force_eager"):  # type: ignore[no-untyped-call]
        for kind in (torchao.AdamW8bit, torchao.AdamW4bit, torchao.AdamWFp8):
            same(lambda: parameters((4096, 2), (7,)), lambda params, kind=kind: kind(params, 0.1))  # type: ignore[misc]
