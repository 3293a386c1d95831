"""A chain heals seven replicas in hardly more time than one, over links of 1 Gbit/s each, and when one of them dies."""

from __future__ import annotations

from datetime import timedelta

import pytest

from .shaped_links import measure, replicas, rights

NUMBER = 7
MEGABYTES = 200


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_time_hardly_depends_on_the_number() -> None:
    """By what it takes for that: one copy leaves the source, and each passes on what it has while the rest comes.

    Seconds are for ``python -m netns.shaped_links``: the processes share their cores with other tests.
    """
    if reason := rights():
        pytest.skip(reason)
    with replicas(NUMBER, "1gbit") as ranks:
        all_ = measure(ranks, NUMBER, MEGABYTES)
        broken = measure(ranks, NUMBER, MEGABYTES, victim=NUMBER // 2 + 1)
    print(all_, broken)
    assert (all_.num_healed, broken.num_healed) == (NUMBER, NUMBER - 1)
    assert all_.copies < 1.1
    for result in (all_, broken):
        assert max(result.firsts) < min(result.ends), "the last one had bytes before the first one had all"


@pytest.mark.parametrize(
    "slow", [pytest.param(1, id="the first", marks=pytest.mark.thorough), pytest.param(2, id="the second")]
)
def test_a_slow_link_does_not_hold_those_behind_it(slow: int) -> None:
    if reason := rights():
        pytest.skip(reason)
    with replicas(4, "1gbit", {slow: "100mbit"}) as ranks:
        result = measure(ranks, 4, 80, stall=timedelta(seconds=1))
    print(result)
    assert result.num_healed == 4
    # One behind it in the chain would be done after it: what it passes on has come to it before.
    assert max(result.ends[slow:]) < result.ends[slow - 1]
    # The source's link carries one copy for the slow one, or for the one before it, and one for those behind.
    assert result.copies < 2.3
