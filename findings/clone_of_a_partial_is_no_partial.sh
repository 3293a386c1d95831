#!/usr/bin/env bash
# One would guess: clone() of a DTensor has the placements of what was cloned, and is a local affair.
#
# What happens: clone() of a Partial one is Replicate: it reduces over the mesh, a collective that every rank
# has to take part in. zeros_like() gives Replicate too. deepcopy(), detach() and to(bfloat16) keep Partial.
#
# Why it matters: a snapshot by clone() cannot be put back into what it was taken from without another value
# in the ranks' parts, and one rank that takes a snapshot alone (the one that serves a peer) waits for the
# others in a collective.
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
from torch.distributed.tensor import DTensor, Partial, Replicate


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    x = DTensor.from_local(torch.full((2,), float(rank + 1)), mesh, [Partial()])
    made = {
        "clone": x.clone(),
        "zeros_like": torch.zeros_like(x),
        "deepcopy": copy.deepcopy(x),
        "detach": x.detach(),
        "to(bfloat16)": x.to(torch.bfloat16),
    }
    if rank == 0:
        print("torch", torch.__version__)
        for name, value in made.items():
            print(f"{name:13}", value.placements, "local part", value.to_local().tolist())
    for name, value in made.items():
        expected = (Replicate(),) if name in ("clone", "zeros_like") else (Partial(),)
        assert value.placements == expected, name
    assert x.to_local().tolist() == [rank + 1.0] * 2
    assert made["clone"].to_local().tolist() == [3.0, 3.0]
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=2, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
