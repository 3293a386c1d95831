"""Which place of the template is which of the state's."""

from __future__ import annotations

from functools import partial

import pytest
from helpers import noise

from ft_transport import PeerReport, RemoteProtocolError, TransferReport
from ft_transport._plan.expected import Template
from ft_transport._plan.template import fit, match_template
from ft_transport._state.describe import describe
from plan.landing import land


def test_missing_and_unused() -> None:
    _, report, _ = land({"a": noise(2, 1), "new": noise(2, 2), "n": 5}, {"a": noise(2, 3), "old": noise(2, 4)})
    assert report.unexpected_keys == ["new"]
    assert report.missing_keys == ["old"]


def test_nothing_to_match_without_tensors() -> None:
    report = TransferReport("destination", "test", 1)
    manifest, _ = describe({"lr": 1})
    assert match_template(manifest, {"other": 2}, report) == {}
    assert match_template(manifest, {}, report) == {}


@pytest.mark.parametrize("sent", [{"_orig_mod.w": noise(2, 1)}, {"user": {"default": {"_orig_mod.w": noise(2, 1)}}}])
def test_a_template_that_matches_nothing_hears_the_likely_cause(sent: dict[str, object]) -> None:
    manifest, _ = describe({**sent, "torchft": {"step": 1}})
    with pytest.raises(RemoteProtocolError, match=r": _orig_mod\. on one side alone comes of torch\.compile$"):
        match_template(manifest, {"w": noise(2, 2)}, TransferReport("destination", "test", 1))


def test_a_refusal_of_a_template_is_for_good() -> None:
    """Else the replica would fail as many quorums of all as are waited for what may pass."""
    manifest, _ = describe({"a": {"w": noise(2, 1)}, "b": {"w": noise(2, 1)}})
    for template, options in (
        ({"other": noise(2, 2)}, {}),
        ({"w": noise(3, 2)}, {}),
        ({"a": {"w": noise(3, 2)}, "b": {"w": noise(2, 1)}}, {"on_mismatch": "refuse"}),
        ({"a": {"w": noise(2, 2)}}, {"strict": True}),
    ):
        with pytest.raises(RemoteProtocolError) as info:
            fit(manifest, Template(partial(dict, template)), TransferReport("destination", "test", 1), **options)
        assert info.value._for_good


def test_strict_says_the_likely_cause() -> None:
    sent = {"w": noise(2, 1), "optim": {"state": {0: {"exp_avg": noise(2, 2)}}}}
    manifest, _ = describe(sent)
    mine = {"w": noise(2, 3), "optim": {"state": {}}}
    with pytest.raises(
        RemoteProtocolError, match=r"optim\.state\.0\.exp_avg: unexpected key.*materialize\(optimizer\)"
    ):
        fit(manifest, Template(lambda: mine), TransferReport("destination", "test", 1), strict=True)


def test_what_is_no_envelope_has_one_place_only() -> None:
    """Without ``torchft`` beside it, ``user`` is a key like any other."""
    manifest, _ = describe({"user": {"default": {"w": noise(2, 1)}}})
    with pytest.raises(RemoteProtocolError, match="matches nothing"):
        match_template(manifest, {"w": noise(2, 2)}, TransferReport("destination", "test", 1))


def test_a_receive_without_a_template_says_so() -> None:
    manifest, _ = describe({"w": noise(2, 1)})
    report = TransferReport("destination", "test", 1, [PeerReport(0, "complete")], nbytes_total=8)
    assert fit(manifest, Template(lambda: {"w": noise(2, 2)}), report).targets
    assert "no state_dict" not in report.summary()
    assert not fit(manifest, None, report).targets
    assert "(the transport was given no state_dict to receive into)" in report.summary()
