"""A cable is cut in the middle of a heal, over links of their own: both sides know, and the rest moves afterwards."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from multiproc.harness import digest, tell

from ft_transport import LaneTransport, Progress, TransferError

from .shaped_links import cut, make_state, mend, replicas, rights

STALL = timedelta(seconds=1)
TIMEOUT = timedelta(seconds=20)
MEGABYTES = 20
STEP = 7

_transport: LaneTransport[Any] | None = None
_template: dict[str, torch.Tensor] = {}


def open_source() -> str:
    global _transport
    _transport = LaneTransport(TIMEOUT, torch.device("cpu"), stall_timeout=STALL, blocking=True)
    return _transport.metadata()


def send() -> tuple[float, dict[str, Any]]:
    """Gives when the call ended, and its report."""
    assert _transport is not None
    _transport.send_checkpoint([1], STEP, make_state(MEGABYTES), TIMEOUT)
    assert _transport.last_report is not None
    return time.monotonic(), _transport.last_report.as_dict()


def receive(metadata: str) -> tuple[float, TransferError | None, dict[str, Any], str]:
    """Gives when the call ended, how, its report, and the fingerprint of the template."""
    global _transport, _template
    if _transport is None:
        _template = {name: torch.zeros_like(tensor) for name, tensor in make_state(MEGABYTES).items()}

        def progress(now: Progress) -> None:
            tell("moves", now.nbytes_done / now.nbytes_total)

        _transport = LaneTransport(
            TIMEOUT, torch.device("cpu"), lambda: _template, stall_timeout=STALL, on_progress=progress
        )
    error = None
    try:
        _transport.recv_checkpoint(0, metadata, STEP, TIMEOUT)
    except TransferError as exc:
        error = exc
    ended = time.monotonic()
    assert _transport.last_report is not None
    return ended, error, _transport.last_report.as_dict(), digest(_template)


@pytest.mark.timeout(60)
def test_a_cut_cable() -> None:
    if reason := rights():
        pytest.skip(reason)
    with replicas(1, "100mbit") as ranks:
        metadata = ranks[0].call(open_source)
        ranks[0].start(send)
        ranks[1].start(receive, metadata)
        assert ranks[1].event("moves").value < 0.9
        cut(1)
        at = time.monotonic()
        (sent, source), (got, error, report, _) = ranks[0].result(), ranks[1].result()
        assert max(sent, got) - at < STALL.total_seconds() + 1.0
        assert error is not None
        assert error.torn
        assert report["torn"]
        assert source["peers"][0]["outcome"] in ("timed out", "dead")

        mend(1)
        ranks[0].start(send)
        ranks[1].start(receive, metadata)
        (_, source), (_, error, report, found) = ranks[0].result(), ranks[1].result()
        assert error is None
        assert source["complete"]
        assert 0 < report["nbytes_kept"] < report["nbytes_total"]
        assert found == digest(make_state(MEGABYTES))
