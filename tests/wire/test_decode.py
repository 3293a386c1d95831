"""What a receiver accepts: classes that are allowed, and manifests of somebody who means ill."""

from __future__ import annotations

import contextlib
import copy
import enum
import fractions
import functools
import io
import math
import operator
import re
import subprocess
import sys
import traceback
import tracemalloc
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy
import pytest
import torch
from helpers import Config, Point, noise

from ft_transport import RemoteProtocolError
from ft_transport._state.tree import LEAF, Node
from ft_transport._wire.columns import pack_column
from ft_transport._wire.decode import MAX_MESSAGE_BYTES, MAX_NODES, check_tree, decode_manifest
from ft_transport._wire.digest import NUM_SAMPLES
from ft_transport._wire.frames import Frame, decode_frame, encode_frame
from wire.manifests import (
    columns,
    decode,
    encode,
    honest,
    read,
    read_body,
    read_rows,
    refuses,
    refuses_body,
    rows_of,
    same,
)


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
    [[]], [0, 0, 0], [0, b"", []], [1, b"\0", b"\0", b"\0"], b"\0\xff",
    ["tuple", ["tuple"]], msgpack.Timestamp(1), msgpack.ExtType(5, b"x"),
]  # fmt: skip


def damaged() -> Iterator[Any]:
    """Bodies with a wrong value somewhere: in place of what is in them, or of a number in a column."""
    body = columns(honest())
    for path in places(body):
        for wrong in WRONG:
            yield replaced(body, path, wrong)
    for path in places(honest()):
        for wrong in WRONG:
            with contextlib.suppress(ValueError):  # no column can say that
                if path[:1] in ((3,), (4,)) and path[1:]:
                    yield columns(replaced(honest(), path, wrong))


def test_every_field_with_every_wrong_value() -> None:
    for body in damaged():
        read(encode_frame(Frame.MANIFEST, body))


def test_every_field_left_out_or_doubled() -> None:
    body = columns(honest())
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
    for body in damaged():
        try:
            manifest, _ = read_body(body)
        except RemoteProtocolError:
            continue
        for leaf in manifest.leaves:
            for view in leaf.views:
                assert view.storage < len(manifest.storages)
                if view.storage >= 0:
                    assert 0 <= view.begin < view.end <= manifest.storages[view.storage].nbytes
        assert sum(storage.nbytes for storage in manifest.storages) < 4096


def with_view(shape: list[Any], stride: list[Any], offset: Any, nbytes: Any, storage: Any = 0) -> list[Any]:
    body = rows_of(noise(2, 1))
    body[2] = [["float32", shape, stride]]
    body[3] = [[storage, 0, offset]]
    body[4] = [[nbytes, "cpu"]]
    return body


def test_the_honest_ones_are_accepted() -> None:
    read_rows(honest())
    read_rows(with_view([4], [1], 0, 16))
    read_rows(with_view([4], [2], 3, 40))


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
        ([4], [1], (1 << 63) - 1, 16),
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
        ([4], ["1"], 0, 16),
    ],
)
def test_sizes_out_of_range(shape: list[Any], stride: list[Any], offset: Any, nbytes: Any) -> None:
    refuses(with_view(shape, stride, offset, nbytes))


@pytest.mark.parametrize("storage", [1, (1 << 63) - 1, -1, -2, -3, -(1 << 63)])
def test_storages_that_do_not_exist(storage: Any) -> None:
    refuses(with_view([4], [1], 0, 16, storage))


@pytest.mark.parametrize("number", [1, -1, (1 << 63) - 1, -(1 << 63)])
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
    read_rows(body)


@pytest.mark.parametrize("storage", [-3, -(1 << 62)])
def test_places_that_nothing_empty_is_in(storage: int) -> None:
    body = with_view([0], [1], 0, 16, storage)
    body[4].clear()
    refuses(body)


@pytest.mark.parametrize("kind", ["sparse", "value", "__class__", "", None, 1, ["tensor"], "Tensor"])
def test_unknown_kinds_of_leaf(kind: Any) -> None:
    body = rows_of(torch.nn.Parameter(noise(2, 1)))
    assert body[3][0][0] == "tensor"
    body[3][0][0] = kind
    refuses(body)


def container(kind: Any, num_children: Any, keys: Any, num_attrs: Any = 0, extra: Any = None, leaves: int = 1) -> Any:
    body = rows_of([0] * leaves)
    body[1][0] = [kind, num_children, keys, num_attrs, extra]
    return body


def test_an_honest_container_is_accepted() -> None:
    assert read_rows(container("dict", 1, ["a"]))[0].paths == [("a",)]
    assert read_rows(container("OrderedDict", 2, ["a", "_metadata"], 1, leaves=2))[0].paths == [("a",), ("_metadata",)]


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
    body = rows_of(torch.nn.Parameter(noise(2, 1)))
    body[3][0][2] = context
    refuses(body)


def test_an_integer_parameter_that_requires_grad() -> None:
    body = rows_of(torch.nn.Parameter(noise(2, 1)))
    body[2][0][0] = "int32"
    refuses(body, "requires grad")


@pytest.mark.parametrize("num_views", [0, 2])
def test_a_tensor_of_another_number_of_views(num_views: int) -> None:
    body = rows_of(torch.nn.Parameter(noise(2, 1)))
    body[3][0][1] = body[3][0][1] * num_views
    if not num_views:
        body[4] = []
    refuses(body)


@pytest.mark.parametrize("kind", ["dtensor", "sharded"])
@pytest.mark.parametrize("context", [None, [], [1, 2, 3], "abcdef", [None] * 6])
def test_contexts_of_distributed_tensors_that_cannot_be_rebuilt(kind: str, context: Any) -> None:
    body = rows_of(torch.nn.Parameter(noise(2, 1)))
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
    body = rows_of({"a": 1})
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
    body = rows_of({"a": 1})
    body[3][0] = [value]
    refuses(body, "^a: |damaged")


def test_values_nested_too_deep_to_read() -> None:
    value: Any = 1
    for _ in range(400):
        value = ["list", value]
    body = rows_of({"a": 1})
    body[3][0] = [value]
    read(encode_frame(Frame.MANIFEST, columns(body)))


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


# ------------------------------------------------------------------------------------------- columns
#
# Bodies as they travel: [header, nodes, shapes, views, leaves, storages, shared].


def three() -> list[Any]:
    """Two plain tensors of one size, and between them a parameter; then a value and a tie."""
    first = noise(2, 1)
    parameter = torch.nn.Parameter(noise(3, 2))
    return columns(rows_of({"a": first, "p": parameter, "b": noise(2, 3), "v": 1, "t": parameter}))


def test_what_three_tensors_are_in_columns() -> None:
    _, _, shapes, views, leaves, storages, _ = three()
    assert shapes == [["float32", [2], [1]], ["float32", [3], [1]]]
    assert views == [3, b"\x00\x01\x02", b"\x00\x01\x00", b"\x00\x00\x00"]
    assert leaves == [[1, ["tensor", 1, ["()", True, True], []]], [3, [1]], [4, 1]]
    assert storages == [3, b"\x00\x01\x00", [[8, "cpu"], [12, "cpu"]]]
    manifest, _ = read_body(three())
    assert [len(leaf.views) for leaf in manifest.leaves] == [1, 1, 1, 0, 1]
    assert manifest.same == {4: 1}


def test_columns_of_more_bytes_than_needed_say_the_same() -> None:
    body = three()
    body[3][1] = b"\x00\x00\x01\x00\x02\x00"
    body[3][3] = bytes(24)
    body[5][1] = b"\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00"
    assert same(read_body(body)[0], read_body(three())[0])


COLUMNS = [(3, 1), (3, 2), (3, 3), (5, 1)]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("wrong", [None, 0, True, "abc", [0, 1, 0], [], [[0, 1, 0]], 1.5])
def test_a_column_that_is_no_bytes(column: tuple[int, int], wrong: Any) -> None:
    name = "tuple" if type(wrong) is list else type(wrong).__name__
    refuses_body(replaced(three(), column, wrong), f"expected a column of 3 integers, got a {name}")


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("num_bytes", [0, 1, 2, 4, 5, 9, 15, 18, 21, 48, 3000])
def test_a_column_of_another_length(column: tuple[int, int], num_bytes: int) -> None:
    """Not a multiple, none for each, or 3, 5, 6, 7 and 16 for each."""
    refuses_body(replaced(three(), column, bytes(num_bytes)), f"expected a column of 3 integers, got {num_bytes} bytes")


@pytest.mark.parametrize("part", [3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 6])
def test_a_count_that_is_not_the_columns(part: int, count: int) -> None:
    """Where the bytes could be so many, the other columns are, or what they say, disagrees."""
    refuses_body(replaced(three(), (part, 0), count), f"expected a column of {count} integers, got 3 bytes")


@pytest.mark.parametrize(
    ("part", "instead", "match"),
    [
        (3, [2, b"\0\1", b"\0\1", b"\0\0"], "expected 3 tensors, got 2"),
        (3, [4, b"\0\1\2\2", b"\0\1\0\0", b"\0\0\0\0"], "expected 3 tensors, got 4"),
        (3, [0, b"", b"", b""], "p: 1 views of -1"),
        (5, [2, b"\0\1", [[8, "cpu"], [12, "cpu"]]], "b: storage 2 of 2"),
        (5, [4, b"\0\1\0\0", [[8, "cpu"], [12, "cpu"]]], "4 storages, of which 3 are referred to"),
        (5, [0, b"", []], "a: storage 0 of 0"),
    ],
)
def test_columns_that_agree_on_too_many_or_too_few(part: int, instead: list[Any], match: str) -> None:
    refuses_body(replaced(three(), (part,), instead), match)


@pytest.mark.parametrize("part", [3, 5])
@pytest.mark.parametrize("count", [-1, -3, MAX_NODES + 1, 1 << 31, (1 << 64) - 1, -(1 << 63)])
def test_counts_out_of_range(part: int, count: int) -> None:
    what = "tensors" if part == 3 else "storages"
    refuses_body(replaced(three(), (part, 0), count), f"{count} {what}, at most {MAX_NODES} are accepted")


@pytest.mark.parametrize("part", [3, 5])
@pytest.mark.parametrize("count", [True, False, None, 3.0, "3", b"\x03", [3]])
def test_counts_that_are_no_integers(part: int, count: Any) -> None:
    refuses_body(replaced(three(), (part, 0), count), "expected int, got ")


@pytest.mark.parametrize("part", [3, 5])
def test_more_than_accepted_is_refused_before_memory_is_taken(part: int) -> None:
    """The columns are as long as they say: lists of what is in them would take eight times as much."""
    count = MAX_NODES + 1
    body = decode_frame(encode_frame(Frame.MANIFEST, three()))[1]
    others = [bytes(count) if type(each) is bytes else each for each in body[part][1:]]
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="at most"):
            decode_manifest((*body[:part], (count, *others), *body[part + 1 :]))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("part", [3, 5])
def test_none_at_all_with_bytes_all_the_same(part: int) -> None:
    body = columns(rows_of([1]))
    assert body[part] == ([0, b"", b"", b""] if part == 3 else [0, b"", []])
    for column in range(1, len(body[part])):
        if type(body[part][column]) is bytes:
            refuses_body(replaced(body, (part, column), b"\0"), "expected a column of 0 integers, got 1 bytes")


@pytest.mark.parametrize(
    ("column", "numbers", "match"),
    [
        ((3, 2), [0, 2, 0], "shapes 0 to 2 of 2"),
        ((3, 2), [0, -1, 0], "shapes -1 to 0 of 2"),
        ((3, 2), [0, 1 << 40, 0], f"shapes 0 to {1 << 40} of 2"),
        ((3, 1), [0, 1, 3], "b: storage 3 of 3"),
        ((3, 1), [0, (1 << 63) - 1, 2], f"p: storage {(1 << 63) - 1} of 3"),
        ((3, 1), [-1, 1, 2], r"a: float32 \(2,\) in storage -1"),
        ((3, 1), [0, -3, 2], r"p: float32 \(3,\) in storage -3"),
        ((3, 1), [0, 1, 1], "3 storages, of which 2 are referred to"),
        ((3, 3), [0, 0, 1], r"b: float32 \(2,\) at 1 is outside of its storage of 8 bytes"),
        ((3, 3), [0, -1, 0], r"p: float32 \(3,\) at -1 is outside of its storage of 12 bytes"),
        ((3, 3), [(1 << 63) - 1, 0, 0], "a: .* is outside of its storage"),
        ((3, 3), [-(1 << 63), 0, 0], "a: .* is outside of its storage"),
        ((5, 1), [0, 2, 0], "storages 0 to 2 of 2"),
        ((5, 1), [0, 1, -1], "storages -1 to 1 of 2"),
        ((5, 1), [0, 0, 0], r"p: float32 \(3,\) at 0 is outside of its storage of 8 bytes"),
    ],
)
def test_numbers_of_columns_out_of_range(column: tuple[int, int], numbers: list[int], match: str) -> None:
    refuses_body(replaced(three(), column, pack_column(numbers)), match)


@pytest.mark.parametrize(
    ("storage", "match"),
    [
        ([-1, "cpu"], "storages of -1 to 12 bytes"),
        ([1 << 63, "cpu"], f"storages of 12 to {1 << 63} bytes"),
        ([(1 << 64) - 1, "cpu"], "storages of 12 to"),
        ([sys.maxsize, "cpu"], f"a storage of {sys.maxsize} bytes, of which 8 are referred to"),
        ([True, "cpu"], "expected int, got bool"),
        ([8.0, "cpu"], "expected int, got float"),
        ([8, None], "expected str, got NoneType"),
        ([8, b"cpu"], "expected str, got bytes"),
        ([8], "not enough values"),
        ([8, "cpu", 1], "too many values"),
        (8, "cannot unpack"),
    ],
)
def test_storages_that_cannot_be(storage: Any, match: str) -> None:
    refuses_body(replaced(three(), (5, 2, 0), storage), match)


PARAMETER = ["tensor", 1, ["()", True, True], []]


@pytest.mark.parametrize(
    ("leaves", "match"),
    [
        ([[3, [1]], [1, PARAMETER], [4, 1]], "leaf 1 of 5, after 4"),
        ([[1, PARAMETER], [3, [1]], [3, [1]], [4, 1]], "leaf 3 of 5, after 4"),
        ([[-1, PARAMETER], [3, [1]], [4, 1]], "leaf -1 of 5, after 0"),
        ([[1, PARAMETER], [3, [1]], [5, 1]], "leaf 5 of 5, after 4"),
        ([[1, PARAMETER], [3, [1]], [1 << 62, 1]], f"leaf {1 << 62} of 5, after 4"),
        ([[True, PARAMETER], [3, [1]], [4, 1]], "expected int, got bool"),
        ([[None, PARAMETER], [3, [1]], [4, 1]], "expected int, got NoneType"),
        ([[1.0, PARAMETER], [3, [1]], [4, 1]], "expected int, got float"),
        ([[1, PARAMETER], [3, [1]], [4]], "not enough values"),
        ([[1, PARAMETER], [3, [1]], [4, 1, 1]], "too many values"),
        ([[1, PARAMETER], [3, [1]], 4], "cannot unpack"),
        # As many tensors as there are leaves that are not listed, and those that are say.
        ([[1, PARAMETER], [3, [1]]], "expected 4 tensors, got 3"),
        ([[1, PARAMETER], [2, [1]], [3, [1]], [4, 1]], "expected 2 tensors, got 3"),
        ([[0, [1]], [1, [1]], [2, [1]], [3, [1]], [4, 1]], "expected 0 tensors, got 3"),
        # A number of views.
        ([[1, ["tensor", 0, *PARAMETER[2:]]], [3, [1]], [4, 1]], "p: a leaf of kind tensor with 0 views"),
        ([[1, ["tensor", 2, *PARAMETER[2:]]], [3, [1]], [4, 1]], "p: a leaf of kind tensor with 2 views"),
        ([[1, ["tensor", 3, *PARAMETER[2:]]], [3, [1]], [4, 1]], "p: 3 views of 2"),
        ([[1, ["tensor", 1 << 62, *PARAMETER[2:]]], [3, [1]], [4, 1]], f"p: {1 << 62} views of 2"),
        ([[1, ["tensor", -1, *PARAMETER[2:]]], [3, [1]], [4, 1]], "p: -1 views of 2"),
        ([[1, ["tensor", True, *PARAMETER[2:]]], [3, [1]], [4, 1]], "p: TypeError: expected int, got bool"),
        ([[1, ["tensor", [[1, 1, 0]], *PARAMETER[2:]]], [3, [1]], [4, 1]], "p: TypeError: expected int, got tuple"),
        ([[4, ["tensor", 0, None, []]]], "t: 0 views of -1"),
        # What is none of all.
        ([[1, PARAMETER], [3, [1]], [4, None]], "t: TypeError: expected tuple, got NoneType"),
        ([[1, PARAMETER], [3, [1]], [4, True]], "t: TypeError: expected tuple, got bool"),
        ([[1, PARAMETER], [3, "v"], [4, 1]], "v: TypeError: expected tuple, got str"),
        ([[1, PARAMETER], [3, b"v"], [4, 1]], "v: TypeError: expected tuple, got bytes"),
        ([[1, PARAMETER], [3, []], [4, 1]], "v: IndexError"),
        ([[1, PARAMETER], [3, ["tensor", 0, None]], [4, 1]], "v: not enough values"),
        ([[1, PARAMETER[:3]], [3, [1]], [4, 1]], "p: not enough values"),
        ([[1, [*PARAMETER, 0]], [3, [1]], [4, 1]], "p: too many values"),
        # The same as one that is not earlier.
        ([[1, PARAMETER], [3, [1]], [4, 4]], "t: the same as leaf 4"),
        ([[1, PARAMETER], [3, [1]], [4, -1]], "t: the same as leaf -1"),
        ([[0, 0], [1, PARAMETER], [3, [1]], [4, 1]], "a: the same as leaf 0"),
        ([[0, 2], [1, PARAMETER], [3, [1]], [4, 1]], "a: the same as leaf 2"),
    ],
)
def test_leaves_that_cannot_be(leaves: list[Any], match: str) -> None:
    refuses_body(replaced(three(), (4,), leaves), match)


@pytest.mark.parametrize("views", [None, 3, [], [3], [3, b"\0\1\2"], [3, b"\0\1\2", b"\0\1\0"], b"\3", "3"])
def test_views_that_are_not_three_columns(views: Any) -> None:
    refuses_body(replaced(three(), (3,), views), "damaged manifest: TypeError")


def test_ties_of_ties_are_of_the_first() -> None:
    tensor = noise(2, 1)
    body = columns(rows_of({"a": tensor, "b": tensor, "c": tensor, "d": tensor}))
    assert body[4] == [[1, 0], [2, 0], [3, 0]]
    manifest, _ = read_body(replaced(body, (4,), [[1, 0], [2, 1], [3, 2]]))
    assert manifest.same == {1: 0, 2: 0, 3: 0}
    assert [leaf.views[0].storage for leaf in manifest.leaves] == [0, 0, 0, 0]
