"""Runs one cell: an environment, the wheel, the tests. What came of it is a JSON file, also where nothing did."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cells import ALSO, PARTS, Cell

__all__ = ["Folder", "counted", "interpreter"]

ROOT = Path(__file__).resolve().parents[2]

# Beside the unit part, which this is without: real processes and networks. The mutants are of the checkout.
_NOT_UNIT = ("chaos", "fabric", "gpu", "multiproc", "netns", "upstream", "test_mutants.py")
_UNIT = ["-n", "2", "--dist", "loadfile", *(f"--ignore=tests/{name}" for name in _NOT_UNIT)]
_HEAL = [f"tests/multiproc/test_{name}.py" for name in ("manager", "shared")]
_ARGUMENTS = dict(zip(PARTS, (_UNIT, _HEAL), strict=True))

# What is installed beside the wheel: all that the unit part looks for, in its newest version.
_EXTRAS = "[demo,test]"

_VERSIONS = """
import importlib.metadata, json, platform, torch
names = ["numpy", "msgpack", "xxhash", "torchao", "torchdata", "pytest"]
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__}
                 | {name: importlib.metadata.version(name) for name in names}))
"""
_WHERE = "import ft_transport; print(ft_transport.__file__)"


def interpreter(python: str) -> str | None:
    """The executable of a Python, ``"3.11"``; None if PATH has none that runs."""
    # Every one of that name: a version manager's shim may be there and have nothing behind it.
    for folder in os.get_exec_path():
        found = shutil.which(f"python{python}", path=folder)
        if found and subprocess.run([found, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return found
    return None


def counted(report: str) -> dict[str, Any]:
    """What pytest's XML report counts, and the tests that failed."""
    num_all = num_skipped = 0
    failures = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        num_all += 1
        num_skipped += case.find("skipped") is not None
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(f"{case.get('classname')}.{case.get('name')}")
    # A test that fails, and whose teardown does so too, is there twice.
    failed = len(set(failures))
    return {
        "passed": num_all - num_skipped - len(failures),
        "failed": failed,
        "skipped": num_skipped,
        "failures": sorted(set(failures)),
    }


class Folder:
    """Where environments, the wheel, and results are.

    Args:
        path: Made if it is not there. What it holds of earlier calls is used again.
        seconds: That the unit part, and the heals, may take in each cell.
    """

    def __init__(self, path: Path, seconds: int) -> None:
        self._path = path.resolve()
        self._seconds = seconds
        self._commit = ""
        self._path.mkdir(parents=True, exist_ok=True)

    def result_of(self, cell: Cell) -> dict[str, Any] | None:
        """What an earlier run gave; None if there was none."""
        path = self._result_path(cell)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _result_path(self, cell: Cell) -> Path:
        return self._path / f"{cell.name}.json"

    def build(self) -> None:
        """Make the wheel, and a copy of all that is beside the package: no test can then import the checkout's."""
        self._commit = _run(["git", "describe", "--always", "--dirty"], cwd=ROOT)
        for name in ("wheel", "source", "sdist"):
            shutil.rmtree(self._path / name, ignore_errors=True)
        listed = _run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
        for name in filter(None, listed.split("\0")):
            # Built from a copy as well: setuptools leaves its folders beside what it builds.
            self._copy(name, "sdist")
            if not name.startswith("ft_transport/"):
                self._copy(name, "source")
        python = interpreter("3.11") or "python3"
        pip_wheel = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir"]
        _run([*pip_wheel, "--wheel-dir", str(self._path / "wheel"), str(self._path / "sdist")])

    def _copy(self, name: str, to: str) -> None:
        if (ROOT / name).exists():  # else it was removed, and git does not know yet
            target = self._path / to / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)

    def is_done(self, cell: Cell) -> bool:
        """Whether there is nothing left to run of it."""
        result = self.result_of(cell) or {}
        return "install" in result or set(PARTS) <= result.keys()

    def forget(self, cell: Cell) -> None:
        """Remove its result."""
        self._result_path(cell).unlink(missing_ok=True)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run those parts of a cell that have no result, keep what came of each, and give it all."""
        result: dict[str, Any] = self.result_of(cell) or {"versions": {}, "commit": self._commit}
        try:
            python = self._install(cell)
            result["versions"] = json.loads(_run([python, "-c", _VERSIONS]))
        except Failed as exc:
            result["install"] = str(exc)
            self._keep(cell, result)
            return result
        for part, arguments in _ARGUMENTS.items():
            if part not in result:
                result[part] = self._test(cell, part, arguments)
                self._keep(cell, result)
        return result

    def _keep(self, cell: Cell, result: dict[str, Any]) -> None:
        self._result_path(cell).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def remove(self, cell: Cell) -> None:
        """Remove the environment of a cell, some gigabytes."""
        shutil.rmtree(self._path / cell.environment, ignore_errors=True)

    def _install(self, cell: Cell) -> str:
        """Make the environment what the cell says; gives its Python.

        Raises:
            Failed: It cannot be had.
        """
        found = interpreter(cell.python)
        if found is None:
            raise Failed(f"no python{cell.python}")
        python = str(self._path / cell.environment / "bin" / "python")
        if not Path(python).exists():
            _run([found, "-m", "venv", str(self._path / cell.environment)])
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        # First: what one distribution removes are the other one's files.
        _run([*pip, "uninstall", "--yes", "torchft", "torchft-nightly", "ft_transport"])
        also = ALSO.get(cell.torch, [])
        (wheel,) = (self._path / "wheel").glob("*.whl")
        _run([*pip, "install", "--no-cache-dir", f"{wheel}{_EXTRAS}", f"torch=={cell.torch}", cell.torchft, *also])
        # Of the wheel alone: an extra that drew in the other torchft would have written over this one.
        where = _run([python, "-c", _WHERE], cwd=self._path / "source")
        if not Path(where).resolve().is_relative_to((self._path / cell.environment).resolve()):
            raise Failed(f"ft_transport is imported from {where}")
        return python

    def _test(self, cell: Cell, part: str, arguments: Sequence[str]) -> dict[str, Any]:
        report = self._path / f"{cell.name}-{part}.xml"
        report.unlink(missing_ok=True)
        # Not ``python -m pytest``, which would put the folder that it is called in before all others.
        pytest = self._path / cell.environment / "bin" / "pytest"
        with open(report.with_suffix(".log"), "wb") as log:
            process = subprocess.Popen(
                [str(pytest), "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments],
                cwd=self._path / "source",
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(self._seconds)
            except subprocess.TimeoutExpired:
                return {"outcome": f"not done after {self._seconds // 60} min"}
            finally:
                _end(process)
        if not report.exists():
            return {"outcome": f"pytest ended with {process.returncode}"}
        return {"outcome": "ran", **counted(report.read_text(encoding="utf-8"))}


class Failed(Exception):
    """A step on the way to the tests failed; says how."""


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR: ")]
        raise Failed((errors or lines)[-1].removeprefix("ERROR: "))
    return done.stdout.strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End all that the tests have started; they have a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
