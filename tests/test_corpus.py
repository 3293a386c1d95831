"""The corpus: what came back is what was there, bit for bit; in place means in place; nothing travels twice.

Each case fresh and in place and with each transport, over real Gloo groups between two threads.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from corpus import CASES
from corpus.case import Case
from corpus.compare import differences
from corpus.look import dotted, leaves, opened
from corpus.measure import allowance, distinct_nbytes, is_tensor, never_lands, reachable
from corpus.memory import Memory
from corpus.wire import TRANSPORTS, Outcome, Wire, wires

# What torch and torchao say about themselves when some kinds are made; none of it is about a transfer.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Sparse .* tensor support is in beta state",
        "The PyTorch API of nested tensors is in prototype stage",
        "torch.quantize_per",
        "TypedStorage is deprecated",
        "Please use DTensor instead and we are deprecating ShardedTensor",
        "'set_vital' is deprecated",
        "Please use .* to create a quantized tensor",
    )
]

CASE = pytest.mark.parametrize("case", CASES, ids=repr)


@pytest.fixture(scope="module")
def lines() -> Iterator[dict[str, Wire]]:
    with wires() as made:
        yield made


@pytest.fixture(params=TRANSPORTS)
def wire(request: pytest.FixtureRequest, lines: dict[str, Wire]) -> Wire:
    return lines[request.param]


def send(wire: Wire, case: Case, template: object = None, *, in_place: bool = False) -> tuple[Any, Outcome]:
    """Transfer the case's state; gives it as it is in another copy, and the outcome, which is a success."""
    state, expected = case.build(1), case.build(1)
    allowed = torch.serialization.safe_globals(list(case.allow)) if case.allow else contextlib.nullcontext()
    with allowed:
        outcome = wire.transfer(state, (lambda: template) if in_place else None)
    outcome.check()
    assert differences(state, expected) == [], "the source's own state has changed"
    return expected, outcome


# ------------------------------------------------------------------------------------------- transfers


@CASE
def test_fresh(case: Case, wire: Wire) -> None:
    expected, outcome = send(wire, case)
    assert differences(outcome.result, expected) == []
    check_wire(outcome, expected)
    assert outcome.report is not None
    assert outcome.report.complete
    assert outcome.report.in_place_share == 0


@CASE
def test_in_place(case: Case, wire: Wire) -> None:
    template = case.build(2)
    before = Memory(template)
    expected, outcome = send(wire, case, template, in_place=True)
    assert differences(outcome.result, expected) == []
    check_wire(outcome, expected)
    check_landing(case, before, outcome)


def check_wire(outcome: Outcome, state: object) -> None:
    assert outcome.source_report is not None
    assert outcome.source_report.nbytes_wire <= allowance(state)


def check_landing(case: Case, before: Memory, outcome: Outcome) -> None:
    report = outcome.report
    assert report is not None
    assert report.complete
    landed: list[torch.Tensor] = []
    total: list[Any] = []
    for path, leaf in leaves(outcome.result):
        name = dotted(path)
        if not is_tensor(leaf):
            continue
        total.append(leaf)
        mine = before.leaves.get(name)
        if mine is None or (case.either and name in report.not_in_place):
            continue
        if name in case.fresh or never_lands(mine):
            assert leaf is not mine, f"{name} must not be written to"
            assert name in report.not_in_place
            continue
        assert name not in report.not_in_place
        assert before.is_in_place(name, leaf), f"{name} is not the template's"
        landed.extend(before.parts[name].values())
    assert not before.changed_outside(landed)
    check_share(report.in_place_share, distinct_nbytes(landed), distinct_nbytes(total), outcome.result)


def is_object(value: object) -> bool:
    inside = opened(value)
    return inside is not None and inside.is_object


def check_share(share: float, landed: int, total: int, state: object) -> None:
    """The report's share agrees, where all bytes are those of tensors among the leaves."""
    if any(isinstance(value, np.ndarray) or is_object(value) for value in reachable(state)):
        assert 0.0 <= share <= 1.0
    else:
        assert share == pytest.approx(landed / total if total else 0.0, abs=0.005)


# ----------------------------------------------------------------------------------------- the yardstick


@pytest.fixture
def deep_recursion() -> Iterator[None]:
    # pytest's own frames are deep already, and pickle needs several for each level.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.usefixtures("lines", "deep_recursion")
@CASE
def test_torch_save_passes_the_same_comparison(case: Case) -> None:
    if case.torch_keeps:
        assert differences(saved_and_loaded(case.build(1)), case.build(1)) == []
    else:
        with pytest.raises((KeyError, RuntimeError)):
            saved_and_loaded(case.build(1))


def saved_and_loaded(state: object) -> object:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.usefixtures("lines")
@CASE
def test_builds_are_repeatable_and_seeds_differ(case: Case) -> None:
    assert differences(case.build(1), case.build(1)) == []
    assert bool(differences(case.build(2), case.build(1))) is case.varies
