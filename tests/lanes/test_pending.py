"""Which messages are still to be fetched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

from ft_transport._lanes.pending import PendingMessages


def never() -> bool:
    return False


def in_thread(call: Callable[[], object]) -> Callable[[], object]:
    """Begin a call that blocks; what is returned ends it and gives its result."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()

    def end() -> object:
        thread.join(10)
        return results[0]

    return end


def test_messages_are_taken_in_order_and_once() -> None:
    pending = PendingMessages(3)
    assert [pending.take(never, block=False) for _ in range(4)] == [0, 1, 2, None]


def test_the_last_ones_are_left_for_others() -> None:
    pending = PendingMessages(4)
    assert [pending.take(never, block=False, leave=2) for _ in range(3)] == [0, 1, None]
    assert [pending.take(never, block=False) for _ in range(3)] == [2, 3, None]


def test_what_was_given_back_is_taken_first() -> None:
    pending = PendingMessages(4)
    taken = [pending.take(never, block=False) for _ in range(3)]
    pending.give_back([message for message in taken if message is not None])
    assert [pending.take(never, block=False) for _ in range(4)] == [0, 1, 2, 3]


def test_a_lane_waits_for_what_others_may_give_back() -> None:
    pending = PendingMessages(1)
    assert pending.take(never, block=False) == 0
    end = in_thread(lambda: pending.take(never, block=True))
    pending.give_back([0])
    assert end() == 0


def test_waiting_ends_when_everything_is_here() -> None:
    pending = PendingMessages(1)
    pending.take(never, block=False)
    end = in_thread(lambda: pending.take(never, block=True))
    pending.landed(0, 5)
    assert end() is None
    assert pending.complete


def test_waiting_ends_when_it_is_stopped() -> None:
    pending, stopped = PendingMessages(1), threading.Event()
    pending.take(never, block=False)
    end = in_thread(lambda: pending.take(stopped.is_set, block=True))
    stopped.set()
    pending.wake()
    assert end() is None


def test_damage_is_counted_until_another_supplies() -> None:
    pending = PendingMessages(2)
    pending.take(never, block=False)
    assert not pending.was_damaged(0)
    assert pending.damaged(0) == 1
    assert pending.take(never, block=False) == 0
    assert pending.damaged(0) == 2
    assert pending.was_damaged(0)
    pending.forgive()
    assert not pending.was_damaged(0)


def test_the_next_in_the_chain_waits_for_a_message() -> None:
    pending = PendingMessages(2)
    assert not pending.await_message(1, timedelta(0))
    end = in_thread(lambda: pending.await_message(1, timedelta(seconds=10)))
    pending.landed(1, 9)
    assert end()
    assert pending.digests == {1: 9}


def test_a_state_without_messages_is_complete() -> None:
    pending = PendingMessages(0)
    assert pending.complete
    assert pending.take(never, block=True) is None
