"""Set-up that all tests share."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from ft_transport.testing import FaultyFabric

# Tests run on every core already, one process each. A second thread for an operation only waits for the first one, and
# spins meanwhile: that took ten times as long as the work. For all processes that tests start, too, and so before torch
# is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run, and no time limit for each: machines that run tests are busy.
settings.register_profile("repeatable", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

# Whoever starts the tests in the background may have them ignore Ctrl-C, and all their processes with them.
signal.signal(signal.SIGINT, signal.default_int_handler)


# A third of the time that it takes to collect twelve thousand tests would go into looking for garbage among them.
gc.disable()

# Whether tests run that differ little from others, see ``make thorough``.
THOROUGH = bool(os.environ.get("FT_TRANSPORT_THOROUGH"))
# These take longest, and wait for most of it: begun first, they wait while others compute, and none of them is last.
LONGEST = ("tests/multiproc/", "tests/chaos/", "tests/netns/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """By file, and otherwise as they were: ``make test`` hands out one file after the other in this order."""
    if not THOROUGH:
        left = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture
def fabric() -> Iterator[FaultyFabric]:
    """A one-sided transport called ``"faulty"``, of which no endpoint is left."""
    # Not above: torch is not to be imported before it is known how many threads it may have.
    from ft_transport._net.one_sided import await_closed
    from ft_transport.testing import FaultyFabric

    with FaultyFabric() as made:
        yield made
    assert await_closed(timedelta(seconds=10))
    assert made.num_open == 0


def pytest_configure(config: pytest.Config) -> None:
    """Have temporary files where they are removed: torchrun, and whatever else is killed, leaves its own behind."""
    if hasattr(config, "workerinput"):
        return  # the process that started this one has done so
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # pytest's own are for who looks for a fault
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="ft_transport-")
    config.add_cleanup(lambda: shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True))


def pytest_collection_finish() -> None:
    """Let later collections look at what has been made since: going through all modules takes a tenth of a second."""
    gc.enable()
    gc.collect()
    gc.freeze()


# What needs an accelerator runs on a simulated one then, see ``make simulated``.
if os.environ.get("FT_TRANSPORT_DEVICE", "").startswith("sim"):
    import simulator  # noqa: F401
