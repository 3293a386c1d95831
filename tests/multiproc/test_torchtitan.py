"""torchtitan's parts with ours among them heal; skipped where torchtitan is not installed (docs/torchtitan.md)."""

from __future__ import annotations

import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from .test_examples import ROOT, lighthouse, marked_processes, marker  # noqa: F401
from .test_training_examples import environment, heal_one_after_the_other, two_replicas

JOB = Path(__file__).with_name("torchtitan_job.py")


def test_the_page_has_what_is_run() -> None:
    job = JOB.read_text()
    recipe = job[job.index("class LaneManager") : job.index("class Job")].strip()
    assert textwrap.indent(recipe, "    ", lambda line: bool(line.strip())) in (ROOT / "docs/torchtitan.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("torchtitan") is None, reason="torchtitan is not installed")
def test_torchtitans_parts_heal(tmp_path: Path, lighthouse: str, marker: str) -> None:  # noqa: F811
    """Under an asynchronous quorum: two ranks, sharded by FSDP2, are a replica, and each replica is killed once."""
    with two_replicas(JOB, tmp_path, 2, (1, 1), **environment(lighthouse, marker)) as replicas:
        heal_one_after_the_other(replicas, 2, 2)
    assert marked_processes(marker) == []
