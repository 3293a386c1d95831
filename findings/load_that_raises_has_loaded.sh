#!/usr/bin/env bash
# One would guess: Module.load_state_dict() checks first: when it raises for one wrong shape or one key too
# many, the module is as it was.
#
# What happens: it writes what fits and raises at the end. After the error every other parameter holds the new
# values, those behind the wrong one too; with a key too many all of them do.
#
# Why it matters: 'could not load, train on with what we have' trains on a mix of two states. Whoever catches
# the error has to load something whole before the next step.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import torch


def after_a_failed_load(**wrong):
    """Names of the parameters that a load of zeros has overwritten although it raised."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state.update({name.replace("_", "."): value for name, value in wrong.items()})
    try:
        model.load_state_dict(state, strict=True)
        raised = False
    except RuntimeError:
        raised = True
    assert raised
    return [name for name, parameter in model.named_parameters() if parameter.eq(0).all()]


shape = after_a_failed_load(**{"1_weight": torch.zeros(3, 3)})
key = after_a_failed_load(extra=torch.zeros(1))
print("torch", torch.__version__)
print("overwritten after 'size mismatch for 1.weight':", shape)
print("overwritten after 'unexpected key':", key)
assert shape == ["0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]
assert key == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
