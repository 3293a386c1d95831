"""An optimizer's state is what torch's own is; a load is torch's own load, without its casts and copies."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import difference, snapshot, tensors_of
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.optim import Optimizer

from ft_transport import materialize
from ft_transport._training.optimizers import OptimizerState
from training.jobs import CASES, FOUND, REFUSED, Case, job

FLOAT32 = [case for case in CASES if case.dtype is torch.float32]
# torch's own load casts scalars that are no step counts to the dtype of the parameter.
CAST = {"NAdam", "ASGD"}


def load(optimizer: Any, state: Any) -> None:
    OptimizerState(optimizer).prepare(state)()


def adamw(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> torch.optim.AdamW:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(3, 2, generator=generator).to(dtype)) for _ in range(3)]
    return torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], **options)


def stepped(optimizer: Any, steps: int = 1) -> Any:
    for number in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.full_like(param, 0.5 + number)
        optimizer.step()
    return optimizer


# --------------------------------------------------------------------- every optimizer of torch.optim


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_is_what_torch_gives(case: Case, steps: int) -> None:
    made = job(case).run(0, steps)
    for _ in range(2):
        got, expected = OptimizerState(made.optimizer).state_dict(), made.optimizer.state_dict()
        assert difference(got, expected) == ""
        pairs = zip(tensors_of(got["state"]), tensors_of(expected["state"]), strict=True)
        assert all(one is other for one, other in pairs)
        made.run(steps, steps + 1)


@pytest.mark.parametrize("here", ["fresh", "materialized", "stepped"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_load_is_what_torchs_own_is(case: Case, here: str) -> None:
    if case.dtype is not torch.float32 and case.name in CAST:
        pytest.skip("torch's own load casts their scalars")
    given = job(case, 1).run(0, 3).optimizer.state_dict()
    ours, torchs = (job(case, 2, materialize if here == "materialized" else lambda optimizer: None) for _ in range(2))
    if here == "stepped":
        ours.run(0, 1), torchs.run(0, 1)
    load(ours.optimizer, copy.deepcopy(given))
    torchs.optimizer.load_state_dict(copy.deepcopy(given))
    assert difference(ours.optimizer.state_dict(), torchs.optimizer.state_dict()) == ""
    for made in (ours, torchs):
        made.run(3, 6)
    assert difference(ours.params, torchs.params) == ""
    assert difference(ours.optimizer.state_dict(), torchs.optimizer.state_dict()) == ""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_loaded_is_what_was_saved_to_the_bit(case: Case) -> None:
    source = job(case, 1).run(0, 3)
    made = job(case, 2, materialize)
    load(made.optimizer, copy.deepcopy(source.optimizer.state_dict()))
    assert difference(made.optimizer.state_dict(), source.optimizer.state_dict()) == ""


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_tensors_that_are_there_stay(case: Case) -> None:
    made = job(case, 2).run(0, 3)
    tensors = tensors_of(made.optimizer.state_dict()["state"])
    load(made.optimizer, copy.deepcopy(job(case, 1).run(0, 3).optimizer.state_dict()))
    now = tensors_of(made.optimizer.state_dict()["state"])
    assert all(one is other for one, other in zip(now, tensors, strict=True))


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_what_is_there_is_not_written_again(case: Case) -> None:
    made = job(case).run(0, 2)
    state = OptimizerState(made.optimizer)
    received = state.state_dict()
    versions = [tensor._version for tensor in tensors_of(received)]
    values, groups = dict(made.optimizer.state), list(made.optimizer.param_groups)
    before = copy.deepcopy(made.optimizer.state_dict())
    state.prepare(received)()
    assert [tensor._version for tensor in tensors_of(made.optimizer.state_dict())] == versions
    assert all(made.optimizer.state[param] is value for param, value in values.items())
    assert all(one is other for one, other in zip(made.optimizer.param_groups, groups, strict=True))
    assert difference(made.optimizer.state_dict(), before) == ""


def lbfgs(seed: int, steps: int) -> Optimizer:
    torch.manual_seed(seed)
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.LBFGS(layer.parameters(), history_size=3)
    inputs = torch.randn(8, 4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(inputs).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)  # type: ignore[arg-type]
    return optimizer


def sparse_adam(seed: int, steps: int) -> Optimizer:
    torch.manual_seed(seed)
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(list(embedding.parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        embedding(torch.tensor([1, 3])).sum().backward()
        optimizer.step()
    return optimizer


def test_the_others_of_torch_are_tried_too() -> None:
    assert {"LBFGS", "SparseAdam"} == REFUSED
    assert {case.name for case in CASES} | REFUSED == set(FOUND)


@pytest.mark.parametrize("make", [lbfgs, sparse_adam])
@pytest.mark.parametrize("here", [0, 2])
def test_optimizers_with_states_of_another_kind(make: Callable[[int, int], Optimizer], here: int) -> None:
    given = make(1, 3).state_dict()
    ours, torchs = make(2, here), make(2, here)
    assert difference(OptimizerState(ours).state_dict(), ours.state_dict()) == ""
    load(ours, copy.deepcopy(given))
    torchs.load_state_dict(copy.deepcopy(given))
    assert difference(ours.state_dict(), torchs.state_dict()) == ""


# ------------------------------------------------------------------------------- what a load does


def test_a_state_of_float32_beside_parameters_of_bfloat16_is_not_cast() -> None:
    source, here, torchs = (adamw(seed, torch.bfloat16) for seed in (1, 2, 2))
    for optimizer in (source, here):
        for group in optimizer.param_groups:
            for param in group["params"]:
                optimizer.state[param] = {"exp_avg": torch.rand(3, 2), "step": torch.tensor(float(2**24 + 2))}
    given = copy.deepcopy(source.state_dict())
    for optimizer in (here, adamw(3, torch.bfloat16)):  # written to, and taken over
        load(optimizer, copy.deepcopy(given))
        assert difference(optimizer.state_dict(), given) == ""
    torchs.load_state_dict(copy.deepcopy(given))
    assert difference(torchs.state_dict(), given) != ""  # torch's own casts


def test_a_state_of_an_older_torch_is_brought_up_to_date_as_torch_does_it() -> None:
    """Step counts were numbers once; an optimizer's class sees to what it finds."""
    given = copy.deepcopy(stepped(adamw(1)).state_dict())
    for state in given["state"].values():
        state["step"] = 1
    for group in given["param_groups"]:
        del group["maximize"]
    ours, torchs = adamw(), adamw()
    load(ours, copy.deepcopy(given))
    torchs.load_state_dict(copy.deepcopy(given))
    assert difference(ours.state_dict(), torchs.state_dict()) == ""
    assert isinstance(ours.state_dict()["state"][0]["step"], torch.Tensor)


def test_entries_that_the_source_lacks_are_dropped() -> None:
    here = stepped(adamw())
    given = copy.deepcopy(here.state_dict())
    del given["state"][1], given["state"][2]["exp_avg"]
    load(here, given)
    assert difference(here.state_dict(), given) == ""
    load(here, adamw(1).state_dict())
    assert here.state_dict()["state"] == {}


def test_what_does_not_fit_is_taken_over_and_the_live_one_left_alone() -> None:
    here = stepped(adamw())
    live = here.state[here.param_groups[0]["params"][0]]["exp_avg"]
    before = live.clone()
    given = copy.deepcopy(here.state_dict())
    given["state"][0]["exp_avg"] = torch.ones(3, 2, dtype=torch.float64)
    load(here, given)
    assert here.state_dict()["state"][0]["exp_avg"].dtype is torch.float64
    assert torch.equal(live, before)


def test_a_tensor_under_two_names_is_written_to_once() -> None:
    here, source = (torch.optim.SGD([nn.Parameter(torch.zeros(2))]) for _ in range(2))
    param = here.param_groups[0]["params"][0]
    one = torch.zeros(3)
    here.state[param] = {"a": one, "b": one}
    source.state[source.param_groups[0]["params"][0]] = {"a": torch.ones(3), "b": torch.full((3,), 2.0)}
    given = copy.deepcopy(source.state_dict())
    load(here, given)
    assert difference(here.state_dict(), given) == ""


def test_settings_are_loaded_and_what_is_local_stays() -> None:
    here = adamw(foreach=False, lr=torch.tensor(0.3))
    lr, params = here.param_groups[0]["lr"], [group["params"] for group in here.param_groups]
    given = copy.deepcopy(adamw(1, capturable=False, fused=True, lr=torch.tensor(0.7), betas=(0.1, 0.2)).state_dict())
    given["param_groups"][0]["initial_lr"] = 3.0
    load(here, given)
    first, second = here.param_groups
    assert first["lr"] is lr
    assert lr.item() == pytest.approx(0.7)
    assert (second["lr"], first["betas"], first["initial_lr"]) == (0.5, (0.1, 0.2), 3.0)
    assert (first["foreach"], first["fused"]) == (False, None)
    assert all(group["params"] is before for group, before in zip(here.param_groups, params, strict=True))


def test_what_is_loaded_is_not_the_givers_to_change() -> None:
    here = adamw()
    given = copy.deepcopy(adamw(lr=torch.tensor(0.7)).state_dict())
    given["param_groups"][0]["notes"] = ["mutable"]
    load(here, given)
    given["param_groups"][0]["notes"].append("later")
    given["param_groups"][0]["lr"].fill_(5)
    assert here.param_groups[0]["notes"] == ["mutable"]
    assert here.param_groups[0]["lr"].item() == pytest.approx(0.7)


def test_names_of_parameters_stay_where_the_source_has_none() -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    ours, torchs = (torch.optim.SGD(list(each.named_parameters())) for each in (layer, other))
    given = torch.optim.SGD(nn.Linear(2, 2).parameters()).state_dict()
    load(ours, copy.deepcopy(given))
    torchs.load_state_dict(copy.deepcopy(given))
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]
    assert difference(ours.state_dict(), torchs.state_dict()) == ""


def test_a_parameter_in_two_places_and_keys_that_are_no_parameters() -> None:
    param = nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="duplicate"):
        ours = torch.optim.SGD([param, param], momentum=0.9)
    ours.state["global"] = {"count": 3, "history": [torch.ones(2), None]}
    assert difference(OptimizerState(ours).state_dict(), ours.state_dict()) == ""
    given = copy.deepcopy(ours.state_dict())
    del ours.state["global"]
    load(ours, given)
    assert ours.state["global"]["count"] == 3


def test_new_groups_are_in_the_state() -> None:
    optimizer = adamw()
    state = OptimizerState(optimizer)
    state.state_dict()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.25})
    stepped(optimizer)
    assert difference(state.state_dict(), optimizer.state_dict()) == ""


def test_a_state_read_while_it_is_changed_is_a_copy() -> None:
    optimizer = stepped(adamw())
    read = OptimizerState(optimizer).state_dict()
    optimizer.state[optimizer.param_groups[0]["params"][0]]["more"] = 1
    assert "more" not in read["state"][0]


@pytest.mark.parametrize("spoil", [lambda groups: groups.pop(), lambda groups: groups[1]["params"].pop()])
def test_errors_are_torchs_and_nothing_is_loaded(spoil: Callable[[Any], object]) -> None:
    here = stepped(adamw())
    given = copy.deepcopy(stepped(adamw(1), 2).state_dict())
    spoil(given["param_groups"])
    before, values = snapshot(here.state_dict()), copy.deepcopy(here.state_dict())
    with pytest.raises(ValueError, match="loaded state dict") as ours:
        OptimizerState(here).prepare(given)
    with pytest.raises(ValueError, match="loaded state dict") as torchs:
        here.load_state_dict(given)
    assert str(ours.value) == str(torchs.value)
    assert snapshot(here.state_dict()) == before
    assert difference(here.state_dict(), values) == ""


# --------------------------------------------------------------------- those that have a say in it


def test_hooks_are_called_as_torch_calls_them() -> None:
    called: list[str] = []
    optimizer = stepped(adamw())
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: called.append("before"))
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: {**state, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda opt: called.append("after"))
    state = OptimizerState(optimizer)
    state.prepare(copy.deepcopy(state.state_dict()))()
    assert called == ["before", "after"]
    assert optimizer.state_dict()["state"] == {}
    optimizer.register_state_dict_pre_hook(lambda opt: called.append("reading"))
    optimizer.register_state_dict_post_hook(lambda opt, made: made.update(stamp=3))
    assert state.state_dict()["stamp"] == 3
    assert called[2:] == ["reading"]


class Scaled(torch.optim.SGD):
    """As optimizers with a loss scale do: more in the state than torch knows."""

    scale = 2.0

    def state_dict(self) -> Any:
        return {"inner": super().state_dict(), "scale": self.scale}

    def load_state_dict(self, state: Any) -> None:
        self.scale = state["scale"]
        super().load_state_dict(state["inner"])


def test_optimizers_with_functions_of_their_own_are_asked() -> None:
    source, here = (Scaled([nn.Parameter(torch.zeros(2))], lr=lr) for lr in (0.1, 0.2))
    source.scale = 7.0
    assert OptimizerState(source).state_dict()["scale"] == 7
    load(here, copy.deepcopy(OptimizerState(source).state_dict()))
    assert here.scale == 7
    assert here.param_groups[0]["lr"] == 0.1


class Containing(torch.optim.SGD):
    """Loads by torch's own load, and has one thing to do beside; its state is nested."""

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        for values in self.state.values():
            if "halved" in values:
                values["halved"] = values["halved"] * 2


def nested(value: float) -> dict[str, Any]:
    """Some state of float32, none of which bfloat16 could hold."""
    third, counts = torch.full((2,), value / 3), torch.tensor([2**24 + 1])
    parts = {"in_list": [third], "in_tuple": (third + 1, 5), "in_deque": deque([third + 2], 4), "in_dict": {"a": third}}
    return {"itself": third + 3, "counts": counts, "nan": torch.full((2,), float("nan")), **parts}


@pytest.mark.parametrize("here", [0, 1])
def test_what_an_optimizers_own_load_has_torch_cast_is_put_back(here: int) -> None:
    source, target, torchs = (Containing([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]) for _ in range(3))
    for optimizer in (source, target)[: 1 + here]:
        optimizer.state[optimizer.param_groups[0]["params"][0]] = nested(1.0 + (optimizer is target))
    given = copy.deepcopy(source.state_dict())
    load(target, copy.deepcopy(given))
    assert difference(target.state_dict(), given) == ""
    assert target.state[target.param_groups[0]["params"][0]]["in_deque"].maxlen == 4
    torchs.load_state_dict(copy.deepcopy(given))
    assert difference(torchs.state_dict(), given) != ""  # torch's own casts


def test_what_an_optimizers_own_load_makes_of_its_state_stays() -> None:
    source, target = (Containing([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]) for _ in range(2))
    source.state[source.param_groups[0]["params"][0]] = {"halved": torch.full((2,), 0.25)}
    load(target, copy.deepcopy(source.state_dict()))
    halved = target.state[target.param_groups[0]["params"][0]]["halved"]
    assert torch.equal(halved, torch.full((2,), 0.5, dtype=torch.bfloat16))


class Wrapper(Optimizer):
    """Somebody's own, that adds to what is in it: not to be looked through."""

    def __init__(self, optim: Optimizer) -> None:
        self.optim = optim
        self.count = 0

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optim.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optim.param_groups

    def state_dict(self) -> Any:
        return {**self.optim.state_dict(), "count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]
        self.optim.load_state_dict({name: value for name, value in state.items() if name != "count"})


def test_wrappers_that_add_to_the_state_are_asked() -> None:
    wrapper, here = Wrapper(stepped(adamw())), Wrapper(adamw(1))
    wrapper.count = 5
    load(here, copy.deepcopy(OptimizerState(wrapper).state_dict()))
    assert here.count == 5
    assert difference(here.state_dict(), wrapper.state_dict()) == ""


def test_torchfts_wrapper_is_looked_through() -> None:
    torchft = pytest.importorskip("torchft")
    adam, here = stepped(adamw()), stepped(adamw(1))
    wrapper = torchft.Optimizer(None, adam)
    assert difference(OptimizerState(wrapper).state_dict(), adam.state_dict()) == ""
    tensors = tensors_of(here.state_dict()["state"])
    load(torchft.Optimizer(None, here), copy.deepcopy(adam.state_dict()))
    assert all(one is other for one, other in zip(tensors_of(here.state_dict()["state"]), tensors, strict=True))
    assert difference(here.state_dict(), adam.state_dict()) == ""


# -------------------------------------------------------------------------- those that wrap another one


@pytest.fixture
def wrappers() -> Iterator[Any]:
    """torch's own, in a group of one rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script, which they use
        import torch.distributed.optim as found
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield found
    dist.destroy_process_group()


def test_a_zero_optimizer_goes_on_with_the_learning_rate_that_its_scheduler_has_set(wrappers: Any) -> None:
    """Its own groups are what a scheduler changes; the inner one's follow with the next step."""

    def made() -> tuple[nn.Linear, Any, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = wrappers.ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def step(model: nn.Linear, optimizer: Any, scheduler: Any) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()

    source, destination = made(), made()
    for _ in range(4):
        step(*source)
    destination[0].load_state_dict(source[0].state_dict())
    load(destination[1], copy.deepcopy(OptimizerState(source[1]).state_dict()))
    destination[2].load_state_dict(source[2].state_dict())
    for _ in range(3):
        assert destination[1].param_groups[0]["lr"] == source[1].param_groups[0]["lr"]
        step(*source)
        step(*destination)
        assert difference(list(destination[0].parameters()), list(source[0].parameters())) == ""


def test_a_wrapper_with_a_count_of_its_own_is_asked_itself(wrappers: Any) -> None:
    def made() -> Any:
        return wrappers.PostLocalSGDOptimizer(adamw(), PeriodicModelAverager(period=4, warmup_steps=100))

    source, destination = made(), made()
    source.averager.step = 5
    state = OptimizerState(source).state_dict()
    assert state["step"] == 5
    load(destination, copy.deepcopy(state))
    assert destination.averager.step == 5


def test_a_scalar_parameters_momentum_is_moved_to_its_device_and_a_count_is_not() -> None:
    there = torch.optim.AdamW([nn.Parameter(torch.ones((), device="meta")), nn.Parameter(torch.ones(2, device="meta"))])
    here = torch.optim.AdamW([nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2))])
    materialize(here)
    load(there, here.state_dict())
    scalar, vector = there.state.values()
    assert (scalar["exp_avg"].device.type, vector["exp_avg"].device.type) == ("meta", "meta")
    assert (scalar["step"].device.type, vector["step"].device.type) == ("cpu", "cpu")


def test_a_flag_that_the_state_lacks_stays_as_it_is_here() -> None:
    source, destination = adamw(1), adamw(2, foreach=True)
    state = source.state_dict()
    for group in state["param_groups"]:
        del group["foreach"]
    load(destination, state)
    assert [group["foreach"] for group in destination.param_groups] == [True, True]
