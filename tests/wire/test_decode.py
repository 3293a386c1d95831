"""What a receiver accepts: classes that are allowed, and manifests of somebody who means ill."""

from __future__ import annotations

import copy
import enum
import fractions
import functools
import io
import math
import operator
import re
import subprocess
import traceback
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy
import pytest
import torch
from helpers import Config, Point, noise

from ft_transport import RemoteProtocolError
from ft_transport._state.tree import LEAF, Node
from ft_transport._wire.decode import MAX_MESSAGE_BYTES, check_tree
from ft_transport._wire.digest import NUM_SAMPLES
from ft_transport._wire.frames import Frame, encode_frame
from wire.manifests import body_of, decode, encode, honest, read, read_body, refuses


class Unknown:
    """Never allowed."""

    class Inner:
        """In it."""


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("state", [{"a": Unknown()}, {"a": [Unknown]}, {"a": (1, {"b": Unknown()})}])
def test_a_class_that_is_not_allowed_is_named_with_the_remedy(state: object) -> None:
    data = encode(state)
    with pytest.raises(RemoteProtocolError) as caught:
        decode(data)
    assert "Unknown" in caught.value.message
    assert "add_safe_globals" in caught.value.message
    assert caught.value.message.startswith("a")


def test_a_namedtuple_must_be_allowed() -> None:
    data = encode({"a": Point(1, 2)})
    decode(data)
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(RemoteProtocolError, match=r"helpers\.Point .*add_safe_globals\(\[helpers.Point\]\)"):
            decode(data)
    finally:
        torch.serialization.add_safe_globals(before)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("of", [torch.Tensor.untyped_storage, torch.Tensor.storage])
def test_a_bare_storage_is_refused_even_if_somebody_allows_what_it_is_pickled_as(of: Any) -> None:
    """That is a call of torch.load, which runs what it is given."""
    data = encode({"a": of(torch.ones(2))})
    for allowed in ([], [torch.storage._load_from_bytes]):
        with torch.serialization.safe_globals(allowed):
            with pytest.raises(RemoteProtocolError, match="a: a bare storage cannot travel") as caught:
                decode(data)
            assert "add_safe_globals" not in caught.value.message


def test_the_remedy_for_a_class_that_pickle_knows_by_an_older_name() -> None:
    data = encode({"a": ValueError("x")})
    with pytest.raises(RemoteProtocolError) as caught:
        decode(data)
    entry = '(ValueError, "exceptions.ValueError")'
    assert f"add_safe_globals([{entry}])" in caught.value.message
    with torch.serialization.safe_globals([eval(entry)]):
        decode(data)


def remedy(message: str) -> str:
    """The code in an error, as one would paste it."""
    found = re.search(r"call (.*\]\)) on the receiver", message)
    assert found is not None, message
    return found[1]


def healed_by_one_remedy(state: Any) -> Any:
    """What arrives once all has been allowed that one refusal names, as it says."""
    data, before = encode(state), torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(RemoteProtocolError) as caught:
            decode(data)
        exec(remedy(caught.value.message), {})
        return decode(data)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_one_refusal_names_all_classes_of_a_generator() -> None:
    state = {"rng": numpy.random.default_rng(7)}
    manifest, _ = healed_by_one_remedy(state)
    assert manifest.leaves[0].kind == "object"


def test_one_refusal_names_the_classes_of_all_leaves_and_containers() -> None:
    state = {"a": Point(1, 2), "b": [Unknown()], "c": {"d": Config(3)}, "e": Unknown.Inner, "f": Colour.RED}
    healed_by_one_remedy({**state, "g": {Colour.RED, 5}, "h": [fractions.Fraction(1, 2), 5]})


@pytest.mark.parametrize(
    "value", [getattr, functools.partial(Unknown, 1), operator.attrgetter("a"), torch.load, subprocess.Popen, eval, map]
)
def test_no_advice_that_harms(value: Any) -> None:
    with pytest.raises(
        RemoteProtocolError, match=r"a, b.0: class \S*Unknown is not allowed.*; \S+ cannot travel"
    ) as caught:
        decode(encode({"a": Unknown(), "b": [value]}))
    assert f"add_safe_globals([{__name__}.Unknown])" in caught.value.message


def test_what_a_peer_has_chosen_is_escaped_in_the_traceback_too() -> None:
    hostile = "a\x1b[2J\nb"
    data = encode({hostile: Unknown(), "b": 1})
    with pytest.raises(RemoteProtocolError) as caught:
        decode(data)
    assert caught.value.message.startswith(r"a\x1b[2J\nb: class")
    text = "".join(traceback.format_exception(caught.value))
    assert all(line.isprintable() for line in text.splitlines())


def places(value: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    yield path
    if isinstance(value, list):
        for index, child in enumerate(value):
            yield from places(child, (*path, index))


def replaced(body: Any, path: tuple[int, ...], value: Any) -> Any:
    body = copy.deepcopy(body)
    if not path:
        return value
    parent = body
    for index in path[:-1]:
        parent = parent[index]
    parent[path[-1]] = value
    return body


WRONG = [
    None, True, -1, 0, 1, 1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63), 1.5, math.nan, "", "x",
    "leaf", "__class__", b"", b"x", [], [None], [1], ["object", b"\x80\x02c"], ["int", "9" * 5000], {}, {"a": 1},
    [[]], [0, 0, 0], ["tuple", ["tuple"]], msgpack.Timestamp(1), msgpack.ExtType(5, b"x"),
]  # fmt: skip


def test_every_field_with_every_wrong_value() -> None:
    body = honest()
    for path in places(body):
        for wrong in WRONG:
            read(encode_frame(Frame.MANIFEST, replaced(body, path, wrong)))


def test_every_field_left_out_or_doubled() -> None:
    body = honest()
    for path in places(body):
        if path:
            for values in ([], None):
                changed = copy.deepcopy(body)
                parent = changed
                for index in path[:-1]:
                    parent = parent[index]
                if values is None:
                    parent.insert(path[-1], parent[path[-1]])
                else:
                    del parent[path[-1]]
                read(encode_frame(Frame.MANIFEST, changed))


def test_what_a_hostile_manifest_gets_through_lands_nowhere_else() -> None:
    """What is accepted of all of the above lies inside its own storages, which are no larger than their views."""
    body = honest()
    for path in places(body):
        for wrong in WRONG:
            try:
                manifest, _ = read_body(replaced(body, path, wrong))
            except RemoteProtocolError:
                continue
            for leaf in manifest.leaves:
                for view in leaf.views:
                    assert view.storage < len(manifest.storages)
                    if view.storage >= 0:
                        assert 0 <= view.begin < view.end <= manifest.storages[view.storage].nbytes
            assert sum(storage.nbytes for storage in manifest.storages) < 4096


def with_view(shape: list[Any], stride: list[Any], offset: Any, nbytes: Any, storage: Any = 0) -> list[Any]:
    body = body_of(noise(2, 1))
    body[2] = [["float32", shape, stride]]
    body[3] = [[storage, 0, offset]]
    body[4] = [[nbytes, "cpu"]]
    return body


def test_the_honest_ones_are_accepted() -> None:
    read_body(honest())
    read_body(with_view([4], [1], 0, 16))
    read_body(with_view([4], [2], 3, 40))


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "nbytes"),
    [
        ([1 << 63], [1], 0, 16),
        ([1 << 62], [1], 0, 1 << 62),
        ([1 << 31, 1 << 31], [1, 1], 0, 16),
        ([(1 << 64) - 1], [1], 0, 16),
        ([4], [1 << 62], 0, 16),
        ([4], [(1 << 64) - 1], 0, 16),
        ([4], [1], 1, 16),
        ([4], [1], 1 << 62, 16),
        ([4], [1], (1 << 64) - 1, 16),
        ([4], [1], 0, 15),
        ([4], [1], 0, 0),
        ([4], [1], 0, 1 << 62),
        ([4], [1], 0, (1 << 64) - 1),
        ([4], [1], 0, 10_000),
        ([4], [1], -1, 16),
        ([-4], [1], 0, 16),
        ([4], [-1], 3, 16),
        ([4], [1], 0, -1),
        ([4], [1, 1], 0, 16),
        ([4, 1], [1], 0, 16),
        ([0], [1], 0, 16),
        ([4.0], [1], 0, 16),
        ([True], [1], 0, 16),
        ([4], [1], None, 16),
        ([4], ["1"], 0, 16),
    ],
)
def test_sizes_out_of_range(shape: list[Any], stride: list[Any], offset: Any, nbytes: Any) -> None:
    refuses(with_view(shape, stride, offset, nbytes))


@pytest.mark.parametrize("storage", [1, 1 << 63, -2, -1, None, "0", False])
def test_storages_that_do_not_exist(storage: Any) -> None:
    refuses(with_view([4], [1], 0, 16, storage))


@pytest.mark.parametrize("number", [1, -1, None, 1 << 63])
def test_shapes_that_do_not_exist(number: Any) -> None:
    body = with_view([4], [1], 0, 16)
    body[3][0][1] = number
    refuses(body)


@pytest.mark.parametrize("dtype", ["float33", "", None, 1, "Tensor", "__class__", b"float32"])
def test_dtypes_that_do_not_exist(dtype: Any) -> None:
    body = with_view([4], [1], 0, 16)
    body[2][0][0] = dtype
    refuses(body)


@pytest.mark.parametrize("nbytes", [16, 1 << 20, 1 << 40])
def test_a_storage_that_nothing_refers_to(nbytes: int) -> None:
    body = with_view([4], [1], 0, 16)
    body[4].append([nbytes, "cpu"])
    refuses(body, "2 storages, of which 1 are referred to")


@pytest.mark.parametrize("storage", [-1, -2])
def test_a_storage_that_only_something_empty_refers_to(storage: int) -> None:
    """Memory would be taken for it."""
    body = with_view([0], [1], 0, 16, storage)
    refuses(body, "1 storages, of which 0 are referred to")
    body[4].clear()
    read_body(body)


@pytest.mark.parametrize("storage", [-3, -(1 << 62)])
def test_places_that_nothing_empty_is_in(storage: int) -> None:
    body = with_view([0], [1], 0, 16, storage)
    body[4].clear()
    refuses(body)


@pytest.mark.parametrize("kind", ["sparse", "value", "__class__", "", None, 1, ["tensor"], "Tensor"])
def test_unknown_kinds_of_leaf(kind: Any) -> None:
    body = body_of(torch.nn.Parameter(noise(2, 1)))
    assert body[3][0][0] == "tensor"
    body[3][0][0] = kind
    refuses(body)


def container(kind: Any, num_children: Any, keys: Any, num_attrs: Any = 0, extra: Any = None, leaves: int = 1) -> Any:
    body = body_of([0] * leaves)
    body[1][0] = [kind, num_children, keys, num_attrs, extra]
    return body


def test_an_honest_container_is_accepted() -> None:
    assert read_body(container("dict", 1, ["a"]))[0].paths == [("a",)]
    assert read_body(container("OrderedDict", 2, ["a", "_metadata"], 1, leaves=2))[0].paths == [("a",), ("_metadata",)]


@pytest.mark.parametrize(
    "body",
    [
        container("dict", 2, ["a", "a"], leaves=2),
        container("dict", 2, [1, True], leaves=2),
        container("dict", 1, []),
        container("dict", 1, ["a", "b"]),
        container("dict", 2, ["a"]),
        container("dict", 1, [["list"]]),
        container("dict", 1, ["a"], 1),
        container("list", 1, ["a"]),
        container("list", 2, []),
        container("list", 0, []),
        container("list", 1 << 62, []),
        container("list", -1, []),
        container("list", 1, [], 1),
        container("OrderedDict", 1, ["__class__"], 1),
        container("OrderedDict", 1, ["__dict__"], 1),
        container("OrderedDict", 1, [5], 1),
        container("OrderedDict", 1, ["a"], 2),
        container("OrderedDict", 1, ["a"], -1),
        container("deque", 1, [], 0, "os:system"),
        container("deque", 1, [], 0, 1.5),
        container("namedtuple", 1, [], 0, "os:system"),
        container("namedtuple", 1, [], 0, "posix:system"),
        container("namedtuple", 1, [], 0, "helpers:Point"),
        container("defaultdict", 1, ["a"], 0, "os:system"),
        container("defaultdict", 1, ["a"], 0, "builtins:eval"),
        container("defaultdict", 1, ["a"], 0, ["os", "system"]),
        container(None, 1, []),
        container(1, 1, []),
    ],
)
def test_containers_that_cannot_be(body: Any) -> None:
    refuses(body)


@pytest.mark.parametrize(
    "body",
    [
        container("leaf", 0, []),
        container("set", 1, []),
        container("__class__", 1, []),
        container("namedtuple", 1, []),
        container("namedtuple", 1, [], 0, "builtins:int"),
        container("deque", 1, [], 0, -1),
        container("defaultdict", 2, ["a", "b"], 1, leaves=2),
        replaced(container("Size", 1, []), (3,), [["text"]]),
    ],
)
def test_containers_that_cannot_be_built(body: Any) -> None:
    """They must be refused before a byte lands, not found when the result is built."""
    refuses(body)


def test_a_path_of_attributes_cannot_reach_into_classes() -> None:
    for name in ("__class__", "__init__", "__dict__", "__setstate__"):
        refuses(container("OrderedDict", 1, [name], 1))


def test_nodes_after_the_end_or_missing() -> None:
    body = honest()
    refuses(replaced(body, (1,), [*body[1], None]))
    refuses(replaced(body, (1,), body[1][:-1]))
    refuses(replaced(body, (1,), []))
    refuses(replaced(body, (3,), [*body[3], [1]]))
    refuses(replaced(body, (3,), body[3][:-1]))


@pytest.mark.parametrize(
    "limits",
    [
        [63, 0, 1, 1],
        [MAX_MESSAGE_BYTES + 1, 0, 1, 1],
        [1024, -1, 1, 1],
        [1024, 0, 0, 1],
        [1024, 0, 1, 0],
        [1024, 0, 1],
        [1024, 0, 1, 1, 1],
        [1024.0, 0, 1, 1],
        [1024, 1025, 1, 1],
        None,
    ],
)
def test_limits_out_of_range(limits: Any) -> None:
    body = honest()
    body[0][1] = limits
    refuses(body)


@pytest.mark.parametrize("sample", [-2, NUM_SAMPLES, 1 << 63, None, True, 1.0])
def test_samples_out_of_range(sample: Any) -> None:
    body = honest()
    body[0][3] = sample
    refuses(body)


@pytest.mark.parametrize("context", ["ab", [1], [True], [True, "yes"], ["x", "y"], [1, 2, 3], 7, {"a": 1}])
def test_contexts_that_cannot_be_rebuilt(context: Any) -> None:
    """They must be refused before a byte lands, not found when the result is built."""
    body = body_of(torch.nn.Parameter(noise(2, 1)))
    body[3][0][2] = context
    refuses(body)


def test_an_integer_parameter_that_requires_grad() -> None:
    body = body_of(torch.nn.Parameter(noise(2, 1)))
    body[2][0][0] = "int32"
    refuses(body, "requires grad")


@pytest.mark.parametrize("num_views", [0, 2])
def test_a_tensor_of_another_number_of_views(num_views: int) -> None:
    body = body_of(torch.nn.Parameter(noise(2, 1)))
    body[3][0][1] = body[3][0][1] * num_views
    if not num_views:
        body[4] = []
    refuses(body)


@pytest.mark.parametrize("kind", ["dtensor", "sharded"])
@pytest.mark.parametrize("context", [None, [], [1, 2, 3], "abcdef", [None] * 6])
def test_contexts_of_distributed_tensors_that_cannot_be_rebuilt(kind: str, context: Any) -> None:
    body = body_of(torch.nn.Parameter(noise(2, 1)))
    body[3][0] = [kind, body[3][0][1], context, None]
    refuses(body)


ran: list[str] = []


def run_code() -> None:
    ran.append("code from the wire")


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (run_code, ())


def test_a_pickle_runs_no_code() -> None:
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    body = body_of({"a": 1})
    for value in (["object", buffer.getvalue()], ["list", ["object", buffer.getvalue()]]):
        body[3][0] = [value]
        refuses(body, "a: ")
    refuses(container("dict", 1, [["object", buffer.getvalue()]]))
    assert ran == []
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert ran == ["code from the wire"], "it would have run"
    ran.clear()


@pytest.mark.parametrize(
    "value",
    [
        ["int", "9" * 4301],
        ["int", "x"],
        ["int", 5],
        ["int"],
        ["unknown", 1],
        [None],
        [],
        ["dict", 1],
        ["dict", ["list"], 1],
        ["set", ["list"]],
        ["dtype", "Tensor"],
        ["device", "no such device"],
        ["complex", 1, 2],
        ["range", 1, 2, 0],
        ["range", "a"],
        ["slice"],
        ["bytearray", 1 << 40],
        ["object", "text"],
        ["object", b""],
    ],
)
def test_values_that_cannot_be(value: Any) -> None:
    body = body_of({"a": 1})
    body[3][0] = [value]
    refuses(body, "^a: |damaged")


def test_values_nested_too_deep_to_read() -> None:
    value: Any = 1
    for _ in range(400):
        value = ["list", value]
    body = body_of({"a": 1})
    body[3][0] = [value]
    read(encode_frame(Frame.MANIFEST, body))


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [LEAF, LEAF],
        [Node("list", 2), LEAF],
        [Node("list", 1), LEAF, LEAF],
        [Node("list", 1 << 60), LEAF],
        [Node("list", 1)] * 1100 + [LEAF],
    ],
)
def test_nodes_of_a_peer_that_are_not_one_tree(nodes: list[Node]) -> None:
    with pytest.raises(ValueError, match="tree"):
        check_tree(nodes)
