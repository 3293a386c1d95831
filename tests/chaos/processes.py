"""The processes of the replicas: start, strike, hear, and leave none behind."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import time
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .events import Event, decode
from .replica import Birth, main

__all__ = ["Cluster", "Member", "warm_up"]

ROOT = Path(__file__).resolve().parents[2]
# Loopback by its own name: nothing depends on what the host name resolves to. Two arenas, and freed memory given
# back: else glibc's arenas, one for each thread that ever ran at the same time, would look like a leak.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MALLOC_ARENA_MAX": "2"}
_READ_BYTES = 1 << 16
# How long a process may take to end after SIGKILL.
_PATIENCE = 20.0


class Member:
    """One incarnation of a replica."""

    def __init__(self, birth: Birth) -> None:
        context = _context()
        ours, theirs = context.Pipe(duplex=False)
        commands, self._commands = context.Pipe(duplex=False)
        self.birth = birth
        self.process = context.Process(target=main, args=(birth, commands, theirs), name=f"replica {birth.replica}")
        self.process.start()
        theirs.close()
        commands.close()
        os.set_blocking(ours.fileno(), False)
        os.set_blocking(self._commands.fileno(), False)
        self.events: Connection = ours
        self._half = b""
        self.over = False  # whether the process has ended, and everything that it told has been read

    @property
    def life(self) -> tuple[int, int]:
        """Replica and incarnation."""
        return self.birth.replica, self.birth.incarnation

    def read(self) -> list[Event]:
        """What it has told since the last call. A line that was cut off by a kill is lost."""
        found = []
        while not self.over:
            try:
                data = os.read(self.events.fileno(), _READ_BYTES)
            except BlockingIOError:
                break
            self.over = not data
            *lines, self._half = (self._half + data).split(b"\n")
            found += [decode(line.decode()) for line in lines]
        return found

    def tell(self, command: dict[str, Any]) -> None:
        """A command. One that is frozen hears it later, one that is dead never."""
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self._commands.fileno(), json.dumps(command).encode() + b"\n")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process lives."""
        if self.process.is_alive() and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def end(self) -> int | None:
        """Kill the process, whatever it does, and collect it; gives its exit status, negative for a signal."""
        self.process.kill()
        self.process.join(_PATIENCE)
        self.events.close()
        self._commands.close()
        return self.process.exitcode


class Cluster:
    """All members, living ones only, by replica."""

    def __init__(self, birth: Birth) -> None:
        self._birth = birth
        self._born: dict[int, int] = {}
        self.members: dict[int, Member] = {}

    def now(self) -> float:
        """Seconds since the start of the run."""
        return time.monotonic() - self._birth.origin

    def start(self, replica: int) -> Member:
        """Start a replica, for the first time or again."""
        incarnation = self._born.get(replica, -1) + 1
        self._born[replica] = incarnation
        member = Member(dataclasses.replace(self._birth, replica=replica, incarnation=incarnation))
        self.members[replica] = member
        return member

    def hear(self, seconds: float) -> list[Event]:
        """What the members tell; waits so long at most when they tell nothing."""
        pipes = [member.events for member in self.members.values() if not member.over]
        if not pipes:
            time.sleep(seconds)
        elif not connection.wait(pipes, timeout=max(0.0, seconds)):
            return []
        return [event for member in self.members.values() for event in member.read()]

    def tell(self, command: dict[str, Any]) -> None:
        """A command to all."""
        for member in self.members.values():
            member.tell(command)

    def end(self) -> list[int]:
        """Kill and collect all; gives the ids of processes that are still there, which should be none."""
        for member in self.members.values():
            member.process.kill()
        for member in self.members.values():
            member.end()
        # One that an interrupt came in the middle of starting is no member.
        for process in multiprocessing.active_children():
            process.kill()
            process.join(_PATIENCE)
        return [process.pid for process in multiprocessing.active_children() if process.pid]


def warm_up() -> None:
    """Return when the server that replicas are forked from has imported everything."""
    process = _context().Process(target=os.getpid)
    process.start()
    process.join()


@functools.cache
def _context() -> ForkServerContext:
    """Replicas are forked from a server that has imported everything, where no thread runs: it takes milliseconds."""
    context = multiprocessing.get_context("forkserver")
    # An optimizer's first step imports the last of these, which takes two seconds.
    context.set_forkserver_preload([main.__module__, "ft_transport._torchft.lanes", "torch._dynamo"])
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    with patch.dict(os.environ, {**_ENVIRONMENT, "PYTHONPATH": path}):
        forkserver.ensure_running()
    return context
