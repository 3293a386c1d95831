"""The messages of a described state: which are copied at once, and what makes the transfer void."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import CPU, noise, raw_bytes, until

from ft_transport._lanes import messages
from ft_transport._lanes.messages import StateMessages
from ft_transport._options import LaneOptions
from ft_transport._plan.buffers import Bucket, aligned
from ft_transport._plan.source import SourcePlan
from ft_transport._telemetry.report import TransferReport
from ft_transport.errors import LocalProtocolError

LARGE = 100_000  # elements of four bytes, more than a small range


def offered(state: object, **options: Any) -> StateMessages:
    store = StateMessages(SourcePlan(state, 7, LaneOptions(CPU, **options), TransferReport("source", "test", 7)))
    store.copy_small()
    store.let_read()
    return store


def read(store: StateMessages, nbytes: int) -> bytes:
    """What whoever fetches the message of this size is sent."""
    message = store.sizes.index(nbytes)
    bucket = Bucket(CPU)
    bucket.reset(aligned(nbytes))
    return bytes(store.view(message, bucket))


def test_forward_goes_on_with_what_is_small() -> None:
    """It changes small buffers (BatchNorm) without a word; large ones stay where they are."""
    state = {"weight": noise(LARGE, 1), "mean": noise(10, 2), "var": noise(20, 3)}
    before = {name: raw_bytes(tensor) for name, tensor in state.items()}
    with torch.no_grad():
        store = offered(state)
        for tensor in (state["mean"], state["var"]):
            tensor.zero_()
    assert [read(store, nbytes) for nbytes in (40, 80)] == [before["mean"], before["var"]]
    store.check_unchanged()
    assert store.error is None
    state["weight"].view(torch.uint8).numpy()[0] ^= 1  # behind torch's back: nothing but the memory itself tells
    assert read(store, 4 * LARGE) == raw_bytes(state["weight"])
    assert read(store, 4 * LARGE) != before["weight"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "HEARTBEAT", timedelta(milliseconds=10))


@pytest.mark.usefixtures("quick")
def test_what_is_copied_is_there_for_all_and_the_state_itself_when_all_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying may fail, and then the call has raised: nothing of the state may have been read."""
    # Small ones fill messages of ten each; the last one has no room among the copies.
    monkeypatch.setattr(messages, "SMALL_BYTES", 2 * 2_000_000 + 64)
    state = {"weight": noise(LARGE, 1), **{str(index): noise(50_000, index) for index in range(25)}}
    plan = SourcePlan(state, 7, LaneOptions(CPU), TransferReport("source", "test", 7))
    store = StateMessages(plan)
    there: list[list[bool]] = []
    view = plan.placement.view

    def noting(message: int, bucket: Bucket) -> memoryview:
        there.append([store.has(other) for other in range(len(store.sizes))])
        return view(message, bucket)

    monkeypatch.setattr(plan.placement, "view", noting)
    assert store.sizes == [400_000, 2_000_000, 2_000_000, 1_000_000]
    assert not store.await_message(1)
    store.copy_small()
    assert there == [[False] * 4, [False, True, False, False]]
    assert [store.has(message) for message in range(4)] == [False, True, True, False]
    assert store.await_message(2)
    assert not store.await_message(3)
    store.let_read()
    assert all(map(store.has, range(4)))


@pytest.mark.usefixtures("quick")
def test_whoever_waits_for_copies_hears_why_there_are_none() -> None:
    store = StateMessages(SourcePlan({"mean": noise(10, 2)}, 7, LaneOptions(CPU), TransferReport("source", "test", 7)))
    store.check_unchanged()
    store.let_read("memory was taken away")
    for ask in (lambda: store.await_message(0), lambda: store.has(0), store.check_unchanged):
        with pytest.raises(LocalProtocolError, match="memory was taken away"):
            ask()
    assert str(store.error) == "memory was taken away"


def test_who_waits_is_woken_by_each_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "HEARTBEAT", timedelta(seconds=20))
    store = StateMessages(SourcePlan({"mean": noise(10, 2)}, 7, LaneOptions(CPU), TransferReport("source", "test", 7)))
    waiting = threading.Thread(target=store.await_message, args=[0], daemon=True)
    waiting.start()
    until(lambda: bool(store._changed._waiters))  # type: ignore[attr-defined]
    store.copy_small()
    waiting.join(10)
    assert not waiting.is_alive()


def test_only_what_is_of_a_users_memory_is_held() -> None:
    """Nobody can take a copy away, and to look whether somebody has would cost a call for each piece."""
    store = offered({"weight": noise(LARGE, 1), "mean": noise(10, 2)})
    assert {nbytes: store.held(message) is not None for message, nbytes in enumerate(store.sizes)} == {
        4 * LARGE: True,
        40: False,
    }


@pytest.mark.parametrize(
    ("room", "copied"),
    [(0, []), (63, []), (64, [40]), (127, [40]), (128, [40, 44]), (1 << 20, [40, 44, 48])],
)
def test_copies_are_bounded(monkeypatch: pytest.MonkeyPatch, room: int, copied: list[int]) -> None:
    """In the layout's order, as far as there is room for them: each begins at a multiple of 64 bytes."""
    monkeypatch.setattr(messages, "SMALL_BYTES", room)
    state = [noise(10, 1), noise(11, 2), noise(12, 3)]
    before = [raw_bytes(tensor) for tensor in state]
    store = offered(state)
    for tensor in state:
        tensor.zero_()
    assert [len(data) for data in before if read(store, len(data)) == data] == copied


def written(tensor: torch.Tensor) -> None:
    tensor.add_(1)


def given_back(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    ("change", "text"),
    [(written, "the state changed while it was sent: weight"), (given_back, "weight")],
)
def test_a_large_tensor_that_changes_makes_it_void(change: Callable[[torch.Tensor], None], text: str) -> None:
    state = {"weight": noise(LARGE, 1), "mean": noise(10, 2)}
    store = offered(state)
    store.check_unchanged()
    change(state["weight"])
    assert store.error is None, "nobody has looked"
    with pytest.raises(LocalProtocolError, match=text) as info:
        store.check_unchanged()
    assert store.error is info.value


@pytest.mark.parametrize(("numel", "is_void"), [(LARGE, True), (10, False)], ids=["large", "small"])
def test_an_optimizer_changes_nothing_that_is_copied(numel: int, is_void: bool) -> None:
    weight = torch.nn.Parameter(torch.zeros(numel))
    weight.grad = torch.ones_like(weight)
    store = offered({"weight": weight, "bias": noise(20, 1)})
    torch.optim.SGD([weight], lr=0.1).step()
    with pytest.raises(LocalProtocolError) if is_void else nullcontext():
        store.check_unchanged()


def test_what_a_lane_has_found_missing_is_said_even_if_it_is_there_again() -> None:
    """A message of it may have left as something else meanwhile."""
    store = offered({"weight": noise(LARGE, 1)})
    gone = LocalProtocolError("weight was exchanged")
    store.note_error(gone)
    with pytest.raises(LocalProtocolError) as info:
        store.check_unchanged()
    assert store.error is info.value is gone


def test_memory_that_is_gone_is_named_before_a_lanes_word_of_it() -> None:
    state = {"weight": noise(LARGE, 1)}
    store = offered(state)
    store.note_error(LocalProtocolError("something was given back"))
    given_back(state["weight"])
    with pytest.raises(LocalProtocolError, match="weight"):
        store.check_unchanged()


def test_the_first_digest_of_a_message_is_that_of_all() -> None:
    """Who reads it later and finds it changed is told by its own destination, for which the two do not agree."""
    store = offered({"weight": noise(LARGE, 1)})
    assert store.digest(0) is None
    store.note_digest(0, 5)
    store.note_digest(0, 6)
    assert store.digest(0) == 5


@pytest.mark.parametrize("verify", [True, False])
def test_whether_there_are_digests_is_the_callers_choice(verify: bool) -> None:
    assert offered({"weight": noise(10, 1)}, verify=verify).verified is verify
