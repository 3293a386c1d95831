#!/usr/bin/env bash
# One would guess: torch.distributed.checkpoint.load() into a tensor of another dtype raises, as it does for
# another shape.
#
# What happens: it converts, under the default (strict) planner, and says nothing: int64 300 is 44 in an int8
# tensor, float32 0.7 is 0 in an int32 tensor, float32 lands rounded in bfloat16. A tensor of one element for
# one of four raises.
#
# Why it matters: the template decides what is restored. A step counter or a master weight whose template was
# made in a narrower dtype comes back as another number, and the load has passed every check.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import tempfile

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException


def load(name, template):
    state = {name: template}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state[name]


with tempfile.TemporaryDirectory() as folder:
    saved = {"count": torch.tensor([300]), "weight": torch.tensor([0.7, 1.7, 2.7, 3.7])}
    dcp.save(saved, checkpoint_id=folder, no_dist=True)
    count = load("count", torch.zeros(1, dtype=torch.int8))
    whole = load("weight", torch.zeros(4, dtype=torch.int32))
    half = load("weight", torch.zeros(4, dtype=torch.bfloat16))
    try:
        load("weight", torch.zeros(1))
        refused = None
    except CheckpointException as exc:  # no Exception
        refused = type(exc).__name__

print("torch", torch.__version__)
print("int64 300 into int8:", count)
print("float32 into int32:", whole)
print("float32 into bfloat16:", half)
print("four elements into one:", refused)
assert count.tolist() == [44]
assert whole.tolist() == [0, 1, 2, 3]
assert half.dtype == torch.bfloat16
assert half[0].item() != saved["weight"][0].item()
assert refused == "CheckpointException"
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
