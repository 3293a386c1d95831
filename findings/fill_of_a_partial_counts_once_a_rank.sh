#!/usr/bin/env bash
# One would guess: dtensor.fill_(1) makes a DTensor whose value is 1.
#
# What happens: of a Partial one it makes the value 2 on two ranks: every rank's part becomes 1, and the parts
# are added. add_(1) on the same tensor raises because it would have to change the placement, copy_() from a
# replicated tensor gives the right value, ones_like() too.
#
# Why it matters: whoever sets a Partial leaf (an accumulated gradient, a loss counter) back to a constant in
# place has it multiplied by the number of ranks; only 0 is harmless, and most tests use 0.
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
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def partial():
        return DTensor.from_local(torch.full((2,), float(rank + 1)), mesh, [Partial()])

    filled = partial().fill_(1).full_tensor()
    zeroed = partial().zero_().full_tensor()
    copied = partial().copy_(distribute_tensor(torch.ones(2), mesh, [Replicate()])).full_tensor()
    like = torch.ones_like(partial()).full_tensor()
    try:
        partial().add_(1)
        refused = False
    except RuntimeError:
        refused = True
    if rank == 0:
        print("torch", torch.__version__)
        print("fill_(1):", filled, "zero_():", zeroed, "copy_(ones):", copied, "ones_like():", like)
        print("add_(1) refused:", refused)
    assert filled.tolist() == [2.0, 2.0]
    assert zeroed.tolist() == [0.0, 0.0]
    assert copied.tolist() == like.tolist() == [1.0, 1.0]
    assert refused
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=2, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
