"""What the caller's choices mean on the wire."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from ft_transport._options import CPU, LaneOptions, Options
from ft_transport._wire.digest import NUM_SAMPLES

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "verify", "cores", "digest", "samples"),
    [
        (CPU, None, 4, "xxh3", {-1}),
        (CPU, None, 3, "xxh3", set(range(NUM_SAMPLES))),
        (CPU, True, 1, "xxh3", {-1}),
        (CPU, False, 1, "", {-1}),
        (CUDA, None, 1, "sum", {-1}),
        (CUDA, True, 64, "sum", {-1}),
        (CUDA, False, 1, "", {-1}),
    ],
)
def test_digests(
    device: torch.device, verify: Any, cores: int, digest: str, samples: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few cores a block of each large message, another one each time, so that a bad place is found at last."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    options = Options(device, verify=verify)
    assert options.digest == digest
    assert {options.sample for _ in range(40 * NUM_SAMPLES)} == samples


@pytest.mark.parametrize("nbytes", [0, 1 << 20, 1 << 40])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_in_order_no_more_flights_than_buckets(device: torch.device, nbytes: int) -> None:
    """Where the operations of a pair run as they were posted, a third flight would wait for a bucket out of turn."""
    assert Options(device, in_order=True).limits(nbytes).window == 2
    assert Options(device).limits(nbytes).window > 2


@pytest.mark.parametrize("chain", [True, False])
def test_lanes_read_every_byte_and_grow_their_messages_up_to_a_point(chain: bool) -> None:
    """A message that came damaged is moved again, so each must be known to be sound or not."""
    options = LaneOptions(CPU, chain=chain)
    assert options.sample == -1
    sizes = [options.limits(1 << power).message_bytes for power in range(20, 45)]
    assert sizes == sorted(sizes)
    assert sizes[0] == (2 << 20 if chain else 4 << 20)
    assert sizes[-1] == (4 << 20 if chain else 16 << 20)
