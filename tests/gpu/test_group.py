"""Two ranks, devices 0 and 1, that send each other their states: over the devices' own group, and on a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

HERE = Path(__file__).parent


def move_around(backend: str, tmp_path: Path) -> None:
    """A model's state, mixed content with a DTensor, a ShardedTensor, CPU tensors by way of the devices; in place and
    fresh; with torch's interface and with torchft's."""
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
        said = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert all(text.rstrip().endswith("ok") for text in said), said


def test_on_a_stand_in(tmp_path: Path) -> None:
    move_around("stand-in", tmp_path)


@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two accelerators")
def test_over_their_own_group(tmp_path: Path) -> None:
    """Several flights, too."""
    from .kernels import current

    move_around("simccl" if current() == "sim" else dist.get_default_backend_for_device(current()), tmp_path)
