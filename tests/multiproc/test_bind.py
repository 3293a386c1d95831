"""bind() beside what needs ranks: DDP, FSDP2, HSDP and FSDP1, in real processes over Gloo.

What is compared with is torch's own ``state_dict()``, called where nothing else runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import succeed
from torch import nn
from torch.distributed import TCPStore

from ft_transport import bind
from ft_transport._training.memory import same_memory

from .harness import digest, workers

STEPS = 200
PATIENCE = 100.0  # seconds for two threads that take turns in each of two processes, on a busy machine
SHAPE = {"fsdp2": (2,), "hsdp": (2, 1), "one rank": (1,)}


class Net(nn.Module):
    """Blocks that are sharded by themselves, and parameters of the root's own, two of which are tied."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 6)) for _ in range(2)])
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3, bias=False)
        self.tail = nn.Linear(6, 3, bias=False)
        self.tail.weight = self.head.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        inputs = self.norm(inputs)
        return self.head(inputs) + self.tail(inputs)


class Rank:
    """One process's part in a group, while it is entered."""

    def __init__(self, rank: int, port: int, size: int) -> None:
        self._rank, self._port, self._size = rank, port, size

    def __enter__(self) -> None:
        store = TCPStore("localhost", self._port, is_master=False, wait_for_workers=False)
        timeout = timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=self._rank, world_size=self._size, timeout=timeout)

    def __exit__(self, *exc: object) -> None:
        dist.destroy_process_group()


def sharded(kind: str, seed: int = 0, wrap: Callable[[nn.Module], nn.Module] = lambda block: block) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shape = SHAPE[kind]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[2 - len(shape) :])
    net = Net(seed)
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        model(inputs(step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def inputs(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def local(value: Any) -> Any:
    """A state with each DTensor's own piece and how it is cut in its place."""
    if isinstance(value, dict):
        return {key: local(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [local(part) for part in value]
    if hasattr(value, "to_local"):
        return [value.to_local().detach(), str(value.placements), tuple(value.shape)]
    return value.detach() if isinstance(value, torch.Tensor) else value


def same_state(got: Any, expected: Any) -> bool:
    return digest(local(got)) == digest(local(expected))


class Reading:
    """Calls a function again and again in a thread of its own, as torchft's quorum thread may at any time."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.count = 0
        self.error = ""

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._function()
                self.count += 1
                # Else each operation of the other thread, which lets go of the interpreter, waits to get it back.
                time.sleep(1e-3)
        except Exception as exc:
            self.error = f"{type(exc).__name__}: {exc}"

    def __enter__(self) -> Reading:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


def in_group(function: Callable[..., Any], size: int, *args: object) -> list[Any]:
    """Call ``function(*args)`` in processes that are a group; gives what each has returned."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with workers(size) as found:
        for rank in range(size):
            found[rank].start(ranked, function, rank, store.port, size, *args)
        return [found[rank].result(PATIENCE) for rank in range(size)]


def ranked(function: Callable[..., Any], rank: int, port: int, size: int, *args: object) -> Any:
    with Rank(rank, port, size):
        return function(*args)


# --------------------------------------------------------------------------------------- the reason


def train_while_read(kind: str, bound: bool) -> dict[str, Any]:
    model = sharded(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    state_dict = bind(model=model, optimizers=optimizer).state_dict
    error = ""
    with Reading(state_dict if bound else model.state_dict) as reading:
        try:
            train(model, optimizer, STEPS)
        except Exception as exc:
            error = f"{type(exc).__name__}: {exc}"
    return {"error": error, "reader": reading.error, "reads": reading.count, "end": digest(local(model.state_dict()))}


def train_alone(kind: str) -> str:
    model = sharded(kind)
    train(model, torch.optim.AdamW(model.parameters()), STEPS)
    return digest(local(model.state_dict()))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("hsdp", marks=pytest.mark.thorough)])
def test_a_thread_that_reads_all_the_time_changes_nothing(kind: str) -> None:
    alone = in_group(train_alone, 2, kind)
    ends = in_group(train_while_read, 2, kind, True)
    assert [(end["error"], end["reader"]) for end in ends] == [("", "")] * 2
    assert [end["end"] for end in ends] == alone
    assert all(end["reads"] >= STEPS for end in ends)


def test_torchs_own_state_dict_breaks_the_thread_that_trains() -> None:
    """Why there is bind(). Should it bear this one day, the modules could be asked."""
    (end,) = in_group(train_while_read, 1, "one rank", False)
    assert end["error"] or end["reader"]


# ------------------------------------------------------------------------------- what is in the state


def compare_states(kind: str, steps: int) -> list[bool]:
    model = sharded(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    bound = bind(model=model, optimizers=optimizer)
    train(model, optimizer, steps)
    with torch.no_grad():
        model(inputs(0))
    gathered = [type(each.weight) is nn.Parameter for each in (model.head, model.tail)]
    got = bound.state_dict()
    expected = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    return [
        all(gathered),
        list(got["model"]) == list(expected["model"]),
        same_state(got, expected),
        all(same_memory(got["model"][key], value) for key, value in expected["model"].items()),
        all(bound.state_dict()["model"][key] is value for key, value in got["model"].items()),
    ]


@pytest.mark.parametrize("kind", ["fsdp2", "hsdp"])
@pytest.mark.parametrize("steps", [0, 2])
def test_the_state_is_what_torch_gives(kind: str, steps: int) -> None:
    assert in_group(compare_states, 2, kind, steps) == [[True] * 5] * 2


def heal_gathered(kind: str, in_place: bool) -> list[bool]:
    """A heal while the root's parameters are gathered, as they are after a forward under no_grad."""
    source, here = sharded(kind, 1), sharded(kind, 2)
    adams = [torch.optim.AdamW(model.parameters()) for model in (source, here)]
    train(source, adams[0], 2), train(here, adams[1], 1)
    bound_source, bound = (bind(model=m, optimizers=o) for m, o in zip((source, here), adams, strict=True))
    with torch.no_grad():
        here(inputs(5))
    gathered = type(here.head.weight) is nn.Parameter and tuple(here.head.weight.shape) == (3, 6)
    differ = not same_state(bound.state_dict(), bound_source.state_dict())
    ends = succeed(bound_source.state_dict(), bound.state_dict if in_place else None).destination
    before = moments(bound)
    bound.load_state_dict(ends.result)
    kept = len(before) == 11 and all(one is other for one, other in zip(moments(bound), before, strict=True))
    let_go = same_memory(here.head.weight, bound.state_dict()["model"]["head.weight"])
    equal = same_state(bound.state_dict(), bound_source.state_dict())
    computes = torch.equal(here.eval()(inputs(9)), source.eval()(inputs(9)))
    here.train(), source.train()
    torchs = same_state(here.state_dict(), source.state_dict())
    train(source, adams[0], 1, 7), train(here, adams[1], 1, 7)
    after = same_state(bound.state_dict(), bound_source.state_dict())
    share = not in_place or ends.report.in_place_share == 1
    return [gathered, differ, kept, let_go, equal, computes, torchs, after, share]


def moments(bound: Any) -> list[torch.Tensor]:
    return [state["exp_avg"] for state in bound.state_dict()["optim"]["state"].values()]


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
@pytest.mark.parametrize("kind", ["fsdp2", "hsdp"])
def test_what_lands_while_the_root_is_gathered_is_what_it_computes_with(kind: str, in_place: bool) -> None:
    assert in_group(heal_gathered, 2, kind, in_place) == [[True] * 9] * 2


def changed_afterwards() -> list[bool]:
    model = sharded("fsdp2")
    bound = bind(model=model)
    bound.state_dict()
    model.to(torch.float64)
    found = [is_torchs(bound.state_dict()["model"], model.state_dict())]
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()}, assign=True)
    # torch has assigned the tied parameter of FSDP2 twice, and FSDP2 has kept the first: until the next forward, the
    # module holds one under the second name that nobody trains.
    got, expected = bound.state_dict()["model"], model.state_dict()
    del expected["tail.weight"]
    found += [is_torchs(got, expected), same_memory(got["tail.weight"], got["head.weight"])]
    model(inputs(0).double()).sum().backward()
    return [*found, is_torchs(bound.state_dict()["model"], model.state_dict())]


def is_torchs(got: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(same_state(got[k], value) and same_memory(got[k], value) for k, value in expected.items())


def test_the_state_follows_parameters_that_are_replaced() -> None:
    assert in_group(changed_afterwards, 2) == [[True] * 4] * 2


def error_of(load: Callable[[Any], object], given: Any) -> str:
    try:
        load(given)
    except RuntimeError as exc:
        return str(exc)
    return "none"


def _missing(state: Any) -> None:
    del state["head.weight"]


def _not_sharded(state: Any) -> None:
    state["head.weight"] = torch.zeros(3, 6)


def errors() -> list[tuple[str, str, bool]]:
    model = sharded("fsdp2").eval()
    bound = bind(model=model)
    found = []
    for spoil in (_missing, _not_sharded):
        before = digest(local(model.state_dict()))
        given = {key: value + 1 for key, value in model.state_dict().items()}
        spoil(given)
        with torch.no_grad():
            model(inputs(0))
        ours = error_of(bound.load_state_dict, {"model": given})
        unchanged = digest(local(model.state_dict())) == before
        found.append((ours, error_of(model.load_state_dict, given), unchanged))
    return found


def test_errors_are_torchs_own() -> None:
    for found in in_group(errors, 2):
        for ours, torchs, unchanged in found:
            assert ours == torchs
            assert unchanged
            assert ours.startswith("Error(s) in loading state_dict for FSDPNet")


# -------------------------------------------------------------------------------------------- refused


class Own(nn.Sequential):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return super().state_dict(*args, **kwargs)


def refused() -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    overrides = nn.Sequential(nn.Linear(2, 2), Own(nn.Linear(2, 2)))
    fully_shard(overrides[1][0])
    hook = nn.Sequential(nn.Linear(2, 2))
    hook.register_state_dict_post_hook(lambda *args: None)
    fully_shard(hook)
    older = nn.Sequential(FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu")))
    found = []
    for model in (overrides, hook, older):
        try:
            bind(model=model)
            found.append("not refused")
        except TypeError as exc:
            found.append(str(exc))
    return found


def test_what_cannot_be_had_without_disturbing_is_refused_by_name() -> None:
    for overrides, hook, older in in_group(refused, 2):
        assert overrides.startswith("module 1 (Own): it has a state_dict or a state-dict hook of its own")
        assert hook.startswith("module <root> (FSDPSequential): it has a state_dict or a state-dict hook of its own")
        assert older.startswith("module 0 (FullyShardedDataParallel): ")
        assert "fully_shard" in older


# --------------------------------------------------------------------------------- DDP, ZeRO


def data_parallel() -> list[object]:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    logging.getLogger("torch.distributed.optim").setLevel(logging.WARNING)
    found: list[object] = []
    jobs = []
    for seed in (1, 2):
        model = DistributedDataParallel(Net(seed))
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
        bound = bind(model=model, optimizers=optimizer)
        with Reading(bound.state_dict):
            train(model, optimizer, seed)
        state = bound.state_dict()
        found.append(same_state(state["model"], model.state_dict()) and "module.head.weight" in state["model"])
        found.append(same_state(state["optim"], optimizer.optim.state_dict()))
        jobs.append((model, optimizer, bound))
    ends = succeed(jobs[0][2].state_dict(), jobs[1][2].state_dict)
    jobs[1][2].load_state_dict(ends.destination.result)
    for model, optimizer, _ in jobs:
        train(model, optimizer, 2, 5)
    found.append(ends.destination.report.in_place_share == 1)
    found.append(same_state(jobs[0][2].state_dict(), jobs[1][2].state_dict()))
    return found


def test_data_parallel_with_an_optimizer_that_keeps_a_part_on_each_rank() -> None:
    assert in_group(data_parallel, 2) == [[True] * 6] * 2
