"""LaneTransport over loopback: one peer's trouble, or a callback's, costs nobody else anything."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from ft_transport import LocalProtocolError, PeerFailure
from ft_transport._deadline import Deadline
from ft_transport._lanes import admission, dispatcher, serving
from ft_transport._lanes import news as _news
from ft_transport._lanes.protocol import LaneFrame, LaneHeader, LaneProtocol, Role, encode
from ft_transport._lanes.session import Session
from ft_transport._net.dial import dial
from ft_transport._net.endpoint import Endpoint
from ft_transport._net.stall import StallTimer
from ft_transport._torchft import lanes as _lanes
from ft_transport.errors import TransferTimeout

from .harness import residue, wait_until
from .test_lanes import MIB, STEP, TIMEOUT, Lanes, envelope, lanes, make_state, slowly

__all__ = ["lanes"]  # the fixture


# So that nobody is taken for silent on a busy machine.
CALM: dict[str, Any] = {"stall_timeout": timedelta(seconds=10)}


class Peer(Session):
    """A destination that says what the test has it say."""

    def __init__(self, metadata: str, step: int = STEP, identity: bytes = b"", attempt: int = 1) -> None:
        self.timer = StallTimer(Deadline(TIMEOUT))
        hello = encode(LaneFrame.HELLO, attempt, step, body=[identity or secrets.token_bytes(16), "peer"])
        connection = dial(Endpoint.decode(metadata), hello, self.timer, None)
        super().__init__(connection, LaneProtocol(Role.DESTINATION, attempt, step))
        self.protocol.sent(LaneFrame.HELLO)

    def await_frame(self, frame: LaneFrame) -> tuple[LaneHeader, Any]:
        while (heard := self.recv(self.timer))[0].frame is LaneFrame.WAIT:
            pass
        assert heard[0].frame is frame
        return heard


@contextlib.contextmanager
def peer(*arguments: Any, **keywords: Any) -> Iterator[Peer]:
    made = Peer(*arguments, **keywords)
    with contextlib.closing(made.connection):
        yield made


def waiting(source: Any) -> int:
    return len(source._local.dispatcher._waiting)


def outcomes(source: Any) -> list[str]:
    return [found.outcome for found in source.last_report.peers]


# ---------------------------------------------------------------------------------------- another step


@pytest.mark.parametrize("early", [True, False], ids=["waits already", "comes later"])
def test_one_of_a_step_that_is_over_takes_nobodys_place(lanes: Lanes, early: bool) -> None:
    source, state = lanes.transport(**CALM), make_state()
    stale, right = lanes.destination(make_state(2), **CALM), lanes.destination(make_state(3), **CALM)
    if early:
        stale.start(source.metadata(), step=STEP - 1)
        wait_until(lambda: waiting(source) == 1)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    if not early:
        stale.start(source.metadata(), step=STEP - 1)
    assert isinstance(stale.join().error, PeerFailure)
    assert "expected step 6, source has step 7" in str(stale.error)
    assert right.start(source.metadata()).join().sound(state)
    source.disallow_checkpoint()
    assert outcomes(source) == ["complete"]


@pytest.mark.parametrize("early", [True, False], ids=["waits already", "comes later"])
def test_one_of_the_next_step_waits_for_the_next_offer(lanes: Lanes, early: bool) -> None:
    source, state, following = lanes.transport(**CALM), make_state(), make_state(4)
    now, then = lanes.destination(make_state(2), **CALM), lanes.destination(make_state(3), **CALM)
    if early:
        then.start(source.metadata(), step=STEP + 1)
        wait_until(lambda: waiting(source) == 1)
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    if not early:
        then.start(source.metadata(), step=STEP + 1)
        wait_until(lambda: waiting(source) == 1)
    assert now.start(source.metadata()).join().sound(state)
    source.disallow_checkpoint()
    assert outcomes(source) == ["complete"]
    source.send_checkpoint([1], STEP + 1, envelope(following), TIMEOUT)
    assert then.join().sound(following), then.error
    source.disallow_checkpoint()
    assert outcomes(source) == ["complete"]


def test_one_of_a_step_that_is_never_offered_waits_until_its_own_deadline(lanes: Lanes) -> None:
    """Longer than the stall time-out: the source is there, and says so."""
    source = lanes.transport()
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    early = lanes.destination(make_state(2)).start(source.metadata(), STEP + 1, timedelta(seconds=1.5)).join()
    assert isinstance(early.error, TransferTimeout)
    assert "the source is there and has not begun to send" in str(early.error)
    source.disallow_checkpoint()
    assert outcomes(source) == ["timed out"]


def test_an_earlier_attempt_that_comes_late_does_not_cut_the_later_one(lanes: Lanes) -> None:
    source = lanes.transport(**CALM)
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    with peer(source.metadata(), identity=b"i" * 16, attempt=2) as later:
        later.await_frame(LaneFrame.MANIFEST)
        with peer(source.metadata(), identity=b"i" * 16, attempt=1) as earlier:
            _, reasons = earlier.await_frame(LaneFrame.FAILED)
            assert reasons == ("a later attempt has come before",)
        later.send(LaneFrame.READY, later.timer, body=["", b""])
        later.await_frame(LaneFrame.ROUTE)


# ----------------------------------------------------------------------------- what a peer says of itself


@pytest.mark.parametrize(("metadata", "ident"), [("nonsense", b"i" * 16), ("", b"i"), ("of another", b"i" * (1 << 15))])
def test_metadata_that_nobody_can_read_costs_those_behind_it_nothing(lanes: Lanes, metadata: str, ident: bytes) -> None:
    source, state = lanes.transport(**CALM), make_state()
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    with peer(source.metadata()) as first:
        first.await_frame(LaneFrame.MANIFEST)
        of_another = lanes.transport().metadata() if metadata == "of another" else metadata
        first.send(LaneFrame.READY, first.timer, body=[of_another, ident])
        first.await_frame(LaneFrame.ROUTE)
        assert lanes.destination(make_state(2), **CALM).start(source.metadata()).join().sound(state)
    source.disallow_checkpoint()
    assert sorted(outcomes(source)) == ["complete", "dead"]


def test_a_route_that_nobody_can_read_is_answered(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_is_endpoint", lambda metadata, ident: True)
    source, state = lanes.transport(**CALM), make_state()
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    with peer(source.metadata()) as first:
        first.await_frame(LaneFrame.MANIFEST)
        first.send(LaneFrame.READY, first.timer, body=["nonsense", b"i" * 16])
        first.await_frame(LaneFrame.ROUTE)
        destination = lanes.destination(make_state(2), **CALM).start(source.metadata()).join()
        assert destination.sound(state), destination.error
    source.disallow_checkpoint()


# ---------------------------------------------------------------------------------------------- many


def guests() -> int:
    return sum(thread.name == "ft_transport-destination" for thread in threading.enumerate())


def test_so_many_are_served_at_once_and_the_others_wait(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SPARE_DESTINATIONS", 3)
    source, state = lanes.transport(**CALM), make_state()
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(peer(source.metadata())) for _ in range(12)]
        wait_until(lambda: waiting(source) == 8)
        assert guests() == 4
        destination = lanes.destination(make_state(2), **CALM).start(source.metadata())
        wait_until(lambda: waiting(source) == 9)
        for each in peers:
            each.connection.close()
        assert destination.join().sound(state), destination.error
    source.disallow_checkpoint()
    assert outcomes(source).count("complete") == 1


def test_so_many_conversations_of_one_transfer_and_no_more(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SPARE_CONVERSATIONS", 0)
    source = lanes.transport(**CALM)
    source.send_checkpoint([1, 2, 3], STEP, envelope(make_state()), TIMEOUT)
    for identity in (b"a", b"b", b"a"):
        with peer(source.metadata(), identity=identity) as one:
            one.await_frame(LaneFrame.MANIFEST)
    with peer(source.metadata()) as one:
        _, reasons = one.await_frame(LaneFrame.FAILED)
    assert reasons == ("too many have come for this transfer",)
    source.disallow_checkpoint()
    assert outcomes(source) == ["dead", "dead", "timed out"]


def test_so_many_lanes_in_all(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gets fewer than it wants does with these."""
    monkeypatch.setattr(dispatcher, "MAX_ALL_LANES", 2)
    source, state = lanes.transport(**CALM), make_state(large=12)
    proxy = lanes.proxy(source.metadata(), slowly(100))
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination = lanes.destination(make_state(2, large=12), lanes=8, **CALM).start(proxy.metadata)
    wait_until(lambda: proxy.num_connections == 9)
    assert sum(thread.name == "ft_transport-supplier" for thread in threading.enumerate()) <= 2
    assert destination.join().sound(state), destination.error
    source.disallow_checkpoint()


# ----------------------------------------------------------------------------------------- callbacks


class Slow:
    """A callback that takes its time, and keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.go_on = threading.Event()

    def __call__(self, news: Any) -> None:
        self.go_on.wait(8)
        self.told.append(news)


def test_an_event_callback_that_takes_its_time_holds_nobody(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_news, "_TELLING", timedelta(milliseconds=100))
    slow, state = Slow(), make_state()
    source = lanes.transport(on_event=slow)
    # Nobody comes, so it is the listener that finds the first one over.
    source.send_checkpoint([1], STEP, envelope(state), timedelta(milliseconds=200))
    assert source._serving.transfer is not None
    wait_until(lambda: source._serving.transfer.is_over)  # type: ignore[union-attr]
    early = lanes.destination(make_state(2)).start(source.metadata(), step=STEP + 1)
    time.sleep(1.5)  # more than the stall time-out
    source.disallow_checkpoint()
    source.send_checkpoint([1], STEP + 1, envelope(state), TIMEOUT)
    assert early.join().sound(state), early.error
    source.disallow_checkpoint()
    assert slow.told == []
    slow.go_on.set()
    source.shutdown()
    assert [(event["step"], event["outcome"]) for event in slow.told] == [(STEP, "timed out"), (STEP + 1, "complete")]


def test_a_progress_callback_that_takes_its_time_holds_nobody(lanes: Lanes) -> None:
    slow, state = Slow(), make_state()
    source = lanes.transport(on_progress=slow)
    proxy = lanes.proxy(source.metadata(), slowly(10))
    source.send_checkpoint([1], STEP, envelope(state), TIMEOUT)
    destination = lanes.destination(make_state(2)).start(proxy.metadata).join()
    assert destination.sound(state), destination.error
    assert destination.seconds > 1.0  # longer than the stall time-out
    slow.go_on.set()
    source.disallow_checkpoint()
    assert [now.nbytes_done for now in slow.told] == sorted({now.nbytes_done for now in slow.told})
    assert slow.told[-1].nbytes_done == slow.told[-1].nbytes_total


def test_a_log_handler_that_takes_its_time_does_not_hold_the_listener(lanes: Lanes) -> None:
    slow = Slow()
    handler = logging.Handler()
    handler.emit = slow  # type: ignore[method-assign]
    logger = logging.getLogger("ft_transport")
    source = lanes.transport(**CALM)
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    logger.addHandler(handler)
    try:
        with peer(source.metadata(), step=STEP - 1) as stale:  # which is logged
            stale.await_frame(LaneFrame.FAILED)
        with peer(source.metadata()) as right:
            right.await_frame(LaneFrame.MANIFEST)
        assert slow.told == []
    finally:
        slow.go_on.set()
        logger.removeHandler(handler)
    source.disallow_checkpoint()


# ------------------------------------------------------------------------------------------- frozen


def test_a_frozen_one_costs_the_one_before_it_nothing(lanes: Lanes) -> None:
    """It is cut off, and once it goes on the source gives it the rest."""
    state = make_state(large=8)
    source = lanes.transport(stall_timeout=timedelta(seconds=15))
    source.send_checkpoint([1, 2], STEP, envelope(state), TIMEOUT)
    first = lanes.destination(make_state(2, large=8), stall_timeout=timedelta(seconds=15))
    proxy = lanes.proxy(first.transport.metadata(), slowly(20))
    first.transport._local = first.transport._local._replace(metadata=proxy.metadata)
    assert first.start(source.metadata()).join().sound(state)
    second = lanes.destination(make_state(3, large=8), lanes=1, **CALM).start(source.metadata())
    wait_until(lambda: proxy.nbytes > 4 * MIB)
    proxy.freeze()
    begin = time.monotonic()
    first.transport.disallow_checkpoint()
    assert time.monotonic() - begin < 5.0
    assert second.join().sound(state), second.error
    source.disallow_checkpoint()
    assert outcomes(source) == ["complete", "complete"]


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """A handler that runs in the main thread, again and again."""
    over, main = threading.Event(), threading.main_thread().ident
    assert main is not None
    earlier = signal.signal(signal.SIGUSR1, lambda number, frame: None)

    def send() -> None:
        while not over.wait(0.1):
            signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, earlier)


def test_signals_do_not_prolong_a_receive(lanes: Lanes) -> None:
    source = lanes.transport(stall_timeout=timedelta(seconds=12))
    proxy = lanes.proxy(source.metadata(), slowly(10))
    destination = lanes.destination(make_state(2), stall_timeout=timedelta(seconds=12)).transport
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)

    def freeze() -> None:
        wait_until(lambda: proxy.nbytes > MIB)
        proxy.freeze()

    freezing = threading.Thread(target=freeze)
    freezing.start()
    begin = time.monotonic()
    with signals(), pytest.raises(TransferTimeout):
        destination.recv_checkpoint(0, proxy.metadata, STEP, timedelta(seconds=1.5))
    assert time.monotonic() - begin < 5.0
    freezing.join()
    proxy.cut()


# ------------------------------------------------------------------------------------ how it ends


@pytest.mark.parametrize("early", [False, True], ids=["offered", "not yet offered"])
@pytest.mark.parametrize("error", [KeyboardInterrupt("by hand"), SystemExit("enough")], ids=lambda e: type(e).__name__)
def test_a_template_function_that_ends_the_process_tells_the_source(
    lanes: Lanes, error: BaseException, early: bool
) -> None:
    called = threading.Event()

    def state_dict() -> object:
        called.set()
        raise error

    source = lanes.transport(**CALM)
    destination = lanes.destination(**CALM)
    destination.transport._state_dict = state_dict
    if early:
        receiving = destination.start(source.metadata())
        assert called.wait(10)
    source.send_checkpoint([1], STEP, envelope(make_state()), TIMEOUT)
    if not early:
        receiving = destination.start(source.metadata())
    receiving.join()
    source.disallow_checkpoint()
    assert destination.error is error
    assert source.last_report is not None
    (told,) = source.last_report.peers
    assert told.outcome == "refused"
    assert f"{type(error).__name__}: {error}" in told.reason


class Ends:
    """A leaf whose class ends the process when it is described."""

    def __reduce__(self) -> Any:
        raise SystemExit("enough")


def test_a_leaf_that_ends_the_process_is_told_to_destinations(lanes: Lanes) -> None:
    source, destination = lanes.transport(**CALM), lanes.destination(make_state(2), **CALM)
    destination.start(source.metadata())
    with pytest.raises(SystemExit, match="enough"):
        source.send_checkpoint([1], STEP, envelope({"leaf": Ends()}), TIMEOUT)
    assert isinstance(destination.join().error, PeerFailure)
    assert "SystemExit: enough" in str(destination.error)


def test_without_an_address_there_is_no_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    before = residue()
    monkeypatch.setattr(_lanes, "interfaces", list)
    with pytest.raises(LocalProtocolError, match="could not be reached by anybody"):
        _lanes.LaneTransport(TIMEOUT, torch.device("cpu"))

    def no_list() -> None:
        raise OSError(13, os.strerror(13))

    monkeypatch.setattr(_lanes, "interfaces", no_list)
    with pytest.raises(LocalProtocolError, match=r"cannot be listed: .*Permission denied"):
        _lanes.LaneTransport(TIMEOUT, torch.device("cpu"))
    assert residue().threads == before.threads
    assert residue().descriptors <= before.descriptors
