#!/usr/bin/env bash
# One would guess: p.data = other puts the other DTensor's values into the parameter, as it does for tensors,
# or raises.
#
# What happens: it passes, and the parameter holds what it held: local shard and placements are the old ones.
# Assigned a longer one, the parameter says shape (6,) and holds 2 elements a rank of the old 4.
# torch.nn.utils.vector_to_parameters(), which assigns so, changes nothing either. p.data.copy_(other) writes.
#
# Why it matters: a backup that is swapped back in by .data (outer optimizers, EMA evaluation, rollback after
# a failed step) restores nothing on sharded parameters, and the run goes on with the weights it meant to
# drop.
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
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def dtensor(value, count=4, placement=None):
        return distribute_tensor(torch.full((count,), value), mesh, [placement or Shard(0)])

    plain = torch.nn.Parameter(torch.zeros(4))
    plain.data = torch.ones(4)
    parameter = torch.nn.Parameter(dtensor(0.0))
    parameter.data = dtensor(1.0)
    assigned = parameter.full_tensor().tolist()
    parameter.data = dtensor(1.0, placement=Replicate())
    replicated = parameter.placements, parameter.full_tensor().tolist()
    torch.nn.utils.vector_to_parameters(torch.ones(4), [parameter])
    by_vector = parameter.full_tensor().tolist()
    parameter.data.copy_(dtensor(5.0))
    copied = parameter.full_tensor().tolist()
    parameter.data = dtensor(1.0, count=6)
    longer = tuple(parameter.shape), tuple(parameter.to_local().shape)
    if rank == 0:
        print("torch", torch.__version__)
        print("a tensor, assigned ones:", plain.tolist())
        print("a DTensor, assigned ones:", assigned, "replicated ones:", replicated)
        print("vector_to_parameters(ones):", by_vector)
        print("data.copy_(fives):", copied, "- assigned six elements:", longer)
    assert plain.tolist() == [1.0] * 4
    assert assigned == by_vector == [0.0] * 4
    assert replicated == ((Shard(0),), [0.0] * 4)
    assert copied == [5.0] * 4
    assert longer == ((6,), (2,))
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=2, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
