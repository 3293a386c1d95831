#!/usr/bin/env bash
# One would guess: what Fabric.save() takes, Fabric.load() puts back: a module within a dict within the state
# as well as one at the top.
#
# What happens: only modules, optimizers and what has a load_state_dict at the top are filled. One within a
# dict is pickled whole by save(); load() refuses the file by default, and with weights_only=False puts
# another module into the dict, while the one that trains keeps its values. A tensor at the top is likewise
# replaced, not filled.
#
# Why it matters: {'model': m, 'extra': {'ema': e}} resumes with the model restored and the EMA as it was,
# without an error once weights_only is off. Keep the state flat, or copy back what load() has left in the
# dict.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lightning==2.6.6

cat >"$folder/finding.py" <<'EOF'
import tempfile

import lightning
import torch
from lightning.fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=1)
model, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
tensor = torch.ones(2)
modules = [model, average]
with torch.no_grad():
    for module in modules:
        module.weight.fill_(1.0)

with tempfile.TemporaryDirectory() as folder:
    fabric.save(f"{folder}/checkpoint", {"model": model, "extra": {"ema": average}, "tensor": tensor})
    with torch.no_grad():
        for value in (model.weight, average.weight, tensor):
            value.zero_()
    state = {"model": model, "extra": {"ema": average}, "tensor": tensor}
    try:
        fabric.load(f"{folder}/checkpoint", state)
        refused = None
    except Exception as exc:
        refused = type(exc).__name__
    fabric.load(f"{folder}/checkpoint", state, weights_only=False)

print("lightning", lightning.__version__, "torch", torch.__version__)
print("by default:", refused)
print("module at the top:", model.weight.tolist(), "in a dict:", average.weight.tolist(), "tensor:", tensor.tolist())
print("what the dict holds now:", state["extra"]["ema"].weight.tolist(), state["tensor"].tolist())
assert refused == "UnpicklingError"
assert model.weight.eq(1).all()
assert average.weight.eq(0).all()
assert state["extra"]["ema"] is not average
assert state["extra"]["ema"].weight.eq(1).all()
assert tensor.tolist() == [0.0, 0.0]
assert state["tensor"].tolist() == [1.0, 1.0]
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
