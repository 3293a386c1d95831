"""The training thread takes memory away while a state is moved: nobody dies, and nobody takes what came for a state."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from .moved_memory import MOVES


def outcomes(way: str) -> list[dict[str, Any]]:
    """In a process of its own, which may die of it."""
    command = [sys.executable, "-m", "tests.multiproc.moved_memory", way]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize("way", ["lanes", "direct", "group"])
def test_memory_that_is_taken_away_voids_the_transfer_by_name(way: str) -> None:
    found = outcomes(way)
    assert len(found) == 3 * len(MOVES) - (2 if way == "group" else 0)
    for case in found:
        own = case["error"] if case["side"] == "destination" else case["source"]
        assert "LocalProtocolError" in own, case
        assert "was exchanged or given back while the state was moved: w3" in own, case
        assert case["error"] != "None", case
        assert case["torn"] is not case["shadow"], case
        told = case["source"] if case["side"] == "destination" else case["error"]
        # Gloo breaks with the memory that it has taken; there is no way to tell anybody then.
        if way == "group" and not (case["side"] == "source" and "give" in case["move"]):
            assert "gave up: memory of the state" in told, case
        if way != "group":
            assert case["outcome"] == "failed", case
            assert case["side"] == "destination" or "gave up: memory of the state" in told, case


def test_a_relay_whose_memory_is_taken_away_is_left() -> None:
    found = outcomes("relay")
    assert len(found) == len(MOVES)
    assert all(case["sound"] for case in found), found


def test_what_is_compared_is_looked_at_too() -> None:
    found = outcomes("again")
    assert len(found) == 2 * len(MOVES)
    for case in found:
        assert "was exchanged or given back while the state was moved: w3" in case["error"], case


def test_nobody_dies_who_reads_memory_that_is_given_back_meanwhile() -> None:
    (found,) = outcomes("read")
    assert found["whole"] >= 20, found
    assert found["voided"] >= 20, found
