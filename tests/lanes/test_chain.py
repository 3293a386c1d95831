"""Who supplies whom, who is to blame, and what follows when a supplier has ended: tables, without sockets."""

from __future__ import annotations

import ast
import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ft_transport._deadline import Deadline
from ft_transport._lanes import chain
from ft_transport._lanes.chain import (
    _AHEAD_BYTES,
    AFTER,
    MAX_BREAKS,
    DestinationState,
    Ended,
    Next,
    after,
    is_to_blame,
    supplier_of,
)
from ft_transport._telemetry.report import PeerReport

LONG = timedelta(days=1)
PAST = Deadline(timedelta(0))


def destination(
    nbytes: int = 0,
    before: DestinationState | None = None,
    outcome: Any = "pending",
    settling: Deadline | None = PAST,
    relay: bytes = b"",
) -> DestinationState:
    peer = PeerReport(-1, outcome=outcome, nbytes=nbytes)
    metadata = "somewhere" if relay else ""
    return DestinationState(peer, metadata=metadata, relay=relay, before=before, settling=settling)


# ------------------------------------------------------------------------------------ who supplies whom


@pytest.mark.parametrize(
    ("line", "avoided", "supplier"),
    [
        ([], set(), None),
        ([("pending", b"1")], set(), 0),
        ([("complete", b"1")], set(), 0),
        ([("pending", b"1"), ("pending", b"2")], set(), 1),
        ([("pending", b"1"), ("dead", b"2")], set(), 0),
        ([("pending", b"1"), ("failed", b"2")], set(), 0),
        ([("pending", b"1"), ("timed out", b"2")], set(), 0),
        ([("pending", b"1"), ("refused", b"2")], set(), 0),
        ([("pending", b"1"), ("pending", b"")], set(), 0),
        ([("pending", b"1"), ("pending", b"2")], {b"2"}, 0),
        ([("pending", b"1"), ("pending", b"2")], {b"1"}, 1),
        ([("pending", b"1"), ("pending", b"2")], {b"1", b"2"}, None),
        ([("dead", b"1"), ("pending", b"")], set(), None),
    ],
    ids=[
        "the first in line has the source",
        "the second has the first",
        "who is complete goes on supplying",
        "the nearest",
        "not who is dead",
        "not who has failed",
        "not who was too late",
        "not who has refused",
        "not who cannot be reached",
        "not who has failed it",
        "who has failed it is no reason against another",
        "if all have failed it, the source",
        "if nobody is well, the source",
    ],
)
def test_who_supplies(line: list[tuple[str, bytes]], avoided: set[bytes], supplier: int | None) -> None:
    before = [destination(outcome=outcome, relay=relay) for outcome, relay in line]
    state = destination()
    state.avoided = avoided
    # Those behind it never supply it, so nobody waits in a circle.
    behind = destination(relay=b"behind")
    found = supplier_of(state, [*before, state, behind])
    assert found is (None if supplier is None else before[supplier])


def test_nobody_waits_in_a_circle_whatever_fails() -> None:
    line = [destination(relay=bytes([position])) for position in range(5)]
    for outcomes in itertools.product(("pending", "complete", "dead"), repeat=len(line)):
        for state, outcome in zip(line, outcomes, strict=True):
            state.peer.outcome = outcome  # type: ignore[assignment]
        for position, state in enumerate(line):
            found = supplier_of(state, line)
            assert found is None or line.index(found) < position


def test_who_gets_another_supplier_need_not_be_quick_at_once() -> None:
    first, second, state = destination(relay=b"1"), destination(relay=b"2"), destination(settling=None)
    state.follow(first, LONG)
    assert (state.before, is_to_blame(state)) == (first, False)
    begun = state.settling
    state.follow(first, LONG)
    assert state.settling is begun, "it goes on where it was"
    state.follow(second, LONG)
    assert state.before is second
    assert state.settling is not begun


@pytest.mark.parametrize(
    ("failed", "slow", "blame", "counts", "avoided"),
    [
        (b"1", False, False, True, {b"1"}),
        (b"1", True, True, True, {b"1"}),
        (b"1", True, False, False, set()),
        (b"any", False, False, True, set()),
        (b"any", True, True, True, set()),
    ],
    ids=["it has ended", "it is slow", "it waits itself", "somebody else has ended", "somebody else is slow"],
)
def test_who_is_turned_away_from(failed: bytes, slow: bool, blame: bool, counts: bool, avoided: set[bytes]) -> None:
    supplier = destination(relay=b"1", settling=PAST if blame else Deadline(LONG))
    state = destination(before=supplier)
    assert state.turn_away(failed, slow=slow) is counts
    assert state.avoided == avoided


# ------------------------------------------------------------------------------------- who is to blame

MUCH = 10 * _AHEAD_BYTES


@pytest.mark.parametrize(
    ("slow", "to_blame"),
    [
        (destination(1), True),
        (destination(1, destination(MUCH)), True),
        (destination(MUCH, destination(MUCH + 1, outcome="complete")), True),
        (destination(MUCH, destination(MUCH + 1)), False),
        (destination(1, destination(_AHEAD_BYTES)), False),
        (destination(1, settling=Deadline(LONG)), False),
        (destination(1, settling=None), False),
        (None, False),
    ],
    ids=[
        "supplied by the source",
        "its supplier is far ahead",
        "its supplier has everything",
        "it waits itself",
        "on its way",
        "has just got another supplier",
        "has no supplier yet",
        "is gone",
    ],
)
def test_who_is_to_blame(slow: DestinationState | None, to_blame: bool) -> None:
    assert is_to_blame(slow) is to_blame


# ----------------------------------------------------------------------------------------- what follows


def ended(**words: Any) -> Ended:
    """Lanes to a destination before this one have broken, and the source can be asked; but for what is said."""
    usual = {
        "complete": False,
        "overwritten": False,
        "named": False,
        "from_source": False,
        "source_lost": False,
        "hopeless": False,
        "breaks": 1,
    }
    return Ended(**{**usual, **words})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("situation", "follows"),
    [
        (ended(complete=True), Next.FINISH),
        (ended(complete=True, source_lost=True), Next.FINISH),
        (ended(complete=True, hopeless=True, breaks=MAX_BREAKS), Next.FINISH),
        (ended(complete=True, overwritten=True), Next.SAME),
        (ended(complete=True, overwritten=True, source_lost=True), Next.SAME),
        (ended(complete=True, overwritten=True, named=True), Next.NAMED),
        (ended(named=True), Next.NAMED),
        (ended(named=True, source_lost=True), Next.NAMED),
        (ended(), Next.ANOTHER),
        (ended(hopeless=True), Next.ANOTHER),
        (ended(breaks=10 * MAX_BREAKS), Next.ANOTHER),
        (ended(source_lost=True), Next.GIVE_UP),
        (ended(from_source=True), Next.SAME),
        (ended(from_source=True, breaks=MAX_BREAKS - 1), Next.SAME),
        (ended(from_source=True, breaks=MAX_BREAKS), Next.GIVE_UP),
        (ended(from_source=True, hopeless=True), Next.GIVE_UP),
        (ended(from_source=True, source_lost=True), Next.GIVE_UP),
    ],
    ids=str,
)
def test_what_follows(situation: Ended, follows: Next) -> None:
    assert after(situation) is follows


BOTH = (False, True)
ALL = [Ended(*words, breaks) for *words, breaks in itertools.product(*[BOTH] * 6, range(1, MAX_BREAKS + 2))]


def test_what_holds_in_every_situation() -> None:
    for situation in ALL:
        follows = after(situation)
        assert (follows is Next.FINISH) is (situation.complete and not situation.overwritten)
        if follows is Next.NAMED:
            assert situation.named
        if follows is Next.ANOTHER:
            assert not situation.source_lost, "there is nobody to ask"
        if follows is Next.GIVE_UP:
            assert not situation.complete, "what is here is not given up"
        if follows is Next.SAME and not situation.complete:
            assert situation.breaks < MAX_BREAKS, "else it would go on for ever"


def test_the_table_has_no_line_that_is_never_reached() -> None:
    reached = {next((i for i, (words, _) in enumerate(AFTER) if _holds(words, each)), -1) for each in ALL}
    assert reached == {-1, *range(len(AFTER))}


def _holds(words: Any, situation: Ended) -> bool:
    found = situation._asdict() | {"hopeless": situation.hopeless or situation.breaks >= MAX_BREAKS}
    return all(found[word] is value for word, value in words.items())


def test_it_has_no_sockets_threads_or_locks() -> None:
    tree = ast.parse(Path(chain.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not {"socket", "threading", "ft_transport._lanes.session", "ft_transport._net.connection"} & modules
