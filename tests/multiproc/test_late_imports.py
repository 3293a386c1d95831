"""Leaves of classes that torch imports late, to and from a process of its own that has not imported them."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ft_transport import LaneTransport

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=60)

# Receives a state at the metadata that it is told, and sends it back from where it says.
ECHO = """
import sys
from datetime import timedelta
import torch
from ft_transport import LaneTransport

TIMEOUT = timedelta(seconds=60)
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
transport = LaneTransport(TIMEOUT, torch.device("cpu"), host="127.0.0.1")
print("torch.distributed.tensor" in sys.modules)
state = transport.recv_checkpoint(0, sys.stdin.readline().strip(), 7, TIMEOUT)
print(type(state["weight"]).__module__)
transport.send_checkpoint([0], 8, state, TIMEOUT)
print(transport.metadata(), flush=True)
sys.stdin.readline()
transport.disallow_checkpoint()
transport.shutdown()
torch.distributed.destroy_process_group()
"""


def test_dtensors_travel_to_and_from_a_process_that_has_imported_none() -> None:
    mesh = DeviceMesh("cpu", [0], mesh_dim_names=("replicate",), _init_backend=False, _rank=0)
    weight, mine = (
        DTensor.from_local(values.reshape(3, 4), mesh, [Shard(0)], run_check=False)
        for values in (torch.arange(12.0), torch.zeros(12))
    )
    transport = LaneTransport(TIMEOUT, CPU, lambda: {"weight": mine, "lr": 0.0}, host="127.0.0.1")
    command = [sys.executable, "-c", ECHO]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": Path(__file__).parents[2], "text": True}
    try:
        transport.send_checkpoint([1], 7, {"weight": weight, "lr": 0.1}, TIMEOUT)
        with subprocess.Popen(command, **pipes) as other:  # type: ignore[call-overload]
            print(transport.metadata(), file=other.stdin, flush=True)
            assert other.stdout.readline() == "False\n"
            assert other.stdout.readline() == "torch.distributed.tensor\n"
            transport.disallow_checkpoint()
            again = transport.recv_checkpoint(1, other.stdout.readline().strip(), 8, TIMEOUT)
            print(file=other.stdin, flush=True)
        assert other.returncode == 0
    finally:
        transport.shutdown()
    assert again["weight"] is mine
    assert again["lr"] == 0.1
    assert torch.equal(mine._local_tensor, weight._local_tensor)
