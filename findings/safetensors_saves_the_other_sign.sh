#!/usr/bin/env bash
# One would guess: a float32 tensor is saved with the numbers that it prints.
#
# What happens: a view such as z.conj().imag is an ordinary contiguous float32 tensor to look at, -2.0, with
# the minus sign kept as a bit of the tensor. save_file() writes the memory below: 2.0. torch.save() keeps
# -2.0. A conj() view comes back as what it is the conjugate of.
#
# Why it matters: a state with complex parameters (rotary tables, state-space models) loses a sign in one file
# format and not in another, with no error on either side. resolve_neg() and resolve_conj() before the save
# mend it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0

cat >"$folder/finding.py" <<'EOF'
import io

import safetensors
import torch
from safetensors.torch import load, save

z = torch.tensor([1 + 2j])
real, conjugate = z.conj().imag, z.conj()
loaded = {**load(save({"real": real})), **load(save({"conjugate": conjugate}))}
resolved = load(save({"real": real.resolve_neg(), "conjugate": conjugate.resolve_conj()}))
buffer = io.BytesIO()
torch.save(real, buffer)
buffer.seek(0)
by_torch = torch.load(buffer)

print("safetensors", safetensors.__version__, "torch", torch.__version__)
print("in memory:  ", real, real.dtype, conjugate)
print("safetensors:", loaded["real"], loaded["conjugate"])
print("torch.save: ", by_torch)
assert real.dtype == torch.float32
assert real.tolist() == [-2.0]
assert loaded["real"].tolist() == [2.0]
assert loaded["conjugate"].tolist() == [1 + 2j]
assert conjugate.tolist() == [1 - 2j]
assert by_torch.tolist() == [-2.0]
assert resolved["real"].tolist() == [-2.0]
assert resolved["conjugate"].tolist() == [1 - 2j]
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
