"""The corpus: what came back is what was there, bit for bit; in place means in place; nothing travels twice.

Each case fresh and in place and with each transport, over real Gloo groups between two threads.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from corpus import CASES, WARNINGS
from corpus.case import Case
from corpus.compare import differences
from corpus.kinds import Scaled, dtensor, mesh, sharded
from corpus.look import dotted, leaves, opened
from corpus.measure import allowance, distinct_nbytes, is_tensor, never_lands, reachable
from corpus.memory import Memory
from corpus.python_values import Sampler
from corpus.structure import Pair
from corpus.wire import TRANSPORTS, Outcome, Wire, wires
from helpers import noise
from torch.distributed.tensor import Partial, Shard

from ft_transport import state_digest

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in WARNINGS]

CASE = pytest.mark.parametrize("case", CASES, ids=repr)
# Lanes share all that knows of kinds with PGTransport, so there one case in five is tried; all with this variable.
ONE_IN = 1 if os.environ.get("FT_TRANSPORT_ALL_CASES") else 5
CASE_AND_TRANSPORT = pytest.mark.parametrize(
    ("case", "transport"),
    [(c, t) for i, c in enumerate(CASES) for t in TRANSPORTS if t != "LaneTransport" or i % ONE_IN == 0],
    ids=repr,
)


@pytest.fixture(scope="module")
def lines() -> Iterator[dict[str, Wire]]:
    with wires() as made:
        yield made


@pytest.fixture
def wire(transport: str, lines: dict[str, Wire]) -> Wire:
    return lines[transport]


def send(wire: Wire, case: Case, template: object = None, *, in_place: bool = False) -> tuple[Any, Outcome]:
    """Transfer the case's state; gives it, and the outcome, which is a success."""
    state = case.build(1)
    allowed = torch.serialization.safe_globals(list(case.allow)) if case.allow else contextlib.nullcontext()
    with allowed:
        outcome = wire.transfer(state, (lambda: template) if in_place else None)
    outcome.check()
    return state, outcome


def check_digest(wire: Wire, outcome: Outcome, state: object) -> None:
    """What was healed has the digest of its source. With one transport: what arrived is the same with each."""
    if wire.name == "PGTransport":
        got, expected = state_digest(outcome.result), state_digest(state)
        assert got.diff(expected) == []
        assert got == expected


# ------------------------------------------------------------------------------------------- transfers


@CASE_AND_TRANSPORT
def test_fresh(case: Case, wire: Wire) -> None:
    state, outcome = send(wire, case)
    expected = case.build(1)
    assert differences(outcome.result, expected) == []
    assert differences(state, expected) == [], "the source's own state has changed"
    check_wire(outcome, expected)
    assert outcome.report is not None
    assert outcome.report.complete
    assert outcome.report.in_place_share == 0
    check_digest(wire, outcome, state)


@CASE_AND_TRANSPORT
def test_in_place(case: Case, wire: Wire) -> None:
    template = case.build(2)
    before = Memory(template)
    state, outcome = send(wire, case, template, in_place=True)
    assert differences(outcome.result, state) == []
    check_wire(outcome, state)
    check_landing(case, before, outcome)
    check_digest(wire, outcome, state)


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
        mine = before.leaves.get(path)
        if mine is None or (case.either and name in report.not_in_place):
            continue
        if name in case.fresh or never_lands(mine):
            assert leaf is not mine, f"{name} must not be written to"
            assert name in report.not_in_place
            continue
        assert name not in report.not_in_place
        assert before.is_in_place(path, leaf), f"{name} is not the template's"
        landed.extend(before.parts[path].values())
    assert not before.changed_outside(landed)
    if not case.either:
        check_share(report.in_place_share, distinct_nbytes(landed), distinct_nbytes(total), outcome.result)


def has_bytes_of_its_own(value: object) -> bool:
    """Whether a value that is no tensor may count as bytes that travel."""
    inside = opened(value)
    return isinstance(value, (np.ndarray, torch.Generator)) or (inside is not None and inside.is_object)


def check_share(share: float, landed: int, total: int, state: object) -> None:
    """The report's share agrees, where all bytes are those of tensors among the leaves."""
    if any(map(has_bytes_of_its_own, reachable(state))):
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
        try:
            saved_and_loaded(case.build(1))
        except (KeyError, RuntimeError):
            return
        pytest.skip("this torch keeps it")


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


# ------------------------------------------------------------------------------- the comparison bites


def rich() -> dict[str, Any]:
    """A state with something of everything that the comparison looks at."""
    base = noise((6, 4), 1)
    ordered: Any = OrderedDict(a=1, b=2)
    ordered._metadata = {"version": 1}
    buffer = torch.nn.Buffer(noise(2, 7))
    shared = [1]
    return {
        "base": base,
        "row": base[2],
        "twice": base,
        "view": base.view(-1),
        "weight": torch.nn.Parameter(noise((2, 3), 2)),
        "transposed": noise((2, 3), 3).t(),
        "expanded": noise((1, 3), 4).expand(2, 3),
        "nan": torch.tensor([0x7FC00001, 0], dtype=torch.int32).view(torch.float32),
        "buffer": buffer,
        "coo": torch.eye(2).to_sparse(),
        "csr": torch.eye(2).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.5, 1, torch.qint8),
        "jagged": torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(3, 2)], layout=torch.jagged),
        "dtensor": dtensor(noise((2, 3), 5), mesh((2,)), (Shard(0),), (4, 3)),
        "sharded": sharded([noise((1, 4), 1), noise((2, 4), 2)], [[0, 0], [1, 0]], (3, 4)),
        "scaled": Scaled(noise((2, 3), 1, torch.int8), noise(2, 2), 3),
        "meta": torch.empty(2, 3, device="meta"),
        "ordered": ordered,
        "default": defaultdict(list, {1: []}),
        "deque": deque([1], maxlen=3),
        "pair": Pair(1, [2]),
        "sampler": Sampler(3, order=[1, 2]),
        "shared": [shared, shared],
        "apart": [[1], [1]],
        "number": 1,
        "float": 0.0,
        "text": "a",
        "size": torch.Size([2]),
        "array": np.arange(4, dtype=np.int32),
        "set": {1, 2},
    }


def _set(name: str, value: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda state: state.__setitem__(name, value())


def _reorder(state: Any) -> None:
    state["number"] = state.pop("number")


# By name: what is changed, one thing at a time.
MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "a byte": lambda s: s["weight"].data.view(-1)[1:2].view(torch.uint8)[0].bitwise_xor_(1),
    "a payload of nan": lambda s: s["nan"].view(torch.int32)[0].add_(1),
    "minus zero": lambda s: s["nan"].view(torch.int32)[1].fill_(-(1 << 31)),
    "dtype": _set("weight", lambda: torch.nn.Parameter(noise((2, 3), 2).view(torch.int32), requires_grad=False)),
    "shape": _set("weight", lambda: torch.nn.Parameter(noise((3, 2), 2))),
    "no parameter": _set("weight", lambda: noise((2, 3), 2).requires_grad_()),
    "requires grad": lambda s: s["weight"].requires_grad_(False),
    "dense strides": lambda s: s.__setitem__("transposed", s["transposed"].contiguous()),
    "expanded": lambda s: s.__setitem__("expanded", s["expanded"].contiguous()),
    "an attribute of a tensor": lambda s: setattr(s["buffer"], "persistent", False),
    "one more attribute": lambda s: setattr(s["row"], "origin", 1),
    "a view that is a copy": lambda s: s.__setitem__("row", s["row"].clone()),
    "all views that are copies": lambda s: s.update(row=s["row"].clone(), view=s["view"].clone()),
    "a view elsewhere": lambda s: s["base"].__setitem__(3, s["base"][2]) or s.__setitem__("row", s["base"][3]),
    "a tie that is a view": lambda s: s.__setitem__("twice", s["base"].view(6, 4)),
    "a tie too many": lambda s: s.__setitem__("weight", s["weight"]) or s.__setitem__("extra", s["weight"]),
    "values of a sparse one": lambda s: s["coo"]._values().mul_(2),
    "indices of a sparse one": lambda s: s["coo"]._indices()[0, 0].fill_(1),
    "coalesced": lambda s: s["coo"]._coalesced_(False),
    "columns of a csr": lambda s: s["csr"].col_indices().fill_(0),
    "csc": _set("csr", lambda: torch.eye(2).to_sparse_csc()),
    "scale": _set("quantized", lambda: torch.quantize_per_tensor(torch.ones(2), 0.25, 1, torch.qint8)),
    "zero point": _set(
        "quantized", lambda: torch._make_per_tensor_quantized_tensor(torch.tensor([3, 3]).char(), 0.5, 2)
    ),
    "offsets": _set(
        "jagged", lambda: torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(2, 2)], layout=torch.jagged)
    ),
    "placement": _set("dtensor", lambda: dtensor(noise((2, 3), 5), mesh((2,)), (Partial(),), (4, 3))),
    "global shape": _set("dtensor", lambda: dtensor(noise((2, 3), 5), mesh((2,)), (Shard(0),), (3, 3))),
    "mesh": _set("dtensor", lambda: dtensor(noise((2, 3), 5), mesh((3,)), (Shard(0),), (4, 3))),
    "names of a mesh": _set("dtensor", lambda: dtensor(noise((2, 3), 5), mesh((2,), ("x",)), (Shard(0),), (4, 3))),
    "local bytes": lambda s: s["dtensor"]._local_tensor.view(torch.uint8)[0, 0].bitwise_xor_(1),
    "shards": _set("sharded", lambda: sharded([noise((2, 4), 1), noise((1, 4), 2)], [[0, 0], [2, 0]], (3, 4))),
    "bytes of a shard": lambda s: s["sharded"].local_shards()[1].tensor.view(torch.uint8)[0, 0].bitwise_xor_(1),
    "context of a subclass": lambda s: setattr(s["scaled"], "block", 4),
    "part of a subclass": lambda s: s["scaled"].scale.view(torch.uint8)[0].bitwise_xor_(1),
    "strides of meta": _set("meta", lambda: torch.empty(3, 2, device="meta").t()),
    "meta made real": _set("meta", lambda: torch.empty(2, 3)),
    "order of keys": _reorder,
    "a key of another type": lambda s: s["default"].__setitem__(True, s["default"].pop(1)),
    "type of a mapping": lambda s: s.__setitem__("default", dict(s["default"])),
    "default factory": lambda s: setattr(s["default"], "default_factory", dict),
    "attribute of a mapping": lambda s: setattr(s["ordered"], "_metadata", {"version": 2}),
    "no attribute of a mapping": lambda s: delattr(s["ordered"], "_metadata"),
    "maxlen": _set("deque", lambda: deque([1], maxlen=4)),
    "tuple for a namedtuple": _set("pair", lambda: (1, [2])),
    "attribute of an object": lambda s: s["sampler"].order.append(3),
    "one list that was two": lambda s: s.__setitem__("apart", [s["apart"][0]] * 2),
    "two lists that were one": lambda s: s.__setitem__("shared", [[1], [1]]),
    "true for one": _set("number", lambda: True),
    "one point zero for one": _set("number", lambda: 1.0),
    "minus zero as a number": _set("float", lambda: -0.0),
    "bytes for text": _set("text", lambda: b"a"),
    "tuple for a size": _set("size", lambda: (2,)),
    "byte of an array": lambda s: s["array"].__setitem__(0, 7),
    "dtype of an array": lambda s: s.__setitem__("array", s["array"].view(np.uint32)),
    "type in a set": _set("set", lambda: {True, 2}),
    "one leaf less": lambda s: s.pop("number"),
    "one leaf more": lambda s: s.update(more=None),
}


@pytest.mark.usefixtures("lines")
@pytest.mark.parametrize("change", MUTATIONS)
def test_the_comparison_finds_each_change(change: str) -> None:
    state = rich()
    MUTATIONS[change](state)
    assert differences(state, rich()) != []
    assert differences(rich(), state) != []


def test_the_comparison_finds_neighbours_that_are_no_longer_neighbours() -> None:
    flat, wider = noise(9, 1), noise(12, 2)
    wider[:5], wider[8:] = flat[:5], flat[5:]
    assert differences([wider[:5], wider[8:]], [flat[:5], flat[5:]]) != []
    assert differences([flat[:5].clone(), flat[5:]], [flat[:5], flat[5:]]) != []


@pytest.mark.usefixtures("lines")
def test_the_comparison_leaves_open_what_nobody_can_see() -> None:
    base, wide = noise((6, 8), 1), noise((6, 3), 2)
    cut = base[:, 2:5]
    closed = torch.empty(6, 3).copy_(cut)
    assert differences({"gaps": closed, "all": rich()}, {"gaps": cut, "all": rich()}) == []
    far = noise((100, 4), 3)
    near = torch.cat([far[3:5], far[90:]])
    assert differences([near[:2], near[2:]], [far[3:5], far[90:]]) == []
    lazy = torch.view_as_complex(wide.nan_to_num()[:, :2].contiguous()).conj()
    assert differences(lazy.resolve_conj(), lazy) == []


def test_what_travels_is_counted_once() -> None:
    base = noise((100, 10), 1)
    assert distinct_nbytes([base, base.t(), base[3:7], base.view(-1)]) == 4000
    assert distinct_nbytes([base[:, 3:5], base[:, 4:6], base[7]]) == 4 * (100 * 3 + 7)
    assert distinct_nbytes([noise((1, 5), 2).expand(9, 5), torch.empty(7, device="meta"), torch.empty(0)]) == 20
