"""A whole job, bound: its tree, and a heal that lands in it and changes nothing else."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from helpers import difference, snapshot, succeed
from torch import nn

from ft_transport import Bound, bind
from training.modules import plain, randomized


class Loader:
    """As StatefulDataLoader: an object with the two functions."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Job:
    """A model with norms, AdamW, a chain of schedulers, a loader and a scaler."""

    def __init__(self, seed: int, compiled: bool = False, materialize: bool = True) -> None:
        self.module = randomized(plain(), seed)
        self.model: Any = torch.compile(self.module, backend="eager") if compiled else self.module
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=0.1 * seed)
        schedules = torch.optim.lr_scheduler
        self.scheduler = schedules.SequentialLR(
            self.adam,
            [schedules.LambdaLR(self.adam, lambda epoch: 0.5), schedules.CosineAnnealingLR(self.adam, 10)],
            milestones=[2],
        )
        self.loader = Loader(seed)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
        self.bound = bind(
            model=self.model,
            optimizers=self.adam,
            schedulers=self.scheduler,
            extra={"loader": self.loader, "scaler": self.scaler},
            materialize=materialize,
        )

    def train(self, steps: int) -> Job:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.loader.position)
            self.adam.zero_grad()
            self.module(torch.randn(8, 4, generator=generator)).square().mean().backward()
            self.adam.step()
            self.scheduler.step()
            self.loader.position += 1
        return self

    def by_hand(self) -> dict[str, Any]:
        return {
            "model": self.module.state_dict(),
            "optim": self.adam.state_dict(),
            "schedulers": self.scheduler.state_dict(),
            "loader": self.loader.state_dict(),
            "scaler": self.scaler.state_dict(),
        }


@pytest.mark.parametrize("compiled", [False, True])
def test_the_tree_is_the_one_that_is_written_by_hand(compiled: bool) -> None:
    job = Job(1, compiled)
    for _ in range(3):
        assert difference(job.bound.state_dict(), job.by_hand()) == ""
        job.train(1)


@pytest.mark.parametrize("compiled", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_heal_lands_in_place_and_training_goes_on_as_at_the_source(compiled: tuple[bool, bool], steps: int) -> None:
    source, here = Job(1, compiled[0]).train(steps), Job(2, compiled[1])
    end = succeed(source.bound.state_dict(), here.bound.state_dict).destination
    assert end.report.in_place_share == 1
    assert end.report.unexpected_keys == end.report.missing_keys == []
    versions = [param._version for param in here.module.parameters()]
    moments = [here.adam.state[param] for param in here.module.parameters() if param.requires_grad]
    here.bound.load_state_dict(end.result)
    assert [param._version for param in here.module.parameters()] == versions  # nothing was copied once more
    assert all(a is here.adam.state[p] for a, p in zip(moments, trained(here), strict=True))
    assert difference(here.bound.state_dict(), source.bound.state_dict()) == ""
    source.train(4), here.train(4)
    assert difference(here.bound.state_dict(), source.bound.state_dict()) == ""


def trained(job: Job) -> list[torch.Tensor]:
    return [param for param in job.module.parameters() if param.requires_grad]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_replica_heals_from_one_that_does_it_by_hand(in_place: bool) -> None:
    source, here = Job(1).train(3), Job(2, materialize=in_place)
    template = here.bound.state_dict if in_place else None
    here.bound.load_state_dict(succeed(source.by_hand(), template).destination.result)
    assert difference(here.by_hand(), source.by_hand()) == ""
    by_hand = Job(3)
    state = succeed(source.bound.state_dict(), by_hand.by_hand).destination.result
    by_hand.module.load_state_dict(state["model"])
    by_hand.adam.load_state_dict(state["optim"])
    assert difference(by_hand.by_hand()["optim"], source.by_hand()["optim"]) == ""


def test_the_optimizers_first_state_is_there_unless_not_wanted() -> None:
    assert Job(1).bound.state_dict()["optim"]["state"][1]["exp_avg"].eq(0).all()
    assert Job(1, materialize=False).bound.state_dict()["optim"]["state"] == {}


def test_where_it_cannot_be_made_a_warning_names_the_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    source, here = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizers = [torch.optim.LBFGS(each.parameters()) for each in (source, here)]
    with caplog.at_level(logging.WARNING, "ft_transport"):
        one, other = (bind(model=m, optimizers=o) for m, o in zip((source, here), optimizers, strict=True))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "LBFGS" in caplog.text
    assert "fresh memory" in caplog.text
    optimizers[0].step(lambda: closure(source))  # type: ignore[arg-type]
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert difference(other.state_dict(), one.state_dict()) == ""


def closure(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    loss = model(torch.ones(3, 2)).square().sum()
    loss.backward()
    return loss  # type: ignore[no-any-return]


def test_several_are_nested_as_they_were_given() -> None:
    def job(seed: int) -> Bound:
        one, other = randomized(plain(), seed), randomized(nn.Linear(2, 2), seed)
        return bind(
            model={"generator": one, "critic": other},
            optimizers=[torch.optim.SGD(one.parameters(), lr=seed), torch.optim.Adam(other.parameters(), lr=seed)],
            extra={"ema": randomized(plain(), seed + 1), "more": torch.optim.SGD(other.parameters(), lr=3.0 * seed)},
        )

    source, here = job(1), job(2)
    state = source.state_dict()
    assert list(state) == ["model", "optim", "ema", "more"]
    assert list(state["model"]) == ["generator", "critic"]
    assert [each["param_groups"][0]["lr"] for each in state["optim"]] == [1, 1]
    ends = succeed(state, here.state_dict)
    here.load_state_dict(ends.destination.result)
    assert ends.destination.report.in_place_share == 1
    assert difference(here.state_dict(), state) == ""


def test_parts_that_were_not_given_are_absent() -> None:
    assert bind().state_dict() == {}
    assert list(bind(model=nn.Linear(2, 2)).state_dict()) == ["model"]
    bind().load_state_dict({})


def test_torchfts_wrapper_and_other_kinds_of_optimizers() -> None:
    torchft = pytest.importorskip("torchft")
    model = nn.Linear(2, 2)
    adam = torch.optim.Adam(model.parameters())
    bound = bind(optimizers=torchft.Optimizer(None, adam))
    assert difference(bound.state_dict()["optim"], adam.state_dict()) == ""
    assert len(adam.state) == 2


def test_objects_that_are_no_optimizers_of_torch_are_asked(caplog: pytest.LogCaptureFixture) -> None:
    loader = Loader(3)
    bound = bind(optimizers=loader)
    assert bound.state_dict() == {"optim": {"position": 3}}
    assert "Loader" in caplog.text
    bound.load_state_dict({"optim": {"position": 5}})
    assert loader.position == 5


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": 5}, "model: expected a torch.nn.Module, got int"),
        ({"model": [nn.Linear(2, 2), 5]}, r"model\[1\]: expected a torch.nn.Module, got int"),
        ({"optimizers": 5}, r"optimizers: expected an object with state_dict\(\), got int"),
        ({"schedulers": {"a": object()}}, r"schedulers\['a'\]: expected an object with state_dict\(\), got object"),
        ({"extra": {"step": 5}}, r"extra\['step'\]: expected an object with state_dict\(\), got int"),
    ],
)
def test_what_is_no_such_part_is_named(parts: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        bind(**parts)


@pytest.mark.parametrize("name", ["model", "optim", "schedulers"])
def test_extra_has_names_of_its_own(name: str) -> None:
    with pytest.raises(ValueError, match=f"extra: '{name}' is the name of another part"):
        bind(extra={name: Loader()})


def _no_scheduler(state: Any) -> None:
    del state["schedulers"]


def _one_more(state: Any) -> None:
    state["other"] = 5


def _other_model(state: Any) -> None:
    del state["model"]["0.weight"]


def _other_groups(state: Any) -> None:
    state["optim"]["param_groups"].append({"params": []})


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_no_scheduler, ValueError, "state: missing schedulers, unexpected none; nothing was loaded"),
        (_one_more, ValueError, "state: missing none, unexpected other; nothing was loaded"),
        (_other_model, RuntimeError, 'Missing key.*"0.weight"'),
        (_other_groups, ValueError, "loaded state dict has a different number of parameter groups"),
    ],
    ids=["no scheduler", "one more", "other model", "other groups"],
)
def test_after_an_error_nothing_was_loaded(spoil: Any, error: type[Exception], message: str) -> None:
    source, here = Job(1).train(3), Job(2).train(1)
    state = copy.deepcopy(source.bound.state_dict())
    spoil(state)
    before, values = snapshot(here.by_hand()), copy.deepcopy(here.by_hand())
    with pytest.raises(error, match=message):
        here.bound.load_state_dict(state)
    assert snapshot(here.by_hand()) == before
    assert difference(here.by_hand(), values) == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{}], "optim: expected 2 of them, the state has 1; nothing was loaded"),
        ({}, "optim: expected a list, the state has a dict; nothing was loaded"),
        (None, "optim: expected a list, the state has None; nothing was loaded"),
        ([None, {}], r"optim\[0\]: expected a dict, the state has None; nothing was loaded"),
        ([{}, {}], r"the state of SGD has no 'state', expected as state_dict\(\) gives it"),
    ],
)
def test_another_number_of_optimizers_is_refused(given: Any, message: str) -> None:
    params = [nn.Parameter(torch.zeros(2))]
    bound = bind(optimizers=[torch.optim.SGD(params), torch.optim.SGD(params)])
    with pytest.raises(ValueError, match=message):
        bound.load_state_dict({"optim": given})


@pytest.mark.parametrize("given", [None, [], 5])
def test_what_is_no_state_at_all_is_refused(given: Any) -> None:
    bound = bind(optimizers=torch.optim.SGD([nn.Parameter(torch.zeros(2))]))
    with pytest.raises(ValueError, match=r"state: expected a dict, the state has .*; nothing was loaded"):
        bound.load_state_dict(given)
    with pytest.raises(ValueError, match=r"optim: expected a dict, the state has .*; nothing was loaded"):
        bound.load_state_dict({"optim": given})


def test_extra_parts_have_names() -> None:
    with pytest.raises(TypeError, match="extra: expected a mapping of names to objects, got list"):
        bind(extra=[plain()])  # type: ignore[arg-type]


def test_names_that_are_numbers_are_named_too() -> None:
    bound = bind(model={0: plain(), 1: plain()}, materialize=False)
    state = bound.state_dict()
    with pytest.raises(ValueError, match="model: missing 1, unexpected none; nothing was loaded"):
        bound.load_state_dict({"model": {0: state["model"][0]}})
