#!/usr/bin/env bash
# One would guess: a buffer that two modules share is shared after model.double() or to_empty(), as a shared
# parameter is.
#
# What happens: the parameter is still one; the buffer is two. deepcopy() and torch.save() keep both shared.
#
# Why it matters: a position table, an amax history or a step counter that two modules update by turns goes
# its own ways from then on; both names were in the state dict before as well, so nothing in the keys shows
# it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import copy

import torch

first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
second.weight = first.weight
first.register_buffer("counter", torch.zeros(1))
second.register_buffer("counter", first.counter)
model = torch.nn.ModuleList([first, second])


def shared(model):
    first, second = model
    return {"parameter": first.weight is second.weight, "buffer": first.counter is second.counter}


made = shared(model)
copied = shared(copy.deepcopy(model))
cast = shared(copy.deepcopy(model).double())
empty = shared(copy.deepcopy(model).to_empty(device="cpu"))
same_dtype = shared(copy.deepcopy(model).float())

print("torch", torch.__version__)
results = {"as made": made, "deepcopy": copied, "float (no change)": same_dtype, "double": cast, "to_empty": empty}
for what, value in results.items():
    print(f"{what:18}", value)
assert made == copied == same_dtype == {"parameter": True, "buffer": True}
assert cast == empty == {"parameter": True, "buffer": False}
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
