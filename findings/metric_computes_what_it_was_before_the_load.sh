#!/usr/bin/env bash
# One would guess: after Metric.load_state_dict() the next compute() is of the state that was loaded.
#
# What happens: compute() keeps its last result until the next update() or reset(), and a load is neither: a
# metric that had computed 5.0 still says 5.0 when its state says 1.0. State dicts show the right numbers
# meanwhile.
#
# Why it matters: a replica that heals in mid-evaluation reports the value from before the heal, although its
# state is that of its peers to the bit. reset() before the load helps.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0

cat >"$folder/finding.py" <<'EOF'
import torch
import torchmetrics


def mean(value):
    metric = torchmetrics.MeanMetric()
    metric.persistent(True)
    metric.update(value)
    return metric


source, computed, fresh = mean(1.0), mean(5.0), mean(5.0)
computed.compute()
state = source.state_dict()
for metric in (computed, fresh):
    metric.load_state_dict(state)

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
print("state:", computed.state_dict())
print("compute() of one that had computed:", computed.compute(), "- of one that had not:", fresh.compute())
assert computed.mean_value.item() == 1.0
assert computed.compute().item() == 5.0
assert fresh.compute().item() == 1.0
computed.reset()
computed.load_state_dict(state)
assert computed.compute().item() == 1.0
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
