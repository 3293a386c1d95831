"""The fuzzer's seeds and what it has found (``make fuzz``), replayed without it.

Seeds are honest frames: one that is no longer accepted means that the wire has changed. Then
``python tests/fuzz/make_corpus.py`` writes them anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hostile import ALLOWED, STATES, WARNINGS, hear, process_group, receive

from ft_transport._lanes.protocol import MAGIC

FUZZ = Path(__file__).parent / "fuzz"
SEEDS = sorted((FUZZ / "corpus").glob("*.bin"))
LANE_SEEDS = [path for path in SEEDS if path.stem.startswith("lane_")]
FOUND = sorted(path for path in (FUZZ / "found").glob("*") if path.is_file())

pytestmark = pytest.mark.filterwarnings(*WARNINGS)


@pytest.fixture(scope="module", autouse=True)
def _receiver() -> Iterator[None]:
    with process_group(), torch.serialization.safe_globals(ALLOWED):
        yield


def test_there_are_seeds() -> None:
    assert len(SEEDS) > 20
    assert sum(path.stat().st_size for path in SEEDS) < 1 << 17


@pytest.mark.parametrize("path", LANE_SEEDS, ids=lambda path: path.stem)
def test_frames_of_lanes_are_accepted(path: Path) -> None:
    assert not hear(path.read_bytes())


@pytest.mark.parametrize("path", sorted({*SEEDS}.difference(LANE_SEEDS)), ids=lambda path: path.stem)
def test_seeds_are_accepted(path: Path) -> None:
    data = path.read_bytes()
    reason = receive(data)
    assert not reason or path.stem.startswith("frame_")
    receive(data, STATES)


def test_what_was_found_is_refused_or_accepted() -> None:
    for path in FOUND:
        data = path.read_bytes()
        if data.startswith(MAGIC):
            hear(data)
            continue
        receive(data)
        receive(data, STATES)
