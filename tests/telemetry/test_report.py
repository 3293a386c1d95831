"""What a report sums up, and how it reads."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from ft_transport._telemetry.causes import NO_STATE_YET
from ft_transport._telemetry.events import transfer_event
from ft_transport._telemetry.report import PHASES, PeerReport, TransferReport, outcome_of
from ft_transport.errors import (
    LocalProtocolError,
    PeerFailure,
    RemoteProtocolError,
    TransferTimeout,
    ended,
    printable,
    reason_of,
)


def served() -> TransferReport:
    report = TransferReport("source", "PGTransport", 5, nbytes_total=2_000_000, num_messages=3)
    report.peers = [
        PeerReport(1, "complete", "verify", 2_000_000, 2_000_100, {"agree": 0.1, "move": 0.5}),
        PeerReport(2, "dead", "move", 500_000, 500_050, {"agree": 0.2, "move": 0.3}, "the channel broke: reset"),
    ]
    return report


def test_finish_sums_bytes_and_takes_the_slowest_peer() -> None:
    report = served()
    report.seconds = {"describe": 0.05, "move": 1.0}
    report.finish(0.8, None)
    assert report.nbytes_wire == 2_500_150
    assert report.seconds == pytest.approx({"describe": 0.05, "agree": 0.2, "move": 1.5})
    assert report.total_seconds == 0.8
    assert report.error == ""
    assert report.gigabytes_per_second == pytest.approx(0.0025)


def test_an_error_of_its_own_is_in_the_summary_and_is_called_by_its_public_name() -> None:
    class Hidden(PeerFailure):
        pass

    report = TransferReport("source", "PGTransport", 5)
    report.finish(0.1, Hidden("gone"))
    assert report.error == "PeerFailure: gone"
    assert report.summary().endswith("] PeerFailure: gone")
    other = served()
    other.finish(0.1, Hidden("gone"))
    assert ": 2.0 of 2.0 MB in 0.100 s" in other.summary()
    assert "PeerFailure" not in other.summary(), "a peer's reason says it already"


@pytest.mark.parametrize(
    ("error", "outcome", "cancelled"),
    [
        (TransferTimeout("late"), "timed out", "timed out"),
        (PeerFailure("gone"), "dead", "failed"),
        (ended(PeerFailure("it gave up"), "failed"), "failed", "failed"),
        (ended(PeerFailure("silent"), "timed out"), "timed out", "timed out"),
        (RemoteProtocolError("damaged"), "failed", "failed"),
        (ended(RemoteProtocolError("not mine"), "refused"), "refused", "refused"),
        (ValueError("of the user's"), "failed", "failed"),
        (None, "failed", "failed"),
    ],
)
def test_an_error_becomes_an_outcome(error: BaseException | None, outcome: str, cancelled: str) -> None:
    assert outcome_of(error) == outcome
    assert outcome_of(error, cancelled=True) == cancelled
    assert outcome_of(pickle.loads(pickle.dumps(error))) == outcome


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (TransferTimeout("timed out after 2 s"), "timed out", "timed out after 2 s"),
        (PeerFailure("gone"), "dead", "gone"),
        (LocalProtocolError("a.b: cannot travel"), "failed", "a.b: cannot travel"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt: "),
        (None, "failed", "the call is over"),
    ],
)
def test_no_peer_of_a_finished_report_is_pending(error: BaseException | None, outcome: str, reason: str) -> None:
    report = served()
    report.peers.append(PeerReport(3))
    report.began = {"agree": 2.0, "describe": 1.0}
    report.finish(0.1, error)
    assert [peer.outcome for peer in report.peers] == ["complete", "dead", outcome]
    assert (report.peers[2].reason, report.peers[2].phase) == (reason, "agree")
    assert report.peers[1].reason == "the channel broke: reset"
    assert "pending" not in report.summary() + json.dumps(transfer_event(report))


HOSTILE = "a\nb\r\x1b[2J\x00\u202e\u2028\udc80\x9b é"


def test_what_a_peer_says_is_escaped_wherever_it_is_shown() -> None:
    """One line of text: no line break, no control character, no change of direction, no half of a pair."""
    peer = PeerReport(-1, reason=HOSTILE, name=HOSTILE)
    peer.address = HOSTILE
    report = TransferReport("source", "LaneTransport", 5, [peer])
    report.finish(0.1, PeerFailure(f"the peer gave up: {HOSTILE}"))
    error = PeerFailure(HOSTILE)
    again = pickle.loads(pickle.dumps(error))
    event = transfer_event(report)
    shown = [peer.label, report.summary(), report.error, error.message, str(error), str(again), reason_of(error)]
    shown += [event["reason"], event["error"], *(event["peers"][0][name] for name in ("name", "address", "reason"))]
    for text in shown:
        assert text.isprintable()
        assert r"a\nb\r\x1b[2J\x00\u202e\u2028\udc80\x9b é" in text
    assert printable("plain é \\n text") == "plain é \\n text"


def test_complete_only_if_every_peer_is() -> None:
    report = served()
    assert not report.complete
    report.peers.pop()
    assert report.complete
    report.finish(1.0, ValueError("x"))
    assert report.error == "ValueError: x"
    assert not report.complete


def test_the_summary_is_one_line_with_what_one_wants_to_know() -> None:
    report = served()
    report.finish(0.8, None)
    summary = report.summary()
    assert "\n" not in summary
    for part in ("PGTransport step 5 to rank 1 complete", "2 dead (move: the channel broke: reset)", "2.0 MB",
                 "3 messages", "agree 0.200", "move 0.500"):  # fmt: skip
        assert part in summary


def test_the_summary_of_a_destination_says_what_landed_in_place() -> None:
    report = TransferReport("destination", "PGTransport", None, [PeerReport(0)], nbytes_total=4_000_000)
    report.nbytes_in_place, report.nbytes_fresh = 3_000_000, 1_000_000
    assert report.in_place_share == 0.75
    assert "PGTransport from rank 0 pending" in report.summary()
    assert "75% in place, 1.0 MB fresh" in report.summary()


def landed(**fields: Any) -> str:
    report = TransferReport(
        "destination", "PGTransport", 5, [PeerReport(0, "complete")], nbytes_total=3_000_000, **fields
    )
    report.nbytes_in_place, report.nbytes_fresh = 1_000_000, 2_000_000
    return report.summary()


def test_the_summary_names_the_first_path_and_the_likely_cause() -> None:
    text = landed(unexpected_keys=["optim.state.0.exp_avg", "optim.state.0.step"])
    assert "33% in place, 2.0 MB fresh (unexpected keys: the template lacks 2 leaves, first optim.state.0.exp" in text
    assert f"first optim.state.0.exp_avg: {NO_STATE_YET})" in text
    assert "(missing keys: the source lacks 1 leaf of the template, first head.weight)" in landed(
        missing_keys=["head.weight"]
    )
    text = landed(unexpected_keys=["model._orig_mod.a"], missing_keys=["model.a"])
    assert "; missing keys: the source lacks 1 leaf of the template, first model.a: _orig_mod. on one side" in text


def test_the_summary_names_keys_of_one_side_also_where_all_landed_in_place() -> None:
    report = TransferReport("destination", "PGTransport", 5, [PeerReport(0, "complete")], nbytes_total=4)
    report.nbytes_in_place, report.missing_keys = 4, ["head.weight"]
    assert "100% in place, 0.0 MB fresh (missing keys: " in report.summary()
    report.missing_keys = []
    assert "100% in place, 0.0 MB fresh [" in report.summary()


def test_the_summary_says_that_there_was_no_template() -> None:
    report = TransferReport("destination", "PGTransport", 5, [PeerReport(0, "complete")], nbytes_total=4)
    report.without_template = True
    assert "0% in place, 0.0 MB fresh (the transport was given no state_dict to receive into)" in report.summary()


def test_the_summary_names_what_did_not_fit() -> None:
    text = landed(mismatched={"a": "expected x, source has y", "b": "…"}, not_in_place={"c": "read-only"})
    assert (
        "2 leaves do not fit, first a: expected x, source has y; 1 leaf not received in place, first c: read-only"
        in text
    )
    assert "(1 leaf does not fit, first a: " in landed(mismatched={"a": "expected x, source has y"})


def test_a_long_reason_is_cut_for_people() -> None:
    report = served()
    report.peers[0].outcome, report.peers[0].reason = (
        "refused",
        "; ".join(f"layer.{i}: expected" for i in range(20_000)),
    )
    report.finish(1.0, PeerFailure(report.peers[0].reason))
    event = transfer_event(report)
    for text in (report.summary(), event["reason"], event["error"], event["peers"][0]["reason"]):
        assert "layer.7: expected" in text
        assert "characters more" in text
        assert len(text) < 3_000
    assert "layer.19999" in report.error


def test_nothing_is_divided_by_zero() -> None:
    report = TransferReport("destination", "x", 1)
    assert report.gigabytes_per_second == 0.0
    assert report.in_place_share == 0.0
    report.finish(0.0, None)
    assert report.summary()


def test_as_dict_is_json() -> None:
    report = served()
    report.finish(0.8, None)
    values = json.loads(json.dumps(report.as_dict()))
    assert values["peers"][1]["outcome"] == "dead"
    assert values["complete"] is False
    assert values["nbytes_wire"] == 2_500_150


def test_phases_add_up_even_when_they_raise() -> None:
    report = TransferReport("source", "x", 1, [PeerReport(1)])
    with report.phase("describe"):
        pass
    with pytest.raises(ValueError, match="inside"), report.peers[0].enter("move", "source"):
        raise ValueError("inside")
    first = report.peers[0].seconds["move"]
    with report.peers[0].enter("move", "source"):
        pass
    assert report.seconds["describe"] >= 0
    assert report.peers[0].seconds["move"] >= first
    assert report.peers[0].phase == "move"
    assert {"describe", "agree", "move", "verify", "rebuild"} == set(PHASES)
