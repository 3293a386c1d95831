"""The corpus: states of every kind that a training run may hold, and how to tell whether one arrived exactly.

The cases are written against what the package promises, not against what it does. ``look`` and ``compare`` know
nothing of the package, and ``torch.save`` must pass the same comparison.
"""

from __future__ import annotations

from corpus import dtypes, kinds, python_values, real_states, sharing, structure, views
from corpus.case import Case

__all__ = ["CASES", "WARNINGS"]

CASES: list[Case] = [
    *dtypes.CASES,
    *views.CASES,
    *sharing.CASES,
    *kinds.CASES,
    *structure.CASES,
    *python_values.CASES,
    *real_states.CASES,
]

# What torch and torchao say about themselves when some kinds are made; none of it is about a transfer.
WARNINGS = [
    "Sparse .* tensor support is in beta state",
    "The PyTorch API of nested tensors is in prototype stage",
    "torch.quantize_per",
    "TypedStorage is deprecated",
    "Please use DTensor instead and we are deprecating ShardedTensor",
    "'set_vital' is deprecated",
    "Please use .* to create a quantized tensor",
]
