#!/usr/bin/env bash
# One would guess: torch.save() of a memory-mapped TensorDict, or of a tensor in it, writes the numbers as
# they are now.
#
# What happens: it writes the name of the file. A megabyte makes a checkpoint of less than two kilobytes, and
# loading it gives what the file says by then: 2.0, where 1.0 was saved; a write into what was loaded goes to
# the file of the running job. The copy made by clone() is saved with its numbers.
#
# Why it matters: a replay buffer or an offloaded optimizer state that is mapped for its size is not in the
# checkpoint, follows training after it, and is missing on another machine. clone() first, or keep the folder
# with the checkpoint.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 tensordict==0.15.3

cat >"$folder/finding.py" <<'EOF'
import io
import tempfile
from pathlib import Path

import tensordict
import torch
from tensordict import TensorDict


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def loaded(data):
    return torch.load(io.BytesIO(data), weights_only=False)


with tempfile.TemporaryDirectory() as folder:
    state = TensorDict({"x": torch.ones(1 << 18)}, [1 << 18]).memmap(Path(folder) / "state")
    whole, tensor, cloned = saved(state), saved(state["x"]), saved(state.clone())
    state["x"].fill_(2.0)  # training goes on
    restored = loaded(whole)["x"][0].item(), loaded(tensor)[0].item(), loaded(cloned)["x"][0].item()
    loaded(tensor).fill_(3.0)
    running = state["x"][0].item()

print("tensordict", tensordict.__version__, "torch", torch.__version__)
print("bytes: TensorDict", len(whole), "tensor", len(tensor), "clone", len(cloned))
print("saved at 1.0, loaded after the file went on to 2.0 (TensorDict, tensor, clone):", restored)
print("in the running job after a write into what was loaded:", running)
assert max(len(whole), len(tensor)) < 10_000
assert len(cloned) > 1 << 20
assert restored == (2.0, 2.0, 1.0)
assert running == 3.0
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
