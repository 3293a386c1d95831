#!/usr/bin/env bash
# One would guess: of a key under which two ranks have different plain values, a checkpoint holds one rank's:
# rank 0's.
#
# What happens: it holds the number of rank 0 and the tensor of rank 1, of one and the same save, and both
# ranks get this mix. Nothing compares the values or warns. Keys that only one rank has are kept for it.
#
# Why it matters: a step counter and a loss that are each rank's own, saved under the same names by all, come
# back as a pair that no rank ever had. Put the rank into the key.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    folder = f"{store}-checkpoint"
    own = f"own.{rank}"
    dcp.save({"number": rank, "tensor": torch.tensor([rank]), own: rank}, checkpoint_id=folder)
    state = {"number": None, "tensor": torch.tensor([-1]), own: None}
    dcp.load(state, checkpoint_id=folder)
    if rank == 0:
        print("torch", torch.__version__)
    print(f"rank {rank} saved number {rank} and tensor {rank}, loaded {state}")
    assert state["number"] == 0
    assert state["tensor"].item() == 1
    assert state[own] == rank
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=2, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
