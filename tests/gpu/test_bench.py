"""The benchmark with states on an accelerator at both ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .kernels import current

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")

# A module of its own: workers import it, and with it the simulated device where there is no other.
_MAIN = """
import sys
{simulator}
from ft_transport.bench.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def test_every_state_arrives(tmp_path: Path) -> None:
    kind = current()
    script = tmp_path / "main.py"
    script.write_text(_MAIN.format(simulator="import simulator" if kind == "sim" else ""))
    arguments = ["--device", kind, "--states", "gpt2-adam,views,tiny", "--scale", "0.02", "--rounds", "1"]
    transports = "group,lanes,distributed"
    command = [sys.executable, str(script), *arguments, "--transports", transports, "--output", str(tmp_path)]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {row["status"] for row in found["rows"]} == {"equal", "limit"}
    moved = [row for row in found["rows"] if row["status"] == "equal"]
    assert {row["transport"] for row in moved} == set(transports.split(","))
    assert {row["in_place_share"] for row in moved if row["mode"] == "in-place"} == {1.0}
    for name in ("pinned to device", "device to pinned"):
        assert all(row["seconds"][0] > 0 for row in found["rows"] if row["transport"] == name)
        assert name in done.stdout
