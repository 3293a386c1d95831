#!/usr/bin/env bash
# One would guess: what torch.distributed.checkpoint raises for a load that cannot work is an Exception.
#
# What happens: CheckpointException derives from BaseException alone. 'except Exception' around dcp.load() and
# dcp.save() lets it pass, also where the cause is a plain ValueError of one rank.
#
# Why it matters: 'try the newest checkpoint, else the one before' ends the process at the first bad one, and
# code that turns errors into a failed step (a fault-tolerant manager, a worker thread) never sees it as one.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import tempfile

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException


def caught_by(error):
    try:
        dcp.load({"weight": torch.zeros(1)}, checkpoint_id=folder, no_dist=True)
    except error as exc:
        return exc
    return None


def outcome():
    try:
        return caught_by(Exception)
    except BaseException as exc:
        return f"passed 'except Exception' as {type(exc).__name__}"


with tempfile.TemporaryDirectory() as folder:
    dcp.save({"weight": torch.ones(4)}, checkpoint_id=folder, no_dist=True)
    passed, exc = outcome(), caught_by(CheckpointException)

print("torch", torch.__version__)
print(passed)
causes = {rank: type(failure[0]).__name__ for rank, failure in exc.failures.items()}
print("bases:", CheckpointException.__mro__[1].__name__, "- causes:", causes)
assert passed == "passed 'except Exception' as CheckpointException"
assert CheckpointException.__bases__ == (BaseException,)
assert causes == {0: "ValueError"}
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
