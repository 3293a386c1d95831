"""Breaks one promise of the code after the other, and sees whether the test that holds it notices.

    python tests/mutants.py              all of them, a few seconds each
    python tests/mutants.py lanes relay  those whose promise has one of these words in it

Works on a copy of the tree in a temporary folder: the tests must pass there first, and then each must fail once its
promise is broken. Exits with 1 if one passes all the same (the mutant *survives*), or if what is to be replaced is not
in the source any more, exactly once: then the promise has moved, and its line in :data:`MUTANTS` must follow.
``tests/test_mutants.py`` looks for that in each run of the tests, which do not include this.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("ft_transport", "tests", "docs", "examples", "setup.cfg", "pyproject.toml", "README.md")
# A test that hangs has noticed, too.
LIMIT = 180.0


class Mutant(NamedTuple):
    """One change of the code.

    Attributes:
        promise: What it breaks.
        file: Of the package.
        old: What is replaced, which must be there exactly once.
        new: By what.
        test: The one that must fail.
    """

    promise: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, root: Path = ROOT) -> str:
        """The file's text with the change.

        Raises:
            LookupError: What is to be replaced is not there exactly once.
        """
        text = (root / "ft_transport" / self.file).read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1:
            raise LookupError(f"{self.file}: {self.old.strip()!r} is there {count} times; where is this promise now?")
        return text.replace(self.old, self.new)


LANES = "tests/multiproc/test_lanes.py::"
SOURCE = "tests/lanes/test_source.py::"
DEVICE = "tests/test_device.py::"

MUTANTS = [
    Mutant(
        "a staged message marks the replica torn",
        "_lanes/sink.py",
        "            self._note_torn(message)\n            self._landing.placement.scatter",
        "            self._landing.placement.scatter",
        LANES + "test_what_goes_through_a_bucket_tears_the_replica_too",
    ),
    Mutant(
        "a relay without digests does not splice",
        "_lanes/relay.py",
        "return self.verified",
        "return True",
        "tests/lanes/test_relay.py::test_what_nobody_could_check_is_copied_before_this_side_goes_on",
    ),
    Mutant(
        "memory that the next message will overwrite is not told by its place",
        "_lanes/session.py",
        "if steady and protocol.state is State.DIRECT",
        "if protocol.state is State.DIRECT",
        "tests/lanes/test_session.py::test_what_is_small_or_will_not_stay_is_sent",
    ),
    Mutant(
        "nobody reads a process that has not shown that it is the peer's",
        "_net/cma.py",
        "if found != token:",
        "if False:",
        "tests/net/test_cma.py::test_a_token_that_is_not_there_is_no_peers",
    ),
    Mutant(
        "a new supplier begins without the damage of the one before",
        "_lanes/move.py",
        "self._sink.pending.forgive()",
        "pass",
        LANES + "test_the_source_has_no_part_in_what_a_relay_has_damaged",
    ),
    Mutant(
        "who takes memory away waits for who reads it",
        "_plan/lent.py",
        "while not self._nobody.wait_for(lambda: not self._inside, _LOOK_AGAIN_S):",
        "while False:",
        "tests/plan/test_lent.py::test_who_takes_memory_away_waits_for_who_reads_it",
    ),
    Mutant(
        "a supplier bounds message numbers",
        "_lanes/supplier.py",
        "if asked.number >= len(self._store.sizes)",
        "if False",
        "tests/lanes/test_supplier.py::test_a_message_that_there_is_not_is_not_looked_for",
    ),
    Mutant(
        "how many peers wait is bounded",
        "_lanes/dispatcher.py",
        "if len(self._waiting) > ",
        "if len(self._waiting) > 100_000 + ",
        "tests/lanes/test_dispatcher.py::test_how_many_wait_is_bounded_and_the_oldest_make_room",
    ),
    Mutant(
        "a relay is drained in disallow_checkpoint",
        "_torchft/under_way.py",
        "relay.drain()",
        "pass",
        LANES + "test_a_relay_waits_for_who_fetches_from_it",
    ),
    Mutant(
        "a trickle does not outlast the deadline of who reads",
        "_net/connection.py",
        "                timer.check()  # as in write",
        "                pass",
        "tests/net/test_connection.py::test_what_goes_on_coming_has_a_deadline",
    ),
    Mutant(
        "what is as fast as it is read does not outlast the deadline of who reads",
        "_net/connection.py",
        "timer.check()  # there may be something to read each time",
        "pass  # there may be something to read each time",
        "tests/net/test_connection.py::test_what_goes_on_coming_has_a_deadline",
    ),
    Mutant(
        "how many lanes a destination opens is bounded",
        "_lanes/supplier.py",
        "len(self._lanes) >= MAX_LANES",
        "len(self._lanes) >= 1000 * MAX_LANES",
        "tests/lanes/test_supplier.py::test_how_many_lanes_a_destination_may_open_is_bounded",
    ),
    Mutant(
        "a relay keeps copies of small messages",
        "_lanes/relay.py",
        "data.clone()",
        "data",
        "tests/lanes/test_relay.py::test_small_messages_are_passed_on_as_they_came",
    ),
    Mutant(
        "failed destinations are not named as suppliers",
        "_lanes/chain.py",
        'alive = other.peer.outcome in ("pending", "complete")',
        "alive = True",
        SOURCE + "test_who_has_failed_supplies_nobody",
    ),
    Mutant(
        "a resumed receive begins torn",
        "_lanes/destination.py",
        "self._report.torn = bool(left)",
        "pass",
        LANES + "test_what_is_left_of_an_earlier_receive_is_a_mix_from_the_beginning",
    ),
    Mutant(
        "the source's deadline is told to destinations",
        "_lanes/serving.py",
        'if outcome in ("failed", "timed out")',
        'if outcome in ("failed",)',
        SOURCE + "test_the_sources_deadline_is_told",
    ),
    Mutant(
        "who goes on talking does not outlast the source's deadline",
        "_lanes/serving.py",
        "header, body = session.recv(timer)\n            timer.check()\n",
        "header, body = session.recv(timer)\n",
        SOURCE + "test_the_sources_deadline_is_told",
    ),
    Mutant(
        "an earlier visit of the same identity is cut",
        "_lanes/source.py",
        "earlier.session.connection.abort()",
        "pass",
        SOURCE + "test_whoever_comes_again_is_served_in_place_of_the_earlier_visit",
    ),
    Mutant(
        "the optimizer's hook looks at every parameter group",
        "_plan/unchanged.py",
        '"param_groups", ())',
        '"param_groups", ())[:1]',
        "tests/plan/test_unchanged.py::test_every_parameter_group_of_an_optimizer_is_seen",
    ),
    Mutant(
        "what comes from a device is there before it is sent",
        "_lanes/supplier.py",
        "        copied.finish()\n",
        "",
        DEVICE + "test_copies_of_one_message_overlap_what_the_wire_does_with_another",
    ),
    Mutant(
        "a bucket is not filled anew while a device copies from it",
        "_plan/buffers.py",
        "        self._copies.finish()\n",
        "",
        DEVICE + "test_copies_of_one_message_overlap_what_the_wire_does_with_another",
    ),
    Mutant(
        "each device that a state is on is waited for before its bytes are read",
        "_device.py",
        "    devices = _devices_of(tensors)\n    for device in devices:\n",
        "    devices = _devices_of(tensors)\n    for device in ():\n",
        DEVICE + "test_a_kernel_that_still_writes_to_the_state_is_waited_for",
    ),
    Mutant(
        "copies run in streams of a transfer's own",
        "_device.py",
        "self._own = [_seam.new_stream(device) for device in self.devices]",
        "self._own = [_seam.current_stream(device) for device in self.devices]",
        DEVICE + "test_copies_do_not_wait_for_the_step_that_training_is_in",
    ),
]


def copy_of_the_tree(folder: Path) -> Path:
    """A copy that the tests run in."""
    root = folder / "tree"
    root.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, root / name)
    return root


def passes(root: Path, tests: list[str]) -> tuple[bool, str]:
    """Whether these tests pass in a copy of the tree, and the end of what they say.

    Raises:
        RuntimeError: They could not be run: there is no such test, or the code cannot be imported.
    """
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line", "--timeout=60"]
    try:
        done = subprocess.run(
            [*command, *tests], cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no end after {LIMIT:g} s"
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(tests)} cannot be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0, done.stdout[-2000:]


def is_noticed(mutant: Mutant, root: Path) -> bool:
    """Whether the test fails with the change; the copy is as before afterwards."""
    path = root / "ft_transport" / mutant.file
    before, changed = path.read_text(encoding="utf-8"), mutant.apply(root)
    path.write_text(changed, encoding="utf-8")
    try:
        return not passes(root, [mutant.test])[0]
    finally:
        path.write_text(before, encoding="utf-8")


def run(mutants: list[Mutant]) -> bool:
    """Try them all and print a table; gives whether each was noticed."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = copy_of_the_tree(Path(folder))
        for mutant in mutants:
            mutant.apply(root)
        sound, said = passes(root, sorted({mutant.test for mutant in mutants}))
        if not sound:
            raise RuntimeError(f"the tests fail already:\n{said}")
        print(f"| {'promise that is broken':76} | {'file':22} | {'':8} | {'s':>4} |", flush=True)
        survivors = 0
        for mutant in mutants:
            begin = time.perf_counter()
            noticed = is_noticed(mutant, root)
            survivors += not noticed
            seconds = time.perf_counter() - begin
            verdict = "noticed" if noticed else "SURVIVES"
            print(f"| {mutant.promise:76} | {mutant.file:22} | {verdict:8} | {seconds:4.0f} |", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} noticed")
    return not survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only promises with one of these words in them")
    words = parser.parse_args().words
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.promise for word in words)]
    if not chosen:
        parser.error("no promise has one of these words in it")
    try:
        return 0 if run(chosen) else 1
    except (LookupError, RuntimeError) as exc:
        print(exc, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
