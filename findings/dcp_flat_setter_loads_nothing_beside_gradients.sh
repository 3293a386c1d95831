#!/usr/bin/env bash
# One would guess: set_optimizer_state_dict() loads the moments that it is given, or raises; whether the parameters
# have gradients at that moment is nothing to it.
#
# What happens: with flatten_optimizer_state_dict=True, into an optimizer that has not stepped yet, it loads the
# learning rate and not one moment if any parameter has a gradient. It returns without a word, with strict=True too.
# The flat dict is read by the names of the state that the optimizer has, and the step with zero gradients that makes
# this state is left out where gradients are. AdamW finds empty states and starts again at step 1. Not flattened, or
# after zero_grad(), all of it is loaded.
#
# Why it matters: torchtitan and others save flattened. A replica that heals loads a state into a fresh optimizer, and
# it may have run its backward by then. Its weights and its rate are right, and it goes on without moments.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import copy

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

model = torch.nn.Linear(2, 2)


def backward():
    model(torch.ones(1, 2)).sum().backward()


def steps_after_load(flat, gradients):
    """The learning rate and step counters of a fresh optimizer, after the load and after one step more."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat, strict=True)
    model.zero_grad()
    trained = torch.optim.AdamW(model.parameters(), lr=0.25)
    for _ in range(3):
        backward()
        trained.step()
        trained.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(model, trained, options=options))

    fresh = torch.optim.AdamW(model.parameters(), lr=0.5)
    if gradients:
        backward()
    set_optimizer_state_dict(model, fresh, saved, options=options)
    loaded = [int(state["step"]) if state else None for state in fresh.state.values()]
    fresh.zero_grad()
    backward()
    fresh.step()
    return fresh.param_groups[0]["lr"], loaded, [int(state["step"]) for state in fresh.state.values()]


print("torch", torch.__version__)
for flat in (False, True):
    for gradients in (False, True):
        rate, loaded, later = steps_after_load(flat, gradients)
        print(f"flat: {flat!s:5}  gradients: {gradients!s:5}  lr: {rate}  steps loaded: {loaded}  a step later: {later}")
        lost = flat and gradients
        assert rate == 0.25
        assert loaded == ([None, None] if lost else [3, 3])
        assert later == ([1, 1] if lost else [4, 4])
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
