#!/usr/bin/env bash
# One would guess: random operations on a DTensor are those of one tensor: replicas agree whatever the ranks
# were seeded with, and the shards under one seed are different parts of one draw.
#
# What happens: on a CPU mesh each rank draws from its own generator. With one seed both shards get the same
# numbers (normal_() and the mask of dropout() alike), with a seed for each rank the replicas of one tensor
# differ. The constructor rand() over the same mesh raises an AssertionError without text.
#
# Why it matters: a leaf that a restore has left out and that is initialized anew is no replica any more, or
# repeats itself along the shards. Draw the full tensor on one rank and distribute_tensor() it.
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
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, rand


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def draws(seed, placement):
        """What the two ranks hold after normal_() and after dropout()."""
        torch.manual_seed(seed)
        ones = distribute_tensor(torch.ones(16), mesh, [placement])
        mask = torch.nn.functional.dropout(ones, 0.5).to_local().tolist()
        normal = ones.clone().normal_().to_local().tolist()
        everyone = [None, None]
        dist.all_gather_object(everyone, (mask, normal))
        return everyone

    one_seed, own_seed = draws(0, Shard(0)), draws(rank, Replicate())
    try:
        rand(4, device_mesh=mesh, placements=[Shard(0)])
        refused = None
    except AssertionError as exc:
        refused = repr(exc)
    if rank == 0:
        print("torch", torch.__version__)
        print("two shards under one seed, the same numbers:", one_seed[0] == one_seed[1])
        print("two replicas under a seed each, the same numbers:", own_seed[0] == own_seed[1])
        print("rand() over the mesh:", refused)
    assert one_seed[0] == one_seed[1]
    assert own_seed[0][0] != own_seed[1][0]
    assert own_seed[0][1] != own_seed[1][1]
    assert refused == "AssertionError()"
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=2, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
