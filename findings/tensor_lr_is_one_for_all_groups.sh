#!/usr/bin/env bash
# One would guess: an lr given to the optimizer is each parameter group's own, whether it is a number or a
# tensor.
#
# What happens: a tensor is put into every group as it is, one and the same object, and schedulers fill it in
# place. LambdaLR with one function for each group: with a number the groups have 1/3 and 1.0 after two steps,
# with a tensor both have 1.0, the last group's. A state dict whose groups come back with a tensor each trains
# on with two rates.
#
# Why it matters: whether two leaves of the state are one object decides how training goes on. torch.save
# keeps it; a restore that gives each leaf memory of its own changes the rates, and the run is no longer the
# one that was saved.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import torch
from torch.optim.lr_scheduler import LambdaLR


def rates(lr, restored=None):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    scheduler = LambdaLR(optimizer, [lambda step: 1 / (step + 1), lambda step: 1.0])
    if restored is not None:
        optimizer.load_state_dict(restored)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    return [float(group["lr"]) for group in optimizer.param_groups], optimizer


number, _ = rates(1.0)
tensor, optimizer = rates(torch.tensor(1.0))
first, second = optimizer.param_groups
state = optimizer.state_dict()
for group in state["param_groups"]:
    group["lr"] = group["lr"].clone()
apart, _ = rates(torch.tensor(1.0), restored=state)

print("torch", torch.__version__)
print("lr a number:", number)
print("lr a tensor:", tensor, "one object:", first["lr"] is second["lr"])
print("lr a tensor, restored with one tensor for each group:", apart)
assert number == [1 / 3, 1.0]
assert first["lr"] is second["lr"]
assert tensor == [1.0, 1.0]
assert apart[0] < 0.34
assert apart[1] == 1.0
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
