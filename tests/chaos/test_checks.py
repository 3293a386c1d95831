"""Each check finds what it is there for, in events made by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from .checks import GRACE, SLACK, Promise, call_times, check, frozen_times
from .events import Event, decode, encode
from .settings import Settings

SETTINGS = Settings(replicas=3)
ALL = [0, 1, 2]


@dataclass
class Story:
    """Events, told one after the other; each takes a tenth of a second."""

    events: list[Event] = field(default_factory=list)
    lives: dict[int, int] = field(default_factory=dict)
    now: float = 0.0

    def tell(self, replica: int, name: str, **fields: Any) -> Story:
        self.now = round(self.now + 0.1, 6)
        self.events.append(Event(self.now, replica, self.lives.get(replica, 0), name, fields))
        return self

    def commit(self, step: int, digest: str, *replicas: int, quorum: int = 1, buffers: str = "sent") -> Story:
        for replica in replicas:
            self.tell(replica, "commit", step=step, digest=digest, quorum=quorum, members=ALL, buffers=buffers)
        return self

    def offer(self, replica: int, step: int, buffers: str = "sent") -> Story:
        return self.tell(replica, "offered", step=step, quorum=1, buffers=buffers)

    def heal(self, replica: int, source: int, step: int, digest: str, seconds: float = 0.1, error: str = "") -> Story:
        where = {"call": "receive", "number": 1, "step": step, "quorum": 1, "source": source}
        self.tell(replica, "begin", **where)
        return self.tell(replica, "end", **where, seconds=seconds, error=error, digest=digest)

    def strike(self, replica: int, kind: str) -> Story:
        return self.tell(replica, "strike", fault={"kind": kind}, role="destination", phase="move", share=0.5)

    def again(self, replica: int) -> Story:
        """A killed replica is gone and back."""
        self.tell(replica, "gone", status=-9)
        self.lives[replica] = self.lives.get(replica, 0) + 1
        return self.tell(replica, "started").tell(replica, "joined", digest=f"fresh {replica}")

    def broken(self, *, whole: bool = False) -> dict[str, Promise]:
        found = check(self.events, SETTINGS, whole=whole)
        return {promise.name: promise for promise in found if not promise.kept}


def begun() -> Story:
    story = Story()
    for replica in ALL:
        story.tell(replica, "started").tell(replica, "joined", digest=f"fresh {replica}")
    return story.commit(1, "a", *ALL)


def test_a_good_run_breaks_nothing() -> None:
    story = begun().strike(2, "kill").again(2).commit(2, "b", 0, 1, quorum=2)
    story.offer(0, 2).heal(2, 0, 2, "b").tell(-1, "calm").commit(3, "c", *ALL, quorum=3)
    story.tell(-1, "finishing", together=True)
    assert story.broken(whole=True) == {}


def test_two_states_after_the_same_commit() -> None:
    assert list(begun().commit(2, "b", 0, 1).commit(2, "x", 2).broken()) == ["agreement"]


def test_a_state_that_is_not_the_source_s() -> None:
    found = begun().strike(2, "kill").again(2).heal(2, 0, 1, "x").broken()
    assert list(found) == ["wrong states accepted"]
    assert "replica 2 from 0, step 1: x, source had a" in found["wrong states accepted"].broken[0]


def test_a_heal_at_step_0_has_the_source_s_first_state() -> None:
    story = Story().tell(0, "joined", digest="fresh 0")
    assert story.heal(1, 0, 0, "fresh 0").broken() == {}
    assert list(story.heal(1, 0, 0, "fresh 1").broken()) == ["wrong states accepted"]


def healed() -> Story:
    story = begun().strike(2, "kill").again(2).offer(0, 1, "first").offer(0, 1, "second")
    return story.offer(1, 1, "another's").heal(2, 0, 1, "a")


@pytest.mark.parametrize("buffers", ["first", "second"])
def test_the_buffers_of_a_heal_are_what_was_offered(buffers: str) -> None:
    story = healed().commit(2, "b", 0, 1, buffers="their own").commit(2, "b", 2, buffers=buffers)
    # Each replica's forward goes on from there.
    assert story.commit(3, "c", 2, buffers="its own").broken() == {}


@pytest.mark.parametrize("buffers", ["a mix", "another's"])
def test_the_buffers_of_a_heal_are_something_else(buffers: str) -> None:
    found = healed().commit(2, "b", 2, buffers=buffers).broken()
    assert list(found) == ["wrong buffers committed"]
    assert "source had sent ['first', 'second']" in found["wrong buffers committed"].broken[0]


def test_the_buffers_of_a_heal_that_was_not_committed() -> None:
    story = healed().tell(2, "failed", step=1, cause="group", error="", quorum=1, members=ALL, buffers="a mix")
    assert story.commit(2, "b", 2, buffers="its own").broken() == {}


def test_a_failed_receive_accepts_nothing() -> None:
    assert begun().heal(2, 0, 1, "x", error="PeerFailure: gone").broken() == {}


def test_a_step_of_a_majority_is_committed_anew() -> None:
    story = begun().commit(2, "b", 0, 1)
    assert list(story.commit(2, "x", 2, quorum=2).broken()) == ["no step lost"]


def test_a_step_of_one_alone_may_be_committed_anew() -> None:
    assert begun().commit(2, "b", 0).commit(2, "x", 1, 2, quorum=2).broken() == {}


def test_a_step_may_be_lost_with_all_who_had_it() -> None:
    story = begun().commit(2, "b", 0, 1).strike(0, "kill").again(0).strike(1, "kill").again(1)
    assert story.commit(2, "x", 2, quorum=2).broken() == {}


def test_a_source_that_loses_a_step() -> None:
    story = begun().tell(0, "failed", step=1, cause="send", error="TransferTimeout", quorum=2, members=ALL)
    assert list(story.broken()) == ["steps lost by sources"]
    # Over a group it may: the group is what the transfer moves over.
    assert all(promise.kept for promise in check(story.events, Settings(transport="pg"), whole=False))


def test_a_call_beyond_its_deadline() -> None:
    limit = SETTINGS.transfer + GRACE
    assert begun().heal(2, 0, 1, "a", seconds=limit - 0.1).broken() == {}
    assert list(begun().heal(2, 0, 1, "a", seconds=limit + 0.1).broken()) == ["deadlines"]


def test_time_spent_frozen_is_not_the_call_s() -> None:
    story = begun().strike(2, "stop").tell(2, "stopped")
    story.now += 5.0
    story.tell(2, "continued").heal(2, 0, 1, "a", seconds=5.0)
    assert story.broken() == {}
    ((_, seconds),) = call_times(story.events)
    assert seconds < 1.0


def test_who_was_stopped_twice_at_once_is_stopped_no_longer_than_it_lives() -> None:
    story = begun().strike(2, "stop").strike(2, "stop and kill").again(2)
    assert all(end <= story.now for times in frozen_times(story.events).values() for _, end in times)


def test_a_replica_that_stands_still() -> None:
    assert "no hang" in begun().tell(1, "hangs", seconds=30.0, calls=["receive"]).broken()


@pytest.mark.parametrize(("status", "kept"), [(-9, False), (1, False), (0, False)])
def test_a_replica_that_nobody_killed(status: int, kept: bool) -> None:
    assert ("no crash" not in begun().tell(1, "gone", status=status).broken()) == kept


def test_a_torn_replica_may_stop() -> None:
    story = begun().tell(1, "ended", reason="torn", error="TornStateError: …").tell(1, "gone", status=70)
    assert story.broken() == {}


def test_a_torn_replica_does_not_stop_where_no_heal_was_tried() -> None:
    """Its group could not be configured: the next quorum would heal it."""
    story = begun().tell(1, "end", call="configure", number=3, seconds=3.0, error="DistStoreError: wait timeout")
    story.tell(1, "ended", reason="torn", error="TornStateError: …").tell(1, "gone", status=70)
    assert list(story.broken()) == ["no crash"]


def health(story: Story, **more: Any) -> Story:
    story.now += 30.0
    look = {"threads": 10, "descriptors": 50, "rss": 300 << 20, "ours": ["ft_transport-listener"], **more}
    return story.tell(0, "health", **look)


@pytest.mark.parametrize("what", list(SLACK))
def test_what_grows(what: str) -> None:
    story = health(health(health(health(begun()))))
    assert story.broken() == {}
    assert "no leak" in health(story, **{what: 400 << 20}).broken()


def test_a_thread_that_is_left() -> None:
    assert "no leak" in health(begun(), ours=["ft_transport-lane"]).broken()
    assert "no leak" in begun().tell(0, "left", threads=["ft_transport-listener"]).broken()


def test_one_that_does_not_heal() -> None:
    story = begun().strike(2, "kill").again(2).tell(-1, "calm").commit(2, "b", 0, 1)
    found = story.tell(-1, "finishing", together=False).broken(whole=True)
    assert len(found["everyone healed"].broken) == 3
    torn = begun().tell(2, "ended", reason="torn", error="TornStateError: …").tell(2, "gone", status=70).again(2)
    torn.tell(2, "ended", reason="torn", error="TornStateError: …").tell(2, "gone", status=70).again(2)
    torn.commit(2, "b", *ALL).tell(-1, "calm").commit(3, "c", *ALL).tell(-1, "finishing", together=True)
    assert torn.broken(whole=True) == {}, "nobody was left to heal it"


def test_what_is_left_afterwards() -> None:
    (promise,) = [p for p in check(begun().events, SETTINGS, whole=False, left=["port 1"]) if not p.kept]
    assert promise.broken == ["port 1"]


def test_events_survive_their_file() -> None:
    for event in begun().heal(2, 0, 1, "a").events:
        assert decode(encode(event)) == event
