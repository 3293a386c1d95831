"""Classes that the states of these tests hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import Config, Point


@pytest.fixture(autouse=True)
def _allowed() -> Iterator[None]:
    with torch.serialization.safe_globals([Point, Config]):
        yield
