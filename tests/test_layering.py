"""Who imports whom. Imports only run downwards; the table of rooms is the shape of the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ft_transport

PACKAGE = Path(ft_transport.__file__).parent
TESTS = Path(__file__).resolve().parent
PYPROJECT = TESTS.parent / "pyproject.toml"
BENCH = sorted((PACKAGE / "bench").glob("*.py"))
TESTING = sorted((PACKAGE / "testing").glob("*.py"))
# Registers the kinds, all in one place: their order matters.
KINDS = PACKAGE / "_state" / "kinds"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FILES = sorted(set(PACKAGE.rglob("*.py")) - set(BENCH) - set(TESTING))

_NOTHING: set[str] = set()
_MOVING = {"_deadline", "_device", "_options", "_plan", "_process", "_state", "_telemetry", "_threads", "_wire"}
_MOVING |= {"errors"}

# The rooms (a folder, or a file at the top), from the ground up, and from which others each may import: lines above its
# own alone. Smaller is better; larger is a decision.
ROOMS: dict[str, set[str]] = {
    "_version": _NOTHING,
    "errors": _NOTHING,
    "_training": {"errors"},
    "_deadline": _NOTHING,
    "_threads": _NOTHING,
    "_process": _NOTHING,
    "_device": {"_deadline", "errors"},
    "_telemetry": {"_deadline", "_threads", "_version", "errors"},
    "_net": {"_deadline", "_process", "errors"},
    "_state": {"_device", "_process", "errors"},
    "_wire": {"_process", "_state", "errors"},
    "_options": {"_telemetry", "_wire"},
    "_plan": {"_deadline", "_device", "_options", "_process", "_state", "_telemetry", "_wire", "errors"},
    "_group": _MOVING,
    "_lanes": _MOVING | {"_net"},
    "_check": {"_plan", "_process", "_state", "_telemetry", "_wire"},
    "state_digest": {"_device", "_options", "_plan", "_process", "_state", "_wire", "errors"},
    "_transport": {"_deadline", "_options", "_plan", "_process", "_telemetry", "_threads", "errors"},
    "distributed": _MOVING - {"_threads"} | {"_group", "_transport"},
    "_torchft": _MOVING | {"_group", "_lanes", "_net", "_transport", "state_digest"},
    "__init__": {"_check", "_state", "_telemetry", "_torchft", "_training", "_version", "errors", "state_digest"},
}
# What ft_transport.testing may import of ours, beside itself: the seams, and the wire to find messages in.
ALLOWED_TESTING: dict[str, set[str]] = {
    "__init__": set(),
    "_memory": {"_deadline", "_group/channel", "errors"},
    "_fabric": {"_net/cma", "_net/one_sided", "_process"},
    "_faults": set(),
    "_device": {"_device"},
    "_stream": {"_lanes/protocol", "errors"},
    "_channel": {"_deadline", "_group/channel", "_group/control", "_wire/frames"},
    "_proxy": {"_deadline", "_net/endpoint"},
    "_transport": {"_group/channel", "_telemetry/report"},
}
# Source files without a test file of their own: where what they say is tested instead.
TESTED_ELSEWHERE = {
    "__init__": "test_layering.py",
    "_version": "test_layering.py",
    "_state/kinds": "state/kinds/test_base.py",
    "_lanes/destination": "multiproc/test_lanes.py",
    "_net/listener": "net/test_dial.py",
    "_training/fully_sharded": "multiproc/test_bind.py",
    "_training/provisional": "training/test_materialize.py",
}
# Folders of tests that may wait for time to pass: of several processes, which share no clock but that one.
IN_REAL_TIME = {"chaos", "gpu", "multiproc", "netns", "fabric"}
# The benchmark is a user: public names only. But what bounds lanes within a machine is the very call that they make.
PUBLIC = {"state_digest", "errors", "distributed", "testing", "bench"}
BARE_CALLS = {"limits": {"_net/cma"}}


def name_of(file: Path) -> str:
    """``"_net/dial"``, and ``"_net"`` for what a folder says of itself."""
    return file.relative_to(PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")


def room_of(name: str) -> str:
    return name.partition("/")[0]


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
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module in ("ft_transport", "torch", "torch.distributed"):
                yield from names
            # A file of a folder is imported from it, as a name.
            elif node.module.startswith("ft_transport.") and PACKAGE.joinpath(*node.module.split(".")[1:]).is_dir():
                yield from names
                continue
            yield node.module


def ours(file: Path) -> set[str]:
    """What a file imports of ours, named as by :func:`name_of`."""
    return {name.partition(".")[2].replace(".", "/") for name in imported(file) if name.startswith("ft_transport.")}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_of_other_rooms(file: Path) -> None:
    name = name_of(file)
    assert room_of(name) in ROOMS, f"give {room_of(name)} a line in ROOMS"
    others = {other for other in ours(file) if room_of(other) != room_of(name)}
    assert {other for other in others if room_of(other) not in ROOMS[room_of(name)]} == set()


def test_the_table_runs_downwards_and_has_no_dead_line() -> None:
    above: set[str] = set()
    for room, others in ROOMS.items():
        assert others <= above, f"{room} may only import from lines above its own"
        above.add(room)
    files = {name_of(file) for file in FILES}
    assert {room_of(name) for name in files} == set(ROOMS)


def test_no_circle_among_files() -> None:
    """Inside of a room anything else goes."""
    files = {name_of(file): file for file in FILES}
    waiting = {name: ours(file) & set(files) for name, file in files.items()}
    while waiting:
        ready = {name for name, others in waiting.items() if not others & set(waiting)}
        assert ready, f"a circle among {set(waiting)}"
        waiting = {name: others for name, others in waiting.items() if name not in ready}


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.name == "__init__.py" and f.parent not in (PACKAGE, KINDS)], ids=name_of
)
def test_a_folder_says_what_it_is_and_imports_nothing(file: Path) -> None:
    (only,) = tree(file).body
    assert isinstance(only, ast.Expr)
    assert ast.get_docstring(tree(file))


def test_every_folder_is_in_the_wheel() -> None:
    listed = re.findall(r'^    "(ft_transport[\w.]*)",$', PYPROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    folders = {file.parent.relative_to(PACKAGE.parent).as_posix() for file in PACKAGE.rglob("*.py")}
    assert sorted(listed) == sorted(name.replace("/", ".") for name in folders)


def file_of_tests(name: str) -> str:
    """Where the tests of a source file are. A room has its folder, without the underscore where Python allows it."""
    *rooms, module = name.split("/")
    if rooms and rooms[0] != "_torchft":  # a folder torchft would be imported in the place of torchft itself
        rooms[0] = rooms[0].removeprefix("_")
    return "/".join([*rooms, f"test_{module.removeprefix('_')}.py"])


def test_every_source_file_has_its_test_file() -> None:
    folders = {name_of(file) for file in FILES if file.name == "__init__.py" and file.parent not in (PACKAGE, KINDS)}
    names = {name_of(file) for file in FILES} - folders
    missing = {name for name in names if not (TESTS / file_of_tests(name)).exists()}
    assert missing == set(TESTED_ELSEWHERE)
    assert all((TESTS / where).exists() for where in TESTED_ELSEWHERE.values())


def test_every_test_file_of_a_room_has_its_source_file() -> None:
    rooms = {(TESTS / file_of_tests(name_of(file))).parent for file in FILES} - {TESTS}
    found = {file.relative_to(TESTS).as_posix() for room in rooms for file in room.glob("test_*.py")}
    assert found - {file_of_tests(name_of(file)) for file in FILES} == set()


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: file.relative_to(TESTS).as_posix())
def test_only_tests_of_several_processes_sleep(file: Path) -> None:
    if file.relative_to(TESTS).parts[0] in IN_REAL_TIME:
        return
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and node.attr == "sleep":
            assert ast.unparse(node.value) != "time", f"{file.name}:{node.lineno}: say what is waited for"
        if isinstance(node, ast.ImportFrom):
            assert node.module != "time", f"{file.name}: from time import … hides who sleeps"


@pytest.mark.parametrize("file", TESTING, ids=lambda file: file.stem)
def test_imports_of_the_faults(file: Path) -> None:
    assert {name for name in ours(file) if room_of(name) != "testing"} <= ALLOWED_TESTING[file.stem]
    assert set(ALLOWED_TESTING) == {file.stem for file in TESTING}


@pytest.mark.parametrize("file", TESTING, ids=lambda file: file.stem)
def test_faults_read_no_clock_and_need_no_torchft(file: Path) -> None:
    assert not {"time", "torchft"} & {name.split(".")[0] for name in imported(file)}


@pytest.mark.parametrize("file", BENCH, ids=lambda file: file.stem)
def test_the_benchmark_uses_public_names_only(file: Path) -> None:
    used = {room_of(name) for name in ours(file) - BARE_CALLS.get(file.stem, set())}
    modules = {name for name in used if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()}
    assert modules <= PUBLIC
    assert {name for name in used - modules if name.startswith("_") and name != "__version__"} == set()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_the_room_of_torchft_imports_torchft(file: Path) -> None:
    if room_of(name_of(file)) != "_torchft":
        assert not any(name.split(".")[0] == "torchft" for name in imported(file))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_deadline_reads_the_clock_that_decides(file: Path) -> None:
    name = name_of(file)
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Attribute) and node.attr in ("monotonic", "monotonic_ns", "time_ns", "sleep"):
            # A span says when it was, which decides nothing.
            # And a sleep of no time at all is none.
            assert name == "_deadline" or (name, node.attr) in {("_telemetry/otel", "time_ns"), ("_process", "sleep")}
        if isinstance(node, ast.Attribute) and node.attr == "time" and isinstance(node.value, ast.Name):
            assert node.value.id != "time"
        if isinstance(node, ast.ImportFrom):
            assert node.module != "time", f"{name}: from time import … hides who reads the clock"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_one_room_uses_sockets(file: Path) -> None:
    used = {name.split(".")[0] for name in imported(file)} & {"socket", "selectors", "ssl", "select"}
    name = name_of(file)
    if room_of(name) == "_net":
        assert not used or name not in ("_net/handshake", "_net/stall"), "the handshake decides, and does no I/O"
    else:
        # The transport takes contexts for TLS from its user.
        assert used <= ({"ssl"} if name == "_torchft/lanes" else set())


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_each_fabric_is_known_to_one_file(file: Path) -> None:
    """What it is made of has the same names nowhere else: the rest asks for places."""
    mine = {"process_vm_readv": "_net/cma", "torch.distributed._transport": "_net/one_sided"}
    code = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    docs = {ast.get_docstring(n, clean=False) for n in ast.walk(tree(file)) if isinstance(n, DOCUMENTED)}
    said = [str(node.value) for node in code if node.value not in docs] + list(imported(file))
    assert {home for name, home in mine.items() if any(name in text for text in said)} <= {name_of(file)}


# Names by which a channel goes, and a session over lanes; everything else with send, recv or wait would be a group or a
# Work.
CHANNELS = {"channel", "_channel"}
SESSIONS = {"session", "_session"}
OVER_GROUPS = [f for f in FILES if name_of(f) != "_group/channel" and room_of(name_of(f)) != "_net"]


@pytest.mark.parametrize("file", OVER_GROUPS, ids=name_of)
def test_only_the_channel_talks_to_groups_and_works(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("send", "recv", "wait"):
                owner = node.func.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                is_flights = node.func.attr == "send" and isinstance(owner, ast.Call)
                is_session = room_of(name_of(file)) == "_lanes" and name in SESSIONS and node.func.attr != "wait"
                is_session = is_session or (name_of(file), name) == ("_lanes/session", "self")
                assert name in CHANNELS or is_flights or is_session, (
                    f"{file.name}:{node.lineno}: {ast.unparse(node.func)}"
                )
            assert node.func.attr not in ("isend", "irecv", "get_future", "is_completed")
        if isinstance(node, ast.Attribute):
            assert node.attr != "work" or ast.unparse(node.value) == "arrival", f"{file.name}:{node.lineno}"
            if ast.unparse(node.value) in ("pg", "self._pg"):
                assert node.attr in ("size", "rank"), f"{file.name}:{node.lineno}: {ast.unparse(node)}"
    assert not any(name in ("torch.distributed.Work", "torch.distributed.P2POp") for name in imported(file))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_distributed_unpickles(file: Path) -> None:
    name = name_of(file)
    assert name in ("distributed", "_state/pickles") or "pickle" not in set(imported(file))
    used = {n.attr for n in ast.walk(tree(file)) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"}
    assert name == "distributed" or used <= {"Pickler", "UnpicklingError"}
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
    advice = "pip install 'ft_transport[torchft]', or torchft-nightly"
    assert out.split("\n")[:3] == ["PGTransport False", *[f"blocked: torchft: {advice}"] * 2]


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


@pytest.mark.parametrize(
    "code",
    [
        "import ft_transport, ft_transport.distributed, ft_transport.testing",
        "import torchft; from ft_transport import LaneTransport, PGTransport",
    ],
)
def test_importing_the_package_imports_nothing_that_no_state_has_asked_for(code: str) -> None:
    """What DTensor and ShardedTensor come with takes a second and more; whoever has such a leaf has imported it."""
    late = ("torch.distributed.tensor", "torch.distributed._shard", "torch._dynamo")
    out = run(f"{code}\nimport sys\nprint([name for name in sys.modules if name.startswith({late})])")
    assert out == "[]\n"


def test_all_public_names_exist() -> None:
    for name in ft_transport.__all__:
        assert getattr(ft_transport, name) is not None
