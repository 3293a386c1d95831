"""What is asked of accelerators, and when: with a stand-in for them, whose work runs later."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import pace
from torch.utils._pytree import tree_leaves
from two_ends import TIMEOUT, WAYS, Ends, ends

import ft_transport
from ft_transport import TransferTimeout
from ft_transport import _device as device_module
from ft_transport._deadline import Deadline
from ft_transport._device import NO_STREAMS, Seam, Streams, settle
from ft_transport._lanes.session import Session
from ft_transport._plan.destination import DestinationPlan
from ft_transport.errors import PeerFailure
from ft_transport.testing import StandInAccelerator

ZERO, ONE = torch.device("cuda", 0), torch.device("cuda", 1)
rebuild = DestinationPlan.rebuild


def state(value: float) -> dict[str, Any]:
    """Large, small, and with gaps."""
    return {
        "large": torch.full((1 << 20,), value),
        "small": [torch.full((100,), value) for _ in range(20)],
        "strided": torch.full((512, 1024), value).t(),
    }


def tensors(found: dict[str, Any]) -> list[torch.Tensor]:
    return [found["large"], *found["small"], found["strided"]]


def put(devices: StandInAccelerator, found: dict[str, Any], index: int) -> None:
    for tensor in tensors(found):
        devices.put(tensor, index)


def holds(found: dict[str, Any], value: float, devices: StandInAccelerator | None = None) -> bool:
    """Whether all of a state is a number by now, wherever it is. Waits for nothing."""
    get = devices.reach if devices is not None else lambda tensor: tensor
    return all(bool((get(tensor) == value).all()) for tensor in tensors(found))


def fill(devices: StandInAccelerator, index: int, found: dict[str, Any], value: float, seconds: float = 0.3) -> None:
    """A kernel that takes its time, and writes."""
    devices.launch(index, lambda: [devices.reach(tensor).fill_(value) for tensor in tensors(found)], seconds=seconds)


def in_phase(ends: Ends, phase: str, act: Callable[[], object]) -> None:
    """Do something as the source's phase begins."""
    options = ends.source._options
    on_phase = lambda report, begun: act() if begun == phase else None  # noqa: E731
    ends.source._options = dataclasses.replace(options, on_phase=on_phase)


class Nobody(Seam):
    """There may be an accelerator, and nobody may ask it anything."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        raise AssertionError("asked")

    def synchronize(self, device: torch.device) -> None:
        raise AssertionError("asked")

    def current_stream(self, device: torch.device) -> Any:
        raise AssertionError("asked")

    def new_stream(self, device: torch.device) -> Any:
        raise AssertionError("asked")

    def adopt(self, streams: Sequence[Any]) -> None:
        raise AssertionError("asked")


@WAYS
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
def test_a_job_of_cpu_tensors_asks_no_accelerator_anything(
    monkeypatch: pytest.MonkeyPatch, way: str, in_place: bool
) -> None:
    """A question makes a context, of some hundred MiB; and pinned memory is a question."""
    monkeypatch.setattr(device_module, "_seam", Nobody())
    for name in ("is_available", "synchronize", "current_stream", "set_stream", "current_accelerator"):
        monkeypatch.setattr(torch.accelerator, name, None)
    with ends(way, state(0.0) if in_place else None) as found:
        assert holds(found.move(state(7.0)).result, 7.0)
    assert not found.errors
    ft_transport.state_digest(state(7.0))


@WAYS
def test_a_kernel_that_still_writes_to_the_state_is_waited_for(way: str) -> None:
    """On whichever device: with another one current nobody would wait for it otherwise."""
    with StandInAccelerator(2) as devices:
        sent = state(0.0)
        put(devices, sent, 1)
        fill(devices, 1, sent, 7.0)
        with ends(way, state(3.0)) as found:
            assert holds(found.move(sent).result, 7.0)
        assert not found.errors
        assert set(devices.synchronized) == {1}, "no other is touched"


class Loss:
    """A class of the user's, that keeps its value on a device, and tells it when it is pickled."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value
        self.read: Callable[[], float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        assert self.read is not None
        return {"value": self.read(), "read": None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loss) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]


def test_a_class_that_reads_a_device_when_it_is_taken_apart_reads_what_is_there_in_the_end() -> None:
    with StandInAccelerator(1) as devices, torch.serialization.safe_globals([Loss]):
        sent, loss = state(0.0), Loss()
        put(devices, sent, 0)
        loss.read = lambda: float(devices.reach(sent["large"])[0])
        fill(devices, 0, sent, 7.0)
        with ends("lanes") as found:
            assert found.move({"state": sent, "loss": loss}).result["loss"].value == 7.0


@WAYS
def test_a_kernel_that_still_reads_the_template_is_waited_for(way: str) -> None:
    with StandInAccelerator(2) as devices:
        template, read = state(3.0), []
        put(devices, template, 0)
        devices.launch(
            0, lambda: read.extend(devices.reach(tensor).mean().item() for tensor in tensors(template)), seconds=0.3
        )
        with ends(way, template) as found:
            assert holds(found.move(state(7.0)).result, 7.0, devices)
        assert set(read) == {3.0}
        assert set(devices.synchronized) == {0}


@WAYS
def test_what_has_been_copied_in_the_end_is_waited_for(way: str) -> None:
    """Copies run on a stream that whoever trains is not on."""
    with StandInAccelerator(1) as devices:
        template = state(3.0)
        put(devices, template, 0)
        with ends(way, template) as found:
            found.move(state(7.0))
            assert devices.synchronized[0] == 1, "before a byte lands"
            streams = len(devices.streams)
            assert devices.events[0] >= 1, "after the last"
            assert holds(template, 7.0, devices)
        assert streams == 1, "of its own"


@WAYS
@pytest.mark.parametrize("shadow", [False, True])
def test_a_template_that_is_copied_to_in_the_end_is_waited_for(way: str, shadow: bool) -> None:
    """With a shadow no message lands there, and a kernel that still writes to it would write last."""
    with StandInAccelerator(1) as devices:
        template = state(1.0)
        put(devices, template, 0)
        fill(devices, 0, template, 3.0)
        with ends(way, template, shadow=shadow) as found:
            found.move(state(7.0))
            assert not found.errors
            assert holds(template, 7.0, devices)


@WAYS
@pytest.mark.parametrize("shadow", [False, True])
def test_a_state_that_has_arrived_does_not_wait_for_the_step_that_training_is_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str, shadow: bool
) -> None:
    """Nor is it given up for that: the source has committed it."""
    with StandInAccelerator(1) as devices:
        template, steps = state(3.0), []
        put(devices, template, 0)

        def rebuild_beside(self: DestinationPlan, streams: Streams) -> object:
            devices.launch(0, lambda: steps.append("is over"), seconds=15.0)
            return rebuild(self, streams)

        monkeypatch.setattr(DestinationPlan, "rebuild", rebuild_beside)
        with ends(way, template, shadow=shadow) as found:
            found.move(state(7.0))
            assert not found.errors
            assert not steps, "the step is over"
            assert holds(template, 7.0, devices)
            assert not found.destination.torn
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@WAYS
@pytest.mark.parametrize("shadow", [False, True])
def test_copies_that_hang_end_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str, shadow: bool
) -> None:
    """While bytes move, and in the end, where a state that was received beside is copied to the template."""
    use = Streams.use

    def hang(streams: Streams) -> None:
        with use(streams):
            devices.run(ZERO, lambda: devices._over.wait(6.0))

    def hanging(self: Streams, **options: Any) -> Any:
        if self.devices:
            hang(self)
        return use(self, **options)

    def rebuild_beside(self: DestinationPlan, streams: Streams) -> object:
        hang(streams)
        return rebuild(self, streams)

    with StandInAccelerator(1) as devices:
        template = state(3.0)
        put(devices, template, 0)
        if shadow:
            monkeypatch.setattr(DestinationPlan, "rebuild", rebuild_beside)
        else:
            monkeypatch.setattr(Streams, "use", hanging)
        with ends(way, template, shadow=shadow) as found:
            found.move(state(7.0), timedelta(seconds=1))
            monkeypatch.undo()
            assert isinstance(found.errors["destination"], TransferTimeout)
            assert all(seconds < 2.5 for seconds in found.seconds.values()), found.seconds
            assert found.destination.torn
    assert "were begun and are not over" in caplog.text


@WAYS
def test_a_source_whose_copies_hang_says_so_at_the_deadline(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """It is not the destination that is late: the device may read the state yet, and a step would write to it."""
    use = Streams.use

    def hanging(self: Streams, **options: Any) -> Any:
        if self.devices:
            with use(self):
                devices.run(ZERO, lambda: devices._over.wait(6.0))
        return use(self, **options)

    with StandInAccelerator(1) as devices:
        sent, template = state(7.0), state(3.0)
        put(devices, sent, 0)
        monkeypatch.setattr(Streams, "use", hanging)
        with ends(way, template) as found:
            found.move(sent, timedelta(seconds=1))
            monkeypatch.undo()
            assert isinstance(found.errors["source"], TransferTimeout)
            assert isinstance(found.errors["destination"], (TransferTimeout, PeerFailure))
            assert all(seconds < 2.5 for seconds in found.seconds.values()), found.seconds


def test_shutdown_ends_a_receive_that_waits_for_a_device() -> None:
    with StandInAccelerator(1) as devices:
        template = state(3.0)
        put(devices, template, 0)
        done: list[str] = []
        devices.launch(0, lambda: done.append("all"), seconds=15.0)
        with ends("lanes", template) as found:
            ending = threading.Timer(0.5, found.destination.shutdown)
            ending.start()
            found.move(state(7.0))
            ending.join()
            assert not done, "the device was waited for"
            assert "shut down" in str(found.errors["destination"])


def test_who_calls_keeps_its_streams() -> None:
    """And so its current device, which setting one would change."""
    with StandInAccelerator(2) as devices:
        sent = state(7.0)
        put(devices, sent, 1)
        before = devices.current_stream(ONE)
        with ends("group", state(3.0)) as found:
            found.move(sent)
        assert devices.current_stream(ONE) is before
        assert before not in devices.streams


@WAYS
@pytest.mark.parametrize("busy", ["source", "destination"])
def test_the_deadline_holds_behind_a_device_that_is_busy(way: str, busy: str) -> None:
    with StandInAccelerator(1) as devices:
        sent, template = state(7.0), state(3.0)
        for tensor in tensors(sent if busy == "source" else template):
            devices.put(tensor, 0)
        done: list[str] = []
        devices.launch(0, lambda: done.append("all"), seconds=15.0)
        with ends(way, template) as found:
            found.move(sent, timedelta(seconds=1))
            assert not done, "the device was waited for"
            error = found.errors[busy]
            if busy == "source":
                assert isinstance(error, TransferTimeout)
                assert "cuda:0 has not done what it was told" in str(error)
            else:
                assert isinstance(error, (TransferTimeout, PeerFailure))
    assert holds(template, 3.0), "nothing was written"


@WAYS
def test_copies_do_not_wait_for_the_step_that_training_is_in(way: str) -> None:
    """In the caller's stream each would: a step under way takes longer than a state's bytes."""
    with StandInAccelerator(1) as devices:
        sent, template = state(7.0), state(3.0)
        put(devices, sent, 0)
        put(devices, template, 0)
        with ends(way, template) as found:
            # Behind what is waited for before a byte moves.
            in_phase(found, "move", lambda: devices.launch(0, int, seconds=15.0))
            found.move(sent, timedelta(seconds=10))
            assert not found.errors
            assert devices.current_stream(ZERO) not in devices.streams


def test_threads_of_a_transfer_copy_in_its_streams() -> None:
    with StandInAccelerator(2) as devices:
        tensor = devices.put(torch.zeros(5), 1)
        streams = settle([tensor, torch.zeros(3)])
        assert streams.devices == (ONE,)
        seen = []

        def run() -> None:
            with streams.use():
                seen.append(devices.current_stream(ONE))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
            thread.join()
        assert seen[0] is seen[1]
        assert seen[0] not in (devices.current_stream(ONE), devices.current_stream(ZERO))


def test_lanes_copy_in_two_streams() -> None:
    with StandInAccelerator(1) as devices:
        sent, template = state(7.0), state(3.0)
        put(devices, sent, 0)
        put(devices, template, 0)
        with ends("lanes", template) as found:
            found.move(sent)
            own = devices.streams - {devices.current_stream(ZERO)}
            assert len(own) == 2, "the source's and the destination's, for two lanes each"


def many(value: float) -> dict[str, Any]:
    return {f"bias {i}": torch.full((256,), value + i) for i in range(5000)}


@WAYS
@pytest.mark.parametrize("where", ["source", "destination", "both"])
def test_many_small_tensors_cross_in_few_copies(way: str, where: str) -> None:
    """Packed on the device: five thousand copies of 1 KiB, and as many waits, take as long as gigabytes."""
    with StandInAccelerator(1) as devices:
        sent, template = many(7.0), many(3.0)
        for side, found in (("source", sent), ("destination", template)):
            if where in (side, "both"):
                for tensor in found.values():
                    devices.put(tensor, 0)
        with ends(way, template) as moved:
            moved.move(sent)
            assert moved.destination.last_report.in_place_share == 1.0
        sides = 2 if where == "both" else 1
        assert 0 < devices.num_copies <= 20 * sides
        assert devices.synchronized[0] + devices.events[0] <= 5 * sides
    assert all(torch.equal(template[name], tensor) for name, tensor in sent.items())


def adam(value: float) -> dict[str, Any]:
    """As torch's Adam keeps it: counts of steps on the host, momenta where the parameters are."""
    return {
        f"{index} {name}": torch.full((256,) if name != "step" else (), value + index)
        for index in range(1500)
        for name in ("step", "exp_avg", "exp_avg_sq")
    }


@WAYS
@pytest.mark.parametrize("where", ["source", "destination", "both"])
def test_what_is_on_the_host_in_between_costs_no_copies(way: str, where: str) -> None:
    """What lies between a device's tensors goes along, and is as it was."""
    with StandInAccelerator(1) as devices:
        sent, template = adam(7.0), adam(3.0)
        for side, found in (("source", sent), ("destination", template)):
            for name, tensor in found.items():
                if where in (side, "both") and "exp" in name:
                    devices.put(tensor, 0)
        with ends(way, template) as moved:
            moved.move(sent)
            assert not moved.errors
        assert 0 < devices.num_copies <= 20
    assert all(torch.equal(template[name], tensor) for name, tensor in sent.items())


@WAYS
def test_what_is_far_apart_in_a_message_goes_by_itself(way: str) -> None:
    """The way there and back of much that is the host's would cost more than a copy."""
    with StandInAccelerator(1) as devices:
        sent, template = ({f"{i}": torch.full((20_000,), value + i) for i in range(9)} for value in (7.0, 3.0))
        for found in (sent, template):
            for name in list(found)[::2]:
                devices.put(found[name], 0)
        with ends(way, template) as moved:
            moved.move(sent)
            assert not moved.errors
        assert devices.num_copies >= 10
    assert all(torch.equal(template[name], tensor) for name, tensor in sent.items())


@WAYS
@pytest.mark.parametrize("make", [many, state], ids=["small", "large and strided"])
def test_a_receive_takes_no_memory_of_a_device_but_for_what_is_fresh(way: str, make: Callable[[float], Any]) -> None:
    with StandInAccelerator(1) as devices:
        sent, template = make(7.0), make(3.0)
        found = [tensor for side in (sent, template) for tensor in tree_leaves(side)]
        for tensor in found:
            devices.put(tensor, 0)
        with ends(way, template) as moved:
            moved.move(sent)
        assert (devices.nbytes_allocated, moved.errors) == (0, {})
        with ends(way, device=ZERO) as moved:
            moved.move(sent)
        whole = sum(tensor.nbytes for tensor in tree_leaves(sent))
        assert devices.nbytes_allocated == (whole if way == "lanes" else 0), "a group's fresh tensors are on the host"


@WAYS
def test_what_is_here_and_there_arrives_where_it_belongs(way: str) -> None:
    """Host, two devices, strided, empty and large, in one message and between them."""
    with StandInAccelerator(2) as devices:
        sent, template = mixed(7.0), mixed(3.0)
        for found in (sent, template):
            for name, tensor in found.items():
                if (where := int(name.split()[1]) % 3) < 2:
                    devices.put(tensor, where)
        with ends(way, template) as moved:
            moved.move(sent)
            assert not moved.errors
        assert all(torch.equal(template[name], tensor) for name, tensor in sent.items())


def mixed(value: float) -> dict[str, torch.Tensor]:
    small = {f"small {i}": torch.arange(10.0 + i) * value for i in range(60)}
    strided = {f"strided {i}": (torch.arange(600.0) * value).view(20, 30).t() for i in range(6)}
    large = {f"large {i}": torch.full(((1 << 20) + 7,), value) for i in range(6)}
    return {**small, **strided, **large, "empty 0": torch.empty(0), "odd 1": torch.ones(3, dtype=torch.uint8)}


def test_buckets_that_a_device_copies_to_are_pinned() -> None:
    with StandInAccelerator(1) as devices:
        sent = state(7.0)
        devices.put(sent["strided"], 0)
        with ends("lanes", state(3.0)) as found:
            assert holds(found.move(sent).result, 7.0)
        assert devices.nbytes_pinned > 0
        before = devices.nbytes_pinned
        with ends("lanes", state(3.0)) as found:
            assert holds(found.move(state(7.0)).result, 7.0)
        assert devices.nbytes_pinned == before


def test_what_a_device_raises_is_raised() -> None:
    class Broken(StandInAccelerator):
        def synchronize(self, device: torch.device) -> None:
            raise RuntimeError("an illegal memory access")

    with Broken(2) as devices:
        tensor = devices.put(torch.zeros(5), 1)
        for deadline in (None, Deadline(TIMEOUT)):
            with pytest.raises(RuntimeError, match="illegal memory access"):
                settle([tensor], deadline)


def test_what_has_no_bytes_is_on_no_device() -> None:
    assert settle([torch.empty(3, device="meta"), torch.zeros(3)]) is NO_STREAMS
    assert NO_STREAMS.devices == ()


def big(value: float) -> dict[str, Any]:
    return {f"layer {i}": torch.full((1 << 22,), value + i) for i in range(8)}


@pytest.mark.parametrize("side", ["source", "destination"])
def test_copies_of_one_message_overlap_what_the_wire_does_with_another(
    monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """By the order of events: the next message's bytes come from the device while one is sent, and one's go there while
    the next one is received."""
    log: list[tuple[str, int]] = []
    send, read, run = Session.send_message, Session.read_messages, StandInAccelerator.run

    def sending(self: Session, number: int, *args: Any, **kwargs: Any) -> Any:
        log.append(("wire", number))
        found = send(self, number, *args, **kwargs)
        log.append(("wire is done", number))
        return found

    def reading(self: Session, places: Any, *args: Any, **kwargs: Any) -> Any:
        assert len(places) == 1, "the next one may need its bucket"
        log.append(("wire", sum(what == "wire" for what, _ in log)))
        return read(self, places, *args, **kwargs)

    def running(self: StandInAccelerator, device: torch.device, work: Callable[[], object]) -> None:
        number = sum(what == "copy" for what, _ in log)
        log.append(("copy", number))
        run(self, device, lambda: (pace(0.005), work(), log.append(("copy is done", number))))

    monkeypatch.setattr(Session, *(("send_message", sending) if side == "source" else ("read_messages", reading)))
    monkeypatch.setattr(StandInAccelerator, "run", running)
    with StandInAccelerator(1) as devices:
        sent, template = big(7.0), big(3.0)
        for tensor in (sent if side == "source" else template).values():
            devices.put(tensor, 0)
        with ends("lanes", template, lanes=1) as found:
            found.move(sent)
            assert not found.errors
            count = found.source.last_report.num_messages
    assert all(torch.equal(template[name], tensor) for name, tensor in sent.items())
    at = {what: index for index, what in enumerate(log)}
    # In one lane copies and messages are in the same order, and there is one copy for each message.
    first, then = ("copy", "wire is done") if side == "source" else ("wire", "copy is done")
    overlapping = sum(at[first, number + 1] < at[then, number] for number in range(count - 1))
    assert overlapping >= count // 2, (overlapping, count)
    # And no more than two at once: there are two buckets.
    first, then = ("copy", "wire is done") if side == "source" else ("copy", "copy is done")
    assert all(at[first, number + 2] > at[then, number] for number in range(count - 2))
