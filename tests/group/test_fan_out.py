"""Several destinations at once, each in a thread of its own."""

from __future__ import annotations

import threading

import pytest

from ft_transport import PeerFailure
from ft_transport._group.fan_out import in_parallel
from ft_transport.testing import MemoryChannel, memory_channels


def channels(number: int) -> list[MemoryChannel]:
    return [memory_channels()[0] for _ in range(number)]


def test_all_are_under_way_at_once() -> None:
    """One that waits for its peer must not hold up the others: here each waits for all."""
    met = threading.Barrier(3)
    assert in_parallel(channels(3), lambda index: met.wait(10) and None) == [None] * 3


def test_one_alone_is_served_on_the_callers_thread() -> None:
    served: list[threading.Thread] = []
    assert in_parallel(channels(1), lambda index: served.append(threading.current_thread())) == [None]
    assert served == [threading.current_thread()]
    assert in_parallel([], lambda index: pytest.fail("there is nobody")) == []


def test_what_is_raised_is_given_in_the_order_of_the_channels_without_frames() -> None:
    """A frame that an error keeps would keep the operations, and with them the group: gloo then writes late."""

    def run(index: int) -> None:
        if index != 1:
            raise PeerFailure(f"peer {index}")

    errors = in_parallel(channels(3), run)
    assert [str(error) if error else None for error in errors] == ["peer 0", None, "peer 2"]
    assert all(error is None or error.__traceback__ is None for error in errors)


def test_no_more_threads_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may move once the call is over: those who have begun are aborted, and waited for."""
    ends = channels(3)
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def start_two(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    def run(index: int) -> None:
        aborted[index].wait(10)

    aborted = [threading.Event() for _ in ends]
    for end, event in zip(ends, aborted, strict=True):
        monkeypatch.setattr(end, "abort", event.set)
    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        in_parallel(ends, run)
    assert all(event.is_set() for event in aborted)
    assert not any(thread.is_alive() for thread in started)
