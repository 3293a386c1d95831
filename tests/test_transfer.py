"""A whole transfer, source and destination in two threads over the in-memory channel."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import (
    CPU,
    PLAIN,
    SMALL,
    Config,
    Ends,
    Point,
    Recorded,
    Wrapped,
    difference,
    distinct_nbytes,
    noise,
    num_posted,
    randomized,
    raw_bytes,
    snapshot,
    storage_bytes,
    succeed,
    tensors_of,
    ties,
    transfer,
)
from states import STATES, State, model_and_optimizer

from ft_transport import (
    LocalProtocolError,
    PeerFailure,
    PeerReport,
    Progress,
    RemoteProtocolError,
    TransferReport,
    TransferTimeout,
)
from ft_transport._deadline import Deadline
from ft_transport._device import Streams
from ft_transport._group.channel import Channel, Pending
from ft_transport._group.control import FRAME_TAG
from ft_transport._group.destination import receive
from ft_transport._group.fan_out import in_parallel
from ft_transport._group.source import serve
from ft_transport._options import Options
from ft_transport._plan.rebuild import mark_changed
from ft_transport._plan.source import SourcePlan
from ft_transport._telemetry.progress import report_progress
from ft_transport._wire.layout import Limits
from ft_transport.testing import FaultyChannel, StandInAccelerator, memory_channels

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

# Templates of these cannot take all bytes: their own elements overlap.
OVERLAPPING = {"expanded"}


@pytest.fixture(autouse=True)
def _allowed() -> Iterator[None]:
    with torch.serialization.safe_globals([Point, Config]):
        yield


def refused(ends: Ends) -> str:
    """Both sides know that the destination refuses; gives the destination's text."""
    for side in (ends.source, ends.destination):
        assert isinstance(side.error, RemoteProtocolError), side.error
        assert side.peer.outcome == "refused"
        assert num_posted(side.channel) == 0
    assert isinstance(ends.destination.error, RemoteProtocolError)
    assert ends.destination.error.message in ends.source.text
    assert not ends.destination.report.torn
    return ends.destination.error.message


# ------------------------------------------------------------------------------------------ all states


@pytest.mark.parametrize("options", [PLAIN, SMALL], ids=["one flight", "many flights"])
@pytest.mark.parametrize("name", STATES)
def test_fresh(name: str, options: Options) -> None:
    state = STATES[name](1)
    ends = succeed(state, options=options)
    assert difference(ends.destination.result, state) == ""
    assert sorted(ties(ends.destination.result)) == sorted(ties(state))
    assert ends.destination.report.nbytes_in_place == 0


@pytest.mark.parametrize("options", [PLAIN, SMALL], ids=["one flight", "many flights"])
@pytest.mark.parametrize("name", STATES)
def test_in_place(name: str, options: Options) -> None:
    state, template = STATES[name](1), STATES[name](2)
    ends = succeed(state, lambda: template, options=options)
    result, report = ends.destination.result, ends.destination.report
    assert difference(result, state) == ""
    assert sorted(ties(result)) == sorted(ties(state))
    if name not in OVERLAPPING:
        assert report.nbytes_in_place == report.nbytes_total
        assert report.nbytes_in_place + report.nbytes_fresh == report.nbytes_total
        assert report.not_in_place == {}
        assert difference(template, state) == "" or name == "values"
        for received, mine in zip(tensors_of(result), tensors_of(template), strict=True):
            assert received is mine


@pytest.mark.parametrize("name", sorted(set(STATES) - {"same_gap_view_twice"}))
def test_only_the_distinct_bytes_travel(name: str) -> None:
    state = STATES[name](1)
    ends = succeed(state)
    assert ends.source.report.nbytes_total == distinct_nbytes(state)
    assert ends.source.peer.nbytes == ends.destination.peer.nbytes == distinct_nbytes(state)
    # The manifest, ten bytes of digest a message, and four frames with three numbers in all, signals and answers.
    overhead = ends.frame_nbytes + 10 * ends.source.report.num_messages + 256
    for side in (ends.source, ends.destination):
        assert distinct_nbytes(state) <= side.peer.nbytes_wire <= distinct_nbytes(state) + overhead
        assert side.report.nbytes_wire == side.peer.nbytes_wire == side.channel.nbytes_wire


def test_only_the_distinct_bytes_travel_of_two_columns() -> None:
    base = noise((100, 50), 1)
    state = {"first": base[:, :1], "last": base[:, 48:49]}
    assert succeed(state).source.report.nbytes_total == distinct_nbytes(state)


def test_columns_of_one_matrix_land_in_place_and_leave_the_others_alone() -> None:
    matrix, template = noise((100, 50), 1), noise((100, 50), 2)
    before = template.clone()
    columns = {"first": slice(0, 1), "some": slice(7, 20), "last": slice(48, 49)}
    mine = {name: template[:, where] for name, where in columns.items()}
    ends = succeed({name: matrix[:, where] for name, where in columns.items()}, template=lambda: mine)
    assert ends.destination.report.nbytes_fresh == 0
    for where in columns.values():
        before[:, where] = matrix[:, where]
    assert torch.equal(template.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("name", STATES)
def test_the_state_at_the_source_is_not_touched(name: str) -> None:
    state = STATES[name](1)
    before = snapshot(state)
    succeed(state, options=SMALL)
    assert snapshot(state) == before


def test_sixteen_views_of_one_storage_share_one_storage_afterwards() -> None:
    ends = succeed(STATES["views_of_one"](1))
    assert len({tensor.untyped_storage().data_ptr() for tensor in ends.destination.result}) == 1


def test_a_fresh_storage_of_ten_rows_has_ten_rows() -> None:
    ends = succeed(STATES["ten_rows"](1))
    assert ends.destination.result["rows"].untyped_storage().nbytes() == 10 * 16 * 4


def test_fresh_parameters_are_parameters() -> None:
    result = succeed(STATES["parameters"](1)).destination.result
    assert isinstance(result["weight"], torch.nn.Parameter)
    assert result["weight"].requires_grad
    assert isinstance(result["frozen"], torch.nn.Parameter)
    assert not result["frozen"].requires_grad
    assert result["leaf"].requires_grad
    assert result["leaf"].is_leaf


def test_a_lazy_conjugate_arrives_with_the_tensor_that_it_is_of() -> None:
    z = torch.randn(4, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    state = {"z": z, "conj": z.conj(), "imag of conj": z.conj().imag}
    ends = succeed(state)
    result = ends.destination.result
    for name, tensor in state.items():
        assert torch.equal(result[name], tensor)
        assert result[name].untyped_storage().data_ptr() == result["z"].untyped_storage().data_ptr()
    assert ends.destination.report.nbytes_total == 32


def test_without_digests() -> None:
    state = model_and_optimizer(1)
    ends = succeed(state, options=Options(CPU, verify=False))
    assert difference(ends.destination.result, state) == ""


def test_the_sum_digest() -> None:
    class Sums(Options):
        @property
        def digest(self) -> str:
            return "sum"

    state = model_and_optimizer(1)
    assert difference(succeed(state, options=Sums(CPU)).destination.result, state) == ""


def test_without_a_step() -> None:
    state = model_and_optimizer(1)
    assert difference(succeed(state, step=None, expected_step=None).destination.result, state) == ""


@pytest.mark.parametrize("pack_from", [1, 5, 6, 7])
@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_any_limits(pack_from: int, window: int) -> None:
    class Chosen(Options):
        def limits(self, nbytes: int) -> Limits:
            return Limits(message_bytes=128, flight_bytes=128, pack_below=65, pack_from=pack_from, window=window)

    def make(seed: int) -> State:
        base = noise((30, 7), seed)
        return [base.t(), *(noise(n, seed + n, torch.uint8) for n in (1, 63, 64, 65, 127, 128, 129, 1000)), base[:, 1]]

    state, template = make(1), make(2)
    assert difference(succeed(state, lambda: template, options=Chosen(CPU)).destination.result, state) == ""
    assert difference(succeed(state, options=Chosen(CPU)).destination.result, state) == ""


# ---------------------------------------------------------------------------------- templates that differ


def test_another_memory_order_in_the_template_keeps_its_own() -> None:
    state = {"image": noise((2, 3, 4, 5), 1), "t": noise((30, 40), 2).t()}
    template = {
        "image": torch.zeros((2, 3, 4, 5)).to(memory_format=torch.channels_last),
        "t": torch.zeros((40, 60))[:, ::2],
    }
    strides = [tensor.stride() for tensor in template.values()]
    ends = succeed(state, lambda: template, options=SMALL)
    assert [tensor.stride() for tensor in template.values()] == strides
    assert difference(template, state) == ""
    assert ends.destination.result["t"] is template["t"]
    assert ends.destination.report.in_place_share == 1.0
    assert ends.destination.report.nbytes_staged > 0


@pytest.mark.parametrize(
    "window",
    [
        lambda base: base[10:40].view(5, 6),
        lambda base: base[::2][:30].view(5, 6),
        lambda base: base.view(10, 10)[2:7, 3:9],
        lambda base: base.view(10, 10)[3:9, 2:7].t(),
    ],
    ids=["offset", "every second", "rectangle", "transposed rectangle"],
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"])
def test_neighbours_in_the_template_are_untouched(window: Callable[[torch.Tensor], torch.Tensor], layout: str) -> None:
    makers = {
        "contiguous": lambda: noise((5, 6), 1),
        "transposed": lambda: noise((6, 5), 1).t(),
        "gaps": lambda: noise((5, 12), 1)[:, ::2],
    }
    state = {"part": makers[layout]()}
    base = noise(100, 2)
    part = window(base)
    outside = torch.ones(100, dtype=torch.bool)
    window(outside)[...] = False
    before = raw_bytes(base[outside])
    ends = succeed(state, lambda: {"part": part})
    assert ends.destination.result["part"] is part
    assert difference({"part": part}, state) == ""
    assert raw_bytes(base[outside]) == before
    assert ends.destination.report.in_place_share == 1.0


def test_template_ties_that_the_source_lacks_end_in_memory_of_their_own() -> None:
    state = {"a": noise(8, 1), "b": noise(8, 2), "c": noise(4, 3)}
    tied = noise(8, 4)
    before = raw_bytes(tied)
    ends = succeed(state, lambda: {"a": tied, "b": tied, "c": torch.zeros(4)})
    result, report = ends.destination.result, ends.destination.report
    assert difference(result, state) == ""
    assert raw_bytes(tied) == before
    assert set(report.not_in_place) == {"a", "b"}
    assert report.nbytes_in_place == 16
    assert report.nbytes_fresh == 64
    assert ties(result) == []


def test_source_ties_that_the_template_lacks_are_written_to_both() -> None:
    shared = noise((4, 4), 1)
    state = {"a": shared, "b": shared, "part": shared[1:3]}
    template = {"a": noise((4, 4), 2), "b": noise((4, 4), 3), "part": noise((2, 4), 4)}
    result = succeed(state, lambda: template).destination.result
    assert difference(result, state) == ""
    assert difference(template, state) == ""
    assert all(result[name] is template[name] for name in template)


def test_overlapping_views_at_another_distance_in_the_template() -> None:
    base, other = noise(20, 1), noise(20, 2)
    state = {"a": base[:10], "b": base[5:15]}
    ends = succeed(state, lambda: {"a": other[:10], "b": other[8:18]})
    assert difference(ends.destination.result, state) == ""
    assert sorted(ties(ends.destination.result)) == sorted(ties(state))


def test_what_is_received_beside_the_template_because_of_what_it_shares_is_named() -> None:
    base = noise(20, 1)
    state, template = {"a": base[:10], "b": base[5:15], "c": noise(3, 2)}, {"a": noise(10, 3), "b": noise(10, 4)}
    report = succeed(state, lambda: {**template, "c": noise(3, 5)}).destination.report
    assert report.not_in_place.keys() == {"a", "b"}
    assert "otherwise than at the source" in report.not_in_place["a"]
    assert report.nbytes_copied == 60
    assert difference(template, {name: state[name] for name in template}) == ""
    # What the template lacks, or what has a reason of its own, is not named for it.
    alone = succeed(state, lambda: {"a": noise(10, 6), "c": noise(3, 7)}).destination.report
    assert alone.not_in_place.keys() <= {"a"}
    assert alone.unexpected_keys == ["b"]


def test_tied_template_inside_one_buffer_as_the_source_has_it() -> None:
    source, mine = noise(64, 1), noise(80, 2)
    state = {"a": source[:32], "b": source[32:], "all": source}
    template = {"a": mine[8:40], "b": mine[40:72], "all": mine[8:72]}
    edges = raw_bytes(mine[:8]), raw_bytes(mine[72:])
    ends = succeed(state, lambda: template)
    assert difference(template, state) == ""
    assert (raw_bytes(mine[:8]), raw_bytes(mine[72:])) == edges
    assert ends.destination.report.in_place_share == 1.0


def test_a_template_that_overlaps_itself_is_left_alone() -> None:
    state = {"a": noise((3, 4), 1), "b": noise(2, 2)}
    row = noise((1, 4), 3)
    before = raw_bytes(row)
    template = {"a": row.expand(3, 4), "b": torch.zeros(2)}
    ends = succeed(state, lambda: template)
    assert difference(ends.destination.result, state) == ""
    assert raw_bytes(row) == before
    assert "overlaps itself" in ends.destination.report.not_in_place["a"]


def test_an_expanded_source_fills_a_full_template() -> None:
    state = {"a": noise((1, 4), 1).expand(3, 4)}
    template = {"a": torch.zeros(3, 4)}
    result = succeed(state, lambda: template).destination.result
    assert difference(result, state) == ""


def test_what_the_template_lacks_is_fresh_and_what_the_source_lacks_is_left_alone() -> None:
    state = {"a": noise(4, 1), "new": noise(8, 2), "lr": 0.5}
    template = {"a": torch.zeros(4), "old": torch.ones(3), "lr": 0.1}
    ends = succeed(state, lambda: template)
    report = ends.destination.report
    assert difference(ends.destination.result, state) == ""
    assert report.unexpected_keys == ["new"]
    assert report.missing_keys == ["old"]
    assert (report.nbytes_in_place, report.nbytes_fresh) == (16, 32)
    assert torch.equal(template["old"], torch.ones(3))
    assert template["lr"] == 0.1


def test_strict_refuses_both() -> None:
    state = {"a": noise(4, 1), "new": noise(8, 2)}
    template = {"a": noise(4, 3), "old": noise(3, 4)}
    before = snapshot(template)
    text = refused(transfer(state, lambda: template, destination_options=Options(CPU, strict=True)))
    assert "new: unexpected key, expected in the template, source has it" in text
    assert "old: missing key, expected from the source, template has it" in text
    assert snapshot(template) == before


def test_strict_takes_what_agrees() -> None:
    state, template = model_and_optimizer(1), model_and_optimizer(2)
    succeed(state, lambda: template, options=Options(CPU, strict=True))
    assert difference(template, state) == ""


def test_all_disagreements_in_one_error_and_nothing_touched() -> None:
    state = {
        "ok": noise(3, 1),
        "dtype": noise(4, 2, torch.bfloat16),
        "shape": noise((2, 3), 3),
        "dims": noise((6,), 4),
        "kind": noise(2, 5),
        "value": 3,
    }
    template = {
        "ok": noise(3, 6),
        "dtype": noise(4, 7),
        "shape": noise((3, 2), 8),
        "dims": noise((1, 6), 9),
        "kind": 1.0,
        "value": noise(2, 10),
    }
    before = snapshot(template)
    text = refused(transfer(state, lambda: template, destination_options=Options(CPU, on_mismatch="refuse")))
    assert snapshot(template) == before
    assert "dtype: expected float32 (4,), source has bfloat16 (4,)" in text
    assert "shape: expected float32 (3, 2), source has float32 (2, 3)" in text
    assert "dims: expected float32 (1, 6), source has float32 (6,)" in text
    assert "kind: expected a plain float, source has tensor float32 (2,)" in text
    assert "value: expected tensor float32 (2,), source has a plain int" in text
    assert "ok" not in text
    assert text.count(";") == 4


def test_a_parameter_takes_a_tensor_and_the_other_way_round() -> None:
    state = {"a": torch.nn.Parameter(noise(4, 1)), "b": noise(4, 2)}
    template = {"a": noise(4, 3), "b": torch.nn.Parameter(noise(4, 4))}
    result = succeed(state, lambda: template).destination.result
    assert all(result[name] is template[name] for name in template)
    assert raw_bytes(template["a"]) == raw_bytes(state["a"])
    assert raw_bytes(template["b"]) == raw_bytes(state["b"])


def test_the_version_counter_tells_autograd() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    strided = torch.ones(3, 4).t()
    loss = (weight * weight).sum()
    versions = weight._version, strided._version
    state = {"w": noise(3, 1), "s": noise((4, 3), 2)}
    ends = succeed(state, lambda: {"w": weight, "s": strided})
    assert {id(tensor) for tensor in ends.destination.written} == {id(weight), id(strided)}
    assert (weight._version, strided._version) == versions, "backward may still run before the step is decided"
    mark_changed(ends.destination.written)
    assert weight._version > versions[0]
    assert strided._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_can_be_templates() -> None:
    with torch.inference_mode():
        template = {"a": torch.zeros(4), "b": torch.zeros(3, 4).t()}
    state = {"a": noise(4, 1), "b": noise((4, 3), 2)}
    ends = succeed(state, lambda: template)
    assert difference(ends.destination.result, state) == ""
    mark_changed(ends.destination.written)


# -------------------------------------------------------------------------------------------- envelope


def envelope(user: State) -> State:
    return {"user": user, "torchft": {"step": 5, "batches_committed": 10}}


@pytest.mark.parametrize(
    ("user", "template", "share"),
    [
        (lambda s: {"default": model_and_optimizer(s)}, model_and_optimizer, 1.0),
        (lambda s: {"default": model_and_optimizer(s)}, lambda s: {"default": model_and_optimizer(s)}, 1.0),
        (lambda s: {"default": model_and_optimizer(s)}, lambda s: envelope({"default": model_and_optimizer(s)}), 1.0),
        (lambda s: {"a": {"w": noise(4, s)}, "b": {"v": noise(4, s + 1)}}, lambda s: {"v": noise(4, s)}, 0.5),
        (
            lambda s: {"a": {"w": noise(4, s)}, "b": {"w": noise(4, s + 1)}},
            lambda s: {"a": {"w": noise(4, s)}, "b": {"w": noise(4, s + 1)}},
            1.0,
        ),
        (lambda s: {"a": {"w": noise(4, s)}, "b": {"w": noise(5, s)}}, lambda s: {"w": noise(5, s)}, 5 / 9),
        (lambda s: {"default": noise(4, s)}, lambda s: noise(4, s), 1.0),
    ],
    ids=["one key", "user", "root", "one of two keys", "two keys", "by shape", "a bare tensor"],
)
def test_the_template_is_found_inside_the_envelope(
    user: Callable[[int], State], template: Callable[[int], State], share: float
) -> None:
    state, mine = envelope(user(1)), template(2)
    ends = succeed(state, lambda: mine)
    assert difference(ends.destination.result, state) == ""
    assert ends.destination.report.in_place_share == pytest.approx(share)


def test_the_template_is_found_at_the_root_of_a_plain_state() -> None:
    state, mine = model_and_optimizer(1), model_and_optimizer(2)
    assert succeed(state, lambda: mine).destination.report.in_place_share == 1.0


def test_two_places_that_fit_alike_are_an_error_that_names_them() -> None:
    state = envelope({"a": {"w": noise(4, 1)}, "b": {"w": noise(4, 2)}})
    template = {"w": noise(4, 3)}
    before = snapshot(template)
    text = refused(transfer(state, lambda: template))
    assert "user.a and user.b" in text
    assert snapshot(template) == before


def test_a_callback_that_matches_nothing_is_an_error_that_names_both() -> None:
    state = envelope({"default": {"layers": noise(4, 1)}})
    template = {"blocks": noise(4, 2)}
    text = refused(transfer(state, lambda: template))
    assert "matches nothing" in text
    assert "blocks" in text
    assert "user.default.layers" in text


def test_an_empty_callback_is_an_error() -> None:
    assert "matches nothing" in refused(transfer({"a": noise(4, 1)}, dict))


def test_what_the_callback_raises_ends_the_transfer_on_both_sides_at_once() -> None:
    def callback() -> object:
        raise KeyError("no model yet")

    start = time.perf_counter()
    ends = transfer({"a": noise(4, 1)}, callback)
    # Last words to a peer that has left would take a whole second.
    assert time.perf_counter() - start < 0.9
    assert isinstance(ends.destination.error, LocalProtocolError)
    assert "no model yet" in ends.destination.text
    assert isinstance(ends.source.error, RemoteProtocolError)
    assert "no model yet" in ends.source.text


# --------------------------------------------------------------------------------------------- refusals


def test_a_refusal_that_the_source_does_not_hear_of_is_one_all_the_same() -> None:
    source, destination = memory_channels()
    # Behind the three messages of the manifest's frame.
    lost = FaultyChannel(destination).raise_at(3, PeerFailure("the channel broke"))
    ends = transfer({"a": noise(4, 1)}, lambda: {"a": noise(3, 2)}, channels=(source, lost))
    assert isinstance(ends.destination.error, RemoteProtocolError)
    assert "a: expected float32 (3,)" in ends.destination.text
    assert ends.destination.report.peers[0].outcome == "refused"


def test_another_step_is_refused() -> None:
    state, template = {"a": noise(4, 1)}, {"a": noise(4, 2)}
    before = snapshot(template)
    text = refused(transfer(state, lambda: template, step=7, expected_step=8))
    assert "expected step 8, source has step 7" in text
    assert snapshot(template) == before


def test_an_unknown_digest_is_refused() -> None:
    class Unknown(Options):
        @property
        def digest(self) -> str:
            return ""

    options = Unknown(CPU)
    ends = transfer({"a": noise(4, 1)}, options=options)
    assert ends.destination.error is None

    class Future(Options):
        @property
        def digest(self) -> str:
            return "blake9"

    assert "blake9" in refused(transfer({"a": noise(4, 1)}, options=Future(CPU)))


class Stranger:
    """A class that nobody allowed."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stranger)

    def __repr__(self) -> str:
        return "Stranger()"

    __hash__ = None  # type: ignore[assignment]


class Pair(tuple[Any, ...]):
    """A namedtuple by hand."""

    _fields = ("left", "right")

    @classmethod
    def _make(cls, values: Any) -> Pair:
        return cls(values)


def test_a_class_that_is_not_allowed_is_named_with_its_path_and_the_remedy() -> None:
    state = {"model": {"w": noise(4, 1)}, "config": {"inner": Stranger()}}
    text = refused(transfer(state))
    assert "config.inner" in text
    assert "Stranger" in text
    assert "add_safe_globals" in text
    with torch.serialization.safe_globals([Stranger]):
        assert difference(succeed(state).destination.result, state) == ""


def test_a_namedtuple_that_is_not_allowed_is_named_with_its_path_and_the_remedy() -> None:
    state = {"model": {"pair": Pair([noise(4, 1), 2])}}
    text = refused(transfer(state))
    assert "Pair" in text
    assert "add_safe_globals" in text
    with torch.serialization.safe_globals([Pair]):
        result = succeed(state).destination.result
    assert type(result["model"]["pair"]) is Pair
    assert difference(result, state) == ""


def outbound(state: object) -> SourcePlan:
    return SourcePlan(state, 7, PLAIN, TransferReport("source", "test", 7))


def test_what_cannot_travel_is_refused_by_name_all_at_once() -> None:
    state = {
        "fine": noise(3, 1),
        "hook": lambda: 0,
        "deep": {"lazy": (x for x in ())},
    }
    with pytest.raises(LocalProtocolError) as caught:
        outbound(state)
    assert "hook" in caught.value.message
    assert "deep.lazy" in caught.value.message
    assert "fine" not in caught.value.message
    assert caught.value.phase == "describe"


def test_a_value_that_cannot_be_encoded_is_refused_by_name() -> None:
    with pytest.raises(LocalProtocolError, match=r"hooks\.0"):
        outbound({"w": noise(3, 1), "hooks": [lambda: 0]})


def test_a_key_that_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(LocalProtocolError):
        outbound({"a": {(lambda: 0): noise(3, 1)}})


def test_a_state_that_contains_itself_is_refused() -> None:
    state: dict[str, Any] = {"w": noise(3, 1)}
    state["self"] = state
    with pytest.raises(LocalProtocolError, match="contains itself"):
        outbound(state)


# --------------------------------------------------------------------------------------------- reports


def test_the_reports() -> None:
    state, template = model_and_optimizer(1), model_and_optimizer(2)
    ends = succeed(state, lambda: template, options=SMALL)
    for side in (ends.source, ends.destination):
        report = side.report
        assert report.complete
        assert report.num_leaves == 12
        assert report.nbytes_total == 3 * (2 * 256 + 4)
        assert report.num_messages > 1
        assert side.peer.outcome == "complete"
        assert set(side.peer.seconds) >= {"agree", "move", "verify"}
        assert all(seconds >= 0 for seconds in report.seconds.values())
        assert not report.torn


def test_progress_rises_to_the_total_on_both_sides() -> None:
    seen: list[Progress] = []
    options = type("Watched", (type(SMALL),), {})(CPU, on_progress=seen.append)
    state = STATES["large"](1)
    succeed(state, options=options)
    for role in ("source", "destination"):
        mine = [progress for progress in seen if progress.role == role]
        assert len(mine) > 3
        assert [p.nbytes_done for p in mine] == sorted({p.nbytes_done for p in mine})
        assert mine[-1].nbytes_done == mine[-1].nbytes_total == distinct_nbytes(state)
        assert {p.step for p in mine} == {7}


def test_a_progress_callback_that_raises_does_not_end_the_transfer(caplog: pytest.LogCaptureFixture) -> None:
    def callback(progress: Progress) -> None:
        raise ZeroDivisionError("in the callback")

    state = STATES["large"](1)
    with caplog.at_level(logging.ERROR, "ft_transport"):
        ends = succeed(state, options=Options(CPU, on_progress=callback))
    assert difference(ends.destination.result, state) == ""
    assert "the progress callback raised" in caplog.text


def test_tell_progress_without_a_callback() -> None:
    report_progress(None, Progress("source", 1, 0, 1, 2))


# ------------------------------------------------------------------------------------- two buckets a side


def test_no_more_than_two_buckets_a_side() -> None:
    """Staged messages come from and go to two places, however many flights there are."""

    state = [noise((16, 32), i)[:, ::2] for i in range(24)]
    template = [noise((16, 16), 90 + i).t() for i in range(24)]
    ends = tuple(map(Recorded, memory_channels()))
    report = succeed(state, lambda: template, options=SMALL, channels=ends).source.report  # type: ignore[arg-type]
    assert report.num_messages == 24
    for channel, what in zip(ends, ("send", "recv"), strict=True):
        assert len({place for op, tag, _, place in channel.operations if op == what and tag >= 3}) <= 2


# --------------------------------------------------------------------------------------------- threads


def test_for_each_gives_what_each_raised_in_order() -> None:
    boom = ValueError("second")

    def run(index: int) -> None:
        if index == 1:
            raise boom
        if index == 2:
            raise KeyboardInterrupt

    channels = [memory_channels()[0] for _ in range(3)]
    errors = in_parallel(channels, run)
    assert errors[0] is None
    assert errors[1] is boom
    assert isinstance(errors[2], KeyboardInterrupt)
    assert boom.__traceback__ is None


def test_for_each_where_the_stream_cannot_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(streams: object) -> AbstractContextManager[None]:
        raise RuntimeError("no such stream")

    seen: list[int] = []
    with StandInAccelerator() as devices:
        streams = Streams([torch.device("cuda", 0)])
        monkeypatch.setattr(devices, "adopt", use)
        errors = in_parallel([memory_channels()[0] for _ in range(2)], seen.append, streams)
    assert [str(error) for error in errors] == ["no such stream"] * 2
    assert not seen


def test_for_each_of_none_and_of_one() -> None:
    seen: list[int] = []
    assert in_parallel([], seen.append) == []
    assert in_parallel([memory_channels()[0]], seen.append) == [None]
    assert seen == [0]


# -------------------------------------------------------------------------------------------- time-outs


def test_a_source_that_is_never_heard_of_times_out() -> None:
    channel, _ = memory_channels()
    report = TransferReport("destination", "test", 1, [PeerReport(1)])
    with pytest.raises(TransferTimeout, match="timed out"):
        receive(channel, 1, None, PLAIN, Deadline(timedelta(milliseconds=20)), report)
    assert report.peers[0].outcome == "timed out"
    assert not report.torn
    assert channel.num_posted == 0


def test_a_destination_that_is_never_heard_of_times_out() -> None:
    channel, _ = memory_channels()
    peer = PeerReport(1)
    with pytest.raises(TransferTimeout, match="timed out"):
        serve(channel, outbound({"a": noise(3, 1)}), Deadline(timedelta(milliseconds=20)), peer)
    assert peer.outcome == "timed out"
    assert channel.num_posted == 0


def test_the_shorter_deadline_ends_both_sides() -> None:
    def slow() -> object:
        raise AssertionError("never asked for")

    ends = transfer({"a": noise(3, 1)}, slow, timeout=timedelta(milliseconds=1), destination_timeout=timedelta(0))
    for side in (ends.source, ends.destination):
        assert isinstance(side.error, (TransferTimeout, PeerFailure, RemoteProtocolError, LocalProtocolError))
        assert num_posted(side.channel) == 0


def test_storage_helper_sees_the_neighbours() -> None:
    """The comparison that all of the above leans on can fail."""
    base = randomized(torch.zeros(8), 1)
    state = {"a": base[:4]}
    other = {"a": base[:4].clone()}
    assert difference(state, other) == ""
    storage_bytes(other["a"])[3] ^= 1
    assert difference(state, other) == "a: bytes differ"
    assert difference({"a": torch.zeros(4)}, {"a": torch.zeros(4, dtype=torch.int32)})
    assert difference({"a": -0.0}, {"a": 0.0})
    assert difference([1], (1,))


# ------------------------------------------------------------------------------- a damaged description


class Flipped(Wrapped):
    """Flips one bit of the first frame that is sent."""

    def __init__(self, channel: Channel, bit: float) -> None:
        super().__init__(channel)
        self.bit = bit

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        if tag == FRAME_TAG and self.bit >= 0:
            tensor = tensor.clone()
            where = int(self.bit * tensor.numel() * 8)
            tensor[where // 8] ^= 1 << where % 8
            self.bit = -1
        return super().send(tensor, tag)


@pytest.mark.parametrize("bit", [i / 60 for i in range(60)])
def test_a_flipped_bit_in_the_description_is_found(bit: float) -> None:
    """Also where what it says makes sense: another key, another number."""
    ours, theirs = memory_channels()
    state = {"weights": noise(40, 1), "names": ["a", "b"], "number": 12345, "more": {f"k{i}": i for i in range(20)}}
    template = {"weights": noise(40, 2), "names": ["c", "d"], "number": 1, "more": {f"k{i}": 0 for i in range(20)}}
    before = raw_bytes(template["weights"])
    ends = transfer(state, lambda: template, channels=(Flipped(ours, bit), theirs))
    assert isinstance(ends.destination.error, (RemoteProtocolError, PeerFailure))
    assert isinstance(ends.source.error, (RemoteProtocolError, PeerFailure))
    assert raw_bytes(template["weights"]) == before
