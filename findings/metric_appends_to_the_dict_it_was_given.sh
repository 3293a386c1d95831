#!/usr/bin/env bash
# One would guess: a metric takes a copy of the state that it loads, as a module does, and state_dict() of one
# does not change later.
#
# What happens: a list state (CatMetric, curves, everything that gathers predictions) is taken as it is:
# update() appends to the list inside of the caller's dict, and two metrics that load one dict share the list
# and count each other's samples.
#
# Why it matters: a checkpoint kept in memory, to be loaded once more after a failure, has grown by what was
# seen since the first load. Each load needs a copy of the lists.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0

cat >"$folder/finding.py" <<'EOF'
import torch
import torchmetrics


def gathering():
    metric = torchmetrics.CatMetric()
    metric.persistent(True)
    return metric


source = gathering()
source.update(torch.tensor([1.0]))
state = source.state_dict()
source.update(torch.tensor([2.0]))
by_source = len(state["value"])
first, second = gathering(), gathering()
first.load_state_dict(state)
second.load_state_dict(state)
first.update(torch.tensor([9.0]))

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
print("entries after the source went on:", by_source)
print("after one that had loaded it went on:", state["value"])
print("the other one that had loaded it computes:", second.compute())
assert by_source == 1
assert [value.item() for value in state["value"]] == [1.0, 9.0]
assert second.compute().tolist() == [1.0, 9.0]
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
