"""Who imports whom. Imports only run downwards; this table is the shape of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ft_transport

PACKAGE = Path(ft_transport.__file__).parent
FILES = sorted(PACKAGE.glob("*.py"))
BENCH = sorted((PACKAGE / "bench").glob("*.py"))
TESTING = sorted((PACKAGE / "testing").glob("*.py"))

_DATA = {"_geometry", "_layout", "_leaves", "_manifest", "_memory", "_tree", "_values"}
_SHARED = _DATA | {"_channel", "_control", "_deadline", "errors", "report"}

_LANES = {"_conversation", "_doors", "_lanes", "_meeting", "_talk"}
_REPORT = {"_deadline", "errors", "report"}

# What each file may import of ours. Smaller is better; larger is a decision.
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "report": {"errors"},
    "_deadline": set(),
    "_crew": set(),
    "_digest": {"_memory"},
    "_lent": set(),
    "_memory": {"_lent", "errors"},
    "_geometry": set(),
    "_pickled": set(),
    "_values": {"_pickled"},
    "_tree": {"errors"},
    "_leaves": {"_geometry", "_values"},
    "_kinds_python": {"_geometry", "_leaves", "_values"},
    "_kinds": {"_geometry", "_kinds_python", "_leaves", "_values"},
    "_kinds_distributed": {"_geometry", "_kinds_python", "_leaves", "_values"},
    "_manifest": {"_geometry", "_kinds", "_kinds_distributed", "_leaves", "_memory", "_tree", "_values", "errors"},
    "_layout": {"_geometry", "_manifest"},
    "_codec": {"_digest", "_geometry", "_layout", "_leaves", "_manifest", "_memory", "_tree", "_values", "errors"},
    "_template": {"_geometry", "_kinds_distributed", "_leaves", "_manifest", "_memory", "_tree", "errors", "report"},
    "_landing": _DATA | {"_kinds_distributed", "_template", "errors", "report"},
    "_channel": {"_deadline", "errors"},
    "_control": {"_channel", "_codec", "_deadline", "errors"},
    "_transfer": {"_channel", "_control", "_crew", "_digest", "_layout", "errors", "events", "report"},
    "_torn": {"errors", "report"},
    "_manager": {"errors"},
    "_rewrite": {"_digest", "_landing", "_layout", "_memory", "_versions"},
    "_versions": {"_deadline", "_layout", "_manifest", "_tree", "errors"},
    "_source": _SHARED | {"_codec", "_digest", "_transfer", "_versions"},
    "_destination": _SHARED | {"_codec", "_digest", "_landing", "_rewrite", "_template", "_torn", "_transfer"},
    "divergence": {"_digest", "_kinds", "_kinds_distributed", "_leaves", "_memory", "_tree", "_values", "errors"},
    "_telemetry": {"_version", "report"},
    "events": {"_telemetry", "report"},
    "_progress": {"_crew", "_deadline", "events", "report"},
    "_teller": {"_deadline"},
    "_call": {"_manager", "_memory", "_rewrite", "_teller", "_torn", "divergence", "errors", "events", "report"},
    "transport": {
        "_call",
        "_channel",
        "_deadline",
        "_destination",
        "_landing",
        "_progress",
        "_rewrite",
        "_source",
        "_torn",
        "_transfer",
        "divergence",
        "errors",
        "events",
        "report",
    },
    # Over lanes.
    "_conversation": {"_digest", "errors"},
    "_meeting": {"_conversation", "errors"},
    "_splice": set(),
    "_resume": {"_digest", "_geometry", "_layout"},
    "_lanes": {"_deadline", "_splice", "errors"},
    "_doors": {"_deadline", "_lanes", "_meeting", "errors"},
    "_talk": {"_conversation", "_lanes", "_memory", "errors"},
    "_work": set(),
    "_supply": {"_conversation", "_crew", "_deadline", "_lanes", "_memory", "_talk", "errors"},
    "_desk": {"_conversation", "_deadline", "_lanes", "_meeting", "_supply", "_talk", "errors"},
    "_lane_options": {"_layout", "_transfer"},
    "_relay": {"_desk", "_lane_options", "_landing", "_lanes", "_layout", "_memory", "_rewrite", "_supply", "_work"}
    | {"_versions", "errors"},
    "_fetch": _LANES
    | {"_crew", "_landing", "_lane_options", "_layout", "_memory", "_relay", "_rewrite", "_work", "errors", "report"},
    "_trial": {"_deadline", "_fetch"},
    "_lane_source": _LANES
    | {"_crew", "_desk", "_lane_options", "_memory", "_progress", "_source", "_supply", "_teller", "_transfer"}
    | _REPORT
    | {"_versions", "events"},
    "_lane_destination": _LANES
    | _REPORT
    | {
        "_codec",
        "_desk",
        "_digest",
        "_fetch",
        "_landing",
        "_lane_options",
        "_layout",
        "_manifest",
        "_memory",
        "_progress",
        "_relay",
        "_resume",
        "_rewrite",
        "_template",
        "_torn",
        "_transfer",
        "_trial",
        "_work",
    },
    "lane_transport": {
        "_call",
        "_deadline",
        "_desk",
        "_doors",
        "_landing",
        "_lane_destination",
        "_lane_options",
        "_lane_source",
        "_meeting",
        "_progress",
        "_relay",
        "_resume",
        "_rewrite",
        "_teller",
        "_torn",
        "divergence",
        "errors",
        "events",
        "report",
    },
    "distributed": _SHARED | {"_codec", "events", "_landing", "_source", "_template", "_torn", "_transfer"},
    "__init__": {
        "_geometry",
        "_leaves",
        "_progress",
        "_version",
        "divergence",
        "errors",
        "events",
        "lane_transport",
        "report",
        "transport",
    },
}
# What ft_transport.testing may import of ours, beside itself: the seams, and the wire to find messages in.
ALLOWED_TESTING = {
    "__init__": set(),
    "_memory": {"_channel", "_deadline", "errors"},
    "_faults": set(),
    "_stream": {"_conversation", "errors"},
    "_channel": {"_channel", "_codec", "_control", "_deadline"},
    "_proxy": {"_deadline", "_meeting"},
    "_transport": {"_channel", "report"},
}
# The benchmark is a user: public names only.
PUBLIC = {"divergence", "errors", "events", "report", "lane_transport", "transport", "distributed", "testing", "bench"}


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, by its full name, wherever in the file."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative imports hide who imports whom"
            assert node.module is not None
            yield node.module
            if node.module in ("ft_transport", "torch", "torch.distributed"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(file) if name.startswith("ft_transport.")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_imports_of_ours(file: Path) -> None:
    assert file.stem in ALLOWED, f"give {file.name} a line in ALLOWED"
    assert ours(file) <= ALLOWED[file.stem]


@pytest.mark.parametrize("file", TESTING, ids=lambda file: file.stem)
def test_imports_of_the_faults(file: Path) -> None:
    assert ours(file) - {"testing"} <= ALLOWED_TESTING[file.stem]
    assert set(ALLOWED_TESTING) == {file.stem for file in TESTING}


@pytest.mark.parametrize("file", TESTING, ids=lambda file: file.stem)
def test_faults_read_no_clock_and_need_no_torchft(file: Path) -> None:
    assert not {"time", "torchft"} & {name.split(".")[0] for name in imported(file)}


def test_the_table_has_no_cycle_and_no_dead_line() -> None:
    assert {file.stem for file in FILES} == set(ALLOWED)
    below: dict[str, set[str]] = {}
    while len(below) < len(ALLOWED):
        ready = {name for name in ALLOWED if name not in below and ALLOWED[name] <= set(below)}
        assert ready, f"a cycle among {set(ALLOWED) - set(below)}"
        below.update({name: ALLOWED[name] for name in ready})


@pytest.mark.parametrize("file", BENCH, ids=lambda file: file.stem)
def test_the_benchmark_uses_public_names_only(file: Path) -> None:
    names = {name.split(".")[1] for name in imported(file) if name.startswith("ft_transport.")}
    modules = {name for name in names if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()}
    assert modules <= PUBLIC
    assert {name for name in names - modules if name.startswith("_") and name != "__version__"} == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_only_the_torchft_transports_import_torchft(file: Path) -> None:
    if file.stem not in ("transport", "lane_transport"):
        assert not any(name.split(".")[0] == "torchft" for name in imported(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_only_deadline_reads_the_clock_that_decides(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and node.attr in ("monotonic", "monotonic_ns", "time_ns", "sleep"):
            # A span says when it was, which decides nothing.
            assert file.stem == "_deadline" or (file.stem == "_telemetry" and node.attr == "time_ns")
        if isinstance(node, ast.Attribute) and node.attr == "time" and isinstance(node.value, ast.Name):
            assert node.value.id != "time"
        if isinstance(node, ast.ImportFrom):
            assert node.module != "time", f"{file.name}: from time import … hides who reads the clock"


# Names by which a channel goes; everything else with send, recv or wait would be a group or a Work.
CHANNELS = {"channel", "_channel"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_only_two_files_use_sockets(file: Path) -> None:
    used = {name.split(".")[0] for name in imported(file)} & {"socket", "selectors", "ssl", "select"}
    # The transport takes contexts for TLS from its user.
    everything = {"socket", "select", "selectors", "ssl"}
    assert used <= {"_lanes": everything, "_doors": everything, "lane_transport": {"ssl"}}.get(file.stem, set())


NOT_OVER_GROUPS = ("_channel", "_doors", "_lanes")


@pytest.mark.parametrize("file", [f for f in FILES if f.stem not in NOT_OVER_GROUPS], ids=lambda f: f.stem)
def test_only_the_channel_talks_to_groups_and_works(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("send", "recv", "wait"):
                owner = node.func.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                is_flights = node.func.attr == "send" and isinstance(owner, ast.Call)
                assert name in CHANNELS or is_flights, f"{file.name}:{node.lineno}: {ast.unparse(node.func)}"
            assert node.func.attr not in ("isend", "irecv", "get_future", "is_completed")
        if isinstance(node, ast.Attribute):
            assert node.attr != "work" or ast.unparse(node.value) == "arrival", f"{file.name}:{node.lineno}"
            if ast.unparse(node.value) in ("pg", "self._pg"):
                assert node.attr in ("size", "rank"), f"{file.name}:{node.lineno}: {ast.unparse(node)}"
    assert not any(name in ("torch.distributed.Work", "torch.distributed.P2POp") for name in imported(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_only_distributed_unpickles(file: Path) -> None:
    assert file.stem in ("distributed", "_values") or "pickle" not in set(imported(file))
    used = {n.attr for n in ast.walk(tree(file)) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"}
    assert file.stem == "distributed" or used <= {"Pickler", "UnpicklingError"}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert arguments.get("weights_only") == "True"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "__import__")


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=PACKAGE.parent, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_package_works_without_torchft() -> None:
    """Without it, everything but its own transport can be imported, and it is not imported before it is used."""
    out = run(
        """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchft":
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocked())
import ft_transport, ft_transport.distributed, ft_transport.testing
print(ft_transport.distributed.PGTransport.__name__, "torchft" in sys.modules)
for name in ("PGTransport", "LaneTransport"):
    try:
        getattr(ft_transport, name)
    except ModuleNotFoundError as exc:
        print(exc)
"""
    )
    assert out.split("\n")[:3] == ["PGTransport False", "blocked: torchft", "blocked: torchft"]


def test_importing_the_package_does_not_import_torchft() -> None:
    out = run(
        """
import sys, ft_transport
print(any(name.split(".")[0] == "torchft" for name in sys.modules))
try:
    ft_transport.no_such_name
except AttributeError as exc:
    print(exc)
"""
    )
    assert out.split("\n")[:2] == ["False", "module 'ft_transport' has no attribute 'no_such_name'"]


def test_all_public_names_exist() -> None:
    for name in ft_transport.__all__:
        assert getattr(ft_transport, name) is not None
