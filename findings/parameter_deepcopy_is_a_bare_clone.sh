#!/usr/bin/env bash
# One would guess: deepcopy() of a Parameter keeps what deepcopy() of a tensor keeps: attributes, the
# gradient, and that two of them are views of one storage.
#
# What happens: all three are lost, for Parameters alone. Plain tensors keep them, and torch.save keeps the
# attributes and the shared storage of Parameters as well.
#
# Why it matters: a flat buffer whose slices are the parameters is cut into pieces that no longer follow it,
# marks such as 'expert' or 'no decay' vanish from a snapshot made by deepcopy, while a checkpoint of the same
# model has them.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import copy
import io

import torch


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def pair(wrap):
    """A flat tensor and one view of it, with an attribute and a gradient."""
    flat = torch.zeros(4)
    view = wrap(flat[1:3])
    view.requires_grad_()
    view.tag = "expert"
    view.grad = torch.ones(2)
    return flat, view


def kept(flat, view):
    return {
        "tag": getattr(view, "tag", None),
        "grad": view.grad is not None,
        "shared": flat.untyped_storage().data_ptr() == view.untyped_storage().data_ptr(),
    }


tensor = kept(*copy.deepcopy(pair(lambda view: view)))
parameter = kept(*copy.deepcopy(pair(torch.nn.Parameter)))
on_disk = kept(*saved(pair(torch.nn.Parameter)))

print("torch", torch.__version__)
print("deepcopy of a tensor:   ", tensor)
print("deepcopy of a Parameter:", parameter)
print("torch.save of a Parameter:", on_disk)
assert tensor == {"tag": "expert", "grad": True, "shared": True}
assert parameter == {"tag": None, "grad": False, "shared": False}
assert on_disk == {"tag": "expert", "grad": False, "shared": True}
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
