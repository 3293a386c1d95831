"""One of two ranks that send each other their states over the accelerator's own group: what torch's test of its
``_pg_transport`` does on two accelerators, and more. Says "ok" in the end.

    python ring.py BACKEND STORE RANK

With "stand-in" for a backend, ``ft_transport.testing`` plays the devices, and messages go over Gloo, from host to host.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

if sys.argv[1] == "simccl":
    import simulator
    from simulator.group import register

    assert simulator.device
    register()

from torch.distributed._shard.sharded_tensor import Shard, ShardMetadata, init_from_local_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import ft_transport.distributed
from ft_transport._state.describe import describe
from ft_transport.testing import StandInAccelerator

TIMEOUT = timedelta(seconds=20)


def plain(rank: int, device: torch.device) -> dict[str, Any]:
    """A model's state, the same on both, then something of the rank's own."""
    torch.manual_seed(42)
    model = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.ReLU(), torch.nn.Linear(10, 10)).to(device)
    return {**model.state_dict(), "rank": torch.tensor(float(rank), device=device)}


def mixed(rank: int, device: torch.device) -> dict[str, Any]:
    mesh = init_device_mesh(device.type, (2,))
    return {
        "dtensor": DTensor.from_local(torch.arange(100.0, device=device).view(10, 10) + rank, mesh),
        "tensor": torch.full((2, 3), float(rank), device=device),
        "text": "some string",
        "nested": {"tensor": torch.full((1, 2), float(rank)), "value": 42},
        "list": [1, 2, 3],
    }


def sharded(rank: int, device: torch.device) -> dict[str, Any]:
    local = torch.arange(256.0, device=device).view(32, 8) + 256 * rank
    metadata = ShardMetadata(shard_offsets=[32 * rank, 0], shard_sizes=[32, 8], placement=f"rank:{rank}/{device}")
    return {"sharded": init_from_local_shards([Shard(local, metadata)], 64, 8)}


def on_the_host(rank: int, device: torch.device) -> dict[str, Any]:
    return {"large": torch.full((1 << 20,), float(rank)), "small": [torch.full((7,), rank + i) for i in range(9)]}


def large(rank: int, device: torch.device) -> dict[str, Any]:
    """More than one flight, with pieces that are packed, and with gaps."""
    return {
        "large": torch.full((20 << 20,), float(rank), device=device),
        "strided": (torch.arange(1 << 20, device=device) + rank).view(1024, 1024).t(),
        "small": [torch.full((100,), float(rank + i), device=device) for i in range(50)],
    }


STAND_IN = StandInAccelerator(2) if sys.argv[1] == "stand-in" else None


def on_device(state: Any, index: int) -> Any:
    """A state whose memory the stand-in moves to a device, if it is that which plays it."""
    for tensor in describe(state)[1].tensors if STAND_IN is not None else ():
        STAND_IN.put(tensor, index)  # type: ignore[union-attr]
    return state


def values(state: object) -> list[Any]:
    """All that is in a state, on the host, in order."""
    if isinstance(state, dict):
        return [item for key in state for item in [key, *values(state[key])]]
    if isinstance(state, list):
        return [item for each in state for item in values(each)]
    if isinstance(state, DTensor):
        return [str(state.placements), *values(state.to_local())]
    if hasattr(state, "local_shards"):
        return [item for shard in state.local_shards() for item in values(shard.tensor)]
    if isinstance(state, torch.Tensor):
        return [(STAND_IN.get(state) if STAND_IN is not None else state.cpu()).tolist()]
    return [state]


Moves = tuple[Callable[[], None], Callable[[], Any]]


def as_torch(group: Any, device: torch.device, other: int, state: Any, template: Any) -> Moves:
    transport = ft_transport.distributed.PGTransport(group, TIMEOUT, device, template)
    return lambda: transport.send_checkpoint([other], state), lambda: transport.recv_checkpoint(other)


def as_torchft(group: Any, device: torch.device, other: int, state: Any, template: Any) -> Moves:
    transport: Any = ft_transport.PGTransport(group, TIMEOUT, device, template)

    def receive() -> Any:
        transport.metadata()
        found = transport.recv_checkpoint(other, "", 7, TIMEOUT)
        transport.disallow_checkpoint()
        return found

    return lambda: transport.send_checkpoint([other], 7, state, TIMEOUT), receive


def main(backend: str, path: str, rank: int) -> None:
    other, cases = 1 - rank, [plain, mixed, sharded, on_the_host, large]
    if STAND_IN is not None:
        # All four of torch's; what is larger than a flight is in other tests of the stand-in.
        backend, device, cases = "gloo", torch.device("cpu"), cases[:4]
    else:
        kind = "sim" if backend == "simccl" else torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
        device = torch.device(kind, rank)
        torch.accelerator.set_device_index(rank)
    dist.init_process_group(backend, store=dist.FileStore(path, 2), rank=rank, world_size=2, timeout=TIMEOUT)
    group = dist.group.WORLD
    for make in cases:
        for in_place in (False, True):
            for moves in (as_torch, as_torchft):
                to = on_device if make is not on_the_host else lambda state, _: state
                template = to(make(5 + rank, device), rank) if in_place and make is not sharded else None
                give = (lambda template=template: template) if template else None
                sent = to(make(rank, device), rank)
                # Only its owner can make a sharded tensor of this rank's.
                others = {"sharded": (torch.arange(256.0) + 256 * other).view(32, 8)}
                expected = values(others if make is sharded else make(other, device))
                send, receive = moves(group, device, other, sent, give)
                if rank:
                    got = receive()
                    send()
                else:
                    send()
                    got = receive()
                about = make.__name__, moves.__name__, in_place
                assert values(got) == expected, about
                assert template is None or values(template) == expected, about
    print("ok", flush=True)


if __name__ == "__main__":
    with STAND_IN or contextlib.nullcontext():
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
