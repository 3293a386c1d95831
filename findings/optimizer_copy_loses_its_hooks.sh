#!/usr/bin/env bash
# One would guess: deepcopy() of a model with its optimizer keeps the step and load hooks, as the copy of a
# module keeps its forward hooks.
#
# What happens: the optimizer's copy holds its state and the copied parameters, and none of its hooks; pickle
# loses them alike. The module's copy has kept its own.
#
# Why it matters: who keeps a copy to go back to (a snapshot in memory, a trial step) goes on without what
# hangs on hooks: guards of a running save, EMA, gradient clipping, all without a word.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import copy
import pickle

import torch

model = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(model.parameters())
calls = []


def forward_hook(module, args, output):
    calls.append("forward")


model.register_forward_hook(forward_hook)
optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load"))


def use(model, optimizer):
    calls.clear()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return list(calls)


original = use(model, optimizer)
model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
copied = use(model_copy, optimizer_copy)
pickled = pickle.loads(pickle.dumps(optimizer))
calls.clear()
pickled.step()

print("torch", torch.__version__)
print("called in the original:", original)
print("called in the copy:", copied, "- in the unpickled optimizer:", calls)
assert optimizer_copy.param_groups[0]["params"][0] is model_copy.weight
assert len(optimizer_copy.state) == 2
assert original == ["forward", "step", "load"]
assert copied == ["forward"]
assert calls == []
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
