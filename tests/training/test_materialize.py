"""Optimizers go on from what was made for them as if it had not been made, and a heal finds all of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import bitwise_equal, difference, snapshot, succeed

from ft_transport import materialize
from training.jobs import CASES, FOUND, REFUSED, VARIANTS, Case, Job, job

STATEFUL = [case for case in CASES if case.name != "SGD" or case.options]
STEPS = 20
HEALED_AT = (0, 1, 7)  # steps of the source


def materialized(case: Case, seed: int = 0) -> Job:
    return job(case, seed, materialize)


def heal(source: Job, destination: Job) -> dict[str, Any]:
    """Every byte lands in the destination's own tensors; nothing is loaded."""
    end = succeed(source.state_dict(), destination.state_dict).destination
    assert end.report.in_place_share == 1
    assert end.report.unexpected_keys == []
    return end.result


def test_every_optimizer_of_torch_is_tried() -> None:
    assert {case.name for case in CASES} | REFUSED == set(FOUND)
    assert set(VARIANTS) <= set(FOUND)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_bit_equal_with_and_without(case: Case) -> None:
    """Beginning at a learning rate that a scheduler changes afterwards."""
    with_state, without = materialized(case), job(case)
    for number in range(STEPS):
        with_state.step(number)
        without.step(number)
        assert difference(with_state.trained, without.trained) == ""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_and_gradients_are_as_they_were(case: Case) -> None:
    made = job(case)
    made.params[0].grad = torch.ones_like(made.params[0])
    addresses = [param.data_ptr() for param in made.params]
    versions = [param._version for param in made.params]
    before, grads = snapshot(made.params), [param.grad for param in made.params]
    groups = copy.deepcopy(made.optimizer.state_dict()["param_groups"])
    numbers = torch.get_rng_state()
    materialize(made.optimizer)
    assert snapshot(made.params) == before
    assert [param.data_ptr() for param in made.params] == addresses
    assert [param._version for param in made.params] == versions
    assert all(param.grad is grad for param, grad in zip(made.params, grads, strict=True))
    assert made.params[0].grad.eq(1).all()
    assert bitwise_equal(made.optimizer.state_dict()["param_groups"], groups)
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_has_the_form_that_a_first_step_gives_it(case: Case) -> None:
    made, stepped = materialized(case), job(case)
    stepped.run(3, 4)  # in which all parameters have gradients but one
    assert forms(made) == forms(stepped)


def forms(made: Job) -> dict[int, dict[str, Any]]:
    """Of all states but that of the parameter that never gets a gradient."""
    states = made.optimizer.state_dict()["state"]
    states.pop(len(made.params) - 2, None)
    return {index: {name: form_of(value) for name, value in state.items()} for index, state in states.items()}


def form_of(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return type(value)
    return value.dtype, value.shape, value.stride(), value.device, value.layout, value.requires_grad


@pytest.mark.parametrize("case", STATEFUL, ids=str)
def test_a_healed_optimizer_goes_on_as_its_source_does(case: Case) -> None:
    """Healed before the first step, after it and later: by what lands in place alone, and with what is loaded."""
    source = materialized(case, seed=1)
    healed: dict[str, Job] = {}
    for number in range(STEPS):
        if number in HEALED_AT:
            healed[f"in place after {number}"] = heal_in_place(source, case)
            if loads_all(case):
                healed[f"loaded after {number}"] = heal_and_load(source, case)
        source.step(number)
        for name, destination in healed.items():
            destination.step(number)
            assert difference(destination.trained, source.trained) == "", f"{name}, in step {number}"
    assert len(healed) == len(HEALED_AT) * (2 if loads_all(case) else 1)


def loads_all(case: Case) -> bool:
    """Whether torch's own ``load_state_dict`` keeps the state: it casts the scalars of these two."""
    return case.dtype is torch.float32 or case.name not in ("NAdam", "ASGD")


def heal_in_place(source: Job, case: Case) -> Job:
    """A destination in which every byte has landed; Python numbers do not travel in place."""
    destination = materialized(case, seed=2)
    destination.stepped |= source.stepped
    heal(source, destination)
    assert difference(destination.params, source.params) == ""
    destination.scheduler.load_state_dict(source.scheduler.state_dict())
    for group, other in zip(destination.optimizer.param_groups, source.optimizer.param_groups, strict=True):
        group["lr"] = copy.deepcopy(other["lr"])
    return destination


def heal_and_load(source: Job, case: Case) -> Job:
    destination = materialized(case, seed=2)
    destination.stepped |= source.stepped
    received = heal(source, destination)
    assert difference(destination.params, source.params) == ""
    destination.optimizer.load_state_dict(received["optimizer"])
    destination.scheduler.load_state_dict(received["scheduler"])
    return destination


def test_who_has_stepped_and_loads_what_no_step_was_taken_from_begins_as_its_source_does() -> None:
    case = Case("SGD", {"momentum": 0.9, "dampening": 0.5})
    source, destination = materialized(case, seed=1), materialized(case, seed=2).run(0, 2)
    received = copy.deepcopy(source.state_dict())
    for mine, theirs in zip(destination.params, received["params"], strict=True):
        mine.data.copy_(theirs)
    destination.optimizer.load_state_dict(received["optimizer"])
    destination.scheduler.load_state_dict(received["scheduler"])
    destination.stepped.clear()
    for number in range(STEPS):
        source.step(number)
        destination.step(number)
        assert difference(destination.trained, source.trained) == ""


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_made_is_refused_by_name(name: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FOUND[name]([param])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=f"the state of {name} cannot be made before its first step"):
        materialize(optimizer)
    assert not optimizer.state
    assert param.grad is None


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got Linear"):
        materialize(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_parameter_without_memory_is_refused_and_the_others_get_nothing() -> None:
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="meta"))]
    optimizer = torch.optim.Adam(params)
    with pytest.raises(ValueError, match="parameter 1 of group 0 has no memory yet"):
        materialize(optimizer)
    assert not optimizer.state


def test_only_what_is_missing_is_made() -> None:
    made = job(Case("Adam", {})).run(0, 2)
    before = {param: dict(state) for param, state in made.optimizer.state.items()}
    for _ in range(2):
        materialize(made.optimizer)
        assert all(made.optimizer.state[p][name] is v for p, state in before.items() for name, v in state.items())
        assert len(made.optimizer.state) == len(made.params) - 1  # the frozen one has none
