"""The API without torchft over real Gloo groups, one thread for each rank."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CPU, difference, noise

from ft_transport import LocalProtocolError, PeerFailure, RemoteProtocolError, TransferError, TransferTimeout
from ft_transport._plan.destination import DestinationPlan
from ft_transport.distributed import PGTransport


def state(seed: int) -> dict[str, Any]:
    large = noise((1 << 20, 2), seed)
    return {
        "large": large,
        "rows": large[3:5],
        "strided": noise((40, 30), seed + 1)[:, ::3],
        "small": {f"p{i}": noise(100 + i, seed + i) for i in range(40)},
        "parameter": torch.nn.Parameter(noise((3, 4), seed).nan_to_num()),
        "step": seed,
        "schedule": ["cosine", 0.1, None],
    }


def run(ranks: list[Callable[[PGTransport], Any]], timeout: float, template: Any = None) -> list[Any]:
    """What each rank returned or raised."""
    store, results = dist.HashStore(), [None] * len(ranks)

    def rank_main(rank: int) -> None:
        group = dist.ProcessGroupGloo(store, rank, len(ranks), timedelta(seconds=60))
        callback = (lambda: template) if template is not None and rank else None
        try:
            results[rank] = ranks[rank](PGTransport(group, timedelta(seconds=timeout), CPU, state_dict=callback))
        except TransferError as exc:
            results[rank] = exc

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


def receive(transport: PGTransport) -> Any:
    return transport.recv_checkpoint(0)


def test_fresh_to_two_destinations() -> None:
    sent = state(1)
    _, first, second = run([lambda t: t.send_checkpoint([1, 2], sent), receive, receive], 10)
    assert difference(first, sent) == ""
    assert difference(second, sent) == ""
    assert first["rows"].untyped_storage().data_ptr() == first["large"].untyped_storage().data_ptr()


def test_both_sides_number_the_storages_alike() -> None:
    # The column comes first and is sent without its gaps, the rows share its storage: two storages in the manifest.
    base = noise((100, 50), 1)
    sent = {"column": base[:50, :1], "other": noise(7, 2), "rows": base[60:], "more": base[:50, 9:12]}
    _, received = run([lambda t: t.send_checkpoint([1], sent), receive], 10)
    assert difference(received, sent) == ""


def test_in_place() -> None:
    sent, template = state(1), state(2)
    reports = []

    def receive_and_report(transport: PGTransport) -> Any:
        received = transport.recv_checkpoint(0)
        reports.append(transport.last_report)
        return received

    version = template["parameter"]._version
    _, received = run([lambda t: t.send_checkpoint([1], sent), receive_and_report], 10, template)
    assert difference(received, sent) == ""
    assert received["large"] is template["large"]
    assert reports[0].in_place_share == 1.0
    assert reports[0].complete
    assert template["parameter"]._version > version


def test_a_template_that_does_not_fit_is_untouched_and_the_source_learns_of_it() -> None:
    template = {"large": torch.zeros(3), "step": 1}
    reports = []

    def receive_and_report(transport: PGTransport) -> Any:
        try:
            return receive(transport)
        finally:
            reports.append(transport.last_report)

    source, destination = run([lambda t: t.send_checkpoint([1], state(1)), receive_and_report], 20, template)
    (peer,) = reports[0].peers
    assert (peer.outcome, peer.phase) == ("refused", "agree")
    assert "large: expected float32 (3,)" in peer.reason
    assert "rank 0 refused (agree: " in reports[0].summary()
    assert isinstance(destination, RemoteProtocolError)
    assert "large: expected float32 (3,), source has float32 (1048576, 2)" in str(destination)
    assert isinstance(source, PeerFailure)
    assert template["large"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("rank", [0, 1], ids=["source", "destination"])
def test_the_timeout_is_honoured(rank: int) -> None:
    done = threading.Event()

    def act(transport: PGTransport) -> None:
        try:
            transport.send_checkpoint([1], state(1)) if rank == 0 else transport.recv_checkpoint(0)
        finally:
            done.set()

    ranks: list[Callable[[PGTransport], Any]] = [lambda _: done.wait(20)] * 2
    ranks[rank] = act
    start = time.monotonic()
    assert isinstance(run(ranks, 1.0)[rank], TransferTimeout)
    assert time.monotonic() - start < 10


def test_what_cannot_be_pickled_is_refused_before_anything_is_sent() -> None:
    result = run([lambda t: t.send_checkpoint([], {"f": lambda: None})], 5)[0]
    assert isinstance(result, TransferError)
    assert "f: a value of class function cannot be encoded" in str(result)


@pytest.mark.parametrize("rank", [-1, 2, "1"])
def test_a_rank_that_is_none_of_the_group(rank: Any) -> None:
    """Before anything is posted: Gloo's answer to one that is out of range is a SIGSEGV."""
    for error in run([lambda t: t.send_checkpoint([rank], {}), lambda t: t.recv_checkpoint(rank)], 5):
        assert isinstance(error, LocalProtocolError)
        assert str(error).startswith("rank "), error


def test_a_rank_that_is_ones_own_or_there_twice() -> None:
    for error in run([lambda t: t.send_checkpoint([1, 0], {}), lambda t: t.recv_checkpoint(1)], 1):
        assert isinstance(error, LocalProtocolError)
        assert "expected another rank than this side's own" in str(error)
    twice, _ = run([lambda t: t.send_checkpoint([1, 1], {}), receive], 1)
    assert isinstance(twice, LocalProtocolError)


# Of gaps, so that it goes through buckets: more than there are at a time.
STAGED = {"columns": noise((1 << 22, 2), 1)[:, :1]}


def describe_and_stand_still(transport: PGTransport, until: threading.Event) -> None:
    """Take the description, and nothing else."""
    length = torch.zeros(1, dtype=torch.int64)
    transport._pg.recv([length], 0, tag=1).wait()
    transport._pg.recv([torch.empty(int(length), dtype=torch.uint8)], 0, tag=2).wait()
    assert until.wait(20)


def test_why_there_is_no_state_reaches_others_than_the_one_that_stands_still() -> None:
    told = threading.Event()

    def receive_and_say(transport: PGTransport) -> Any:
        try:
            return receive(transport)
        finally:
            told.set()

    cannot_travel = {"f": lambda: None}
    ends = [lambda t: t.send_checkpoint([1, 2], cannot_travel), lambda _: told.wait(20), receive_and_say]
    source, _, destination = run(ends, 4)
    assert isinstance(source, LocalProtocolError)
    assert isinstance(destination, PeerFailure)
    assert "f: a value of class function cannot be encoded" in str(destination)


def test_a_time_out_names_the_one_that_stands_still() -> None:
    """And not the first that was not served, which has refused."""
    over = threading.Event()

    def send(transport: PGTransport) -> None:
        try:
            transport.send_checkpoint([1, 2], STAGED)
        finally:
            over.set()

    def refuse(transport: PGTransport) -> None:
        transport._state_dict = lambda: {"columns": torch.zeros(3)}
        transport.recv_checkpoint(0)

    source, refused, _ = run([send, refuse, lambda t: describe_and_stand_still(t, over)], 2)
    assert isinstance(refused, RemoteProtocolError)
    assert isinstance(source, TransferTimeout)
    assert source.peer_rank == 2


def test_a_destination_that_stands_still_keeps_nothing_from_the_others() -> None:
    served, reports = threading.Event(), []

    def receive_and_say(transport: PGTransport) -> Any:
        received = receive(transport)
        served.set()
        return received

    def send(transport: PGTransport) -> None:
        try:
            transport.send_checkpoint([1, 2], STAGED)
        finally:
            reports.append(transport.last_report)

    source, _, received = run([send, lambda t: describe_and_stand_still(t, served), receive_and_say], 20)
    assert difference(received, STAGED) == ""
    # That one has gone, in the middle; whether the source has noticed by its end or by its deadline is Gloo's choice.
    assert isinstance(source, (PeerFailure, TransferTimeout))
    assert [(peer.outcome == "complete", peer.phase) for peer in reports[0].peers] == [(False, "move"), (True, "move")]
    assert reports[0].peers[0].nbytes < reports[0].peers[1].nbytes == reports[0].nbytes_total == 1 << 24
    assert reports[0].nbytes_staged == 1 << 24


def test_the_report_says_which_phases_there_were_and_how_far_it_came() -> None:
    reports: list[Any] = [None, None]

    def reported(number: int, act: Callable[[PGTransport], Any]) -> Callable[[PGTransport], Any]:
        def run_it(transport: PGTransport) -> Any:
            try:
                return act(transport)
            finally:
                reports[number] = transport.last_report

        return run_it

    run([reported(0, lambda t: t.send_checkpoint([1], STAGED)), reported(1, receive)], 20)
    assert [list(report.seconds) for report in reports] == [["describe", "move"], ["agree", "move", "rebuild"]]
    assert [report.peers[0].phase for report in reports] == ["move", "rebuild"]
    assert [report.nbytes_staged for report in reports] == [1 << 24, 0], "new memory has no gaps"
    assert [report.peers[0].nbytes for report in reports] == [1 << 24, 1 << 24]


def test_a_leaf_that_was_torn_stays_so_until_a_state_comes_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part = {"a": noise(1 << 20, 1), "b": noise(1 << 20, 2)}, {"a": noise(1 << 20, 3)}
    template = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    store, torn = dist.HashStore(), []
    rebuild, calls = DestinationPlan.rebuild, []

    def break_once(self: DestinationPlan, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == 1:
            raise RuntimeError("broken by the test")
        return rebuild(self, *args)

    monkeypatch.setattr(DestinationPlan, "rebuild", break_once)

    def group(number: int, rank: int) -> dist.ProcessGroup:
        return dist.ProcessGroupGloo(dist.PrefixStore(str(number), store), rank, 2, timedelta(seconds=20))

    def source() -> None:
        for number, state in enumerate([whole, part, whole]):
            with contextlib.suppress(TransferError):
                PGTransport(group(number, 0), timedelta(seconds=20), CPU).send_checkpoint([1], state)

    def destination() -> None:
        transport = PGTransport(group(0, 1), timedelta(seconds=20), CPU, state_dict=lambda: template)
        for number in range(3):
            if number:
                transport._pg = group(number, 1)
            with contextlib.suppress(TransferError):
                transport.recv_checkpoint(0)
            torn.append(transport.torn)

    threads = [threading.Thread(target=main) for main in (source, destination)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert torn == [True, True, False]
    assert difference(template, whole) == ""
