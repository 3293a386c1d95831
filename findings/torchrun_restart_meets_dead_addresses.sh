#!/usr/bin/env bash
# One would guess: with --max-restarts torchrun starts a job again after a rank was killed, and it gets as far as before.
#
# What happens: with --standalone (and any c10d rendezvous) torchrun keeps one store for all attempts, and torch adds no
# prefix for the attempt. The ranks of the second attempt find the addresses of the first one's, whoever looks before the
# other has written: Gloo's init_process_group fails with "Connection refused", in every attempt that follows.
# TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each attempt a store of its own.
#
# Why it matters: a job with restarts for the day when a rank dies ends on that day. (pytorch #135712, closed; #167288.)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/job.py" <<'EOF'
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

dist.init_process_group("gloo", timeout=timedelta(seconds=20))
dist.all_reduce(torch.ones(1))
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], dist.get_rank()
with open(f"{os.environ['REACHED']}.{attempt}.{rank}", "w"):
    pass
if attempt == "0" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
dist.destroy_process_group()
EOF

attempts() {
    REACHED="$folder/$1" "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node=2 \
        --max-restarts=2 "$folder/job.py" >"$folder/log" 2>&1 || true
    echo "$1: attempts that have a group: $(ls "$folder" | sed -n "s/^$1\.\([0-9]\)\..*/\1/p" | sort -u | xargs)"
}

attempts shared | tee "$folder/shared"
grep -o "connectFullMesh failed.*Connection refused" "$folder/log" | head -1
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 attempts own | tee "$folder/own"
grep -qx "shared: attempts that have a group: 0" "$folder/shared"
grep -qx "own: attempts that have a group: 0 1" "$folder/own"
echo "as described"
