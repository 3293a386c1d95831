"""A template that is what comes, and all that it is not taken for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CPU, Config, Point, noise
from states import STATES
from wire.manifests import same

from ft_transport import LocalProtocolError, RemoteProtocolError, TransferReport
from ft_transport._options import LaneOptions
from ft_transport._plan.expected import Template, read
from ft_transport._plan.template import fit
from ft_transport._state.describe import describe
from ft_transport._telemetry.report import Copies
from ft_transport._wire import decode as decoding
from ft_transport._wire.decode import decode_manifest
from ft_transport._wire.encode import encode_manifest
from ft_transport._wire.frames import ManifestHeader, decode_frame
from ft_transport._wire.layout import Layout, Limits, lay_out

LIMITS = LaneOptions(CPU, chain=False).limits


def body_of(state: object, limits: Limits | None = None) -> Any:
    """The body of the MANIFEST that a source sends."""
    manifest, _ = describe(state)
    return decode_frame(encode_manifest(manifest, ManifestHeader(7, limits or LIMITS(0), "xxh3")))[1]


def expecting(tree: object) -> Template:
    template = Template(lambda: tree)
    template.expect(LIMITS)
    return template


def same_layout(one: Layout, other: Layout) -> bool:
    # Where there are gaps, a tensor says.
    def plain(layout: Layout) -> tuple[object, ...]:
        columns = layout.ranges, layout.ranges.lone, layout.large, layout.flights, *layout.owners
        return (*map(list, columns), layout.begins, layout.sizes, layout.nbytes, layout.stage_below, str(layout.gaps))

    return plain(one) == plain(other)


def test_a_callback_that_raises_is_named_and_its_traceback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def mine() -> object:
        return {}["weight"]

    with pytest.raises(LocalProtocolError, match=r"the transport's state_dict raised KeyError: 'weight'"):
        Template(mine)
    assert "in mine" in caplog.text


def model(seed: int, lr: float = 0.1) -> dict[str, Any]:
    weight = noise((3, 4), seed)
    rows = noise((4, 2), seed + 1)
    return {
        "weight": weight,
        "tied": weight,
        "alone": noise((2, 3), seed + 3),
        "rows": [rows[0], rows[1:3]],
        "empty": torch.empty(0),
        "optimizer": {
            "state": {0: {"step": noise((), seed + 2)}},
            "groups": [{"lr": lr, "betas": (0.9, None), "on": True}],
        },
    }


def in_envelope(**trees: object) -> dict[str, Any]:
    return {"user": trees, "torchft": {"step": 7, "batches_committed": 14}}


SHARED = [1, 2]
# What a source sends, and what the callback gives: the place differs.
PLACES: dict[str, tuple[object, object]] = {
    "all of it": (model(1), model(2)),
    "below the only key": (in_envelope(default=model(1)), model(2)),
    "all of user": (in_envelope(model=model(1), other=model(3)), {"model": model(2), "other": model(4)}),
    "a container twice": (
        in_envelope(default={"a": SHARED, "b": SHARED, "w": noise(2, 1)}),
        {"a": SHARED, "b": SHARED, "w": noise(2, 2)},
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_what_is_expected_is_what_all_of_it_says(case: str) -> None:
    state, tree = PLACES[case]
    body, template = body_of(state), expecting(tree)
    found = template.read(body)
    assert found is not None, "it was expected"
    manifest, header, layout = found
    usual, usual_header = decode_manifest(body)
    assert same(manifest, usual)
    assert header == usual_header
    assert same_layout(layout, lay_out(usual, header.limits))


@pytest.mark.parametrize("case", PLACES)
def test_the_fit_is_the_same(case: str) -> None:
    state, tree = PLACES[case]
    fits, reports = [], []
    for template in (expecting(tree), Template(lambda: tree)):
        report = TransferReport("destination", "test", 7)
        manifest, _, _ = read(body_of(state), template)
        assert (template.plain(manifest) is None) == bool(fits)  # the first one was expected
        fits.append(fit(manifest, template, report))
        reports.append(report)
    one, other = [dict(zip(each.targets, each.targets.blocks.addresses, strict=True)) for each in fits]
    assert one == other
    assert fits[0].matched.keys() == fits[1].matched.keys()
    assert all(mine is fits[1].matched[index] for index, mine in fits[0].matched.items())
    assert reports[0] == reports[1]


@pytest.mark.parametrize("name", STATES)
def test_any_state_is_read_as_without_a_template(name: str) -> None:
    state, tree = STATES[name](1), STATES[name](2)
    body = body_of(state)
    template = expecting(tree)
    with torch.serialization.safe_globals([Config, Point]):
        manifest, _, layout = read(body, template)
        usual, header = decode_manifest(body)
    assert same(manifest, usual)
    assert same_layout(layout, lay_out(usual, header.limits))


def test_values_are_the_sources() -> None:
    found = expecting(model(2, lr=0.1)).read(body_of(in_envelope(default=model(1, lr=0.5))))
    assert found is not None
    values = [leaf.context for leaf in found[0].leaves if leaf.kind == "value"]
    assert values == [0.5, 0.9, None, True, 7, 14]


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[], object]:
    def made() -> object:
        state = model(1)
        change(state)
        return in_envelope(default=state)

    return made


def put(name: str, value: object) -> Callable[[], object]:
    return changed(lambda state: state.__setitem__(name, value))


def under_key(state: dict[str, Any], key: object) -> None:
    state["optimizer"]["state"] = {key: state["optimizer"]["state"][0]}


OTHERS: dict[str, Callable[[], object]] = {
    "dtype": put("alone", noise((2, 3), 1, torch.int32)),
    "shape": put("alone", noise((3, 2), 1)),
    "strides": put("alone", noise((3, 2), 1).t()),
    "not tied": put("tied", noise((3, 4), 1)),
    "equal and not the same": changed(lambda state: state.update(tied=state["weight"].view(3, 4))),
    "rows of two storages": put("rows", [noise(2, 1), noise((2, 2), 2)]),
    "other rows": changed(lambda state: state.update(rows=[noise((4, 2), 1)[1], noise((4, 2), 1)[2:4]])),
    "a value for a tensor": put("weight", 5),
    "a tensor for a value": changed(lambda state: state["optimizer"]["groups"][0].update(lr=noise((), 1))),
    "one more": put("more", noise(2, 1)),
    "one less": changed(lambda state: state.pop("rows")),
    "another order": changed(lambda state: state.update(weight=state.pop("weight"))),
    "another container": changed(lambda state: state.update(rows=tuple(state["rows"]))),
    "a key that is a float": changed(
        lambda state: state["optimizer"].update(state={0.0: state["optimizer"]["state"][0]})
    ),
    "a key that is a flag": changed(
        lambda state: state["optimizer"].update(state={False: state["optimizer"]["state"][0]})
    ),
    "a parameter": put("weight", torch.nn.Parameter(noise((3, 4), 1))),
    "an object for a value": changed(lambda state: state["optimizer"]["groups"][0].update(lr=Config())),
    "a container twice": changed(lambda state: state["optimizer"].update(groups=[state["optimizer"]["groups"][0]] * 2)),
    "a second key of values": lambda: in_envelope(default=model(1), other={"lr": 1}),
    "another envelope": lambda: {"model": model(1), "torchft": {"step": 7}},
    "two keys": lambda: in_envelope(default=model(1), other=model(3)),
    "no envelope of torchft's": lambda: {"user": {"default": model(1)}},
    "a tensor beside": lambda: {"user": {"default": model(1)}, "torchft": {"step": noise((), 1)}},
    "beside, the same object": lambda: {"user": {"default": (tree := model(1))}, "torchft": {"step": tree["weight"]}},
    "torchft first": lambda: {"torchft": {"step": 7}, "user": {"default": model(1)}},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_otherwise_is_read_as_a_whole(name: str) -> None:
    state = OTHERS[name]()
    body, template = body_of(state), expecting(model(2))
    assert template.read(body) is None
    with torch.serialization.safe_globals([Config]):
        manifest, _, _ = read(body, template)
        assert same(manifest, decode_manifest(body)[0])
    assert template.plain(manifest) is None


def test_memory_that_is_exchanged_while_the_source_is_waited_for() -> None:
    weight = noise(4, 2)
    template = expecting({"w": weight})
    weight.data = noise(4, 3)
    manifest, _, _ = read(body_of({"w": noise(4, 1)}), template)
    targets = fit(manifest, template, TransferReport("destination", "test", 7)).targets
    assert targets.blocks.addresses == [weight.data_ptr()]


def test_two_containers_are_not_one() -> None:
    one: list[int] = [1, 2]
    state = {"w": noise(2, 1), "a": one, "b": one}
    assert expecting({"w": noise(2, 2), "a": [1, 2], "b": [1, 2]}).read(body_of(state)) is None


def test_what_lies_on_a_device_is_not_what_lies_on_the_host() -> None:
    body = body_of({"w": noise(2, 1)})
    assert expecting({"w": noise(2, 2)}).read(body) is not None
    count, numbers, distinct = body[5]
    body = [*body[:5], (count, numbers, tuple((nbytes, "cuda") for nbytes, _ in distinct)), body[6]]
    assert expecting({"w": noise(2, 2)}).read(body) is None


def test_an_object_is_no_value() -> None:
    state, template = {"w": noise(2, 1), "x": Sly()}, expecting({"w": noise(2, 2), "x": 5})
    with torch.serialization.safe_globals([Sly]):
        assert template.read(body_of(state)) is None


class Sly:
    """An object that knows when it is pickled."""

    def __init__(self) -> None:
        self.num = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        self.num += 1
        return Sly, ()


def test_no_code_of_the_users_is_run_for_a_guess() -> None:
    sly = Sly()
    expecting({"w": noise(2, 2), "sly": sly})
    assert sly.num == 0


def test_a_place_that_is_not_the_only_one_is_looked_for_by_name() -> None:
    inner = {"w": noise(2, 1)}
    body = body_of({"user": {"user": inner}, "torchft": {}})
    assert expecting({"user": {"w": noise(2, 2)}}).read(body) is not None
    assert expecting(noise(2, 2)).read(body_of({"user": noise(2, 1), "torchft": 5})) is None


def test_a_tensor_that_is_more_than_plain_is_expected_beside_plain_ones() -> None:
    def tree(seed: int) -> dict[str, Any]:
        return {"w": noise(3, seed), "b": noise(3, seed + 1).requires_grad_(), "v": noise(2, seed + 2)}

    template = expecting(tree(4))
    found = template.read(body_of(tree(1)))
    assert found is not None
    known = template.plain(found[0])
    assert known is not None
    assert known[1].leaves == {0, 1, 2}


@pytest.mark.parametrize(
    "other", [noise(3, 7).to(torch.complex64).conj(), noise(3, 8).to_sparse()], ids=["lazy", "sparse"]
)
def test_of_a_tensor_of_another_kind_nothing_is_expected(other: torch.Tensor) -> None:
    tree = {"w": noise(3, 4), "other": other}
    assert expecting(tree).read(body_of(tree)) is None


def test_a_class_that_is_not_allowed_is_refused_by_name() -> None:
    state = in_envelope(default={"w": noise(2, 1), "own": 1})
    body = list(body_of(state))
    assert body[4][0] == (1, (1,))
    body[4] = ((1, (("t", "no.such.Class"),)), *body[4][1:])
    with pytest.raises(RemoteProtocolError) as usual:
        decode_manifest(body)
    with pytest.raises(RemoteProtocolError) as here:
        read(body, expecting({"w": noise(2, 2), "own": 2}))
    assert str(here.value) == str(usual.value)


def tied() -> dict[str, Any]:
    """A leaf of every sort that is expected; the last is the same as the second."""
    tensor = noise(2, 2)
    return {"w": noise(3, 1), "t": tensor, "v": 5, "u": tensor}


# What a body says of its leaves: the value and the tie, then two values of the envelope.
TIED = ((2, (5,)), (3, 1), (4, (7,)), (5, (14,)))


def body_of_tied() -> list[Any]:
    """One that is expected by who has the same."""
    body = body_of(in_envelope(default=tied()))
    assert body[4] == TIED
    assert expecting(tied()).read(body) is not None
    return list(body)


def test_values_alone_may_differ() -> None:
    body = body_of_tied()
    body[4] = ((2, ("x",)), *TIED[1:3], (5, (None,)))
    found = expecting(tied()).read(body)
    assert found is not None
    assert [leaf.context for leaf in found[0].leaves if leaf.kind == "value"] == ["x", 7, None]
    assert found[0].same == {3: 1}


@pytest.mark.parametrize(
    "leaves",
    [
        # A value for the tie, another tie, and what equals it to Python.
        (TIED[0], (3, (1,)), *TIED[2:]),
        (TIED[0], (3, 0), *TIED[2:]),
        (TIED[0], (3, True), *TIED[2:]),
        (TIED[0], (3, 1.0), *TIED[2:]),
        (TIED[0], (3, None), *TIED[2:]),
        (TIED[0], (3, ("tensor", 0, None, ())), *TIED[2:]),
        # A tie for the value, and what is none.
        ((2, 1), *TIED[1:]),
        ((2, 0), *TIED[1:]),
        ((2, True), *TIED[1:]),
        ((2, None), *TIED[1:]),
        ((2, ()), *TIED[1:]),
        ((2, (5, 5)), *TIED[1:]),
        ((2, "v"), *TIED[1:]),
        ((2,), *TIED[1:]),
        ((2, (5,), (5,)), *TIED[1:]),
        # Other indices.
        ((1, (5,)), *TIED[1:]),
        ((2.0, (5,)), *TIED[1:]),
        (TIED[0], TIED[0], *TIED[2:]),
        (TIED[0], *TIED[2:]),
        (TIED[1], TIED[0], *TIED[2:]),
        TIED[1:],
        TIED[:2],
        (),
        # The envelope's: a tie, into the template or beside it, no value, another order, one more.
        (*TIED[:2], (4, 1), TIED[3]),
        (*TIED[:2], (4, 2), TIED[3]),
        (*TIED[:3], (5, 4)),
        (*TIED[:3], (5, 0)),
        (*TIED[:3], (5, None)),
        (*TIED[:3], (5, "v")),
        (*TIED[:3], (5, ("tensor", 0, None, ()))),
        (*TIED[:3], (5.0, (14,))),
        (*TIED[:2], TIED[3], TIED[2]),
        (*TIED, (6, (1,))),
        TIED[:3],
        None,
        5,
    ],
)
def test_what_is_said_otherwise_of_any_leaf_is_for_who_reads_all(leaves: Any) -> None:
    """What equals it to Python is otherwise, too: True is no index, and nil is no value."""
    body = body_of_tied()
    body[4] = leaves
    assert expecting(tied()).read(body) is None
    heard = []
    for template in (expecting(tied()), None):
        try:
            heard.append([leaf.kind for leaf in read(body, template)[0].leaves])
        except RemoteProtocolError as exc:
            heard.append([exc.message])
    assert heard[0] == heard[1]


def test_an_index_in_the_envelope_that_is_a_flag() -> None:
    """Behind a template of one leaf, where the next is 1."""
    body, tree = list(body_of({"user": {"w": noise(2, 1)}, "torchft": 5})), {"w": noise(2, 2)}
    assert body[4] == ((1, (5,)),)
    assert expecting(tree).read(body) is not None
    body[4] = ((True, (5,)),)
    assert expecting(tree).read(body) is None


@pytest.mark.parametrize(
    ("part", "instead"),
    [
        (2, (("float32", (3,), (1,)), ("float64", (2,), (1,)))),
        (2, (("float32", (3,), (1,)), ("float32", (2,), (True,)))),
        (2, (("float32", (3,), (1,)), ("float32", (2,), (2,)))),
        (3, (3.0, b"\0\1\2", b"\0\1\1", b"\0\0\0")),
        (3, (4, b"\0\1\2", b"\0\1\1", b"\0\0\0")),
        (3, (3, b"\0\2\1", b"\0\1\1", b"\0\0\0")),
        (3, (3, b"\0\1\2", b"\0\0\1", b"\0\0\0")),
        (3, (3, b"\0\1\2", b"\0\1\1", b"\0\0\1")),
        (3, (3, b"\0\1\2", b"\0\1\1", b"\0\0")),
        (3, (3, b"\0\1\2", b"\0\1\1", b"\0\0\0\0\0\0")),
        (3, (3, "\0\1\2", b"\0\1\1", b"\0\0\0")),
        (5, (3.0, b"\0\1\1", ((12, "cpu"), (8, "cpu")))),
        (5, (4, b"\0\1\1", ((12, "cpu"), (8, "cpu")))),
        (5, (3, b"\0\1\0", ((12, "cpu"), (8, "cpu")))),
        (5, (3, b"\0\1\1", ((12, "cpu"), (9, "cpu")))),
        (5, (3, b"\0\1\1", ((12.0, "cpu"), (8, "cpu")))),
        (5, (3, b"\0\1\1", ((12, "cuda"), (8, "cpu")))),
        (6, ((1, 0),)),
        (6, None),
    ],
)
def test_what_is_said_otherwise_of_views_and_storages(part: int, instead: Any) -> None:
    tree = {"w": noise(3, 1), "t": noise(2, 2), "u": noise(2, 3), "v": 5}
    body = list(body_of(tree))
    assert body[2] == (("float32", (3,), (1,)), ("float32", (2,), (1,)))
    assert body[3] == (3, b"\0\1\2", b"\0\1\1", b"\0\0\0")
    assert body[5:] == [(3, b"\0\1\1", ((12, "cpu"), (8, "cpu"))), ()]
    assert expecting(tree).read(body) is not None
    body[part] = instead
    assert expecting(tree).read(body) is None


@pytest.mark.parametrize("wrong", [(3, 2.0), (3.0, 2), (3, 1), (2, 3), (3,), 3, (3, 2, 2)])
def test_what_is_said_otherwise_of_containers_that_are_one(wrong: Any) -> None:
    def tree() -> dict[str, Any]:
        one: list[int] = []
        return {"w": noise(2, 1), "a": one, "b": one}

    body = list(body_of(tree()))
    assert body[6] == ((3, 2),)
    assert expecting(tree()).read(body) is not None
    body[6] = (wrong,)
    assert expecting(tree()).read(body) is None


def test_limits_are_the_sources_and_are_bounded() -> None:
    state, tree = {"w": noise(100_000, 1)}, {"w": noise(100_000, 2)}
    limits = Limits(message_bytes=256 << 10)
    found = expecting(tree).read(body_of(state, limits))
    assert found is not None
    assert found[1].limits == limits
    assert same_layout(found[2], lay_out(decode_manifest(body_of(state, limits))[0], limits))
    # More than can be: to be refused by who reads all of it.
    assert expecting(tree).read(body_of(state, Limits(message_bytes=1 << 31))) is None


def test_messages_are_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_CUTS", 100)
    state, tree = {"w": noise(100_000, 1)}, {"w": noise(100_000, 2)}
    body = body_of(state, Limits(message_bytes=64, pack_below=0, flight_bytes=64))
    with pytest.raises(RemoteProtocolError, match="more than 100 messages"):
        read(body, expecting(tree))


def test_a_template_that_cannot_travel_expects_nothing() -> None:
    without = noise(4, 1)
    without.untyped_storage().resize_(0)
    template = expecting({"w": without})
    body = body_of({"w": noise(4, 1)})
    assert template.read(body) is None
    assert same(read(body, template)[0], decode_manifest(body)[0])


# ------------------------------------------------------------------------------------------- copies


class Calls:
    """A callback that counts."""

    def __init__(self, give: Callable[[], object]) -> None:
        self.num = 0
        self._give = give

    def __call__(self) -> object:
        self.num += 1
        return self._give()


def test_a_callback_is_asked_again_only_where_nothing_is_known_of_it() -> None:
    weight, copies = noise(4, 1), Copies()
    views = Calls(lambda: {"w": weight.detach()})  # as ``Module.state_dict()`` gives them
    Template(views, copies)
    assert (views.num, copies.paths) == (2, frozenset())
    Template(views, copies)
    assert views.num == 3
    Template(views)
    assert views.num == 4


@pytest.mark.parametrize(
    "give",
    [
        lambda: {"w": noise(4, 1)},
        lambda: {"w": torch.nn.Parameter(noise(4, 1))},
        lambda: {"w": noise(4, 1).to_sparse()},
    ],
)
def test_what_may_be_a_copy_is_left_to_who_compares_it(give: Callable[[], object]) -> None:
    copies = Copies()
    template = Template(give, copies)
    assert copies.paths is None
    assert template.again is not None


@pytest.mark.parametrize("second", [lambda w: {"v": w}, lambda w: [w], lambda w: {"w": w, "v": w}, lambda w: {}])
def test_a_callback_that_gives_another_tree_the_second_time(second: Callable[[torch.Tensor], object]) -> None:
    weight, copies = noise(4, 1), Copies()
    given = [second(weight.detach()), {"w": weight}]
    Template(given.pop, copies)
    assert copies.paths is None


def test_a_callback_that_raises_the_second_time_has_given_a_template() -> None:
    given = [{"w": noise(4, 1)}]
    copies = Copies()
    assert Template(given.pop, copies).tree is not None
    assert copies.paths == frozenset()
