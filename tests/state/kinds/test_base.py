"""Which kind has a leaf, and who may register one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from ft_transport._state.kinds import base
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


class Late:
    """A leaf of a class whose module is imported when somebody needs it."""


class LateKind(Kind):
    name = "late"
    late_types = (("not.yet.imported", "Late"),)

    def flatten(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        return (), None


class NewerKind(LateKind):
    name = "newer"


class ExactKind(LateKind):
    name = "exact"
    types = (Late,)
    late_types = ()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that is being imported: it is listed, and has nothing yet. Kinds that a test registers are forgotten."""
    for table in ("KINDS", "_BY_TYPE", "_LATE"):
        monkeypatch.setattr(base, table, dict(getattr(base, table)))
    listed = ModuleType("not.yet.imported")
    monkeypatch.setitem(sys.modules, listed.__name__, listed)
    return listed


def test_a_class_is_found_once_its_module_has_it_and_is_not_imported_for_it(module: ModuleType) -> None:
    register_kind(LateKind())
    assert kind_of(Late()) is KINDS["object"], "half imported"
    del sys.modules[module.__name__]
    assert kind_of(Late()) is KINDS["object"]
    assert module.__name__ not in sys.modules
    sys.modules[module.__name__] = module
    module.Late = Late  # type: ignore[attr-defined]
    assert kind_of(Late()) is base.KINDS["late"]


@pytest.mark.parametrize("newer", [NewerKind(), ExactKind()], ids=lambda kind: kind.name)
@pytest.mark.parametrize("imported", ["before", "between", "after"])
def test_the_newest_kind_has_a_class_whenever_its_module_is_imported(
    module: ModuleType, newer: Kind, imported: str
) -> None:
    for moment, kind in (("before", LateKind()), ("between", newer)):
        if moment == imported:
            module.Late = Late  # type: ignore[attr-defined]
        register_kind(kind)
    if imported == "after" and newer.late_types:  # who names the class itself has it already
        module.Late = Late  # type: ignore[attr-defined]
    assert kind_of(Late()) is newer
    assert kind_of(Late()) is newer
