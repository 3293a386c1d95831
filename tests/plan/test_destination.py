"""Where each byte lands, and what comes out, without a wire."""

from __future__ import annotations

import pytest
import torch
from helpers import CPU, difference, noise, raw_bytes, snapshot, storage_bytes, tensors_of, ties
from hypothesis import given
from hypothesis import strategies as st

from ft_transport import TransferReport
from ft_transport._plan.compare import Targets, compare
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.pages import Pages
from ft_transport._plan.template import match_template
from ft_transport._state.describe import describe
from ft_transport._wire.layout import Limits, lay_out
from ft_transport.errors import LocalProtocolError
from plan.landing import LIMITS, land

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


# ----------------------------------------------------------------------------------------------- pieces


def test_planning_touches_nothing() -> None:
    template = [noise(10, 1), noise((3, 4), 2).t()]
    before = snapshot(template)
    manifest, _ = describe([noise(10, 3), noise((4, 3), 4)])
    report = TransferReport("destination", "test", 1)
    matched = match_template(manifest, template, report)
    landing = DestinationPlan(
        manifest, lay_out(manifest, LIMITS), matched, compare(manifest, matched, report)[0], CPU, report
    )
    assert landing.in_place
    assert snapshot(template) == before


def test_copies_are_announced() -> None:
    base, mine = noise(20, 1), noise(20, 2)
    _, _, landing = land([base[::2], base[1::2]], [mine[:10], mine[10:]])
    assert landing.copies
    assert not landing.in_place
    _, _, landing = land([noise(5, 1)], [noise(5, 2)])
    assert not landing.copies


def test_what_is_fresh_is_provided_where_it_lands(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, int, bool]]()
    monkeypatch.setattr(Pages, "provide", lambda _, begin, end, *, ahead: asked.append((begin, end, ahead)))
    state = {"mine": noise(1 << 17, 1), "fresh": noise(1 << 17, 2), "small": noise(3, 3)}
    template = {"mine": noise(1 << 17, 4)}
    limits = Limits(message_bytes=256 << 10, flight_bytes=1 << 20, pack_below=64, pack_from=1, window=2)
    result, _, landing = land(state, template, limits)
    assert landing.has_pages
    for message in range(len(landing._layout.messages)):
        landing.provide(message, ahead=message % 2 == 0)
    begin = result["fresh"].data_ptr()
    # Of the template's memory it is for ``Pages`` to know that it is none of its own.
    found = {(first - begin, last - begin): ahead for first, last, ahead in asked}
    halves = found[0, 256 << 10], found[256 << 10, 512 << 10]
    assert sorted(halves) == [False, True], "whether it is done ahead is passed on"
    assert not land(state, {key: tensor.clone() for key, tensor in state.items()}, limits)[2].has_pages


def test_more_than_the_machine_has_is_refused_before_it_is_asked_for() -> None:
    manifest, _ = describe([torch.zeros(4)])
    geometry = manifest.leaves[0].views[0].geometry
    big = describe([torch.zeros(1).expand(1 << 50)])[0]
    assert big.storages[0].nbytes == 4
    manifest.storages[0] = manifest.storages[0]._replace(nbytes=1 << 60)
    assert geometry.numel == 4
    report = TransferReport("destination", "test", 1)
    with pytest.raises(MemoryError, match="more than this machine has"):
        DestinationPlan(manifest, lay_out(manifest, LIMITS), {}, Targets.none(), CPU, report)


# --------------------------------------------------------------------------------------------- template


def test_the_helper_sees_neighbours() -> None:
    tensor = noise(4, 1)
    assert tensors_of({"a": tensor, "b": 1}) == [tensor]
    assert storage_bytes(tensor[:2]).numel() == 16


@pytest.mark.parametrize("case", ["beside", "strides"])
def test_memory_that_is_exchanged_before_it_is_planned_is_not_written_to(case: str) -> None:
    """Its address is noted when it is compared, and not anew: what it has since may be smaller."""
    mine = torch.zeros(1000).as_strided((1000, 1), (1, 7 if case == "strides" else 1))
    template, report = {"a": mine, "b": torch.zeros(3)}, TransferReport("destination", "test", 1)
    manifest, _ = describe({"a": torch.ones(1000, 1), "b": torch.ones(3)})
    layout = lay_out(manifest, Limits(4096, 4096, 0, 1, 2))
    matched = match_template(manifest, template, report)
    targets, _ = compare(manifest, matched, report)
    mine.data = other = torch.zeros(1000, 1)
    beside = {"b"} if case == "beside" else set[str]()
    landing = DestinationPlan(manifest, layout, matched, targets, CPU, report, beside=beside)
    with pytest.raises(LocalProtocolError, match="exchanged or given back"):
        landing.placement.scatter(0, torch.ones(4000, dtype=torch.uint8))
    assert not other.any()


def test_memory_that_is_found_again_is_not_put_right_under_who_reads_it() -> None:
    """A relay's thread may be in the middle of one block, or message."""
    mine = {"a": torch.zeros(100), "b": torch.zeros(3)}
    _, _, landing = land({"a": noise(100, 1), "b": noise(3, 2)}, mine)
    read = landing.placement.blocks
    before = list(read)
    mine["a"].data = noise(100, 1)
    assert landing.find_again() == set()
    assert list(read) == before
    assert [block.here for block in read] == [False, True]
    assert [block.here for block in landing.placement.blocks] == [True, True]
