"""Containers, their types, their order, their keys, and how deep they go."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections import OrderedDict, defaultdict, deque
from typing import Any, NamedTuple

import torch
from helpers import noise
from torch.utils import _pytree as pytree

from corpus.case import Table

__all__ = ["CASES"]

CASES = Table("structure")


class Pair(NamedTuple):
    """A namedtuple."""

    first: Any
    second: Any = None


class Labelled(Pair):
    """A namedtuple with room for attributes."""


@dataclasses.dataclass
class Moments:
    """A dataclass."""

    mean: Any
    variance: Any
    step: int = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A dataclass that cannot be assigned to."""

    weight: Any
    names: tuple[str, ...] = ()


@dataclasses.dataclass(slots=True)
class Slotted:
    """A dataclass without a ``__dict__``."""

    weight: Any
    count: int = 0


@dataclasses.dataclass
class Derived:
    """A dataclass with a field that its constructor does not take."""

    weight: Any
    norm: Any = dataclasses.field(init=False, default=None)


class Registered:
    """A node of torch's pytree."""

    def __init__(self, weight: Any, bias: Any, name: str) -> None:
        self.weight = weight
        self.bias = bias
        self.name = name


pytree.register_pytree_node(
    Registered,
    lambda node: ([node.weight, node.bias], node.name),
    lambda children, name: Registered(*children, name),
    serialized_type_name="corpus.structure.Registered",
    flatten_with_keys_fn=lambda node: (
        [(pytree.GetAttrKey("weight"), node.weight), (pytree.GetAttrKey("bias"), node.bias)],
        node.name,
    ),
)


@dataclasses.dataclass
class RegisteredDataclass:
    """A dataclass that is a node of torch's pytree."""

    weight: Any
    scale: Any


pytree.register_dataclass(RegisteredDataclass)


class Role(enum.Enum):
    """Keys of a dict."""

    ACTOR = "actor"
    CRITIC = "critic"


class Dict(dict):  # type: ignore[type-arg]
    """A user's dict."""


class List(list):  # type: ignore[type-arg]
    """A user's list."""


@CASES.case()
def order_of_a_dict(seed: int) -> Any:
    return {key: noise(i + 1, seed + i) for i, key in enumerate("zebra")}


@CASES.case()
def ordered_dict(seed: int) -> Any:
    return OrderedDict((key, noise(2, seed + i)) for i, key in enumerate(["z", "a", "m"]))


@CASES.case()
def metadata_of_a_module(seed: int) -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = model.state_dict()
    for i, tensor in enumerate(state.values()):
        if tensor.is_floating_point():
            tensor.copy_(noise(tuple(tensor.shape), seed + i).nan_to_num())
    return state


@CASES.case()
def attributes_of_mappings(seed: int) -> Any:
    ordered: Any = OrderedDict([("a", noise(2, seed))])
    ordered._metadata = OrderedDict([("", {"version": seed})])
    ordered.note = ["one", 2]
    return {"model": ordered}


@CASES.case()
def defaultdicts(seed: int) -> Any:
    return {
        "list": defaultdict(list, {1: [noise(2, seed)]}),
        "dict": defaultdict(dict, {"state": {"step": noise((), seed + 1)}}),
        "int": defaultdict(int, {"a": seed}),
        "none": defaultdict(None, {"a": 1}),
        "empty": defaultdict(list),
    }


@CASES.case()
def lists_and_tuples(seed: int) -> Any:
    return [noise(1, seed), (noise(2, seed + 1), [noise(3, seed + 2), (4, None)]), ([],), ()]


@CASES.case(allow=[Pair])
def namedtuples(seed: int) -> Any:
    return Pair(noise(2, seed), {"inner": Pair(seed, [Pair(noise(1, seed + 1))])})


@CASES.case(allow=[Labelled])
def namedtuples_with_attributes(seed: int) -> Any:
    labelled = Labelled(noise(2, seed), Labelled(seed, None))
    labelled.scale = noise(3, seed + 1)  # type: ignore[attr-defined]
    labelled.label = f"{seed}"  # type: ignore[attr-defined]
    return [labelled]


@CASES.case()
def torch_namedtuples(seed: int) -> Any:
    return {"sorted": torch.sort(torch.arange(4.0) * seed), "size": noise((2, 3), seed).size()}


@CASES.case()
def deques(seed: int) -> Any:
    return {
        "bounded": deque([noise(2, seed), 1], maxlen=3),
        "free": deque([noise(1, seed + 1)]),
        "empty": deque(maxlen=0),
    }


@CASES.case(allow=[Moments])
def dataclass(seed: int) -> Any:
    return {"moments": Moments(noise(3, seed), [noise(2, seed + 1)], seed)}


@CASES.case(allow=[Frozen])
def frozen_dataclass(seed: int) -> Any:
    return Frozen(torch.nn.Parameter(noise((2, 2), seed)), ("a", "b"))


@CASES.case(allow=[Slotted])
def slotted_dataclass(seed: int) -> Any:
    return [Slotted(noise(3, seed), seed), Slotted(None)]


@CASES.case(allow=[Derived])
def dataclass_with_derived_field(seed: int) -> Any:
    derived = Derived(noise(3, seed))
    derived.norm = noise((), seed + 1)
    return {"derived": derived}


@CASES.case(allow=[Moments])
def dataclass_with_another_attribute(seed: int) -> Any:
    moments = Moments(noise(3, seed), None)
    moments.extra = noise(2, seed + 1)  # type: ignore[attr-defined]
    return {"moments": moments}


@CASES.case(allow=[Moments, Frozen])
def dataclasses_in_dataclasses(seed: int) -> Any:
    shared = noise((2, 3), seed)
    return Moments(Frozen(shared), {"variance": Moments(shared, shared.t(), 3)}, seed)


@CASES.case(allow=[Registered])
def pytree_node(seed: int) -> Any:
    return {"node": Registered(noise(3, seed), [noise(2, seed + 1)], f"name {seed}")}


@CASES.case(allow=[RegisteredDataclass])
def pytree_dataclass(seed: int) -> Any:
    return {"node": RegisteredDataclass(noise(3, seed), {"s": noise((), seed + 1)})}


@CASES.case(allow=[Dict, List])
def subclasses_of_containers(seed: int) -> Any:
    mapping: Any = Dict(a=noise(2, seed), b=1)
    mapping.note = "kept"
    return {"dict": mapping, "list": List([noise(1, seed + 1), "x"])}


@CASES.case()
def torch_size(seed: int) -> Any:
    return {"size": torch.Size([3, 4, seed]), "empty": torch.Size([]), "tuple": (3, 4)}


@CASES.case()
def integer_keys(seed: int) -> Any:
    return {key: noise(i + 1, seed + i) for i, key in enumerate((3, 0, -7, 1 << 40, 1 << 70))}


@CASES.case(allow=[Role])
def other_keys(seed: int) -> Any:
    keys = (None, True, 2.5, (1, "a"), b"bytes", torch.float32, Role.ACTOR, frozenset({1}), "", ("deep", (None, 3)))
    return {key: noise(i + 1, seed + i) for i, key in enumerate(keys)}


@CASES.case()
def keys_that_look_alike(seed: int) -> Any:
    return {
        "a": {"b.c": noise(1, seed), "b": {"c": noise(2, seed + 1)}},
        "a.b": {"c": noise(3, seed + 2)},
        "1": noise(4, seed + 3),
        1: noise(5, seed + 4),
        "None": noise(6, seed + 5),
        None: noise(7, seed + 6),
        "1.5": noise(8, seed + 7),
        1.5: noise(9, seed + 8),
    }


@CASES.case()
def false_and_zero_as_keys(seed: int) -> Any:
    return {
        "bool": {False: noise(1, seed), True: noise(2, seed + 1)},
        "int": {0: noise(1, seed + 2), 1: noise(2, seed)},
    }


@CASES.case()
def unicode_keys(seed: int) -> Any:
    keys = (
        "grüße",
        "模型.权重",
        "🌍🔥",
        "\udcff",
        "\ud800x",
        "\x00",
        "\n",
        "\uff21",
        "é",
        "e\u0301",
        "\u202e",
        " ",
        ".",
        "..",
    )
    return {key: noise(i + 1, seed + i) for i, key in enumerate(keys)}


@CASES.case()
def long_keys(seed: int) -> Any:
    return {"layer." * 30: noise(2, seed)}


def _nested(step: Any, seed: int) -> Any:
    state: Any = {"tensor": noise(3, seed), "n": seed}
    for _ in range(500):
        state = step(state)
    return state


CASES.add("500 dicts deep", functools.partial(_nested, lambda inner: {"a": inner}))
CASES.add("500 lists deep", functools.partial(_nested, lambda inner: [inner]))
CASES.add("500 tuples deep", functools.partial(_nested, lambda inner: (inner,)))
CASES.add("500 OrderedDicts deep", functools.partial(_nested, lambda inner: OrderedDict(a=inner)))


@CASES.case()
def twenty_thousand_leaves(seed: int) -> Any:
    values = noise((20_000, 3), seed)
    return {f"p{i}": values[i].clone() for i in range(20_000)}


@CASES.case()
def two_thousand_views_of_one(seed: int) -> Any:
    return list(noise((2_000, 4), seed).unbind(0))


@CASES.case()
def five_thousand_numbers(seed: int) -> Any:
    return {"numbers": list(range(seed, 4_000 + seed)), "floats": [i / 7 for i in range(1_000)]}


for _name, _value in {
    "none": None,
    "true": True,
    "number": 5,
    "float": 0.5,
    "text": "text",
    "bytes": b"\x00\xff",
    "dict": {},
    "list": [],
    "tuple": (),
    "OrderedDict": OrderedDict(),
    "deque": deque(),
    "set": set(),
    "Size": torch.Size([]),
    "empty text": "",
}.items():
    CASES.add(f"{_name} as the state", lambda seed, value=_value: value, varies=False)


@CASES.case()
def tensor_as_the_state(seed: int) -> Any:
    return noise((3, 4), seed)


@CASES.case()
def parameter_as_the_state(seed: int) -> Any:
    return torch.nn.Parameter(noise((3, 4), seed))


@CASES.case()
def scalar_tensor_as_the_state(seed: int) -> Any:
    return noise((), seed)


@CASES.case(varies=False)
def empty_tensor_as_the_state(seed: int) -> Any:
    return torch.empty((0, 3))


@CASES.case()
def list_as_the_state(seed: int) -> Any:
    return [noise(3, seed), noise(4, seed + 1)]


@CASES.case(varies=False)
def empty_containers(seed: int) -> Any:
    return {
        "dict": {},
        "OrderedDict": OrderedDict(),
        "list": [],
        "tuple": (),
        "set": set(),
        "frozenset": frozenset(),
        "deque": deque(),
        "nested": [[], [[]], {"a": {}}, ((),)],
        "tensor": torch.empty(0),
    }


@CASES.case()
def envelope_of_the_manager(seed: int) -> Any:
    user = {"default": {"model": {"w": noise((3, 3), seed)}, "optim": {"state": {0: {"m": noise(3, seed + 1)}}}}}
    return {"user": user, "torchft": {"step": seed, "batches_committed": 2 * seed}}
