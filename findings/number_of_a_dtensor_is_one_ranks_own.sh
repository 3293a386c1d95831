#!/usr/bin/env bash
# One would guess: dtensor.sum().item() is the sum, the same on every rank; so is the truth value of
# dtensor.isfinite().all().
#
# What happens: item(), float() and bool() read this rank's part without reducing it: 3.0 on one rank and 12.0
# on the other, where the sum is 15. One shard with a NaN: all() is True on the rank without it and False on
# the other. full_tensor(), a comparison such as x.sum() > 14, and torch.equal() are right.
#
# Why it matters: 'skip the step if a gradient is not finite', 'restore if the digest differs': ranks decide
# differently, and the next collective waits for those who went another way. full_tensor() before the number.
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
    x = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
    spoiled = distribute_tensor(torch.tensor([0.0, 1, 2, 3, 4, float("nan")]), mesh, [Shard(0)])
    number, whole = x.sum().item(), x.sum().full_tensor().item()
    largest = x.max().item()
    finite = bool(torch.isfinite(spoiled).all())
    finite_whole = bool(torch.isfinite(spoiled).all().full_tensor())
    equal = torch.equal(spoiled, x)
    assert bool(x.sum() > 14)
    everyone = [None, None]
    dist.all_gather_object(everyone, (number, whole, largest, finite, finite_whole, equal))
    if rank == 0:
        print("torch", torch.__version__)
        for who, (number, whole, largest, finite, finite_whole, equal) in enumerate(everyone):
            print(f"rank {who}: sum().item() {number}, with full_tensor() {whole}, max().item() {largest}")
            print(f"rank {who}: all finite {finite}, with full_tensor() {finite_whole}, equal {equal}")
    assert everyone == [(3.0, 15.0, 2.0, True, False, False), (12.0, 15.0, 5.0, False, False, False)]
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=2, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
