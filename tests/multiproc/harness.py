"""Real processes for tests: a worker runs one function at a time, can be killed or stopped, and is cheap to replace.

Workers are forked from a server process that has imported torch once, so a new one is there in tens of
milliseconds. Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch
from urllib.request import urlopen

import torch
import xxhash
from torch.distributed import TCPStore
from torchft.manager import REPLICA_ID_KEY, Manager

__all__ = [
    "DEVICE",
    "Died",
    "Residue",
    "Worker",
    "Workers",
    "digest",
    "new_manager",
    "quiet",
    "residue",
    "store_address",
    "tell",
    "wait_for_heartbeat",
    "wait_until",
    "workers",
]

# Where tests of lanes in one process have their states. ``make simulated`` runs them on an accelerator.
DEVICE = torch.device(os.environ.get("FT_TRANSPORT_DEVICE", "cpu"))

# Loopback by its own name: no test depends on what the host name resolves to.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
# How long a worker may take that waits for nothing; tests time what matters themselves.
PATIENCE = 40.0


# ---------------------------------------------------------------------------------- inside a worker


_to_parent: Connection | None = None
_tell_lock = threading.Lock()


def tell(name: str, value: object = None) -> None:
    """Send the parent an event; it gets the time of the call with it."""
    assert _to_parent is not None, "only in a worker"
    with _tell_lock:
        _to_parent.send(("event", name, time.monotonic(), value))


def _work(connection: Connection) -> None:
    global _to_parent
    _to_parent = connection
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    frozen = False
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        if not frozen:
            # All modules are here now. Later collections need not walk through them, which takes a tenth of a second.
            frozen = True
            gc.freeze()
        try:
            answer = ("done", function(*args))
        except Exception as exc:
            answer = ("raised", exc, traceback.format_exc())
        with _tell_lock:
            connection.send(answer)


class Residue(NamedTuple):
    """What a call could leave behind in its process."""

    threads: list[str]
    native_threads: int
    descriptors: int
    children: list[str]


def residue() -> Residue:
    """What is alive in this process now: Python threads, all threads, file descriptors, children."""
    gc.collect()
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    return Residue(
        sorted(thread.name for thread in threading.enumerate()),
        len(os.listdir("/proc/self/task")),
        len(os.listdir("/proc/self/fd")),
        children.read_text().split() if children.exists() else [],
    )


def quiet(seconds: float) -> float:
    """Do nothing for some seconds; gives the processor time that other threads of this process took meanwhile."""
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


def digest(state: object) -> str:
    """Fingerprint of every byte and plain value of nested dicts and lists, and of their types and shapes."""
    hashed = xxhash.xxh3_128()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            hashed.update(f"{value.dtype} {tuple(value.shape)}".encode())
            hashed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key in value:
                hashed.update(f"{key!r}:".encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            hashed.update(f"{type(value).__name__} of {len(value)}".encode())
            for item in value:
                add(item)
        else:
            hashed.update(f"{type(value).__name__} {value!r}".encode())

    add(state)
    return hashed.hexdigest()


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Poll until the condition holds.

    Raises:
        TimeoutError: It does not, after so many seconds.
    """
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"still not so after {seconds:g} s")
        time.sleep(0.001)


def new_manager(lighthouse: str, store_port: int, replica_id: str, timeout: timedelta, **options: Any) -> Manager:
    """A Manager of this machine, which forms a quorum of its own if nobody else is there.

    Args:
        lighthouse: Its address.
        store_port: Of the replica's own store.
        replica_id: How logs and the Lighthouse call it.
        timeout: Of each call, and for connecting.
        options: What the test is about; ``rank`` and ``world_size`` only where a replica has several ranks.
    """
    usual: dict[str, Any] = {"rank": 0, "world_size": 1, "min_replica_size": 1, "quorum_timeout": timedelta(seconds=60)}
    where = {"store_addr": "localhost", "store_port": store_port, "hostname": "localhost"}
    who = {"lighthouse_addr": lighthouse, "replica_id": replica_id}
    return Manager(**usual | options | where | who, timeout=timeout, connect_timeout=timeout)


def wait_for_heartbeat(lighthouse: str, manager: Manager) -> None:
    """Until the Lighthouse knows of this replica: from then on the others' quorum waits for it."""
    replica_id = manager._store.get(REPLICA_ID_KEY).decode()

    def known() -> bool:
        with urlopen(f"{lighthouse}/status", timeout=PATIENCE) as page:
            return replica_id in page.read().decode()

    wait_until(known)


# ---------------------------------------------------------------------------------- inside the test


class Died(Exception):
    """The worker's process has ended before it answered."""


class _Event(NamedTuple):
    time: float
    value: Any


class Worker:
    """One process, which runs what :meth:`start` gives it and answers through :meth:`result`."""

    def __init__(self, name: str) -> None:
        context = _context()
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), name=name)
        self.process.start()
        theirs.close()
        self._events: dict[str, list[_Event]] = {}
        self._answer: tuple[Any, ...] | None = None
        self._busy = False

    @property
    def idle(self) -> bool:
        """Whether the process lives and has answered."""
        return self.process.is_alive() and not self._busy

    def start(self, function: Callable[..., object], *args: object) -> None:
        """Run a function of a module in the worker; one at a time."""
        self._connection.send((function, args))
        self._busy = True

    def result(self, seconds: float = PATIENCE) -> Any:
        """What the function returned.

        Raises:
            Died: The process has ended.
            TimeoutError: No answer in time.
            Exception: What the function raised, with the worker's traceback as a note.
        """
        limit = time.monotonic() + seconds
        while self._answer is None:
            self._receive(limit)
        (kind, value, *text), self._answer = self._answer, None
        self._busy = False
        if kind == "raised":
            raise value from RuntimeError(f"in {self.process.name}:\n{text[0]}")
        return value

    def call(self, function: Callable[..., object], *args: object) -> Any:
        """Start and wait."""
        self.start(function, *args)
        return self.result()

    def event(self, name: str, seconds: float = PATIENCE) -> _Event:
        """The next event of that name, waited for if need be; raises as :meth:`result`."""
        limit = time.monotonic() + seconds
        while not self._events.get(name):
            self._receive(limit)
        return self._events[name].pop(0)

    def _receive(self, limit: float) -> None:
        if not self._connection.poll(max(0.0, limit - time.monotonic())):
            raise TimeoutError(f"{self.process.name} has not answered in time")
        try:
            kind, *rest = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise Died(self.process.name) from None
        if kind == "event":
            name, when, value = rest
            self._events.setdefault(name, []).append(_Event(when, value))
        else:
            self._answer = (kind, *rest)

    def wait_dead(self) -> None:
        """Wait until the process has been killed."""
        self.process.join(PATIENCE)
        assert self.process.exitcode == -signal.SIGKILL, f"{self.process.name}: exit {self.process.exitcode}"

    def wait_ended(self) -> None:
        """Wait until the process has been ended by a signal."""
        self.process.join(PATIENCE)
        assert (self.process.exitcode or 0) < 0, f"{self.process.name}: exit {self.process.exitcode}"

    def wait_stopped(self) -> None:
        """Wait until the process is frozen by SIGSTOP."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def resume(self) -> None:
        """Let a frozen process go on."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        """Kill the process, whatever it does."""
        self.process.kill()
        self.process.join(PATIENCE)
        self._connection.close()


class Workers:
    """Some workers; dead ones are replaced on the way."""

    def __init__(self, number: int) -> None:
        self._workers = [Worker(f"worker {rank}") for rank in range(number)]

    def __getitem__(self, rank: int) -> Worker:
        return self._workers[rank]

    def __len__(self) -> int:
        return len(self._workers)

    def replace(self, rank: int) -> None:
        """Start a new process in the place of one."""
        self._workers[rank].end()
        self._workers[rank] = Worker(f"worker {rank}")

    def each(self, function: Callable[..., object], *args: object, ranks: list[int] | None = None) -> list[Any]:
        """Call ``function(rank, *args)`` in all workers, or in some, at once."""
        chosen = range(len(self._workers)) if ranks is None else ranks
        for rank in chosen:
            self._workers[rank].start(function, rank, *args)
        return [self._workers[rank].result() for rank in chosen]

    def end(self) -> None:
        for worker in self._workers:
            worker.end()


@contextmanager
def workers(number: int) -> Iterator[Workers]:
    """Workers of which nothing is left afterwards."""
    found = Workers(number)
    try:
        yield found
    finally:
        found.end()


def store_address(store: TCPStore, name: str) -> str:
    """A store with a prefix, in the form that ``configure`` wants."""
    return f"localhost:{store.port}/{name}"


@functools.cache
def _context() -> ForkServerContext:
    """Workers are forked from a server that has imported what they need, and where no thread runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torchft.manager", "ft_transport._torchft.pg"])
    with patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context
