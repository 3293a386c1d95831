#!/usr/bin/env bash
# One would guess: an object broadcast of a sharded DTensor gives each rank its shard, or raises.
#
# What happens: every rank gets rank 0's shard and a DTensor that takes it for its own: no error, the right
# shape, and full_tensor() of [0, 1, 2, 3] is [0, 1, 0, 1]. torch.save() by one rank and torch.load() by all
# do the same.
#
# Why it matters: 'rank 0 reads the checkpoint and sends the objects to the others' is a usual way to restore;
# with sharded state the first part of each tensor takes the place of all parts. distribute_tensor() of the
# full tensor sends each its own.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    x = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    objects = [x]
    dist.broadcast_object_list(objects, src=0)
    path = f"{store}-tensor"
    if rank == 0:
        torch.save(x, path)
    dist.barrier()
    restored = torch.load(path, weights_only=False)
    values = [value.full_tensor().tolist() for value in (x, objects[0], restored)]
    if rank == 0:
        print("torch", torch.__version__)
        print("before:", values[0], "broadcast:", values[1], objects[0].placements, "saved and loaded:", values[2])
    assert objects[0].placements == restored.placements == (Shard(0),)
    assert values == [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=2, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
