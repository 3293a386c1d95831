"""What a replica trains: every byte of it changes in every step, and depends on all steps before."""

from __future__ import annotations

from typing import Any

import torch
import xxhash

__all__ = ["WIDTH", "State", "digest"]

WIDTH = 1024


class State:
    """A model, its optimizer, and plain values.

    Args:
        layers: Linear layers of ``WIDTH`` by ``WIDTH``.
        seed: Of the first weights.
    """

    def __init__(self, layers: int, seed: int) -> None:
        torch.manual_seed(seed)
        linear = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers)]
        self.model = torch.nn.Sequential(*linear, torch.nn.BatchNorm1d(WIDTH))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.scalars: dict[str, Any] = {"tokens": 0, "losses": [0.0] * 8, "schedule": "warm up", "best": None}
        # A fresh optimizer has no state to land in.
        self.apply(torch.rand(WIDTH))

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scalars": self.scalars}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scalars = state["scalars"]

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
        for buffer in self.model.buffers():
            buffer.add_(1)
        loss = float(direction[0])
        losses = [*self.scalars["losses"][1:], loss]
        best = min(losses)
        self.scalars = {"tokens": self.scalars["tokens"] + WIDTH, "losses": losses, "schedule": "train", "best": best}


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
