"""Which bytes travel in which message: everything once, in bounds, the same on both sides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from states import STATES

from ft_transport._options import LaneOptions
from ft_transport._state.describe import describe
from ft_transport._state.geometry import geometry
from ft_transport._state.manifest import Leaf, Leaves, Manifest, Storage, View
from ft_transport._state.tree import LEAF
from ft_transport._wire.decode import decode_manifest
from ft_transport._wire.encode import encode_manifest
from ft_transport._wire.frames import Frame, ManifestHeader, decode_frame
from ft_transport._wire.layout import Layout, Limits, Piece, Ranges, lay_out

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def flat(*sizes: int) -> Manifest:
    """A storage of each size, seen whole."""
    leaves = [Leaf("tensor", (View(i, geometry(torch.uint8, (n,), (1,)), 0),)) for i, n in enumerate(sizes)]
    return Manifest([LEAF] * len(sizes), Leaves.of(leaves), [Storage(n, "cpu") for n in sizes])


def check(layout: Layout, limits: Limits) -> None:
    travelled = sorted(piece for message in layout.messages for piece in message)
    rebuilt: list[Piece] = []
    for piece in travelled:
        assert piece.begin < piece.end
        if rebuilt and rebuilt[-1].storage == piece.storage and rebuilt[-1].end == piece.begin:
            same_range = layout.range_of(piece.storage, piece.begin) == layout.range_of(*rebuilt[-1][:2])
            if same_range:
                rebuilt[-1] = rebuilt[-1]._replace(end=piece.end)
                continue
        rebuilt.append(piece)
    assert rebuilt == list(layout.ranges), "every byte travels once"
    assert layout.sizes == [sum(piece.end - piece.begin for piece in message) for message in layout.messages]
    assert layout.nbytes == sum(layout.sizes)
    assert all(0 < size <= limits.message_bytes for size in layout.sizes)
    assert [message for flight in layout.flights for message in flight] == list(range(len(layout.messages)))
    for flight in layout.flights:
        assert len(flight) == 1 or sum(layout.sizes[message] for message in flight) <= limits.message_bytes


@given(
    st.lists(st.integers(1, 600), max_size=40),
    st.integers(64, 300),
    st.integers(0, 300),
    st.integers(1, 20),
)
def test_every_byte_travels_once_in_bounds(sizes: list[int], message: int, pack: int, pack_from: int) -> None:
    limits = Limits(message, message, min(pack, message), pack_from, 2)
    check(lay_out(flat(*sizes), limits), limits)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("limits", [Limits(), Limits(64, 64, 0, 1, 1), Limits(256, 256, 100, 4, 2)])
def test_states(name: str, limits: Limits) -> None:
    manifest, _ = describe(STATES[name](1))
    check(lay_out(manifest, limits), limits)


@pytest.mark.parametrize("name", sorted(set(STATES) - {"values", "containers"}))
def test_both_sides_derive_the_same(name: str) -> None:
    limits = Limits(256, 256, 100, 4, 2)
    manifest, _ = describe(STATES[name](1))
    kind, body = decode_frame(encode_manifest(manifest, ManifestHeader(1, limits, "")))
    assert kind is Frame.MANIFEST
    decoded, header = decode_manifest(body)
    one, other = lay_out(decoded, header.limits), lay_out(manifest, limits)
    assert (list(one.ranges), one.messages, one.flights) == (list(other.ranges), other.messages, other.flights)
    assert {i: (g.end, g.unit, g.places.tolist()) for i, g in one.gaps.items()} == {
        i: (g.end, g.unit, g.places.tolist()) for i, g in other.gaps.items()
    }


def test_a_large_range_is_cut_where_no_element_is() -> None:
    for size in (1, 2, 4, 8, 16):
        layout = lay_out(flat(1000 * size), Limits(message_bytes=100 * size, flight_bytes=100 * size, pack_below=0))
        assert all(piece.begin % 64 == 0 for message in layout.messages for piece in message)


def test_few_small_ranges_travel_one_by_one_and_many_are_packed() -> None:
    limits = Limits(message_bytes=1000, flight_bytes=1000, pack_below=100, pack_from=5)
    assert len(lay_out(flat(10, 20, 30, 40), limits).messages) == 4
    packed = lay_out(flat(10, 20, 30, 40, 50, 500), limits)
    assert [len(message) for message in packed.messages] == [1, 5]
    assert packed.sizes == [500, 150]


def test_buckets_are_filled_in_order_up_to_the_bound() -> None:
    layout = lay_out(flat(*[60] * 10), Limits(message_bytes=200, flight_bytes=200, pack_below=100, pack_from=1))
    assert layout.sizes == [180, 180, 180, 60]


@pytest.mark.parametrize("limits", [Limits(128, 128, 200, 1), Limits(63, 63, 0)], ids=["no range", "no byte"])
def test_limits_by_which_nothing_would_come_to_an_end(limits: Limits) -> None:
    with pytest.raises(ValueError, match="limits: expected message_bytes of 64 and of pack_below at least"):
        lay_out(flat(150, 150), limits)


def test_nothing_to_send() -> None:
    layout = lay_out(flat(), Limits())
    assert (list(layout.ranges), layout.messages, layout.flights, layout.nbytes) == ([], [], [], 0)


def test_range_of() -> None:
    ranges = Ranges([0, 0, 2], [0, 64, 0], [10, 6, 5], [-1, -1, 0])
    assert list(ranges) == [Piece(0, 0, 10), Piece(0, 64, 70), Piece(2, 0, 5)]
    assert [ranges.at(0, 0), ranges.at(0, 9), ranges.at(0, 64), ranges.at(2, 4)] == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("nbytes", "in_a_chain", "else_"),
    [
        (0, 2 << 20, 4 << 20),
        ((512 << 20) - 1, 2 << 20, 4 << 20),
        (512 << 20, 2 << 20, 8 << 20),
        (600 << 20, 2 << 20, 8 << 20),
        (768 << 20, 2 << 20, 12 << 20),
        ((1 << 30) - 1, 2 << 20, 12 << 20),
        (1 << 30, 4 << 20, 16 << 20),
        (2 << 30, 4 << 20, 16 << 20),
        (1 << 40, 4 << 20, 16 << 20),
    ],
)
def test_messages_of_lanes_grow_with_the_state(nbytes: int, in_a_chain: int, else_: int) -> None:
    assert LaneOptions(torch.device("cpu"), chain=True).limits(nbytes).message_bytes == in_a_chain
    assert LaneOptions(torch.device("cpu"), chain=False).limits(nbytes).message_bytes == else_


@pytest.mark.parametrize("name", STATES)
def test_what_a_layout_says_of_ranges_is_so(name: str) -> None:
    """Both ends go by it in place of looking at each range."""
    manifest, _ = describe(STATES[name](1))
    layout, views = lay_out(manifest, Limits(pack_below=100)), manifest.views
    assert list(layout.large) == [which for which, (_, begin, end) in enumerate(layout.ranges) if end - begin >= 100]
    for piece, number in zip(layout.ranges, layout.ranges.lone, strict=True):
        mine = [view for view in views if view.storage == piece.storage and piece.begin <= view.begin < piece.end]
        assert (number >= 0) == (len(mine) == 1 and mine[0].geometry.dense)
        if number >= 0:
            assert piece == (mine[0].storage, mine[0].begin, mine[0].end)
            assert views[number] == mine[0]
