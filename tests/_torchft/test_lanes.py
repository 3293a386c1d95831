"""What a LaneTransport takes, where it listens, and what is left of it."""

from __future__ import annotations

import gc
import socket
import ssl
import threading
from datetime import timedelta
from typing import Any

import pytest
from helpers import CPU, noise

from ft_transport import LaneTransport, LocalProtocolError, PeerFailure, RemoteProtocolError
from ft_transport._lanes.control import ControlConnection
from ft_transport._torchft import lanes as _lanes
from ft_transport.testing import FaultyFabric

SECOND = timedelta(seconds=1)
CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stall_timeout": timedelta(0)},
        {"lanes": 0},
        {"lanes": 17},
        {"lanes": 2.0},
        {"lanes": True},
        {"port": -1},
        {"port": 1 << 16},
        {"port": "80"},
        {"ssl_context": CONTEXT},
        {"ssl_context": (CONTEXT, None)},
        {"topology": "ring"},
        {"fabric": "rdma"},
        {"fabric": 3},
        {"skip_unchanged": True, "shadow": True},
    ],
    ids=lambda wrong: f"{', '.join(wrong)} {wrong.get('port', '')}",
)
def test_arguments_that_cannot_be(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        LaneTransport(SECOND, CPU, **wrong)


def test_a_fabric_that_encrypts_nothing_is_none_with_tls() -> None:
    with (
        FaultyFabric("faulty"),
        pytest.raises(ValueError, match=r"^fabric: expected auto, tcp or cma with ssl_context"),
    ):
        LaneTransport(SECOND, CPU, fabric="faulty", ssl_context=(CONTEXT, CONTEXT))


def test_the_one_fabric_of_torchs_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is what "torch" means, or NIXL where there are several: both sides must come to the same."""
    monkeypatch.setattr(_lanes, "available", lambda: ("alpha", "nixl"))
    assert [_lanes._fabric(name, False) for name in ("torch", "alpha", "auto", "tcp")] == [
        "nixl",
        "alpha",
        "auto",
        "tcp",
    ]
    monkeypatch.setattr(_lanes, "available", lambda: ("beta", "gamma"))
    assert _lanes._fabric("torch", False) == "beta"
    monkeypatch.setattr(_lanes, "available", lambda: ())
    with pytest.raises(ValueError, match=r"^fabric: expected one of auto, tcp, cma with torch"):
        _lanes._fabric("torch", False)


def test_a_port_that_somebody_else_has() -> None:
    with socket.create_server(("", 0)) as taken, pytest.raises(LocalProtocolError, match="cannot listen on port"):
        LaneTransport(SECOND, CPU, port=taken.getsockname()[1])


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("ft_transport")}


@pytest.mark.parametrize("wait", [True, False])
def test_shutting_down_twice_leaves_nothing(wait: bool) -> None:
    before = threads()
    transport: LaneTransport[Any] = LaneTransport(SECOND, CPU, host="127.0.0.1")
    new = threads() - before
    assert new
    transport.shutdown(wait)
    transport.shutdown()
    for thread in new:
        thread.join(10)
        assert not thread.is_alive()
    for call in (
        lambda: transport.send_checkpoint([1], 7, {}, SECOND),
        lambda: transport.recv_checkpoint(0, transport.metadata(), 7, SECOND),
    ):
        with pytest.raises(LocalProtocolError, match="shut down"):
            call()


def test_one_that_nobody_holds_listens_no_more() -> None:
    before = threads()
    transport: LaneTransport[Any] | None = LaneTransport(SECOND, CPU, host="127.0.0.1")
    (listening,) = threads() - before
    del transport
    gc.collect()
    listening.join(10)
    assert not listening.is_alive()


@pytest.mark.parametrize("metadata", ["", "<n/a>", "http://10.0.0.1:80/checkpoint/", "ft-lanes://"])
def test_metadata_of_another_transport(metadata: str) -> None:
    transport: LaneTransport[Any] = LaneTransport(SECOND, CPU, host="127.0.0.1")
    try:
        with pytest.raises(RemoteProtocolError):
            transport.recv_checkpoint(0, metadata, 7, SECOND)
        assert transport.last_report is not None
        assert (transport.last_report.peers[0].outcome, transport.last_report.peers[0].phase) == ("refused", "agree")
        with pytest.raises(RemoteProtocolError, match="cannot be healed from the others"):
            transport.disallow_checkpoint()
    finally:
        transport.shutdown()


def test_a_refusal_that_the_source_does_not_hear_of_is_one_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: ControlConnection, reason: str, *, wait: bool) -> None:
        raise PeerFailure("the connection broke")

    monkeypatch.setattr(ControlConnection, "refuse", lost)
    source: LaneTransport[Any] = LaneTransport(10 * SECOND, CPU, host="127.0.0.1")
    destination: LaneTransport[Any] = LaneTransport(10 * SECOND, CPU, lambda: {"w": noise(3, 1)}, host="127.0.0.1")
    try:
        source.send_checkpoint([1], 7, {"w": noise(1000, 2)}, 10 * SECOND)
        with pytest.raises(RemoteProtocolError, match="w: expected"):
            destination.recv_checkpoint(0, source.metadata(), 7, 10 * SECOND)
        with pytest.raises(RemoteProtocolError, match="cannot be healed from the others"):
            destination.disallow_checkpoint()
        source.disallow_checkpoint()
    finally:
        source.shutdown()
        destination.shutdown()
