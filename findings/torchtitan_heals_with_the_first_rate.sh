#!/usr/bin/env bash
# One would guess: a replica of torchtitan's that heals over torchft gets the source's optimizer, with its learning rate.
#
# What happens: TorchFTOptimizersContainer.state_dict() gives a dict that was made at the start. The tensors in it are the
# live ones; the learning rates are as they were then. LRSchedulersContainer restores where the schedule is and does not
# set the rate either. The healed replica takes its step with the rate of step 0, before the schedule sets the next one.
# The container also makes the optimizers' states by a step with gradients of zero, which counts: AdamW's first update of
# the weights is a quarter smaller than without torchft.
#
# Why it matters: weights differ between replicas from the heal on, and nothing says so; they keep averaging gradients.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchft==0.2.0 torchtitan==0.3.0

cat >"$folder/finding.py" <<'EOF'
import copy
from types import SimpleNamespace

import torch
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, default_adamw
from torchtitan.experiments.torchft.optimizer import TorchFTOptimizersContainer


class Replica:
    def __init__(self, kind=TorchFTOptimizersContainer):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 4)
        manager = {} if kind is OptimizersContainer else {"ft_manager": SimpleNamespace(manager=None, use_async_quorum=True)}
        config = kind.Config(param_groups=default_adamw(lr=1e-2).param_groups, implementation="for-loop")
        self.optimizers = config.build(model_parts=[self.model], **manager)
        self.schedules = LRSchedulersContainer.Config(warmup_steps=10).build(optimizers=self.optimizers, training_steps=100)
        if manager:
            self.optimizers.init_cache_state_dict()  # as TorchFTCheckpointManager does when it is made

    def step(self):
        before = self.model.weight.detach().clone()
        self.model(torch.ones(2, 4)).square().sum().backward()
        for optimizer in self.optimizers.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.schedules.step()
        return (self.model.weight - before).abs().max().item()

    @property
    def rate(self):
        return self.optimizers.optimizers[0].param_groups[0]["lr"]

    def state(self):  # what TorchFTCheckpointManager registers, but for the step
        parts = {"model": self.model, "optimizer": self.optimizers, "lr_scheduler": self.schedules}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizer"])
        self.schedules.load_state_dict(state["lr_scheduler"])


plain, source, healed = Replica(OptimizersContainer), Replica(), Replica()
first, without = source.step(), plain.step()
print(f"first update: {first:.5f}, without torchft {without:.5f}")
for _ in range(4):
    source.step()
healed.load(source.state())
print(f"rate of the source: {source.rate:.3f}, of the healed replica: {healed.rate:.3f}")
assert torch.equal(source.model.weight, healed.model.weight)
rates = source.rate, healed.rate
source.step(), healed.step()
difference = (source.model.weight - healed.model.weight).abs().max().item()
print(f"a step later the weights differ by {difference:.5f}")
assert first < 0.8 * without
assert abs(rates[0] - 0.006) < 1e-9 and abs(rates[1] - 0.001) < 1e-9
assert difference > 1e-3
EOF
"$folder/venv/bin/python" -W ignore "$folder/finding.py"
echo "as described"
