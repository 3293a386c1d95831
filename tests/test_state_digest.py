"""Replicas that hold the same have the same digest, however it lies in memory; whatever differs is named."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from corpus import CASES, WARNINGS
from corpus.case import Case
from corpus.kinds import dtensor, mesh
from corpus.structure import Dict
from corpus.wire import wires
from helpers import noise
from test_corpus import rich
from torch.distributed.tensor import Shard

from ft_transport import LocalProtocolError, StateDigest, state_digest
from ft_transport._state.kinds.base import flatten_leaf
from ft_transport.state_digest import _PIECE_BYTES, _Reader

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in WARNINGS]


@pytest.fixture(scope="module")
def wire() -> Any:
    with wires() as made:
        yield made["PGTransport"]


# ------------------------------------------------------------------------------- the same is the same
#
# That a state which was healed has the digest of its source is seen in test_corpus.py, where each is healed.


@pytest.mark.usefixtures("wire")
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_another_seed_gives_another_digest_and_the_same_one_the_same(case: Case) -> None:
    digest = state_digest(case.build(1))
    assert digest == state_digest(case.build(1))
    other = state_digest(case.build(2))
    assert (digest == other) is not case.varies
    assert bool(digest.diff(other)) is case.varies


def test_what_a_training_run_cannot_see_does_not_count() -> None:
    matrix = noise((6, 4), 1)
    flat = noise(40, 2)
    plain = {"a": matrix, "b": {"x": flat[3:13], "y": flat[20:30]}, "c": 1, "d": {1: [2.0]}}
    other = OrderedDict(
        d=defaultdict(list, {1: [2.0]}),
        c=1,
        b={"y": flat[20:30].clone(), "x": torch.nn.Parameter(flat[3:13].clone())},
        a=matrix.t().contiguous().t(),
    )
    assert state_digest(plain) == state_digest(other)
    assert state_digest(plain).diff(state_digest(other)) == []


def views() -> dict[str, Callable[[], torch.Tensor]]:
    big = noise((3, _PIECE_BYTES // 8), 5)
    cube = noise((5, 7, 9), 6)
    return {
        "transposed": lambda: noise((64, 33), 1).t(),
        "a column": lambda: cube[:, 3, 2],
        "every other": lambda: cube[::2, 1::3, 2:8:2],
        "permuted": lambda: cube.permute(2, 0, 1),
        "expanded": lambda: noise((1, 9), 2).expand(4, 9),
        "more than a piece": lambda: big.t(),
        "complex": lambda: noise((8, 6), 3).view(torch.complex64).t(),
        "half": lambda: noise((8, 6), 3).to(torch.bfloat16).t(),
        "bytes": lambda: noise((8, 6), 3, torch.uint8).t(),
        "one element": lambda: cube[1, 2, 3],
        "none": lambda: cube[:0],
    }


@pytest.mark.parametrize("name", views())
def test_strides_do_not_count(name: str) -> None:
    view = views()[name]()
    assert state_digest({"t": view}) == state_digest({"t": view.clone(memory_format=torch.contiguous_format)})
    if view.numel():
        changed = view.clone(memory_format=torch.contiguous_format)
        changed.view(-1).view(torch.uint8)[-1].bitwise_xor_(1)
        assert state_digest({"t": view}).diff(state_digest({"t": changed})) == [
            f"t: values differ ({state_digest({'t': view}).by_path['t'].what})"
        ]


@pytest.mark.parametrize("shape", [(3, _PIECE_BYTES // 8 + 5), (7,), ()], ids=str)
def test_pieces_make_the_digest_of_the_whole(shape: tuple[int, ...]) -> None:
    """What is on an accelerator is read in pieces, as what has gaps is."""
    tensor = noise(shape, 1)
    assert f"{_Reader()._read_in_pieces(tensor):016x}" == state_digest({"t": tensor}).by_path["t"].digest


@pytest.mark.usefixtures("wire")
def test_strides_and_grad_do_not_count_in_other_kinds_either() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    turned = matrix.t().contiguous().t()
    plain = torch.quantize_per_tensor(matrix, 0.5, 0, torch.qint8)
    quantized = [plain, plain.t().contiguous().t()]
    placed = [dtensor(tensor, mesh((2,)), (Shard(0),), (4, 3)) for tensor in (matrix, turned)]
    metas = [torch.empty(2, 3, device="meta"), torch.nn.Parameter(torch.empty(3, 2, device="meta").t())]
    assert quantized[0].stride() != quantized[1].stride()
    for one, other in (quantized, placed, metas):
        assert state_digest([one]).diff(state_digest([other])) == []


_CHILD = """
import sys, torch
sys.path.insert(0, "tests")
from ft_transport import state_digest
names = [f"name{i}" for i in range(50)]
state = {"set": set(names), "deep": (frozenset(names), [{1, 2}, {"a": {3, "b"}}]), "k": {("x", 1): 2.5}}
print(state_digest(state).whole)
"""


class Settings:
    """Somebody's own: pickled."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def test_whether_equal_texts_are_one_object_does_not_count() -> None:
    def settings(text: Callable[[str], str], last: str = "adam") -> Any:
        # A name of an attribute is the same object as the text in a program, and so are equal texts in it.
        made = Settings(mode=text("mode"), first=text("adam"), then=[text("adam"), {"adam": text("first")}])
        made.last = text(last)
        tensor = torch.ones(2)
        tensor.note = made  # type: ignore[attr-defined]
        return {"settings": made, "set": {("adam", Fraction(1, 3))}, "tensor": tensor}

    one, other = settings(sys.intern), settings(lambda text: "".join(list(text)))
    assert state_digest(one) == state_digest(other) == state_digest(copy.deepcopy(one))
    lines = state_digest(one).diff(state_digest(settings(sys.intern, "mode")))
    assert [line.partition(":")[0] for line in lines] == ["settings", "tensor"]


def test_which_object_is_meant_counts_and_bytes_that_look_like_a_pickle_are_bytes() -> None:
    shared, twin = Settings(rate=1), Settings(rate=1)
    one, other = Settings(a=shared, b=shared, c=twin), Settings(a=shared, b=twin, c=twin)
    assert state_digest({"it": one}) != state_digest({"it": other})
    looks = [b"\x80\x02h\x05.", b"\x80\x02h\x06.", b"\x80\x02\xff."]
    assert len({state_digest({"bytes": data}).whole for data in looks}) == 3


def test_the_digest_is_the_same_in_every_process() -> None:
    """Sets have another order in each process, because text has another hash."""
    found = {
        subprocess.run(
            [sys.executable, "-c", _CHILD], capture_output=True, text=True, timeout=100, check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


# --------------------------------------------------------------------------------- what differs is named


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda state: state.__setitem__(name, value)


# What is changed, and the lines that say so.
CHANGES: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "a bit": (
        lambda s: s["weight"].data.view(-1)[1:2].view(torch.uint8)[0].bitwise_xor_(1),
        ["weight: values differ (float32 (2, 3))"],
    ),
    "a bit of a shared storage": (
        lambda s: s["base"].view(torch.uint8)[2, 0].bitwise_xor_(1),
        [f"{name}: values differ (float32 {shape})"
         for name, shape in (("base", "(6, 4)"), ("row", "(4,)"), ("twice", "(6, 4)"), ("view", "(24,)"))],
    ),
    "minus zero": (
        lambda s: s["nan"].view(torch.int32)[1].fill_(-(1 << 31)), ["nan: values differ (float32 (2,))"],
    ),
    "a payload of nan": (lambda s: s["nan"].view(torch.int32)[0].add_(1), ["nan: values differ (float32 (2,))"]),
    "dtype": (
        _set("row", noise(4, 1).to(torch.float64)), ["row: float32 (4,) here, float64 (4,) there"],
    ),
    "shape": (_set("row", noise((4, 1), 1)), ["row: float32 (4,) here, float32 (4, 1) there"]),
    "a number": (_set("number", 2), ["number: int 1 here, int 2 there"]),
    "true for one": (_set("number", True), ["number: int 1 here, bool True there"]),
    "minus zero as a number": (_set("float", -0.0), ["float: float 0.0 here, float -0.0 there"]),
    "bytes for text": (_set("text", b"a"), ["text: str 'a' here, bytes of 1 there"]),
    "a long text": (_set("text", "a" * 50), ["text: str 'a' here, str of 50 there"]),
    "one leaf less": (lambda s: s.pop("number"), ["number: int 1 only here"]),
    "one leaf more": (lambda s: s.update(more=None), ["more: None only there"]),
    "an empty dict more": (lambda s: s.update(more={}), ["more: empty dict only there"]),
    "tuple for a size": (_set("size", (2,)), ["size: Size of 1 here, tuple of 1 there"]),
    "maxlen": (
        _set("deque", deque([1], maxlen=4)), ["deque: deque of 1 with maxlen 3 here, deque of 1 with maxlen 4 there"],
    ),
    "tuple for a namedtuple": (
        _set("pair", (1, [2])),
        ["pair.first: int 1 only here", "pair.second.0: int 2 only here",
         "pair: corpus.structure.Pair of 2 here, tuple of 2 there", "pair.second: list of 1 only here",
         "pair.0: int 1 only there", "pair.1.0: int 2 only there", "pair.1: list of 1 only there"],
    ),
    "attribute of a mapping": (
        lambda s: setattr(s["ordered"], "_metadata", {"version": 2}),
        ["ordered._metadata.version: int 1 here, int 2 there"],
    ),
    "byte of an array": (
        lambda s: s["array"].__setitem__(0, 7), ["array: values differ (array <i4 (4,) of uint8 (4, 4))"],
    ),
    "type in a set": (_set("set", {True, 2}), ["set: values differ (set)"]),
}  # fmt: skip


@pytest.mark.usefixtures("wire")
@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_named(change: str) -> None:
    state = rich()
    apply, lines = CHANGES[change]
    apply(state)
    before, after = state_digest(rich()), state_digest(state)
    assert before.diff(after) == lines
    assert before != after
    assert len(after.diff(before)) == len(lines)


KINDS = ["coo", "csr", "quantized", "jagged", "dtensor", "sharded", "scaled", "buffer", "sampler"]


@pytest.mark.usefixtures("wire")
@pytest.mark.parametrize("name", KINDS)
def test_a_bit_in_a_leaf_of_any_kind_is_found(name: str) -> None:
    state = rich()
    _, tensors = flatten_leaf(state[name])
    for tensor in tensors:
        if not tensor.numel():
            continue
        tensor.detach().view(-1).view(torch.uint8)[0].bitwise_xor_(1)
    if not tensors:
        state[name].order.append(3)
    found = state_digest(rich()).diff(state_digest(state))
    assert len(found) == 1
    assert found[0].startswith(f"{name}: ")


def test_what_a_kind_makes_on_the_way_is_not_mistaken_for_what_lay_there_before() -> None:
    generators = {str(seed): torch.Generator().manual_seed(seed) for seed in range(8)}
    found = state_digest(generators).by_path
    assert len({entry.digest for entry in found.values()}) == len(generators)


def test_paths_that_are_written_alike_stay_apart() -> None:
    state = {"a": {"b": 1}, "a.b": 2, 1: 3, "1": 4}
    turned = {"1": 4, 1: 3, "a.b": 2, "a": {"b": 1}}
    digest = state_digest(state)
    assert set(digest.by_path) == {"('a', 'b')", "('a.b',)", "(1,)", "('1',)", "<root>"}
    assert digest == state_digest(turned)
    assert state_digest({**state, "1": 3, 1: 4}) != digest


@pytest.mark.parametrize(
    ("one", "other", "lines"),
    [
        ({"a": {0: 1}}, {"a": {"0": 1}}, ["a: dict of 1 keys only here"]),
        ({True: 1}, {"True": 1}, ["<root>: dict of 1 keys only here"]),
        ({"m": {"a.b": 1}}, {"m": {"a": {"b": 1}}}, ["m: dict of 1 keys only here"]),
        ({"a": {"": 1}}, {"a.": 1}, ["a: dict of 1 keys only here", "<root>: dict of 1 keys only there"]),
        ({1: 1, 2.0: 2}, {1.0: 1, 2: 2}, None),
        ({"a": {0: 1, "b": 2}}, {"a": {"0": 1, "b": 2}}, ["a: dict of 2 keys only here"]),
        ({"a": {0: 1, 1: 2}}, {"a": {0: 1, "1": 2}}, ["a: keys differ (dict of 2 keys)"]),
        ({"a": Dict({0: 1})}, {"a": Dict({"0": 1})}, None),
    ],
    ids=str,
)
def test_keys_and_nesting_count(one: Any, other: Any, lines: list[str] | None) -> None:
    """As after a state went through JSON, or was flattened: the function that loads it sees the difference."""
    digest = state_digest(one)
    assert digest != state_digest(other)
    found = digest.diff(state_digest(other))
    assert found
    assert lines is None or found == lines


def test_it_goes_through_json() -> None:
    digest = state_digest({"w": noise((2, 3), 1), "n": 1, "odd \udc80": "\udc80"})
    back = StateDigest.from_dict(json.loads(json.dumps(digest.as_dict())))
    assert back == digest
    assert back.diff(digest) == []
    assert dict(back.by_path) == dict(digest.by_path)


NO_DIGESTS: list[dict[str, Any]] = [
    {}, {"whole": "x"}, {"whole": "x", "by_path": {"a": ["int 1", "0"]}}, {"by_path": 1}, {"by_path": {"a": 1}}
]  # fmt: skip


@pytest.mark.parametrize("data", NO_DIGESTS)
def test_what_is_no_digest_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no digest|expected whole"):
        StateDigest.from_dict(data)


def test_leaves_that_cannot_travel_are_named() -> None:
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    shrunk = torch.ones(64)
    shrunk.untyped_storage().resize_(16)
    with pytest.raises(LocalProtocolError, match=r"a\.f: .*; b: .*no memory; c: .*no memory"):
        state_digest({"a": {"f": lambda: 1}, "b": freed, "c": shrunk, "d": np.float32(1)})
