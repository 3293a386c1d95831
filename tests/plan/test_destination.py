"""How a state fits a template, where each byte lands, and what comes out, without a wire."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CPU, difference, noise, raw_bytes, snapshot, storage_bytes, tensors_of, ties
from hypothesis import given
from hypothesis import strategies as st

from ft_transport import RemoteProtocolError, TransferReport
from ft_transport._plan.buffers import Bucket
from ft_transport._plan.compare import compare
from ft_transport._plan.destination import Landing
from ft_transport._plan.rebuild import mark_changed
from ft_transport._plan.source import place
from ft_transport._plan.template import match_template
from ft_transport._state.describe import describe
from ft_transport._wire.layout import Limits, lay_out

LIMITS = Limits(message_bytes=256, flight_bytes=256, pack_below=64, pack_from=3, window=2)


def land(state: object, template: object = None, limits: Limits = LIMITS) -> tuple[Any, TransferReport, Landing]:
    """Move a state into a template message by message, in this thread."""
    report = TransferReport("destination", "test", 1)
    manifest, tensors = describe(state)
    layout = lay_out(manifest, limits)
    matched = match_template(manifest, template, report) if template is not None else {}
    targets, disagreements = compare(manifest, matched, report)
    assert disagreements == []
    landing = Landing(manifest, layout, matched, targets, CPU, report)
    source = place(manifest, layout, tensors, CPU)
    for message in range(len(layout.messages)):
        bucket = Bucket(CPU)
        bucket.reset(source.staged_bytes(range(message, message + 1)))
        data = source.bytes_of(message, bucket)
        assert data.numel() == layout.sizes[message]
        target = landing.placement.direct(message)
        if target is None:
            landing.placement.scatter(message, data.clone())
        else:
            assert target.numel() == layout.sizes[message]
            target.copy_(data)
    return landing.rebuild(), report, landing


def disagreements(state: object, template: object) -> list[str]:
    report = TransferReport("destination", "test", 1)
    manifest, _ = describe(state)
    return compare(manifest, match_template(manifest, template, report), report)[1]


# --------------------------------------------------------------------------------- any state, any template


@st.composite
def views(draw: st.DrawFn, buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A view of this shape somewhere in a buffer: dense, transposed, or with gaps."""
    rows, columns = shape
    kind = draw(st.sampled_from(["dense", "transposed", "gaps", "columns"]))
    stride = {
        "dense": (columns, 1),
        "transposed": (1, rows),
        "gaps": (2 * columns, 2),
        "columns": (columns + 3, 1),
    }[kind]
    span = (rows - 1) * stride[0] + (columns - 1) * stride[1] + 1
    offset = draw(st.integers(0, buffer.numel() - span))
    return buffer.as_strided(shape, stride, offset)


@st.composite
def states(draw: st.DrawFn, seed: int, shapes: list[tuple[int, int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A tensor of each shape, in a few buffers; gives the buffers as well."""
    buffers = [noise(60, seed + i, torch.int32) for i in range(draw(st.integers(1, 3)))]
    return buffers, [draw(views(draw(st.sampled_from(buffers)), shape)) for shape in shapes]


SHAPES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5)


@given(st.data())
def test_any_views_land_in_any_views(data: st.DataObject) -> None:
    """Whatever shares memory with whatever on either side: the result is the state, ties included, and no byte of
    the template changes that is not an element of a leaf."""
    shapes = data.draw(SHAPES)
    _, state = data.draw(states(1, shapes))
    buffers, template = data.draw(states(10, shapes))
    before = [raw_bytes(buffer) for buffer in buffers]
    inside = [torch.zeros_like(buffer) for buffer in buffers]
    for tensor in template:
        for buffer, mask in zip(buffers, inside, strict=True):
            if buffer.data_ptr() == tensor.untyped_storage().data_ptr():
                mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(-1)
    result, report, landing = land(state, template)
    assert difference(result, state) == ""
    assert report.nbytes_in_place + report.nbytes_fresh == lay_out(describe(state)[0], LIMITS).nbytes
    for buffer, mask, old in zip(buffers, inside, before, strict=True):
        kept = raw_bytes(mask)
        for now, then, element in zip(raw_bytes(buffer), old, kept, strict=True):
            assert element or now == then, "a neighbour has changed"
    written = {id(tensor) for tensor in landing.written()}
    for received, mine in zip(result, template, strict=True):
        assert (received is mine) == (id(mine) in written)


@given(st.data())
def test_any_views_land_fresh_with_their_ties(data: st.DataObject) -> None:
    _, state = data.draw(states(1, data.draw(SHAPES)))
    result, report, _ = land(state)
    assert difference(result, state) == ""
    assert sorted(ties(result)) == sorted(ties(state))
    assert report.nbytes_in_place == 0


@given(st.data())
def test_a_template_with_the_same_ties_is_filled_with_them(data: st.DataObject) -> None:
    buffers, state = data.draw(states(1, data.draw(SHAPES)))
    copies = [noise(60, 20 + i, torch.int32) for i in range(len(buffers))]
    by_storage = {old.data_ptr(): new for old, new in zip(buffers, copies, strict=True)}
    template = [
        by_storage[tensor.untyped_storage().data_ptr()].as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        for tensor in state
    ]
    result, report, _ = land(state, template)
    assert difference(result, state) == ""
    assert sorted(ties(result)) == sorted(ties(state))
    assert report.not_in_place == {}
    assert all(received is mine for received, mine in zip(result, template, strict=True))


def test_a_transposed_tie_into_templates_of_other_strides() -> None:
    base, gaps = noise((4, 4), 1), noise((4, 8), 2)
    state = {"a": base, "b": base.t()}
    result, _, _ = land(state, {"a": gaps[:, ::2], "b": noise((4, 4), 3)})
    assert difference(result, state) == ""


def test_a_part_of_a_whole_into_templates_of_other_strides() -> None:
    base = noise((4, 4), 1)
    state = {"a": base, "row": base[2], "first": base[:1, :1]}
    result, _, _ = land(state, {"a": noise((4, 4), 2).t(), "row": noise(4, 3), "first": noise((1, 1), 4)})
    assert difference(result, state) == ""


def test_ties_that_begin_alike_but_run_in_another_order() -> None:
    """Element by element the template shares other memory than the source: one would overwrite the other."""
    base, mine = noise(4, 1), noise(4, 2)
    state = {"a": base.view(2, 2), "b": base[1:3]}
    result, report, _ = land(state, {"a": mine.view(2, 2).t(), "b": mine[1:3]})
    assert difference(result, state) == ""
    assert set(report.not_in_place) == {"a", "b"}


def test_equal_ties_of_other_strides_still_land_in_place() -> None:
    base, mine = noise((3, 4), 1), noise((4, 3), 2).t()
    state = {"a": base, "b": base}
    result, report, _ = land(state, {"a": mine, "b": mine})
    assert difference(result, state) == ""
    assert result["a"] is mine
    assert report.in_place_share == 0.0 or report.nbytes_in_place == 48


# ----------------------------------------------------------------------------------------------- pieces


def test_a_range_lands_directly_where_strides_agree() -> None:
    template = {"a": noise(100, 2), "b": noise((4, 5), 3)}
    report = TransferReport("destination", "test", 1)
    manifest, _ = describe({"a": noise(100, 1), "b": noise((5, 4), 4).t()})
    layout = lay_out(manifest, LIMITS)
    matched = match_template(manifest, template, report)
    landing = Landing(manifest, layout, matched, compare(manifest, matched, report)[0], CPU, report)
    assert landing.in_place
    direct = [landing.placement.direct(message) for message in range(len(layout.messages))]
    assert direct[0] is not None
    assert direct[0].data_ptr() == template["a"].data_ptr()
    assert direct[-1] is None, "other strides go through a bucket"


def test_planning_touches_nothing() -> None:
    template = [noise(10, 1), noise((3, 4), 2).t()]
    before = snapshot(template)
    manifest, _ = describe([noise(10, 3), noise((4, 3), 4)])
    report = TransferReport("destination", "test", 1)
    matched = match_template(manifest, template, report)
    landing = Landing(manifest, lay_out(manifest, LIMITS), matched, compare(manifest, matched, report)[0], CPU, report)
    assert landing.in_place
    assert snapshot(template) == before


def test_copies_are_announced() -> None:
    base, mine = noise(20, 1), noise(20, 2)
    _, _, landing = land([base[::2], base[1::2]], [mine[:10], mine[10:]])
    assert landing.copies
    assert not landing.in_place
    _, _, landing = land([noise(5, 1)], [noise(5, 2)])
    assert not landing.copies


def test_more_than_the_machine_has_is_refused_before_it_is_asked_for() -> None:
    manifest, _ = describe([torch.zeros(4)])
    geometry = manifest.leaves[0].views[0].geometry
    big = describe([torch.zeros(1).expand(1 << 50)])[0]
    assert big.storages[0].nbytes == 4
    manifest.storages[0] = manifest.storages[0]._replace(nbytes=1 << 60)
    assert geometry.numel == 4
    with pytest.raises(MemoryError, match="more than this machine has"):
        Landing(manifest, lay_out(manifest, LIMITS), {}, {}, CPU, TransferReport("destination", "test", 1))


def test_mark_changed_bumps_the_version_of_what_has_one() -> None:
    plain = torch.zeros(2)
    with torch.inference_mode():
        inference = torch.zeros(2)
    version = plain._version
    mark_changed([plain, inference])
    assert plain._version == version + 1


def test_landing_itself_does_not_tell_autograd() -> None:
    weight, strided = torch.nn.Parameter(torch.zeros(3)), torch.zeros(4, 3).t()
    versions = weight._version, strided._version
    _, _, landing = land([noise(3, 1), noise((3, 4), 2)], [weight, strided])
    assert (weight._version, strided._version) == versions
    assert {id(tensor) for tensor in landing.written()} == {id(weight), id(strided)}


# --------------------------------------------------------------------------------------------- template


def test_each_disagreement_is_one_line_with_expected_and_got() -> None:
    state = {"a": noise(2, 1), "b": {"c": noise((2, 3), 2, torch.bfloat16)}, "d": 1, "e": noise(1, 3)}
    template = {"a": noise(3, 1), "b": {"c": noise((2, 3), 2)}, "d": noise((), 3), "e": "text"}
    assert disagreements(state, template) == [
        "a: expected float32 (3,), source has float32 (2,)",
        "b.c: expected float32 (2, 3), source has bfloat16 (2, 3)",
        "d: expected tensor float32 (), source has a plain int",
        "e: expected a plain str, source has tensor float32 (1,)",
    ]


def test_plain_values_never_disagree() -> None:
    assert disagreements({"a": 1, "w": noise(1, 1)}, {"a": "text", "w": noise(1, 2)}) == []


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.zeros(1, 3).expand(2, 3), "overlaps itself"),
        (lambda: torch.zeros(10).as_strided((2, 3), (2, 1)), "overlaps itself"),
        (lambda: torch.zeros(2, 3, dtype=torch.complex64).conj(), "lazy conjugate"),
    ],
)
def test_template_leaves_that_cannot_be_written_are_named_and_left_alone(make: Any, why: str) -> None:
    mine = make()
    state = {"a": noise((2, 3), 1, mine.dtype), "b": noise(2, 2)}
    result, report, _ = land(state, {"a": mine, "b": noise(2, 3)})
    assert difference(result, state) == ""
    assert why in report.not_in_place["a"]
    assert result["a"] is not mine


def test_a_subclass_in_the_template_is_left_alone() -> None:
    class Sub(torch.Tensor):
        pass

    mine = torch.zeros(3).as_subclass(Sub)
    result, report, _ = land({"a": noise(3, 1), "b": noise(1, 2)}, {"a": mine, "b": noise(1, 3)})
    assert type(result["a"]) is torch.Tensor
    assert "Sub" in report.not_in_place["a"]


def test_missing_and_unused() -> None:
    _, report, _ = land({"a": noise(2, 1), "new": noise(2, 2), "n": 5}, {"a": noise(2, 3), "old": noise(2, 4)})
    assert report.unexpected_keys == ["new"]
    assert report.missing_keys == ["old"]


def test_nothing_to_match_without_tensors() -> None:
    report = TransferReport("destination", "test", 1)
    manifest, _ = describe({"lr": 1})
    assert match_template(manifest, {"other": 2}, report) == {}
    assert match_template(manifest, {}, report) == {}


def test_what_is_no_envelope_has_one_place_only() -> None:
    """Without ``torchft`` beside it, ``user`` is a key like any other."""
    manifest, _ = describe({"user": {"default": {"w": noise(2, 1)}}})
    with pytest.raises(RemoteProtocolError, match="matches nothing"):
        match_template(manifest, {"w": noise(2, 2)}, TransferReport("destination", "test", 1))


def test_the_helper_sees_neighbours() -> None:
    tensor = noise(4, 1)
    assert tensors_of({"a": tensor, "b": 1}) == [tensor]
    assert storage_bytes(tensor[:2]).numel() == 16
