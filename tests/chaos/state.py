"""What a replica trains: every byte of it changes in every step, and depends on all steps before.

Forward writes to the buffers, each replica's with batches of its own, also while a state lands in them. The metric has
another shape in every step, so that a fresh replica's template never has the source's.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import xxhash

__all__ = ["WIDTH", "State", "buffers_digest", "digest", "without_buffers"]

WIDTH = 1024
_BATCH = 4


class State:
    """A model, its optimizer, and plain values.

    Args:
        layers: Linear layers of ``WIDTH`` by ``WIDTH``.
        seed: Of the first weights.
        metric: Whether there is a metric that grows.

    Attributes:
        in_forward: Held by each forward, so that a source can say what its buffers were when they were copied.
    """

    def __init__(self, layers: int, seed: int, *, metric: bool = True) -> None:
        torch.manual_seed(seed)
        pairs = [(torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH)) for _ in range(layers)]
        self.model = torch.nn.Sequential(*(module for pair in pairs for module in pair))
        self.in_forward = threading.Lock()
        self._metrics = {"losses": torch.zeros(0)} if metric else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.scalars: dict[str, Any] = {"tokens": 0, "losses": [0.0] * 8, "schedule": "warm up", "best": None}
        # A fresh optimizer has no state to land in.
        self.apply(torch.rand(WIDTH))

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scalars": self.scalars,
            "metrics": self._metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scalars = state["scalars"]
        self._metrics = dict(state["metrics"])

    def forward(self, generator: torch.Generator) -> None:
        """One forward over a batch of this replica's own. It writes to every buffer of the model."""
        with self.in_forward, torch.no_grad():
            self.model(torch.rand(_BATCH, WIDTH, generator=generator))

    def apply(self, direction: torch.Tensor) -> None:
        """Make the step that a vector of ``WIDTH`` numbers stands for: that is all that replicas have to reduce."""
        for number, parameter in enumerate(self.model.parameters()):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            turned = direction.roll(number)
            if parameter.dim() == 2:
                torch.outer(turned, direction, out=parameter.grad)
            else:
                parameter.grad.copy_(turned)
        self.optimizer.step()
        loss = float(direction[0])
        self._metrics = {name: torch.cat([losses, direction[:1]]) for name, losses in self._metrics.items()}
        losses = [*self.scalars["losses"][1:], loss]
        best = min(losses)
        self.scalars = {"tokens": self.scalars["tokens"] + WIDTH, "losses": losses, "schedule": "train", "best": best}


_BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def without_buffers(state: dict[str, Any]) -> dict[str, Any]:
    """What all replicas have in common: of a state dict of :class:`State`, all but what forward writes."""
    model = {name: value for name, value in state["model"].items() if name.rpartition(".")[2] not in _BUFFERS}
    return {**state, "model": model}


def buffers_digest(state: dict[str, Any]) -> str:
    """Fingerprint of what forward writes."""
    return digest({name: value for name, value in state["model"].items() if name.rpartition(".")[2] in _BUFFERS})


def digest(*values: object) -> str:
    """Fingerprint of every byte and plain value of nested dicts and lists, and of their types and shapes."""
    hashed = xxhash.xxh3_64()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            hashed.update(f"{value.dtype} {tuple(value.shape)}".encode())
            hashed.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key in value:
                hashed.update(f"{key!r}:".encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            hashed.update(f"{type(value).__name__} of {len(value)}".encode())
            for item in value:
                add(item)
        else:
            hashed.update(f"{type(value).__name__} {value!r}".encode())

    for value in values:
        add(value)
    return hashed.hexdigest()
