#!/usr/bin/env bash
# One would guess: the same tensors and the same metadata give the same bytes, in each process.
#
# What happens: with several metadata entries they do not: the header lists the metadata in an order that
# differs from call to call. The tensors' part is the same. With no metadata, or with one entry, the bytes
# agree.
#
# Why it matters: replicas that compare their checkpoints by a digest of the file, and stores that keep equal
# files once, see a new checkpoint each time. Digest the tensors, or keep to one entry.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0

cat >"$folder/finding.py" <<'EOF'
import hashlib

import safetensors
import torch
from safetensors.torch import save

tensors = {name: torch.ones(2) for name in "abcdef"}


def forms(metadata):
    """The number of different files that twenty calls make."""
    return len({hashlib.sha256(save(tensors, metadata=dict(metadata))).digest() for _ in range(20)})


def body(data):
    return data[8 + int.from_bytes(data[:8], "little") :]


many = {f"key{i}": str(i) for i in range(8)}
bodies = {body(save(tensors, metadata=many)) for _ in range(20)}

print("safetensors", safetensors.__version__, "torch", torch.__version__)
print("different files of 20, no metadata:", forms({}))
print("one entry:", forms({"format": "pt"}))
print("eight entries:", forms(many), "- different tensor parts:", len(bodies))
assert forms({}) == 1
assert forms({"format": "pt"}) == 1
assert forms(many) > 1
assert len(bodies) == 1
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
