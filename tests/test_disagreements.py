"""What does not fit arrives beside the template, which is not touched; or it is refused: all of it at once, on both
sides, before a byte moves.

And templates that cannot be written as they are: the values are right, and no neighbour is overwritten.
"""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from corpus.compare import differences
from corpus.kinds import Named, Scaled, dtensor, mesh, sharded
from corpus.look import dotted, leaves, raw_bytes
from corpus.measure import is_tensor
from corpus.memory import Memory
from corpus.python_values import Color, Sampler, schedule
from corpus.structure import Dict, Frozen, Pair
from corpus.wire import PROMPT, TRANSPORTS, Outcome, Wire, wires
from helpers import noise
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from ft_transport import LaneTransport, LocalProtocolError, PeerFailure, RemoteProtocolError, TransferError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Sparse .* tensor support is in beta state",
        "The PyTorch API of nested tensors is in prototype stage",
        "torch.quantize_per",
        "TypedStorage is deprecated",
        "Please use DTensor instead and we are deprecating ShardedTensor",
    )
]


@pytest.fixture(scope="module")
def lines() -> Iterator[dict[str, Wire]]:
    with wires() as made:
        yield made


@pytest.fixture(params=TRANSPORTS)
def wire(request: pytest.FixtureRequest, lines: dict[str, Wire]) -> Wire:
    return lines[request.param]


# --------------------------------------------------------------------------------------- disagreements


def _jagged(rows: int) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(rows, 3)], layout=torch.jagged)


def _nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])


def _quantized(dtype: torch.dtype) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.5, 0, dtype)


def _shards(*rows: int) -> Any:
    offsets = [[sum(rows[:i]), 0] for i in range(len(rows))]
    return sharded([noise((n, 4), n) for n in rows], offsets, (sum(rows), 4))


def _dtensor(local: tuple[int, ...], shape: tuple[int, ...], placement: Any = None) -> Any:
    return dtensor(noise(local, 1), mesh((2,)), (placement or Shard(0),), shape)


def _scaled(rows: int) -> Scaled:
    return Scaled(noise((rows, 6), 1, torch.int8), noise(rows, 2), 6)


# What the source has, what the template has, and words that the line must hold.
DISAGREEMENTS: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[str, ...]]] = {
    "shape": (lambda: noise((3, 4), 1), lambda: noise((4, 3), 2), ("(3, 4)", "(4, 3)")),
    "number of dimensions": (lambda: noise(12, 1), lambda: noise((3, 4), 2), ("(12,)", "(3, 4)")),
    "a dimension of one": (lambda: noise((3, 1), 1), lambda: noise(3, 2), ("(3, 1)", "(3,)")),
    "scalar and one element": (lambda: noise((), 1), lambda: noise(1, 2), ("()", "(1,)")),
    "empty and not": (lambda: torch.empty(0, 3), lambda: noise((2, 3), 2), ("(0, 3)", "(2, 3)")),
    "two empty ones": (lambda: torch.empty(0, 3), lambda: torch.empty(3, 0), ("(0, 3)", "(3, 0)")),
    "dtype": (lambda: noise(4, 1), lambda: noise(4, 2, torch.int32), ("float32", "int32")),
    "dtype of another width": (lambda: noise(4, 1), lambda: noise(8, 2, torch.bfloat16), ("float32", "bfloat16")),
    "dtype of a parameter": (
        lambda: torch.nn.Parameter(noise(4, 1)),
        lambda: torch.nn.Parameter(noise(4, 2, torch.float64)),
        ("float32", "float64"),
    ),
    "dtype without elements": (lambda: torch.empty(0), lambda: torch.empty(0, dtype=torch.int8), ("float32", "int8")),
    "value for a tensor": (lambda: 5, lambda: noise(3, 1), ("int", "float32")),
    "text for a tensor": (lambda: "text", lambda: noise(3, 1), ("str", "float32")),
    "none for a tensor": (lambda: None, lambda: noise(3, 1), ("None", "float32")),
    "tensor for a value": (lambda: noise(3, 1), lambda: 5, ("int", "float32")),
    "sparse for a plain one": (lambda: torch.eye(3).to_sparse(), lambda: torch.eye(3), ("sparse",)),
    "plain for a sparse one": (lambda: torch.eye(3), lambda: torch.eye(3).to_sparse(), ("sparse",)),
    "csr for coo": (lambda: torch.eye(3).to_sparse_csr(), lambda: torch.eye(3).to_sparse(), ("csr", "coo")),
    "shape of a sparse one": (lambda: torch.eye(3).to_sparse(), lambda: torch.eye(4).to_sparse(), ("(3, 3)", "(4, 4)")),
    "quantized for a plain one": (lambda: _quantized(torch.qint8), lambda: noise(3, 1, torch.int8), ("quantized",)),
    "dtype of a quantized one": (
        lambda: _quantized(torch.qint8),
        lambda: _quantized(torch.quint8),
        ("qint8", "quint8"),
    ),
    "jagged for a plain one": (lambda: _jagged(4), lambda: noise((2, 3), 1), ("float32",)),
    "plain for a jagged one": (lambda: noise((2, 3), 1), lambda: _jagged(4), ("nestedtensor", "(2, 3)")),
    "nested for a plain one": (_nested, lambda: noise((2, 3), 1), ("float32", "nested")),
    "plain for a nested one": (lambda: noise((2, 3), 1), _nested, ("float32", "nested")),
    "rows of a jagged one": (lambda: _jagged(4), lambda: _jagged(5), ("(6, 3)", "(7, 3)")),
    "dtensor for a plain one": (lambda: _dtensor((2, 3), (4, 3)), lambda: noise((2, 3), 1), ("dtensor", "tensor")),
    "plain for a dtensor": (lambda: noise((2, 3), 1), lambda: _dtensor((2, 3), (4, 3)), ("dtensor", "tensor")),
    "local shape of a dtensor": (
        lambda: _dtensor((2, 3), (3, 3)),
        lambda: _dtensor((1, 3), (3, 3)),
        ("(2, 3)", "(1, 3)"),
    ),
    "global shape of a dtensor": (
        lambda: _dtensor((2, 3), (4, 3)),
        lambda: _dtensor((2, 3), (3, 3)),
        ("(4, 3)", "(3, 3)"),
    ),
    "placement": (
        lambda: _dtensor((2, 3), (4, 3)),
        lambda: _dtensor((2, 3), (2, 3), Replicate()),
        ("shard", "replicate"),
    ),
    "placement alone": (
        lambda: _dtensor((2, 2), (4, 2), Shard(0)),
        lambda: dtensor(noise((2, 2), 1), mesh((2,)), (Shard(1),), (4, 2)),
        ("0", "1"),
    ),
    "number of shards": (lambda: _shards(1, 2), lambda: _shards(3), ("3", "4")),
    "sizes of shards": (lambda: _shards(1, 2), lambda: _shards(2, 1), ("1", "2")),
    "global size of a sharded one": (lambda: _shards(2), lambda: _shards(3), ("2", "3")),
    "sharded for a plain one": (lambda: _shards(2), lambda: noise((2, 4), 1), ("sharded", "tensor")),
    "inner shape of a subclass": (lambda: _scaled(4), lambda: _scaled(5), ("(4, 6)", "(5, 6)")),
    "subclass for a plain one": (lambda: _scaled(4), lambda: noise((4, 6), 1), ("(4, 6)",)),
}


def template_with_neighbours(**more: Any) -> dict[str, Any]:
    """A template with leaves that agree, and memory beside them that nobody may touch."""
    storage = noise((10, 8), 90)
    agreeing = {"rows": storage[2:5], "parameter": torch.nn.Parameter(noise((3, 3), 91)), "columns": storage[6:, 2:4]}
    return {"agrees": agreeing, **more}


def state_for(template: dict[str, Any], **more: Any) -> dict[str, Any]:
    agreeing = {name: leaf.detach().clone() for name, leaf in template["agrees"].items()}
    for i, leaf in enumerate(agreeing.values()):
        leaf.copy_(noise(tuple(leaf.shape), i))
    return {"agrees": agreeing, **more}


def refused(wire: Wire, state: object, template: object, **options: Any) -> Outcome:
    """A transfer that must be refused by the destination, and leave everything as it was."""
    before = Memory(template)
    if wire.name != "distributed":  # it always refuses
        options = {"on_mismatch": "refuse", **options}
    with torch.serialization.safe_globals([Scaled]):
        outcome = wire.transfer(state, lambda: template, **options)
    assert isinstance(outcome.error, RemoteProtocolError)
    assert outcome.seconds < PROMPT
    assert not outcome.error.torn
    assert not before.changed, "the template has changed"
    after = dict(leaves(template))
    assert all(after[path] is leaf for path, leaf in before.leaves.items())
    assert outcome.report is not None
    assert outcome.source_report is not None
    assert outcome.report.peers[0].nbytes == 0
    if wire.name == "distributed":  # its wire has one direction: the source learns that, and not why
        assert isinstance(outcome.source_error, PeerFailure)
        return outcome
    assert outcome.source_report.peers[0].nbytes == 0, "payload has left"
    assert outcome.source_report.peers[0].outcome == "refused"
    return outcome


def line_of(text: str, path: str, paths: list[str]) -> str:
    """What a text says about one of the paths that it lists."""
    assert f"{path}: " in text, f"{path} is not named in: {text}"
    begin = text.index(f"{path}: ")
    ends = [text.index(f"{other}: ", begin + 1) for other in paths if f"{other}: " in text[begin + 1 :]]
    return text[begin : min(ends, default=len(text))]


def source_text(outcome: Outcome) -> str:
    """What the source says of the refusal; without torchft it is not told, and the destination's text stands in."""
    assert outcome.source_report is not None
    if outcome.source_report.transport.startswith("distributed"):
        return str(outcome.error)
    return f"{outcome.source_report.peers[0].reason} {outcome.source_error or ''}"


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_a_disagreement_is_refused_on_both_sides(wire: Wire, kind: str) -> None:
    source, mine, words = DISAGREEMENTS[kind]
    template = template_with_neighbours(deep=[{"leaf": mine()}])
    outcome = refused(wire, state_for(template, deep=[{"leaf": source()}]), template)
    for text in (str(outcome.error), source_text(outcome)):
        line = line_of(text, "deep.0.leaf", [])
        assert "expected" in line
        for word in words:
            assert word.lower() in line.lower()
        assert "agrees" not in text


def test_all_disagreements_are_listed_at_once(wire: Wire) -> None:
    kinds = {name.replace(" ", "_"): (source, mine) for name, (source, mine, _) in DISAGREEMENTS.items()}
    template = template_with_neighbours(**{name: mine() for name, (_, mine) in kinds.items()})
    # One leaf more than the template has: where its tree fits into the source's is then found by its paths and shapes.
    state = state_for(template, **{name: source() for name, (source, _) in kinds.items()}, more=1)
    outcome = refused(wire, state, template)
    for text in (str(outcome.error), source_text(outcome)):
        for name in kinds:
            assert "expected" in line_of(text, name, list(kinds))


def test_a_thousand_disagreements_are_all_listed(wire: Wire) -> None:
    template = template_with_neighbours(leaves=[noise(2, i) for i in range(1000)])
    outcome = refused(wire, state_for(template, leaves=[noise(3, i) for i in range(1000)]), template)
    for text in (str(outcome.error), source_text(outcome)):
        assert all(f"leaves.{i}: expected" in text for i in range(1000))


@pytest.mark.parametrize("side", ["missing", "extra"])
def test_strict_refuses_what_one_side_lacks(lines: dict[str, Wire], side: str) -> None:
    template = template_with_neighbours(**({"more": {"x": noise(2, 5)}} if side == "extra" else {}))
    state = state_for(template, **({"more": {"x": noise(2, 6), "y": noise(1, 7)}} if side == "missing" else {}))
    outcome = refused(lines["PGTransport"], state, template, strict=True)
    for text in (str(outcome.error), source_text(outcome)):
        assert "more.x" in text


def test_without_strict_missing_leaves_are_made_and_extra_ones_listed(wire: Wire) -> None:
    template = template_with_neighbours(extra={"x": noise(2, 5)})
    state = state_for(template, missing={"y": noise(3, 6), "n": 1})
    before = Memory(template)
    outcome = wire.transfer(state, lambda: template)
    outcome.check()
    check_values(outcome.result, state)
    assert outcome.report is not None
    assert outcome.report.unexpected_keys == ["missing.y"]
    assert outcome.report.missing_keys == ["extra.x"]
    assert not before.changed_outside(list(template["agrees"].values()))


def test_an_empty_slot_of_the_template_lacks_the_tensor(wire: Wire) -> None:
    """As LBFGS and EMA have them before their first step. Where the source's is empty the template's memory stays."""
    template = {"a": noise(3, 1), "slot": None, "deep": [None, noise(2, 2)], "plain": None}
    state = {"a": noise(3, 3), "slot": noise(4, 4), "deep": [noise(1, 5), noise(2, 6)], "plain": 5}
    outcome = wire.transfer(state, lambda: template)
    outcome.check()
    check_values(outcome.result, state)
    assert outcome.report is not None
    assert outcome.report.unexpected_keys == ["slot", "deep.0"]
    assert outcome.result["a"].data_ptr() == template["a"].data_ptr()
    text = str(refused(wire, {"a": noise(3, 3), "slot": None}, {"a": noise(3, 1), "slot": noise(4, 2)}).error)
    assert "slot: expected" in text


def test_strict_refuses_an_empty_slot(lines: dict[str, Wire]) -> None:
    template = template_with_neighbours(slot=None)
    outcome = refused(lines["PGTransport"], state_for(template, slot=noise(2, 3)), template, strict=True)
    assert "slot: unexpected key, expected in the template, source has it" in str(outcome.error)


# ------------------------------------------------------------------------------- a leaf that arrives fresh


@pytest.fixture(params=["PGTransport", "LaneTransport"])
def torchft_wire(request: pytest.FixtureRequest, lines: dict[str, Wire]) -> Wire:
    return lines[request.param]


def arrives(wire: Wire, state: object, template: object, *, mismatched: set[str], **options: Any) -> Outcome:
    """A transfer that must succeed, with these leaves new and nothing written to the template's own."""
    before = Memory(template)
    with torch.serialization.safe_globals([Scaled]):
        outcome = wire.transfer(state, lambda: template, **options)
    outcome.check()
    report = outcome.report
    assert report is not None
    check_values(outcome.result, state)
    assert set(report.mismatched) == mismatched
    mine = dict(leaves(template))
    landed = []
    for path, leaf in leaves(outcome.result):
        if path in mine and not mismatched & {dotted(path[:end]) for end in range(len(path) + 1)}:
            landed += before.parts.get(path, {}).values()
            assert not is_tensor(leaf) or dotted(path) in report.not_in_place or before.is_in_place(path, leaf)
        elif path in mine and is_tensor(leaf):
            assert leaf is not mine[path]
    assert not before.changed_outside(landed), "a leaf that disagrees, or bytes that are no leaf's, have changed"
    return outcome


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_a_leaf_that_disagrees_arrives_fresh(torchft_wire: Wire, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    source, mine, words = DISAGREEMENTS[kind]
    template = template_with_neighbours(deep=[{"leaf": mine()}])
    state = state_for(template, deep=[{"leaf": source()}])
    outcome = arrives(torchft_wire, state, template, mismatched={"deep.0.leaf"})
    assert outcome.report is not None
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for text in (outcome.report.mismatched["deep.0.leaf"], warning):
        assert "expected" in text
        for word in words:
            assert word.lower() in text.lower()
    assert "agrees" not in warning
    casts = kind in ("dtype", "dtype of a parameter", "dtype without elements")
    assert ("load_state_dict casts it without a word" in warning) is casts


def test_all_disagreements_arrive_at_once(torchft_wire: Wire) -> None:
    kinds = {name.replace(" ", "_"): (source, mine) for name, (source, mine, _) in DISAGREEMENTS.items()}
    template = template_with_neighbours(**{name: mine() for name, (_, mine) in kinds.items()})
    state = state_for(template, **{name: source() for name, (source, _) in kinds.items()}, more=1)
    arrives(torchft_wire, state, template, mismatched=set(kinds))


def test_a_metric_that_grows_and_an_empty_blob(torchft_wire: Wire) -> None:
    """In torchft's envelope, as the Manager sends it."""
    metric: dict[str, Any] = {"seen": [noise(7, 3)], "_extra_state": torch.empty(0, dtype=torch.uint8)}
    template = template_with_neighbours(metric=metric)
    theirs = {"seen": [noise(32, 1), noise(7, 2)], "_extra_state": noise(170, 4, torch.uint8)}
    state = {"user": {"default": state_for(template, metric=theirs)}, "torchft": {"step": 7, "batches_committed": 9}}
    outcome = torchft_wire.transfer(state, lambda: template)
    outcome.check()
    check_values(outcome.result, state)
    report = outcome.report
    assert report is not None
    assert report.mismatched == {
        "user.default.metric.seen.0": "expected float32 (7,), source has float32 (32,)",
        "user.default.metric._extra_state": "expected uint8 (0,), source has uint8 (170,)",
    }
    assert report.unexpected_keys == ["user.default.metric.seen.1"]
    assert report.nbytes_fresh == (32 + 7) * 4 + 170
    assert report.not_in_place == {}


def test_strict_refuses_what_disagrees(lines: dict[str, Wire]) -> None:
    template = template_with_neighbours(more=noise(3, 1))
    outcome = refused(
        lines["PGTransport"], state_for(template, more=noise(4, 1)), template, strict=True, on_mismatch="fresh"
    )
    assert "more: expected float32 (3,), source has float32 (4,)" in str(outcome.error)


def test_a_template_of_which_nothing_fits_is_refused(torchft_wire: Wire) -> None:
    template = {"a": noise(3, 1), "b": noise(4, 2), "lr": 0.5}
    state = {"a": noise(4, 3), "b": noise(3, 4), "lr": 0.5}
    outcome = refused(torchft_wire, state, template, on_mismatch="fresh")
    assert "a: expected" in str(outcome.error)
    assert "b: expected" in str(outcome.error)


def test_a_function_chooses_for_each_leaf(torchft_wire: Wire) -> None:
    asked: list[tuple[str, str, str]] = []

    def choose(path: str, expected: str, got: str) -> Literal["fresh", "refuse"]:
        asked.append((path, expected, got))
        return "fresh" if path.startswith("metric") else "refuse"

    template = template_with_neighbours(metric=noise(3, 1))
    state = state_for(template, metric=noise(4, 2))
    arrives(torchft_wire, state, template, mismatched={"metric"}, on_mismatch=choose)
    assert asked == [("metric", "float32 (3,)", "float32 (4,)")]
    template["weight"] = noise(2, 3)
    state["weight"] = noise(2, 4, torch.bfloat16)
    outcome = refused(torchft_wire, state, template, on_mismatch=choose)
    assert str(outcome.error).count("expected") == 1
    assert "weight: expected float32 (2,), source has bfloat16 (2,)" in str(outcome.error)


def test_a_function_that_chooses_something_else_ends_the_transfer(lines: dict[str, Wire]) -> None:
    template = template_with_neighbours(metric=noise(3, 1))
    before = Memory(template)
    state = state_for(template, metric=noise(4, 2))
    outcome = lines["PGTransport"].transfer(state, lambda: template, on_mismatch=lambda *_: "skip")
    assert isinstance(outcome.error, LocalProtocolError)
    assert "expected 'fresh' or 'refuse' for metric, got 'skip'" in str(outcome.error)
    assert not before.changed
    with pytest.raises(ValueError, match="on_mismatch: expected"):
        LaneTransport[Any](timedelta(seconds=1), torch.device("cpu"), on_mismatch=cast(Any, "skip"))


def test_a_tie_with_a_leaf_that_disagrees(torchft_wire: Wire) -> None:
    """The template's tie is written by neither; the source's arrives as one object."""
    weight, tied = torch.nn.Parameter(noise((6, 4), 1)), noise((3, 4), 2)
    template = template_with_neighbours(a=weight, b=weight, c=weight.data[1:3], d=noise((3, 4), 5), e=noise(3, 6))
    state = state_for(template, a=noise((6, 4), 3), b=noise((8, 4), 4), c=noise((2, 4), 7), d=tied, e=tied)
    outcome = arrives(torchft_wire, state, template, mismatched={"b", "e"})
    assert outcome.report is not None
    assert set(outcome.report.not_in_place) == {"a", "c"}
    assert outcome.result["d"] is outcome.result["e"] is template["d"]


def test_a_leaf_of_which_one_part_disagrees_is_new_as_a_whole(torchft_wire: Wire) -> None:
    """The codes agree, the scales do not: not even the codes are written to."""
    mine = Scaled(noise((4, 6), 5, torch.int8), noise(2, 6), 6)
    template = template_with_neighbours(scaled=mine)
    arrives(torchft_wire, state_for(template, scaled=_scaled(4)), template, mismatched={"scaled"})


def test_a_new_dtensor_lives_on_the_mesh_of_the_one_that_disagrees(torchft_wire: Wire) -> None:
    on = mesh((2,), ("only",))
    template = {"a": dtensor(noise((2, 3), 1), on, (Shard(0),), (4, 3)), "b": noise(2, 2)}
    there = DeviceMesh("cpu", [0, 1], mesh_dim_names=("only",), _init_backend=False)
    state = {"a": dtensor(noise((5, 3), 3), there, (Shard(0),), (10, 3)), "b": noise(2, 4)}
    outcome = arrives(torchft_wire, state, template, mismatched={"a"})
    assert outcome.result["a"].device_mesh is on


def _trained(optimizer: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, steps: int, seed: int) -> Any:
    model = torch.nn.Linear(4, 2).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    made = optimizer(model.parameters())

    def loss() -> torch.Tensor:
        made.zero_grad()
        value = model(torch.ones(3, 4, dtype=dtype)).float().square().sum()
        value.backward()
        return value

    for _ in range(steps):
        made.step(loss)
    return model, made


def _state_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("loaded", ["source", "template", "neither"])
@pytest.mark.parametrize("optimizer", [torch.optim.NAdam, torch.optim.ASGD])
def test_an_optimizer_whose_scalars_torch_has_cast(torchft_wire: Wire, optimizer: Any, loaded: str) -> None:
    """torch's ``load_state_dict`` casts float32 scalars to the dtype of bf16 parameters; what arrives is never cast."""
    sides = [_trained(optimizer, torch.bfloat16, 2, seed) for seed in (1, 2)]
    for (_, made), side in zip(sides, ("source", "template"), strict=True):
        if side == loaded:
            made.load_state_dict(made.state_dict())
    state, template = (_state_of(*side) for side in sides)
    outcome = torchft_wire.transfer(state, lambda: template)
    outcome.check()
    check_values(outcome.result, state)  # dtypes and bytes of the source's
    assert outcome.report is not None
    assert bool(outcome.report.mismatched) is (loaded != "neither")
    assert all("bfloat16" in reason for reason in outcome.report.mismatched.values())
    model, made = sides[1]
    model.load_state_dict(outcome.result["model"])
    made.load_state_dict(outcome.result["optimizer"])


@pytest.mark.parametrize("steps", [(3, 0), (3, 1), (1, 3)])
def test_lbfgs_whose_numbers_become_tensors(torchft_wire: Wire, steps: tuple[int, int]) -> None:
    def lbfgs(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.01, max_iter=1)

    sides = [_trained(lbfgs, torch.float32, number, number) for number in steps]
    state, template = (_state_of(*side) for side in sides)
    outcome = torchft_wire.transfer(state, lambda: template)
    outcome.check()
    check_values(outcome.result, state)
    model, made = sides[1]
    model.load_state_dict(outcome.result["model"])
    made.load_state_dict(outcome.result["optimizer"])


@pytest.mark.parametrize("ran", [("source",), ("template",), ("source", "template")])
def test_caches_of_jagged_tensors_are_not_compared(torchft_wire: Wire, ran: tuple[str, ...]) -> None:
    """Two forward passes that asked for different lengths: the values land in place, the caches are the source's."""

    def jagged(*rows: int) -> Any:
        return torch.nested.nested_tensor([torch.ones(n, 3) * n for n in rows], layout=torch.jagged)

    sides = {"source": jagged(1, 5), "template": jagged(2, 4)}
    for side in ran:
        torch.softmax(sides[side], 1)
    template, state = ({"jagged": sides[side], "plain": noise(2, i)} for i, side in enumerate(("template", "source")))
    values = sides["template"].values().data_ptr()
    outcome = torchft_wire.transfer(state, lambda: template)
    outcome.check()
    assert outcome.report is not None
    assert (outcome.report.mismatched, outcome.report.not_in_place) == ({}, {})
    got = outcome.result["jagged"]
    assert got.values().data_ptr() == values
    assert [row.shape[0] for row in got.unbind()] == [1, 5]
    assert got.__tensor_flatten__()[0] == sides["source"].__tensor_flatten__()[0]
    assert got._max_seqlen == 5
    assert got._min_seqlen == 1


@pytest.mark.parametrize("shadow", [False, True])
def test_leaves_that_the_callback_copies_are_told(
    torchft_wire: Wire, shadow: bool, caplog: pytest.LogCaptureFixture
) -> None:
    mine = {"kept": noise((30, 40), 1), "copied": noise((40, 30), 2)}
    calls = []

    def callback() -> object:
        calls.append(1)
        return {"kept": mine["kept"], "copied": mine["copied"].clone()}

    state = {"kept": noise((30, 40), 3), "copied": noise((40, 30), 4)}
    outcome = torchft_wire.transfer(state, callback, shadow=shadow)
    outcome.check()
    check_values(outcome.result, state)
    report = outcome.report
    assert report is not None
    assert "gives a copy" in report.not_in_place.pop("copied")
    assert report.not_in_place == {}
    assert report.nbytes_in_place == (0 if shadow else 4800)
    assert report.nbytes_copied == (4800 if shadow else 0)
    assert "copies of 1 leaf, the first is copied" in caplog.text
    assert len(calls) == 2


# --------------------------------------------------------------------- templates that are hard to write to


def check_values(result: object, state: object) -> None:
    """Every leaf has the source's value, whatever it shares with others."""
    got, expected = ({dotted(path): leaf for path, leaf in leaves(tree)} for tree in (result, state))
    assert list(got) == list(expected)
    for name, leaf in expected.items():
        if type(leaf) in (torch.Tensor, torch.nn.Parameter) and leaf.layout == torch.strided and not leaf.is_quantized:
            assert raw_bytes(got[name]) == raw_bytes(leaf), f"{name} is wrong"
        else:
            assert differences(got[name], leaf) == []


def land(wire: Wire, state: Any, template: Any, *, left_alone: set[str]) -> Outcome:
    """A transfer that must succeed, leave these leaves of the template alone, and overwrite nobody's neighbour."""
    before = Memory(template)
    outcome = wire.transfer(state, lambda: template)
    outcome.check()
    report = outcome.report
    assert report is not None
    check_values(outcome.result, state)
    landed: list[torch.Tensor] = []
    for path, leaf in leaves(outcome.result):
        name = dotted(path)
        if not is_tensor(leaf):
            continue
        if name in report.not_in_place:
            assert leaf is not before.leaves[path]
        else:
            assert before.is_in_place(path, leaf), f"{name} is neither in place nor named"
            landed.extend(before.parts[path].values())
    assert left_alone <= set(report.not_in_place)
    assert not before.changed_outside(landed), "bytes that are no leaf's have changed"
    return outcome


def test_a_tie_that_the_template_lacks(wire: Wire) -> None:
    tied = noise((3, 4), 1)
    template = {"a": noise((3, 4), 2), "b": noise((3, 4), 3), "c": noise(2, 4)}
    land(wire, {"a": tied, "b": tied, "c": noise(2, 5)}, template, left_alone=set())


def test_views_that_the_template_does_not_share(wire: Wire) -> None:
    base = noise((6, 4), 1)
    template = {"base": noise((6, 4), 2), "rows": noise((2, 4), 3), "column": noise(6, 4)}
    land(wire, {"base": base, "rows": base[1:3], "column": base[:, 2]}, template, left_alone=set())


def test_a_tie_that_the_source_lacks(wire: Wire) -> None:
    tied = noise((3, 4), 1)
    outcome = land(wire, {"a": noise((3, 4), 2), "b": noise((3, 4), 3)}, {"a": tied, "b": tied}, left_alone={"b"})
    assert outcome.result["a"] is not outcome.result["b"]


def test_tied_parameters_that_the_source_has_not_tied(wire: Wire) -> None:
    tied = torch.nn.Parameter(noise((3, 4), 1))
    state = {"a": torch.nn.Parameter(noise((3, 4), 2)), "b": torch.nn.Parameter(noise((3, 4), 3))}
    land(wire, state, {"a": tied, "b": tied}, left_alone={"b"})


def test_a_template_tie_whose_values_agree_at_the_source(wire: Wire) -> None:
    tied, equal = noise((3, 4), 1), noise((3, 4), 2)
    land(wire, {"a": equal, "b": equal.clone()}, {"a": tied, "b": tied}, left_alone=set())


@pytest.mark.parametrize(("first", "second"), [((0, 6), (4, 10)), ((0, 10), (3, 5)), ((2, 4), (2, 4))])
def test_template_views_that_overlap(wire: Wire, first: tuple[int, int], second: tuple[int, int]) -> None:
    base = noise((12, 3), 1)
    template = {"a": base[slice(*first)], "b": base[slice(*second)], "apart": base[11:]}
    state = {name: noise(tuple(leaf.shape), i) for i, (name, leaf) in enumerate(template.items())}
    outcome = land(wire, state, template, left_alone=set())
    assert outcome.report is not None
    assert {"a", "b"} & set(outcome.report.not_in_place)
    assert "apart" not in outcome.report.not_in_place


def test_views_that_overlap_elsewhere_than_at_the_source(wire: Wire) -> None:
    source, mine = noise((12, 3), 1), noise((12, 3), 2)
    state = {"a": source[:6], "b": source[4:10]}
    land(wire, state, {"a": mine[:6], "b": mine[3:9]}, left_alone=set())


def test_ties_of_other_pairs(wire: Wire) -> None:
    source, mine = noise((3, 4), 1), noise((3, 4), 2)
    state = {"a": source, "b": source, "c": noise((3, 4), 3)}
    land(wire, state, {"a": mine, "b": noise((3, 4), 4), "c": mine}, left_alone=set())


def test_columns_of_one_matrix_are_no_overlap(wire: Wire) -> None:
    base = noise((8, 10), 1)
    template = {"a": base[:, :3], "b": base[:, 3:7], "c": base[:, 9]}
    state = {name: noise(tuple(leaf.shape), i) for i, (name, leaf) in enumerate(template.items())}
    outcome = land(wire, state, template, left_alone=set())
    assert outcome.report is not None
    assert outcome.report.not_in_place == {}


def test_expanded_template_leaves(wire: Wire) -> None:
    base = noise((1, 4), 1)
    template = {"row": base.expand(5, 4), "scalar": noise((), 2).expand(7), "plain": noise(3, 3)}
    state = {"row": noise((5, 4), 4), "scalar": noise(7, 5), "plain": noise(3, 6)}
    land(wire, state, template, left_alone={"row", "scalar"})


def test_template_leaves_that_overlap_themselves(wire: Wire) -> None:
    template = {"windows": noise(10, 1).as_strided((4, 4), (2, 1)), "plain": noise(3, 2)}
    land(wire, {"windows": noise((4, 4), 3), "plain": noise(3, 4)}, template, left_alone={"windows"})


def test_sparse_and_quantized_template_leaves(wire: Wire) -> None:
    def build(scale: float) -> dict[str, torch.Tensor]:
        return {
            "coo": (torch.eye(3) * scale).to_sparse(),
            "csr": (torch.eye(3) * scale).to_sparse_csr(),
            "quantized": torch.quantize_per_tensor(torch.ones(4) * scale, scale, 1, torch.qint8),
            "plain": torch.ones(2) * scale,
        }

    land(wire, build(0.5), build(0.25), left_alone={"coo", "csr", "quantized"})


# Views of a matrix of 6 x 4 that differ in strides only.
STRIDED: dict[str, Callable[[int], torch.Tensor]] = {
    "contiguous": lambda seed: noise((6, 4), seed),
    "transposed": lambda seed: noise((4, 6), seed).t(),
    "columns": lambda seed: noise((6, 9), seed)[:, 2:6],
    "every second row": lambda seed: noise((12, 4), seed)[::2],
    "every second element": lambda seed: noise((6, 8), seed)[:, ::2],
    "transposed columns": lambda seed: noise((5, 8), seed)[:4, 1:7].t(),
    "offset": lambda seed: noise((9, 4), seed)[2:8],
}


@pytest.mark.parametrize("mine", STRIDED)
@pytest.mark.parametrize("theirs", STRIDED)
def test_other_strides_land_in_place(wire: Wire, theirs: str, mine: str) -> None:
    template = {"leaf": STRIDED[mine](2), "parameter": torch.nn.Parameter(STRIDED[mine](3))}
    state = {"leaf": STRIDED[theirs](4), "parameter": torch.nn.Parameter(STRIDED[theirs](5))}
    outcome = land(wire, state, template, left_alone=set())
    assert outcome.report is not None
    assert outcome.report.not_in_place == {}
    assert outcome.report.in_place_share == 1.0


def test_channels_last_lands_in_contiguous(wire: Wire) -> None:
    image = noise((2, 3, 4, 5), 1).to(memory_format=torch.channels_last)
    outcome = land(wire, {"image": image}, {"image": noise((2, 3, 4, 5), 2)}, left_alone=set())
    assert outcome.report is not None
    assert outcome.report.not_in_place == {}


_READ_ONLY = """
import json, sys, tempfile, warnings
import numpy as np, torch
from corpus.wire import wires
warnings.simplefilter("ignore")
with tempfile.NamedTemporaryFile() as file:
    np.arange(6000, dtype=np.float32).tofile(file.name)
    mapped = np.memmap(file.name, dtype=np.float32, mode="r")
    state = {"mapped": torch.ones(3000), "part": torch.full((286,), 2.0), "plain": torch.ones(3)}
    seen = {}
    with wires() as lines:
        for name in sys.argv[1:]:
            template = {"mapped": torch.from_numpy(mapped[:3000]), "part": torch.from_numpy(mapped)[4000::7]}
            template["plain"] = torch.zeros(3)
            outcome = lines[name].transfer(state, lambda: template)
            outcome.check()
            seen[name] = {
                "right": all(torch.equal(outcome.result[name], leaf) for name, leaf in state.items()),
                "plain in place": outcome.result["plain"] is template["plain"],
                "named": sorted(outcome.report.not_in_place),
                "untouched": bool((mapped == np.arange(6000)).all()),
            }
    print(json.dumps(seen))
"""


def in_a_process(script: str, *arguments: str) -> Any:
    """What a script prints last, as JSON: for memory whose touch kills the process."""
    command = [sys.executable, "-c", script, *arguments]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_read_only_mapping_is_left_alone() -> None:
    expected = {"right": True, "plain in place": True, "named": ["mapped", "part"], "untouched": True}
    assert in_a_process(_READ_ONLY, *TRANSPORTS) == dict.fromkeys(TRANSPORTS, expected)


# Tensors that have a shape, and no memory behind it.
_NO_MEMORY = """
import json, sys
import torch
from corpus.wire import wires
freed = torch.ones(1000)
freed.untyped_storage().resize_(0)
seen = []
with wires() as lines:
    for name in sys.argv[1:]:
        for odd in (freed, torch._to_functional_tensor(torch.ones(3))):
            error = lines[name].transfer({"ok": torch.ones(3), "odd": odd}).source_error
            seen.append([name, type(error).__name__, "odd: " in str(error)])
print(json.dumps(seen))
"""


def test_a_tensor_without_memory_is_refused_by_name() -> None:
    expected = [[name, "LocalProtocolError", True] for name in TRANSPORTS for _ in ("freed", "functional")]
    assert in_a_process(_NO_MEMORY, *TRANSPORTS) == expected


def test_a_parameter_takes_what_the_source_sends_as_a_tensor(wire: Wire) -> None:
    template = {"weight": torch.nn.Parameter(noise((3, 4), 1)), "tied": None}
    template["tied"] = template["weight"]
    values = noise((3, 4), 2)
    outcome = land(wire, {"weight": values, "tied": values}, template, left_alone=set())
    assert outcome.report is not None
    assert outcome.report.in_place_share == 1.0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_graph_that_saved_the_template_errs(lines: dict[str, Wire], transport: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    lines[transport].transfer({"weight": torch.full((3,), 2.0)}, lambda: {"weight": weight}, settle=True).check()
    assert weight.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_new_dtensor_lives_on_the_mesh_of_the_template(wire: Wire) -> None:
    on = mesh((2,), ("mine",))
    template = {"a": dtensor(noise((2, 3), 1), on, (Shard(0),), (4, 3))}
    there = DeviceMesh("cpu", [0, 1], mesh_dim_names=("mine",), _init_backend=False)
    state = {name: dtensor(noise((2, 3), i), there, (Shard(0),), (4, 3)) for i, name in enumerate("ab")}
    outcome = wire.transfer(state, lambda: template)
    outcome.check()
    assert outcome.result["a"] is template["a"]
    assert outcome.result["b"].device_mesh is on


def test_a_template_on_meta_gets_new_memory(wire: Wire) -> None:
    template = {"weight": torch.nn.Parameter(torch.empty(3, device="meta")), "plain": noise(2, 1)}
    state = {"weight": torch.nn.Parameter(noise(3, 2)), "plain": noise(2, 3)}
    outcome = wire.transfer(state, lambda: template)
    if outcome.error is None:
        assert differences(outcome.result, state) == []
        assert outcome.report is not None
        assert "weight" in outcome.report.mismatched
    else:
        assert isinstance(outcome.error, RemoteProtocolError)
        assert "weight: expected" in str(outcome.error)


# ------------------------------------------------------------------------------- what cannot be encoded


def _local_object() -> Any:
    class Local:
        pass

    return Local()


def _generator() -> Any:
    return (i for i in range(3))


UNENCODABLE: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda step: step,
    "lock": threading.Lock,
    "condition": threading.Condition,
    "generator": _generator,
    "instance of a local class": _local_object,
    "local class": lambda: type(_local_object()),
    "module": lambda: json,
    "new module": lambda: types.ModuleType("made_here"),
    "thread": threading.Thread,
    "local function": lambda: _generator().__next__,
    "lambda in a tuple": lambda: (1, lambda step: step),
    "lock in a set": lambda: {threading.Lock()},
    "lambda in an object": lambda: Sampler(1, schedule=lambda step: step),
    "lambda in a dataclass": lambda: Frozen(lambda step: step),
}


def check_unencodable(wire: Wire, value: object, path: str) -> None:
    template = template_with_neighbours()
    before = Memory(template)
    outcome = wire.transfer(state_for(template, deep=[{"bad": value}]), lambda: template)
    assert isinstance(outcome.source_error, LocalProtocolError)
    assert path in outcome.source_error.message
    assert outcome.source_report is not None
    assert outcome.source_report.peers[0].nbytes == 0
    assert isinstance(outcome.error, TransferError)
    assert outcome.source_error.message in str(outcome.error), "the receiver has not learned the reason"
    assert outcome.seconds < PROMPT
    assert not before.changed


@pytest.mark.parametrize("kind", UNENCODABLE)
def test_what_cannot_be_encoded_stops_the_transfer_at_once(wire: Wire, kind: str) -> None:
    check_unencodable(wire, UNENCODABLE[kind](), "deep.0.bad")


def test_an_open_file_stops_the_transfer_at_once(wire: Wire) -> None:
    with Path(__file__).open("rb") as file:
        check_unencodable(wire, file, "deep.0.bad")


def test_a_socket_stops_the_transfer_at_once(wire: Wire) -> None:
    with socket.socket() as end:
        check_unencodable(wire, end, "deep.0.bad")


def test_an_attribute_of_a_tensor_that_cannot_be_encoded_stops_the_transfer(wire: Wire) -> None:
    weight = noise(3, 1)
    weight.hook = lambda: None  # type: ignore[attr-defined]
    check_unencodable(wire, weight, "deep.0.bad")


def test_all_that_cannot_be_encoded_is_named(wire: Wire) -> None:
    state = {"ok": noise(3, 1), "a": threading.Lock(), "b": [1, lambda: None], "c": {"d": _generator()}}
    outcome = wire.transfer(state)
    assert isinstance(outcome.source_error, LocalProtocolError)
    for text in (outcome.source_error.message, str(outcome.error)):
        for path in ("a: ", "b.1: ", "c.d: "):
            assert path in text
        assert "ok: " not in text


def _itself() -> Any:
    loop: list[Any] = [1]
    loop.append(loop)
    return loop


# What torch.save does not save, or saves by a detour: it may arrive, or be refused by name.
EITHER: dict[str, Callable[[], Any]] = {
    "list that contains itself": _itself,
    "memory format": lambda: torch.channels_last,
    "limits of a dtype": lambda: torch.finfo(torch.float32),
    "mkldnn": lambda: torch.ones(3, 3).to_mkldnn(),
    "memoryview": lambda: memoryview(b"abc"),
}


@pytest.mark.parametrize("kind", EITHER)
def test_what_torch_cannot_save_arrives_or_is_refused_by_name(wire: Wire, kind: str) -> None:
    state = {"tensor": noise(3, 1), "odd": EITHER[kind]()}
    outcome = wire.transfer(state)
    assert outcome.seconds < PROMPT
    if outcome.error is None:
        assert type(outcome.result["odd"]) is type(state["odd"])
    else:
        assert isinstance(outcome.source_error, LocalProtocolError)
        assert "odd" in outcome.source_error.message
        assert outcome.source_error.message in str(outcome.error)


# A user's class of each sort that a leaf or a container can have.
NOT_ALLOWED: dict[str, Callable[[], Any]] = {
    "Sampler": lambda: Sampler(3),
    "Color": lambda: Color.RED,
    "Pair": lambda: Pair(1, 2),
    "Frozen": lambda: Frozen(noise(3, 1)),
    "Named": lambda: noise(3, 1).as_subclass(Named),
    "schedule": lambda: schedule,
    "Dict": lambda: Dict(a=1),
}


@pytest.mark.parametrize("name", NOT_ALLOWED)
def test_a_class_that_is_not_allowed_is_refused_by_name(lines: dict[str, Wire], name: str) -> None:
    template = template_with_neighbours()
    state = state_for(template, deep=[NOT_ALLOWED[name]()])
    outcome = refused(lines["PGTransport"], state, template)
    for text in (str(outcome.error), source_text(outcome)):
        assert "deep.0" in text
        assert name in text
        assert "safe_globals" in text


def test_after_a_refusal_the_next_transfer_succeeds(wire: Wire) -> None:
    template = template_with_neighbours(more=noise(3, 1))
    refused(wire, state_for(template, more=noise(4, 1)), template)
    state = state_for(template, more=noise(3, 2))
    outcome = wire.transfer(state, lambda: template)
    outcome.check()
    check_values(outcome.result, state)


def test_paths_of_a_peer_are_escaped(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    """A key may hold what a terminal would obey; it is the peer's choice."""
    evil = "a\x1b[2J\nb"
    with caplog.at_level(logging.WARNING, "ft_transport"):
        outcome = wire.transfer({"ok": noise(3, 1), evil: noise(4, 1)}, lambda: {"ok": noise(3, 2), evil: noise(5, 2)})
    report = outcome.report
    assert report is not None
    told = [caplog.text.replace("\n", ""), report.summary(), *report.mismatched, str(outcome.error or "")]
    assert any("a\\x1b[2J\\nb" in text for text in told)
    assert not any(evil in text or "\x1b" in text for text in told)
