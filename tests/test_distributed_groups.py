"""The API without torchft over real Gloo groups, one thread for each rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CPU, difference, noise

from ft_transport import PeerFailure, RemoteProtocolError, TransferError, TransferTimeout
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
