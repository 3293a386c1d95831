"""What a description says, and what is built by it."""

from __future__ import annotations

import torch

from ft_transport._state.describe import describe


def test_build_by_torchs_own_treespec() -> None:
    manifest, _ = describe({"a": 1, "b": [2, 3]})
    manifest.treespec = torch.utils._pytree.tree_structure({"a": 1, "b": [2, 3]})
    assert manifest.build([4, 5, 6]) == {"a": 4, "b": [5, 6]}
