"""The table of mutants fits the source as it is now. ``make mutants`` tries them."""

from __future__ import annotations

import re

import pytest
from mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.promise)
def test_what_is_to_be_broken_is_there(mutant: Mutant) -> None:
    compile(mutant.apply(), mutant.file, "exec")
    file, _, test = mutant.test.partition("::")
    name = test.partition("[")[0]  # one case of it
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_each_promise_is_there_once() -> None:
    assert len({mutant.promise for mutant in MUTANTS}) == len(MUTANTS)


def test_a_promise_that_has_moved_is_an_error() -> None:
    with pytest.raises(LookupError, match="where is this promise now"):
        MUTANTS[0]._replace(old="no such line").apply()
