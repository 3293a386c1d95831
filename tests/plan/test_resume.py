"""What a receive has left counts for the next one, however the source cuts the state then."""

from __future__ import annotations

from helpers import noise

from ft_transport._plan.resume import PartialReceive
from ft_transport._state.describe import describe
from ft_transport._wire.layout import Layout, Limits, lay_out

STATE = {"large": noise(5000, 1), "other": noise(1000, 2), "small": [noise(3, 3 + i) for i in range(20)], "step": 5}
SMALL = Limits(message_bytes=1 << 12, flight_bytes=1 << 14, pack_below=64, pack_from=8, window=4)
LARGE = SMALL._replace(message_bytes=1 << 13)


def layout(limits: Limits) -> Layout:
    return lay_out(describe(STATE)[0], limits)


def covered(found: Layout, messages: dict[int, int | None]) -> set[tuple[int, int]]:
    """Every byte of some messages, as storage and place."""
    return {(s, at) for m in messages for s, begin, end in found.messages[m] for at in range(begin, end)}


def test_the_same_cut_keeps_the_digests() -> None:
    kept = PartialReceive(7, layout(SMALL), {0: 11, 3: 13})
    assert kept.left_for(7, layout(SMALL)) == {0: 11, 3: 13}


def test_another_cut_offers_what_is_whole_without_digests() -> None:
    small, large = layout(SMALL), layout(LARGE)
    everything = dict.fromkeys(range(len(small.messages)), 1)
    assert PartialReceive(7, small, everything).left_for(7, large) == dict.fromkeys(range(len(large.messages)))
    for missing in everything:
        here = {message: 1 for message in everything if message != missing}
        found = PartialReceive(7, small, here).left_for(7, large)
        assert covered(large, found) <= covered(small, here)
        assert set(found.values()) <= {None}
        # What is missing touches one message of twice the size.
        assert len(found) == len(large.messages) - 1


def test_nothing_is_left_for_another_step() -> None:
    kept = PartialReceive(7, layout(SMALL), {0: 11})
    assert kept.left_for(8, layout(SMALL)) == {}


def test_smaller_cuts_of_a_large_message() -> None:
    small, large = layout(SMALL), layout(LARGE)
    found = PartialReceive(7, large, {0: 1}).left_for(7, small)
    assert covered(small, found) == covered(large, {0: 1})
