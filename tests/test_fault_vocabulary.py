"""The vocabulary of faults does what it says, on a channel, on connections, and on whole transports."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import SMALL, difference, noise, transfer

from ft_transport import LaneTransport, PeerFailure, RemoteProtocolError, TransferError, TransferTimeout
from ft_transport._group import control
from ft_transport._lanes.protocol import HEADER_BYTES, LaneFrame, LaneHeader, encode, encode_header
from ft_transport._telemetry.report import Progress
from ft_transport.testing import FaultProxy, Faults, FaultyChannel, FaultyTransport, memory_channels
from ft_transport.testing._faults import damaged
from ft_transport.testing._stream import HANDSHAKE_BYTES, FrameStream

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=20)
STEP = 7
MIB = 1 << 20


# ------------------------------------------------------------------------------------------- streams


def message(number: int, body: bytes) -> bytes:
    return encode_header(LaneHeader(LaneFrame.MESSAGE, 1, STEP, number, len(body))) + body + bytes(8)


STREAM = [
    bytes(range(64)),
    encode(LaneFrame.WAIT, 1, STEP),
    message(0, b"zero" * 100),
    message(1, b""),
    encode(LaneFrame.ROUTE, 1, STEP, body=[None, b"x", b"x"]),
    message(2, b"two"),
]


@pytest.mark.parametrize("size", [1, 7, 52, 1000])
@pytest.mark.parametrize(
    ("faults", "changed"),
    [
        (Faults(), {}),
        (Faults().duplicate(0), {2: STREAM[2] * 2}),
        (Faults().truncate(1, 3), {3: STREAM[3][:-3]}),
        (Faults().truncate("ROUTE", 1000), {4: STREAM[4][:1]}),
        (Faults().duplicate("WAIT").truncate(2), {1: STREAM[1] * 2, 5: STREAM[5][:-1]}),
        (Faults().duplicate(9), {}),
    ],
    ids=["none", "duplicate", "truncate", "truncate a frame", "two", "no such message"],
)
def test_messages_are_found_however_the_bytes_come(faults: Faults, changed: dict[int, bytes], size: int) -> None:
    data = b"".join(STREAM)
    stream = FrameStream(copy(faults), "down")
    passed = b"".join(stream.feed(data[begin : begin + size]) for begin in range(0, len(data), size))
    assert passed == b"".join(changed.get(i, part) for i, part in enumerate(STREAM))


def copy(faults: Faults) -> Faults:
    import dataclasses

    made = Faults()
    made._faults = [dataclasses.replace(fault) for fault in faults._faults]
    return made


@pytest.mark.parametrize("seed", range(5))
def test_one_bit_of_the_content_is_flipped_as_often_as_asked(seed: int) -> None:
    stream = FrameStream(Faults(seed=seed).corrupt(0, times=2), "down")
    stream.feed(STREAM[0])
    for times in range(3):
        passed = stream.feed(STREAM[2])
        different = [i for i, (a, b) in enumerate(zip(passed, STREAM[2], strict=True)) if a != b]
        assert len(different) == (1 if times < 2 else 0)
        assert all(HEADER_BYTES <= place < len(passed) - 8 for place in different)
        assert all((passed[i] ^ STREAM[2][i]).bit_count() == 1 for i in different)


def test_bytes_that_are_no_frames_pass() -> None:
    stream = FrameStream(Faults().corrupt(0), "up")
    garbage = bytes(random.Random(1).randbytes(1000))
    assert stream.feed(garbage) == garbage[: HANDSHAKE_BYTES["up"]] + garbage[HANDSHAKE_BYTES["up"] :]


def test_the_same_seed_flips_the_same_bit() -> None:
    (fault,) = Faults().corrupt(0)._faults
    first, second, other = (damaged(bytes(99), (5, 90), fault, random.Random(seed)) for seed in (3, 3, 4))
    assert first == second != other


# ------------------------------------------------------------------------------------------- channel


def state(seed: int = 1) -> dict[str, Any]:
    return {"large": noise(2000, seed), "small": [noise(5, seed + i) for i in range(40)], "value": seed}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_LAST_WORDS", timedelta(milliseconds=20))


def over_channel(faulty: Any, **kwargs: Any) -> Any:
    left, right = memory_channels()
    template = state(9)
    return transfer(state(), lambda: template, options=SMALL, channels=(faulty(left), right), **kwargs)


@pytest.mark.parametrize("what", ["corrupt", "truncate"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_message_of_a_channel(what: str, number: int) -> None:
    ends = over_channel(lambda channel: getattr(FaultyChannel(channel), what)(number))
    assert isinstance(ends.destination.error, RemoteProtocolError)
    assert f"the first is message {number}" in ends.destination.text
    assert ends.destination.report.torn


@pytest.mark.parametrize("frame", ["MANIFEST", "DIGESTS"])
def test_a_damaged_frame_of_a_channel(frame: str) -> None:
    ends = over_channel(lambda channel: FaultyChannel(channel).truncate(frame, 8))
    assert isinstance(ends.destination.error, TransferError)
    assert ends.destination.report.torn is (frame == "DIGESTS")


def test_a_doubled_message_of_a_channel_hurts_nobody() -> None:
    ends = over_channel(lambda channel: FaultyChannel(channel).duplicate(0))
    assert ends.destination.error is None
    assert difference(ends.destination.result, state()) == ""
    with pytest.raises(ValueError, match="expected the number of a message"):
        FaultyChannel(memory_channels()[0]).duplicate("DONE")


def test_a_channel_that_drops_or_freezes() -> None:
    dropped = over_channel(lambda channel: FaultyChannel(channel).drop_after(4000))
    assert isinstance(dropped.destination.error, PeerFailure)
    frozen = over_channel(
        lambda channel: FaultyChannel(channel).freeze_after(4000), timeout=timedelta(milliseconds=100)
    )
    assert {type(side.error) for side in (frozen.source, frozen.destination)} & {TransferTimeout}


def test_a_slow_channel_is_only_slow() -> None:
    start = time.monotonic()
    ends = over_channel(lambda channel: FaultyChannel(channel).delay(0.005).throttle(1e6))
    assert ends.destination.error is None
    assert time.monotonic() - start > 0.02
    with pytest.raises(ValueError, match="bytes_per_second"):
        Faults().throttle(0)


# --------------------------------------------------------------------------------------------- proxy


@pytest.fixture
def source() -> Iterator[LaneTransport[Any]]:
    before = threading.active_count()
    made: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, host="127.0.0.1", stall_timeout=timedelta(seconds=1))
    yield made
    made.shutdown()
    assert threading.active_count() <= before


LARGE = {"a": noise(2 * MIB, 1), "b": noise(MIB, 2)}  # 8 MiB and 4 MiB: three messages


def heal(source: LaneTransport[Any], proxy: FaultProxy, **options: Any) -> Any:
    """Receive through the proxy; gives the transport's report, or raises."""
    template = {"a": noise(2 * MIB, 3), "b": noise(MIB, 4)}
    options = {"lanes": 1, "stall_timeout": timedelta(seconds=0.5), **options}
    destination: LaneTransport[Any] = LaneTransport(TIMEOUT, CPU, lambda: template, **options)
    with proxy:
        source.send_checkpoint([1], STEP, LARGE, TIMEOUT)
        try:
            got = destination.recv_checkpoint(0, proxy.metadata, STEP, TIMEOUT)
        finally:
            destination.shutdown()
            proxy.close()
            source.disallow_checkpoint()
    assert difference(got, LARGE) == ""
    return destination.last_report


def test_a_proxy_without_faults_passes_everything_on(source: LaneTransport[Any]) -> None:
    proxy = FaultProxy(source.metadata())
    report = heal(source, proxy)
    assert (report.num_messages, report.num_repaired, proxy.num_connections) == (3, 0, 2)
    assert proxy.nbytes > 12 * MIB


def test_a_corrupted_message_is_repaired(source: LaneTransport[Any]) -> None:
    assert heal(source, FaultProxy(source.metadata()).corrupt(0).corrupt(2, times=2)).num_repaired == 3
    with pytest.raises(RemoteProtocolError, match="message 1 of 3 differs"):
        heal(source, FaultProxy(source.metadata()).corrupt(1, times=-1))


@pytest.mark.parametrize("what", ["truncate", "duplicate"])
def test_a_lane_out_of_step_is_opened_again(source: LaneTransport[Any], what: str) -> None:
    proxy = getattr(FaultProxy(source.metadata()), what)(1)
    heal(source, proxy)
    assert proxy.num_connections == 3


def test_a_damaged_frame_is_found(source: LaneTransport[Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="MANIFEST came damaged"):
        heal(source, FaultProxy(source.metadata()).corrupt("MANIFEST"))


def test_dropped_connections(source: LaneTransport[Any]) -> None:
    with pytest.raises(PeerFailure) as dropped:
        heal(source, FaultProxy(source.metadata()).drop_after(6 * MIB))
    assert dropped.value.torn
    proxy = FaultProxy(source.metadata()).drop_after(6 * MIB, lanes=1)
    heal(source, proxy)
    assert proxy.num_connections == 3


def test_a_frozen_network_is_a_silent_peer(source: LaneTransport[Any]) -> None:
    with pytest.raises(PeerFailure, match="silent"):
        heal(source, FaultProxy(source.metadata()).freeze_after(6 * MIB))


def test_a_slow_network_is_only_slow(source: LaneTransport[Any]) -> None:
    start = time.monotonic()
    heal(source, FaultProxy(source.metadata()).throttle(20e6))
    assert time.monotonic() - start > 0.5
    start = time.monotonic()
    heal(source, FaultProxy(source.metadata()).delay(0.05))
    assert time.monotonic() - start > 0.2


# ----------------------------------------------------------------------------------------- transport


def pair(source: LaneTransport[Any], **options: Any) -> tuple[LaneTransport[Any], dict[str, Any]]:
    template = {"a": noise(2 * MIB, 3), "b": noise(MIB, 4)}
    return LaneTransport(TIMEOUT, CPU, lambda: template, **options), template


def receive(source: LaneTransport[Any], destination: Any, step: int) -> TransferError | None:
    source.send_checkpoint([1], step, LARGE, TIMEOUT)
    try:
        destination.recv_checkpoint(0, source.metadata(), step, TIMEOUT)
    except TransferError as exc:
        return exc
    finally:
        source.disallow_checkpoint()
    destination.disallow_checkpoint()
    return None


def test_only_the_heal_that_was_meant_has_the_fault(source: LaneTransport[Any]) -> None:
    inner, _ = pair(source)
    destination = FaultyTransport(FaultyTransport(inner, at=2).drop_after(2 * MIB), at=4).corrupt(1)
    errors = [receive(source, destination, step) for step in range(1, 5)]
    assert [type(error).__name__ for error in errors] == ["NoneType", "PeerFailure", "NoneType", "NoneType"]
    assert destination.last_report.num_repaired == 1
    assert destination.metadata() == inner.metadata()
    destination.shutdown()


def test_the_same_seed_makes_the_same_schedule(source: LaneTransport[Any]) -> None:
    schedules = []
    for seed in (1, 1, 2):
        inner, _ = pair(source)
        destination = FaultyTransport(inner, chance=0.5, seed=seed).raise_in("move", MemoryError("no room"))
        schedules.append([receive(source, destination, step) is None for step in range(1, 9)])
        destination.shutdown()
    assert schedules[0] == schedules[1] != schedules[2]
    assert {True, False} <= set(schedules[0])


@pytest.mark.parametrize("phase", ["agree", "move", "verify", "rebuild"])
def test_raise_in_a_phase_of_the_destination(source: LaneTransport[Any], phase: str) -> None:
    inner, _ = pair(source)
    destination = FaultyTransport(inner, role="destination").raise_in(phase, OSError("broken"))
    error = receive(source, destination, 1)
    assert error is not None
    assert "broken" in str(error)
    assert error.phase == phase
    destination.shutdown()


def test_raise_in_a_phase_of_the_source(source: LaneTransport[Any]) -> None:
    destination, _ = pair(source)
    faulty = FaultyTransport(source, role="source").raise_in("describe", OSError("broken"))
    with pytest.raises(TransferError, match="broken"):
        faulty.send_checkpoint([1], 1, LARGE, TIMEOUT)
    error = None
    try:
        destination.recv_checkpoint(0, source.metadata(), 1, TIMEOUT)
    except PeerFailure as exc:
        error = exc
    assert error is not None
    assert "broken" in str(error)
    faulty.disallow_checkpoint()
    destination.shutdown()


def test_a_signal_comes_when_the_share_has_moved(source: LaneTransport[Any]) -> None:
    seen: list[Progress] = []
    inner, _ = pair(source, on_progress=seen.append, lanes=1)
    told: list[str] = []
    got: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(len(seen)))
    try:
        faulty = FaultyTransport(inner, on_fault=told.append)
        destination = faulty.throttle(30e6).signal_in("move", signal.SIGUSR1, share=0.5)
        assert receive(source, destination, 1) is None
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told == ["transfer 1 (destination, step 1): SIGUSR1 in move"]
    (number,) = got
    assert seen[number - 1].nbytes_done >= 6 * MIB > (seen[number - 2].nbytes_done if number > 1 else 0)
    destination.shutdown()


@pytest.mark.parametrize("what", ["die_in", "freeze_in"])
@pytest.mark.parametrize("phase", ["agree", "move", "verify"])
def test_a_process_dies_or_stops_in_a_phase(source: LaneTransport[Any], what: str, phase: str) -> None:
    metadata = source.metadata()
    source.send_checkpoint([1], STEP, LARGE, TIMEOUT)
    child = os.fork()
    if child == 0:
        try:
            inner, _ = pair(source)
            destination = getattr(FaultyTransport(inner), what)(phase)
            destination.recv_checkpoint(0, metadata, STEP, TIMEOUT)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, os.WUNTRACED)
    if what == "die_in":
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    source.disallow_checkpoint()


def test_wrong_phases_are_named() -> None:
    with pytest.raises(ValueError, match="phase: expected one of describe, agree"):
        FaultyTransport(LaneTransport(TIMEOUT, CPU)).die_in("moving")
