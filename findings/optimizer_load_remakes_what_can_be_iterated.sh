#!/usr/bin/env bash
# One would guess: what an optimizer keeps beside tensors (a phase by name, a window of the last gradients) comes
# back from load_state_dict() as it was.
#
# What happens: whatever can be iterated is made again by calling its class with a generator. A string becomes the
# text of that generator, a deque has no maxlen any more and grows, a namedtuple, a range and a NumPy array raise
# TypeError. OrderedDict, defaultdict and Counter become dict.
#
# Why it matters: a window that has lost its length keeps every gradient from the heal on; a phase by name matches
# no branch of the optimizer's step any more. Neither shows at the load. deepcopy() of the state dict, or writing to
# the optimizer's state, keeps them.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import numpy
import torch

Pair = namedtuple("Pair", "first second")


def loaded(value):
    source, target = (torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]) for _ in range(2))
    source.state[source.param_groups[0]["params"][0]]["value"] = value
    try:
        target.load_state_dict(source.state_dict())
    except TypeError as exc:
        return type(exc).__name__
    return target.state[target.param_groups[0]["params"][0]]["value"]


phase, window = loaded("warmup"), loaded(deque([torch.ones(2)], maxlen=1))
window.append(torch.zeros(2))
dicts = [type(loaded(kind)).__name__ for kind in (OrderedDict(a=1), defaultdict(int, a=1), Counter("a"))]
raised = [loaded(value) for value in (Pair(1, 2), range(3), numpy.ones(2))]

print("torch", torch.__version__)
print("'warmup' is", repr(phase)[:60])
print("a deque of at most 1 holds", len(window), "and its maxlen is", window.maxlen)
print("OrderedDict, defaultdict, Counter are", dicts)
print("namedtuple, range, array:", raised)
print("bytes, a list, a tuple:", loaded(b"ab"), loaded([1, 2]), loaded((1, 2)))
assert "generator object" in phase
assert window.maxlen is None
assert len(window) == 2
assert dicts == ["dict"] * 3
assert raised == ["TypeError"] * 3
assert (loaded(b"ab"), loaded([1, 2]), loaded((1, 2))) == (b"ab", [1, 2], (1, 2))
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
