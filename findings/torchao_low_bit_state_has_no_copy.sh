#!/usr/bin/env bash
# One would guess: what torch.save() and load_state_dict() carry can be copied in memory too.
#
# What happens: the states of AdamW8bit, AdamW4bit and AdamWFp8 can be saved, loaded and written to with
# copy_(), and neither cloned nor deep-copied: NotImplementedError for aten.clone; zeros_like() and
# empty_like() are missing too.
#
# Why it matters: a snapshot in memory, a template made like the state, a staging copy before an asynchronous
# save, deepcopy of the optimizer: each ends in an error at the first step that has state, not at the start. A
# detour over a buffer of torch.save, or the inner tensors (codes, scale), works.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchao==0.18.0

cat >"$folder/finding.py" <<'EOF'
import copy
import io

import torch
import torchao
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8


def refused(function, *args):
    try:
        function(*args)
    except NotImplementedError:
        return True
    return False


def over_a_buffer(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


print("torchao", torchao.__version__, "torch", torch.__version__)
for cls in (AdamW8bit, AdamW4bit, AdamWFp8):
    parameter = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = cls([parameter])
    copy.deepcopy(optimizer)  # without state it works
    parameter.grad = torch.randn(64, 128)
    optimizer.step()
    state = optimizer.state[parameter]["exp_avg"]
    result = {
        "clone": refused(state.clone),
        "zeros_like": refused(torch.zeros_like, state),
        "empty_like": refused(torch.empty_like, state),
        "deepcopy": refused(copy.deepcopy, state),
        "deepcopy of the optimizer": refused(copy.deepcopy, optimizer),
    }
    print(cls.__name__, type(state).__name__, "refused:", result)
    assert all(result.values())
    again = over_a_buffer(optimizer.state_dict())["state"][0]["exp_avg"]
    assert torch.equal(again.dequantize(), state.dequantize())
    assert state.copy_(state.dequantize()) is state
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
