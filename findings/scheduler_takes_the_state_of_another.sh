#!/usr/bin/env bash
# One would guess: a scheduler's load_state_dict() refuses the state of another class, or of an optimizer with
# another number of groups.
#
# What happens: it sets every entry as an attribute and compares nothing. CosineAnnealingLR takes StepLR's
# state and carries its gamma; one with two groups takes the state of one with a single group: base_lrs has
# one entry then, LambdaLR raises at a later step, CosineAnnealingLR never does.
#
# Why it matters: optimizers refuse another number of groups at the load, so one expects the same of the
# scheduler beside it. A mix-up of two schedulers' states passes and shows as a learning rate that is a little
# wrong.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR


def optimizer(groups):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(groups)], lr=1.0)


def step(scheduler):
    scheduler.optimizer.step()
    try:
        scheduler.step()
    except ValueError as exc:
        return type(exc).__name__
    return scheduler.get_last_lr()


def half(step):
    return 0.5**step


cosine = CosineAnnealingLR(optimizer(1), T_max=5)
cosine.load_state_dict(StepLR(optimizer(1), 3, gamma=0.25).state_dict())
two_cosine = CosineAnnealingLR(optimizer(2), T_max=5)
two_cosine.load_state_dict(CosineAnnealingLR(optimizer(1), T_max=5).state_dict())
two_lambda = LambdaLR(optimizer(2), half)
two_lambda.load_state_dict(LambdaLR(optimizer(1), half).state_dict())
outcomes = step(two_cosine), step(two_lambda)
try:
    optimizer(2).load_state_dict(optimizer(1).state_dict())
    refused = False
except ValueError:
    refused = True

print("torch", torch.__version__)
print("CosineAnnealingLR with StepLR's state:", sorted(cosine.state_dict()))
print("two groups with the state of one, base_lrs:", two_cosine.base_lrs, two_lambda.base_lrs)
print("next step, cosine:", outcomes[0], "lambda:", outcomes[1])
print("the optimizer refuses:", refused)
assert cosine.gamma == 0.25
assert cosine.T_max == 5
assert len(two_cosine.base_lrs) == len(two_lambda.base_lrs) == 1
assert len(outcomes[0]) == 2
assert outcomes[1] == "ValueError"
assert refused
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
