#!/usr/bin/env bash
# One would guess: zero_grad() forgets the gradients of a micro batch, under FSDP2 as under DDP.
#
# What happens: gradients of a backward under set_requires_gradient_sync(False) are kept where nobody sees them. p.grad
# is None meanwhile, and the next synchronized backward counts them in, after zero_grad() of the model and of the
# optimizer, load_state_dict() and reshard(). With DDP's no_sync() zero_grad() clears them.
#
# Why it matters: a step that is given up in the middle of its micro batches, because a peer failed or because the
# replica heals, leaves its gradients to the step after, which has the weights of the healed state.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import copy
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def backward(model, factor):
    (model(torch.ones(1, 2)).sum() * factor).backward()


def gradient(parameter):
    grad = parameter.grad
    return grad.full_tensor().tolist() if hasattr(grad, "full_tensor") else grad.tolist()


def give_up(model, optimizer, saved):
    optimizer.zero_grad()
    model.zero_grad()
    model.load_state_dict(saved)


def sharded(mesh):
    """The bias's gradient of a micro batch of 1, after one of 100 was given up."""
    model = torch.nn.Linear(2, 2)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = copy.deepcopy(model.state_dict())
    model.set_requires_gradient_sync(False)
    backward(model, 100)
    seen = [p.grad for p in model.parameters()]
    give_up(model, optimizer, saved)
    model.reshard()
    model.set_requires_gradient_sync(True)
    backward(model, 1)
    return seen, gradient(model.bias)


def replicated():
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = copy.deepcopy(model.state_dict())
    with model.no_sync():
        backward(model, 100)
    give_up(model, optimizer, saved)
    backward(model, 1)
    return gradient(model.module.bias)


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    seen, fsdp = sharded(init_device_mesh("cpu", (2,)))
    ddp = replicated()
    if rank == 0:
        print("torch", torch.__version__)
        print("gradients after the backward that was not synchronized:", seen)
        print("gradient of the next micro batch alone, DDP:", ddp, "FSDP2:", fsdp)
    assert seen == [None, None]
    assert ddp == [1.0, 1.0]
    assert fsdp == [101.0, 101.0]
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=2, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
