"""Where messages land: which are here already, which came damaged, and from when on the template is torn."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers import CPU, noise, raw_bytes, snapshot

from ft_transport._lanes.pending import PendingMessages
from ft_transport._lanes.sink import Sink
from ft_transport._plan.buffers import Bucket
from ft_transport._plan.compare import compare
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.template import match_template
from ft_transport._state.describe import describe
from ft_transport._telemetry.report import PeerReport, TransferReport
from ft_transport._wire.digest import digest_bytes
from ft_transport._wire.layout import Limits, lay_out
from ft_transport.errors import LocalProtocolError, RemoteProtocolError

# One large message, then a small one of two tensors, which is staged.
STATE = {"large": noise(100, 1), "small": [noise(3, 2), noise(4, 3)]}
LARGE = raw_bytes(STATE["large"])
SMALL = b"".join(raw_bytes(tensor) for tensor in STATE["small"])
LIMITS = Limits(message_bytes=1024, flight_bytes=1024, pack_below=64, pack_from=2, window=2)


class Session:
    """A lane on which messages come as they are given."""

    def __init__(self) -> None:
        self.data = b""
        self.sound = True

    def recv_message(self, message: int, view: memoryview) -> int | None:
        view[:] = self.data
        return digest_bytes(self.data) if self.sound else None


class Destination:
    def __init__(self, claims: dict[int, int | None] | None = None) -> None:
        self.template: dict[str, Any] = {"large": noise(100, 5), "small": [noise(3, 6), noise(4, 7)]}
        self.report = TransferReport("destination", "test", 7, [PeerReport(0)])
        manifest, _ = describe(STATE)
        layout = lay_out(manifest, LIMITS)
        assert layout.sizes == [len(LARGE), len(SMALL)]
        matched = match_template(manifest, self.template, self.report)
        targets, _ = compare(manifest, matched, self.report)
        landing = DestinationPlan(manifest, layout, matched, targets, CPU, self.report)
        self.work, self.session, self.bucket = PendingMessages(2), Session(), Bucket(CPU)
        self.sink = Sink(layout, landing, self.work, self.report, claims or {}, verified=True)

    def land(self, message: int, data: bytes, *, sound: bool = True) -> bool:
        self.session.data, self.session.sound = data, sound
        landing = self.sink.begin(message, self.bucket)
        return self.sink.end(landing, self.session.recv_message(message, landing.target.view))

    @property
    def kept(self) -> bytes:
        """What the template holds of the small message."""
        return b"".join(raw_bytes(tensor) for tensor in self.template["small"])


def test_memory_that_may_be_fresh_is_to_be_provided(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever reads the message, right before: not for many of them at once."""
    it, provided = Destination(), list[int]()
    monkeypatch.setattr(DestinationPlan, "has_pages", True)
    monkeypatch.setattr(DestinationPlan, "provide", lambda _, message: provided.append(message))
    assert it.sink.begin(1, it.bucket).target.provide is None, "it is staged"
    provide = it.sink.begin(0, it.bucket).target.provide
    assert provide is not None
    assert provided == []
    provide()
    assert provided == [0]


def test_messages_land_and_are_counted_once() -> None:
    it = Destination()
    assert it.land(1, SMALL)
    assert it.land(0, LARGE)
    assert (raw_bytes(it.template["large"]), it.kept) == (LARGE, SMALL)
    assert it.work.complete
    assert it.report.peers[0].nbytes == len(LARGE) + len(SMALL)
    assert it.report.nbytes_staged == len(SMALL)
    assert it.land(0, LARGE), "it was fetched again, after forward had written to it"
    assert it.report.peers[0].nbytes == len(LARGE) + len(SMALL)


@pytest.mark.parametrize(
    ("message", "data", "torn"),
    [(0, bytes(len(LARGE)), True), (1, bytes(len(SMALL)), False)],
    ids=["large", "small"],
)
def test_what_came_damaged_is_in_the_template_only_if_it_landed_there(message: int, data: bytes, torn: bool) -> None:
    """A large message lands where it belongs while it comes, a small one once its digest agrees."""
    it = Destination()
    before = snapshot(it.template)
    assert not it.land(message, data, sound=False)
    assert it.report.torn is torn
    assert (snapshot(it.template) == before) is not torn
    assert not it.work.complete
    assert it.report.peers[0].nbytes == 0


def test_a_message_that_always_comes_damaged_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    it = Destination()
    with caplog.at_level(logging.WARNING, "ft_transport"):
        it.sink.note_damage(1)
        it.sink.note_damage(0)
        it.sink.note_damage(1)
        with pytest.raises(RemoteProtocolError, match="message 1 of 2 differs from what the source sent, 3 times"):
            it.sink.note_damage(1)
    assert it.report.num_repaired == 4
    assert len(caplog.records) == 4


@pytest.mark.parametrize("message", [0, 1])
def test_what_may_be_here_is_asked_for_by_its_digest(message: int) -> None:
    """As its memory is now: what an earlier receive has noted of it may have been written over since."""
    data = (LARGE, SMALL)[message]
    here, elsewhere = digest_bytes(data), 5
    assert Destination().sink.claim(message, Bucket(CPU)) is None, "nothing was left"
    for noted, expected in ((here, here), (None, here), (elsewhere, None)):
        it = Destination({message: noted})
        it.template["large"].copy_(STATE["large"])
        for mine, theirs in zip(it.template["small"], STATE["small"], strict=True):
            mine.copy_(theirs)
        assert it.sink.claim(message, it.bucket) == expected


def test_what_came_damaged_is_not_claimed_again() -> None:
    it = Destination({0: None})
    assert it.sink.claim(0, it.bucket) is not None
    it.sink.note_damage(0)
    assert it.sink.claim(0, it.bucket) is None


def test_what_was_here_counts_as_kept_and_is_passed_on() -> None:
    it = Destination({0: None})
    it.template["large"].copy_(STATE["large"])
    digest = it.sink.claim(0, it.bucket)
    it.sink.keep(0)
    assert it.report.nbytes_kept == len(LARGE)
    assert it.report.peers[0].nbytes == 0
    assert not it.report.torn
    assert it.work.await_message(0, timedelta(seconds=1))
    assert digest == digest_bytes(LARGE)


def test_memory_that_was_taken_away_is_named() -> None:
    it = Destination()
    it.template["large"].untyped_storage().resize_(0)
    error = it.sink.named(LocalProtocolError("the memory of a tensor was taken away"))
    assert "large" in error.message
    still = LocalProtocolError("something else")
    assert Destination().sink.named(still) is still
    assert torch.equal(it.template["small"][0], noise(3, 6))
