#!/usr/bin/env bash
# One would guess: untyped_storage() of a DTensor is the storage of this rank's shard: its size is what the
# rank holds, its address tells which tensors share memory.
#
# What happens: nbytes says 256 where the rank holds 128, the size of the whole tensor; data_ptr() is 0 for
# every DTensor, and asking the storage for its address raises. Only to_local() knows.
#
# Why it matters: what sums storages to know how much a replica holds is too high by the size of the mesh, and
# what keeps each storage once, by data_ptr(), takes all sharded parameters for one.
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
    first, second = (distribute_tensor(torch.zeros(8, 8), mesh, [Shard(0)]) for _ in range(2))
    claimed, held = (x.untyped_storage().nbytes() for x in (first, first.to_local()))
    addresses = first.data_ptr(), second.data_ptr()
    local_addresses = first.to_local().data_ptr(), second.to_local().data_ptr()
    try:
        first.untyped_storage().data_ptr()
        refused = False
    except RuntimeError:
        refused = True
    if rank == 0:
        print("torch", torch.__version__)
        print("bytes of the storage:", claimed, "of that of to_local():", held)
        print("data_ptr() of two DTensors:", addresses, "address of the storage refused:", refused)
    assert (claimed, held) == (256, 128)
    assert addresses == (0, 0)
    assert local_addresses[0] != local_addresses[1]
    assert refused
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=2, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
