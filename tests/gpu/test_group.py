"""Over the accelerator's own group: two ranks, devices 0 and 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from .kernels import current

pytestmark = pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two accelerators")

HERE = Path(__file__).parent


def test_a_ring_of_two(tmp_path: Path) -> None:
    """A model's state, mixed content with a DTensor, a ShardedTensor, CPU tensors by way of the devices, several
    flights; in place and fresh; with torch's interface and with torchft's."""
    backend = "simccl" if current() == "sim" else dist.get_default_backend_for_device(current())
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ring.py"), backend, str(tmp_path / "store"), str(rank)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert all(text.rstrip().endswith("ok") for text in said), said
