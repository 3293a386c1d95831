#!/usr/bin/env bash
# One would guess: all_reduce() with MAX or MIN gives NaN where any rank has NaN, as torch.maximum() does.
#
# What happens: over Gloo, one rank's NaN stays or is gone, by the rank that has it and by where in the tensor it
# stands: each pair is compared, and the one that came first stays if the comparison is false. All ranks agree on what
# is left. SUM keeps every NaN.
#
# Why it matters: the largest gradient norm or loss of all ranks is how one looks for a replica that has gone bad. Its
# NaN passes as a good number, every rank goes on, and a test with the NaN on the other rank would have found it.
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

RANKS = 2
LENGTH = 8
OPS = {"MAX": dist.ReduceOp.MAX, "MIN": dist.ReduceOp.MIN, "SUM": dist.ReduceOp.SUM}


def nans_left(rank, op, dtype, bad_rank):
    """Where NaN is after the reduction, of a tensor that is NaN all over on one rank."""
    tensor = torch.full((LENGTH,), float("nan") if rank == bad_rank else 1.0, dtype=dtype)
    dist.all_reduce(tensor, op)
    everyones = [torch.empty_like(tensor) for _ in range(RANKS)]
    dist.all_gather(everyones, tensor)
    assert all(torch.equal(other.isnan(), tensor.isnan()) for other in everyones)
    return tensor.isnan()


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    if rank == 0:
        print("torch", torch.__version__)
    for name, op in OPS.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            left = [nans_left(rank, op, dtype, bad_rank) for bad_rank in range(RANKS)]
            if rank == 0:
                shown = ["".join("n" if nan else "1" for nan in nans) for nans in left]
                print(f"{name} {str(dtype):15} NaN on rank 0: {shown[0]}  NaN on rank 1: {shown[1]}")
            if name == "SUM":
                assert left[0].all() and left[1].all()
            else:
                assert left[0].any() and not left[0].all()
                assert torch.equal(left[0], ~left[1])
    norms = []
    for bad_rank in range(RANKS):
        norm = torch.tensor(float("nan") if rank == bad_rank else 1.0)
        dist.all_reduce(norm, dist.ReduceOp.MAX)
        norms.append(norm.item())
    if rank == 0:
        print("one number, MAX, NaN on rank 0 and on rank 1:", norms)
    assert norms.count(1.0) == 1
    assert torch.maximum(torch.tensor(1.0), torch.tensor(float("nan"))).isnan()
    assert torch.maximum(torch.tensor(float("nan")), torch.tensor(1.0)).isnan()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=RANKS, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
