#!/usr/bin/env bash
# One would guess: a StatefulDataLoader that was restored in mid-epoch goes on as the one that was not
# interrupted: this epoch and the next.
#
# What happens: the rest of this epoch is right. With num_workers=0 and a generator of one's own the next
# epoch is shuffled in another order than without the interruption; with two workers it is the same one.
#
# Why it matters: a test of the resume that looks at one epoch passes, and the run cannot be compared with its
# undisturbed twin from the next epoch on. One replica that was healed so draws other samples than its peers
# expect. The generator's state has to be kept beside the loader's.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchdata==0.11.0

cat >"$folder/finding.py" <<'EOF'
import copy

import torch
import torchdata
from torchdata.stateful_dataloader import StatefulDataLoader


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index


def loader(workers):
    generator = torch.Generator().manual_seed(1)
    return StatefulDataLoader(Numbers(), batch_size=2, shuffle=True, num_workers=workers, generator=generator)


def epoch(loader):
    return [batch.tolist() for batch in loader]


print("torchdata", torchdata.__version__, "torch", torch.__version__)
for workers, same in ((0, False), (2, True)):
    undisturbed = loader(workers)
    expected = epoch(undisturbed), epoch(undisturbed)
    interrupted = loader(workers)
    batches = iter(interrupted)
    next(batches), next(batches)
    state = copy.deepcopy(interrupted.state_dict())
    restored = loader(workers)
    restored.load_state_dict(state)
    rest, following = epoch(restored), epoch(restored)
    print(f"{workers} workers, rest of the epoch: {rest} expected {expected[0][2:]}")
    print(f"{workers} workers, the next one:      {following} expected {expected[1]}")
    assert rest == expected[0][2:]
    assert (following == expected[1]) == same
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
