"""Which kind has a leaf, and who may register one."""

from __future__ import annotations

import pytest
import torch

from ft_transport._state.kinds.base import KINDS, PLAIN, Kind, Part, flatten_leaf, kind_of, register_kind


def test_which_kind() -> None:
    assert flatten_leaf(torch.ones(1))[0] is PLAIN
    assert flatten_leaf(torch.nn.Parameter(torch.ones(1)))[0] == Part("tensor", (True, True))
    assert all(kind_of(value) is None for value in (1, "a", None, [torch.ones(1)], torch.float32))
    assert kind_of(object()) is KINDS["object"]


def test_kinds_are_asked_in_the_same_order_whichever_file_is_imported_first() -> None:
    """The newest that claims a leaf has it: those of torch.distributed before those that would take any subclass."""
    asked = list(reversed(KINDS))
    assert max(map(asked.index, ("dtensor", "sharded"))) < min(map(asked.index, ("wrapper", "python tensor", "object")))


def test_a_kind_cannot_take_the_name_of_another() -> None:
    class Other(Kind):
        name = "sparse"

    for kind in (Other(), Kind()):
        with pytest.raises(ValueError, match="name: expected one that no other kind has"):
            register_kind(kind)
