"""An endpoint of a one-sided transport: what it is asked is done in its own thread, and it is closed in the end."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ft_transport._deadline import Deadline
from ft_transport._net import one_sided
from ft_transport._net.one_sided import Endpoint, Job, available, await_closed, register, unregister
from ft_transport.testing import FaultyFabric
from ft_transport.testing._fabric import _Transport

NBYTES = 1 << 20


def done(job: Job[Any]) -> Any:
    assert job.done.wait(10)
    return job.result()


@pytest.fixture
def ends(fabric: FaultyFabric) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Who shows, and who reads."""
    shows, reads = Endpoint("faulty"), Endpoint("faulty", NBYTES)
    places = done(shows.bind()), done(reads.bind())
    done(reads.connect(places[0]))
    done(shows.connect(places[1]))
    yield shows, reads
    shows.close()
    reads.close()


def tensor(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (NBYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_memory_is_read_into_the_endpoints_own(ends: tuple[Endpoint, Endpoint]) -> None:
    shows, reads = ends
    for seed, nbytes in ((1, NBYTES), (2, 100)):
        shown = tensor(seed)
        assert done(reads.read(done(shows.show(shown)), nbytes)) == memoryview(shown.numpy())[:nbytes]


def test_the_same_memory_is_registered_once(ends: tuple[Endpoint, Endpoint], fabric: FaultyFabric) -> None:
    shows, _ = ends
    one, other = tensor(), tensor()
    assert done(shows.show(one)) == done(shows.show(one[:])) != done(shows.show(other))
    assert fabric.num_registered == 2
    done(shows.show(one[: NBYTES // 2]))
    assert fabric.num_registered == 3


def test_what_is_shown_is_kept_until_it_is_closed(ends: tuple[Endpoint, Endpoint]) -> None:
    shows, reads = ends
    shown = tensor()
    place, kept = done(shows.show(shown)), weakref.ref(shown)
    del shown
    done(shows.show(tensor(2)))  # its thread has the last job in its hands
    gc.collect()
    assert kept() is not None
    assert done(reads.read(place, NBYTES)) == memoryview(tensor().numpy())
    shows.close()
    assert shows.closed.wait(10)
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("what", ["nonsense", "too much", "dies"])
def test_what_fails_is_an_oserror(ends: tuple[Endpoint, Endpoint], fabric: FaultyFabric, what: str) -> None:
    shows, reads = ends
    place = b"nonsense" if what == "nonsense" else done(shows.show(tensor()))
    fabric.die_at(0)
    with pytest.raises(OSError, match=r"JSONDecodeError|1048577 bytes to read|the link is down"):
        done(reads.read(place, NBYTES + (what == "too much")))


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_what_a_backend_quotes_of_the_peer_is_one_line_of_text(
    fabric: FaultyFabric, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """It goes into logs."""

    def connect(self: _Transport, peer: bytes) -> int:
        raise error(f"no peer: {peer.decode()}")

    monkeypatch.setattr(_Transport, "connect", connect)
    endpoint = Endpoint("faulty")
    done(endpoint.bind())
    with pytest.raises(OSError, match=r"no peer: a\\nb\\x1b\[31m$"):
        done(endpoint.connect(b"a\nb\x1b[31m"))
    endpoint.close()
    assert endpoint.closed.wait(10)


def test_an_endpoint_that_cannot_be_made_is_closed_all_the_same(fabric: FaultyFabric) -> None:
    endpoint = Endpoint(fabric.fail_to_make() and "faulty")
    with pytest.raises(OSError, match="failed to create transport"):
        done(endpoint.bind())
    endpoint.close()
    assert endpoint.closed.wait(10)


def test_closing_waits_for_nobody_and_is_done_once_it_can_be(
    ends: tuple[Endpoint, Endpoint], fabric: FaultyFabric
) -> None:
    """A backend whose reads stand still refuses to be closed; what it reads into is kept as long."""
    shows, reads = ends
    fabric.delay_at(0)
    called = threading.Event()
    reads.when_closed(called.set)
    job = reads.read(done(shows.show(tensor())), NBYTES)
    assert Deadline(timedelta(seconds=10)).poll(lambda: fabric.num_late == 1)
    reads.close()
    with pytest.raises(OSError, match="it was closed while it read"):
        done(job)
    assert not await_closed(timedelta(milliseconds=50))
    assert not called.is_set()
    landing = reads._landing
    assert landing is not None
    assert fabric.land() == 1
    assert reads.closed.wait(10)
    assert called.is_set()
    assert torch.equal(landing, tensor()), "late, and where nobody looks"
    with pytest.raises(OSError, match="it is closed"):
        done(reads.read(b"", 1))
    reads.close()


def test_what_was_asked_for_before_it_was_closed_is_not_done(
    ends: tuple[Endpoint, Endpoint], fabric: FaultyFabric
) -> None:
    shows, reads = ends
    fabric.stall_at(0)
    place = done(shows.show(tensor()))
    jobs = [reads.read(place, NBYTES) for _ in range(3)]
    reads.close()
    for job in jobs:
        with pytest.raises(OSError, match="closed"):
            done(job)
    assert fabric.num_reads <= 1
    fabric.land()


def test_what_is_asked_for_while_it_is_closed_is_not_waited_for(
    fabric: FaultyFabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look whether it is closed and its place among the jobs, at which nobody looks any more."""
    endpoint = Endpoint("faulty")
    jobs = endpoint._jobs

    class Late:
        def put(self, job: Any) -> None:
            monkeypatch.setattr(endpoint, "_jobs", jobs)
            endpoint.close()
            assert endpoint.closed.wait(10)
            jobs.put(job)

    monkeypatch.setattr(endpoint, "_jobs", Late())
    with pytest.raises(OSError, match="it is closed"):
        done(endpoint.bind())


class Broken:
    """A backend that fails to close a number of times."""

    left = 0

    def bind(self) -> bytes:
        return b""

    def close(self, *, timeout: float) -> None:
        type(self).left -= 1
        if type(self).left >= 0:
            raise RuntimeError("NIXL transfer failed")


@pytest.mark.parametrize(("failures", "closed"), [(1, True), (2, True), (100, False)])
def test_a_backend_that_fails_to_close(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int, closed: bool
) -> None:
    """One says once what its reads came to; one that cannot be closed at all is kept, with all that it may write to.

    Whoever waits for its end, to give back what was shown by it, does not wait without end.
    """
    monkeypatch.setattr(Broken, "left", failures)
    monkeypatch.setattr(one_sided, "_left", left := [])
    register("broken", Broken)
    try:
        endpoint = Endpoint("broken")
        done(endpoint.bind())
    finally:
        unregister("broken")
    over = threading.Event()
    endpoint.when_closed(over.set)
    endpoint.close()
    assert over.wait(10)
    assert endpoint.closed.wait(10 if closed else 0) == closed
    assert left == ([] if closed else [endpoint])
    assert ("cannot be closed" in caplog.text) != closed
    one_sided._endpoints.discard(endpoint)


def test_backends_of_this_process_are_available_with_or_without_torchs(fabric: FaultyFabric) -> None:
    assert "faulty" in available()
    unregister("faulty")
    assert "faulty" not in available()


def test_a_torch_without_one_sided_transports_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed._transport", None)
    assert available() == ()
    endpoint = Endpoint("nixl")
    with pytest.raises(OSError, match="has no one-sided transports"):
        done(endpoint.bind())
    endpoint.close()
    assert endpoint.closed.wait(10)


def test_torchs_own_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs:
        @staticmethod
        def available_transports() -> tuple[str, ...]:
            return ("nixl",)

        @staticmethod
        def new_transport(backend: str) -> Broken:
            assert backend == "nixl"
            return Broken()

    monkeypatch.setitem(sys.modules, "torch.distributed._transport", Theirs)
    assert available() == ("nixl",)
    endpoint = Endpoint("nixl")
    assert done(endpoint.bind()) == b""
    endpoint.close()
    assert endpoint.closed.wait(10)


class nixlRemoteDisconnectError(Exception):  # noqa: N801 - NIXL's, which is known by its name
    pass


class Agent:
    """NIXL's, as far as torch asks it how a read goes."""

    def __init__(self) -> None:
        self.answer: Any = "PROC"

    def check_xfer_state(self, handle: int) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return handle, self.answer


class OfNIXL(Broken):
    def __init__(self) -> None:
        self._agent = Agent()


def test_a_read_of_nixls_whose_peer_is_gone_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would ask for ever. Whatever else NIXL raises says nothing of the read."""
    monkeypatch.setattr(one_sided, "_torchs", lambda: SimpleNamespace(new_transport=lambda backend: OfNIXL()))
    agent = one_sided._new_transport("nixl")._agent
    assert agent.check_xfer_state(1) == (1, "PROC")
    agent.answer = nixlRemoteDisconnectError("NIXL_ERR_REMOTE_DISCONNECT")
    assert agent.check_xfer_state(1) == "ERR, NIXL_ERR_REMOTE_DISCONNECT"
    agent.answer = RuntimeError("NIXL_ERR_NOT_FOUND")
    with pytest.raises(RuntimeError, match="NIXL_ERR_NOT_FOUND"):
        agent.check_xfer_state(1)


def test_nixls_agent_ends_when_it_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when the collector comes: until then its thread keeps a core busy."""
    monkeypatch.setattr(one_sided, "_torchs", lambda: SimpleNamespace(new_transport=lambda backend: OfNIXL()))
    gc.disable()
    try:
        transport = one_sided._new_transport("nixl")
        agent = weakref.ref(transport._agent)
        del transport
        assert agent() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["bind", "close"])
def test_an_error_does_not_keep_what_has_failed(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """torch keeps a read's error with the read, where no collector looks: with its frames it would keep the agent."""
    errors = [error := RuntimeError("NIXL transfer failed")]

    def fail_once(self: Broken, **options: Any) -> bytes:
        if errors:
            raise errors.pop()
        return b""

    monkeypatch.setattr(Broken, where, fail_once)
    register("broken", Broken)
    try:
        endpoint = Endpoint("broken")
        assert endpoint.bind().done.wait(10)
    finally:
        unregister("broken")
    endpoint.close()
    assert endpoint.closed.wait(10)
    assert not errors
    assert error.__traceback__ is None


def test_a_fork_leaves_its_parents_endpoints_alone(ends: tuple[Endpoint, Endpoint], fabric: FaultyFabric) -> None:
    """It closes none, not even when it ends; and the parent's go on."""
    shows, reads = ends
    place = done(shows.show(tensor()))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            before = fabric.num_open
            kept = sys.getrefcount(reads._transport), sys.getrefcount(shows._transport)
            shows.close()
            reads.close()
            gone = shows.closed.is_set() or reads._closing or not all(count > 2 for count in kept)
            status = 2 * gone + 4 * (fabric.num_open != before) + 8 * len(one_sided._endpoints)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert done(reads.read(place, NBYTES)) == memoryview(tensor().numpy())
