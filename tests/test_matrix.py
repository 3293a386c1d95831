"""The matrix of versions: which cells, what is counted, and the table. Nothing is installed, and no cell is run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from matrix import run
from matrix.__main__ import PAGE, main
from matrix.cells import Cell, cells
from matrix.run import ROOT, Folder, counted, interpreter
from matrix.table import BEGIN, END, describe, render, replaced

REPORT = """<testsuites><testsuite>
<testcase classname="test_a" name="one"/>
<testcase classname="test_a" name="two[x]"><failure message="no">...</failure></testcase>
<testcase classname="test_a" name="three"><skipped message="none here"/></testcase>
<testcase classname="test_b" name="four"/>
<testcase classname="test_b" name="five"><error message="fixture">...</error></testcase>
</testsuite></testsuites>"""
COUNTS = {"passed": 2, "failed": 2, "skipped": 1, "failures": ["test_a.two[x]", "test_b.five"]}


def test_words_choose_cells() -> None:
    found = list(cells(["py3.11", "nightly"]))
    assert found
    assert all(cell.python == "3.11" and "nightly" in cell.torchft for cell in found)
    assert len({cell.name for cell in cells([])}) == len(list(cells([])))
    assert not list(cells(["no such"]))


def test_cells_of_one_environment_are_neighbours() -> None:
    """It is removed after the last of them."""
    environments = [cell.environment for cell in cells([])]
    changes = [one for one, other in zip(environments, [*environments[1:], ""], strict=True) if one != other]
    assert len(changes) == len(set(environments))


def test_what_pytest_reports_is_counted() -> None:
    assert counted(REPORT) == COUNTS


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (None, "not run"),
        ({"outcome": "not done after 60 min"}, "not done after 60 min"),
        ({"outcome": "ran", "passed": 7918, "failed": 0, "skipped": 0}, "7,918 passed"),
        ({"outcome": "ran", **COUNTS}, "2 passed, 2 failed, 1 skipped"),
    ],
)
def test_what_became_of_a_part(part: dict[str, Any] | None, expected: str) -> None:
    assert describe(part) == expected


def test_the_table_says_what_was_run_what_failed_and_what_was_not_run() -> None:
    ran, missing, left = (Cell(python, "2.15.0", "torchft==0.2.0") for python in ("3.11", "3.12", "3.13"))
    results: dict[Cell, Any] = {
        ran: {
            "versions": {"python": "3.11.7", "torch": "2.15.0+cu132"},
            "commit": "abc1234",
            "unit": {"outcome": "ran", **COUNTS},
            "heal": {"outcome": "ran", "passed": 5, "failed": 3, "skipped": 0, "failures": ["b.c[1]", "b.d", "b.c[2]"]},
        },
        missing: {"versions": {}, "install": "no python3.12"},
    }
    table = render([ran, missing, left], results.get)
    assert (
        "| 3.11.7 | 2.15.0+cu132 | torchft 0.2.0 | abc1234 | 2 passed, 2 failed, 1 skipped | 5 passed, 3 failed |"
        in table
    )
    assert "| 3.12 | 2.15.0 | torchft 0.2.0 |  | no python3.12 |  |" in table
    assert "| 3.13 | 2.15.0 | torchft 0.2.0 |  | not run | not run |" in table
    assert f"Failed with {ran.name}:" in table
    assert "* `test_a.two[x]`\n" in table
    assert table.endswith("* `b.c`, 2 cases\n* `b.d`")
    # Elsewhere, where another cell is run, these lines stay.
    del results[ran]
    page = replaced(f"{BEGIN}{END}", table)
    results[left] = {"versions": {}, "install": "no python3.13"}
    later = render([ran, missing, left], results.get, page)
    assert later == table.replace("|  | not run | not run |", "|  | no python3.13 |  |")


def test_the_table_takes_the_place_of_the_one_before() -> None:
    page = replaced(f"before\n{BEGIN}\nold\n{END}\nafter", r"new \1")
    assert page == f"before\n{BEGIN}\n\nnew \\1\n\n{END}\nafter"
    with pytest.raises(ValueError, match="expected"):
        replaced("no place", "new")


def test_the_page_has_a_place_for_it() -> None:
    replaced(PAGE.read_text(encoding="utf-8"), "")


def test_a_cell_that_cannot_be_had_says_why_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builds: list[Folder] = []
    monkeypatch.setattr(run, "interpreter", lambda python: None)
    monkeypatch.setattr(Folder, "build", lambda folder: builds.append(folder))
    arguments = ["py3.13", "torch2.15", "nightly", "--folder", str(tmp_path)]
    for _ in range(2):
        assert main(arguments) == 0
    assert len(builds) == 1
    assert capsys.readouterr().out.count("unit: no python3.13") == 1
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["install"] == "no python3.13"


def test_a_cell_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = cells(["py3.13", "torch2.15", "nightly"])
    folder, ran = Folder(tmp_path, 60), []
    monkeypatch.setattr(Folder, "_install", lambda *_: "python")
    monkeypatch.setattr(run, "_run", lambda *_: '{"python": "3.13.0"}')

    def test(folder: Folder, cell: Cell, part: str, arguments: object) -> dict[str, Any]:
        ran.append(part)
        if ran == ["unit", "heal"]:
            raise KeyboardInterrupt
        return {"outcome": "ran", **COUNTS}

    monkeypatch.setattr(Folder, "_test", test)
    with pytest.raises(KeyboardInterrupt):
        folder.run(cell)
    assert not folder.is_done(cell)
    assert folder.run(cell)["unit"]["passed"] == 2
    assert ran == ["unit", "heal", "heal"]
    assert folder.is_done(cell)
    folder.forget(cell)
    assert folder.result_of(cell) is None


def test_a_step_that_fails_says_how() -> None:
    with pytest.raises(run.Failed, match="no such wheel"):
        run._run(["sh", "-c", "echo 'ERROR: no such wheel' >&2; echo 'more' >&2; exit 1"])
    with pytest.raises(run.Failed, match="exit status 3"):
        run._run(["sh", "-c", "exit 3"])


def test_an_interpreter_that_does_not_run_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\nexit 1\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert interpreter("3.99") is None
    shim.write_text("#!/bin/sh\nexit 0\n")
    assert interpreter("3.99") == str(shim)


def test_the_metadata_says_no_more_than_the_cells() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (python,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    (torch,) = re.findall(r'"torch>=([\d.]+)"', project)
    (torchft,) = re.findall(r'"torchft>=([\d.]+)"', project)
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    ran = re.findall(r"^\| (3\.\d+)\.\d+ \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert named == sorted(set(ran)), "those that the table has counts for"
    assert python == named[0]
    assert any(cell.torch.startswith(f"{torch}.") for cell in cells([]))
    assert any(cell.torchft.startswith(f"torchft=={torchft}.") for cell in cells([]))
    (needed,) = re.findall(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert "torchft" not in needed, "an install would write the release over a nightly"
