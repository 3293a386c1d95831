#!/usr/bin/env bash
# One would guess: x[1:4].zero_() and x[0] = 9 write into a DTensor as they write into a tensor, or raise.
#
# What happens: on a DTensor that is sharded along that dimension they do nothing and say nothing: the slice
# was gathered into new memory. narrow(), select(), chunk() and split() are alike. On a replicated one, along
# another dimension, or through view(), the write lands.
#
# Why it matters: code that restores a state piece by piece (row ranges of an embedding, a bucket's part of a
# flat parameter) passes its tests on replicated leaves and leaves every sharded one as it was.
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

WRITES = {
    "x[1:4].zero_()": lambda x: x[1:4].zero_(),
    "x[0] = 9": lambda x: x.__setitem__(0, 9.0),
    "narrow().fill_()": lambda x: x.narrow(0, 0, 2).fill_(9),
    "select().fill_()": lambda x: x.select(0, 0).fill_(9),
    "chunk()[0].fill_()": lambda x: x.chunk(2)[0].fill_(9),
    "split()[0].fill_()": lambda x: x.split(3)[0].fill_(9),
    "view().fill_()": lambda x: x.view(2, 3).fill_(9),
}


def main(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(1.0, 7.0)

    def landed(write, placement):
        x = distribute_tensor(full.clone(), mesh, [placement])
        write(x)
        return not torch.equal(x.full_tensor(), full)

    if rank == 0:
        print("torch", torch.__version__)
    for name, write in WRITES.items():
        replicated, sharded = landed(write, Replicate()), landed(write, Shard(0))
        if rank == 0:
            print(f"{name:20} lands, replicated: {replicated}, sharded: {sharded}")
        assert replicated
        assert sharded == name.startswith("view")
    rows = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    rows[:, :1].zero_()
    assert rows.full_tensor().tolist() == [[0.0, 1.0]] * 4
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(main, (f"{folder}/store",), nprocs=2, start_method="fork")
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
