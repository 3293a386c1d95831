#!/usr/bin/env bash
# One would guess: get_model_state_dict() with full_state_dict=True and cpu_offload=True is a snapshot:
# training goes on, it stays.
#
# What happens: on CPU, the FSDP2 parameters are gathered copies, and what is not sharded is the live tensor.
# In one and the same dict BatchNorm's running_mean moves with the next forward while the weight beside it
# stands still. With full_state_dict=False the shards are live too.
#
# Why it matters: written out in the background, or sent to a peer while training goes on, such a dict mixes
# two moments. Clone what is plain before training goes on.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    shards = get_model_state_dict(model, options=StateDictOptions(cpu_offload=True))
    before = {name: value.clone() for name, value in full.items()}
    shard = shards["0.weight"].to_local()
    shard_before = shard.clone()
    model(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()

    shard_moved = not torch.equal(shard, shard_before)
    if rank == 0:  # the full state is on rank 0 alone
        moved = sorted(name for name in full if not torch.equal(full[name], before[name]))
        print("torch", torch.__version__)
        print("in the full dict, changed by a training step:", moved)
        print("the shard of 0.weight in the other dict, changed:", shard_moved)
        assert moved == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert shard_moved
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=2, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
