"""One replica: a process that trains until it is told to end, or is ended."""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed import TCPStore
from torchft.manager import Manager

from ft_transport import TornStateError

from .settings import Settings
from .state import WIDTH, State, buffers_digest, digest, without_buffers
from .striker import Striker
from .voice import Voice, listen
from .watched import Group, Watched

__all__ = ["EXIT_TORN", "Birth", "main"]

EXIT_TORN = 70
# Seconds between two looks at what this process holds.
_HEALTH_INTERVAL = 2.0
# Seconds between two forwards: the machine has fewer cores than the job has replicas.
_BETWEEN_FORWARDS = 0.01


@dataclasses.dataclass(frozen=True)
class Birth:
    """What one incarnation is started with.

    Attributes:
        settings: Of the job.
        lighthouse: Its address.
        folder: For logs.
        claims: Where faults are claimed.
        origin: Time of the start of the run.
        seed: Of the run.
        replica: Index.
        incarnation: How often it was started before.
    """

    settings: Settings
    lighthouse: str
    folder: Path
    claims: Path
    origin: float
    seed: int
    replica: int
    incarnation: int


def main(birth: Birth, commands: Connection, events: Connection) -> None:
    """Run until told to end. Ends the process: status 0, ``EXIT_TORN``, or 1 for any other error."""
    _settle(birth.folder / f"replica_{birth.replica}.log", birth.incarnation)
    voice = Voice(events.fileno(), birth.origin, birth.replica, birth.incarnation)
    try:
        replica = _Replica(birth, voice)
        listen(os.dup(commands.fileno()), replica.hear)
        replica.train()
        replica.leave()
        voice.tell("ended", reason="finished")
    except Exception as exc:
        traceback.print_exc()
        torn = _is_torn(exc)
        voice.tell("ended", reason="torn" if torn else "error", error=f"{type(exc).__name__}: {exc}"[:500])
        os._exit(EXIT_TORN if torn else 1)
    os._exit(0)


def _settle(log: Path, incarnation: int) -> None:
    """Let only the director end this process, and give its output a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    form = f"%(asctime)s {incarnation} %(name)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, stream=sys.stderr, force=True)
    logging.getLogger("ft_transport").setLevel(logging.INFO)
    # Every broken collective with its traceback: the events tell it in a line.
    logging.getLogger("torchft").setLevel(logging.CRITICAL)


def _is_torn(exc: BaseException | None) -> bool:
    return exc is not None and (isinstance(exc, TornStateError) or _is_torn(exc.__cause__ or exc.__context__))


class _Replica:
    def __init__(self, birth: Birth, voice: Voice) -> None:
        self._birth = birth
        self._voice = voice
        self._finish_at = sys.maxsize
        self._next_look = 0.0
        settings = birth.settings
        numbers = f"{birth.seed} {birth.replica} {birth.incarnation}"
        self._generator = torch.Generator().manual_seed(int(digest(numbers), 16) >> 2)
        self._state = State(settings.layers, int(digest(numbers), 16) >> 2, metric=settings.metric)
        self._striker = Striker(voice, birth.claims)
        self._group = Group(timedelta(seconds=settings.group), voice)
        self._transport = Watched(settings, self._group, self._state, voice, self._striker)
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        manager_timeout = timedelta(seconds=settings.manager)
        self._manager = Manager(
            pg=self._group,
            load_state_dict=cast(Any, self._state.load_state_dict),
            state_dict=self._state.state_dict,
            min_replica_size=settings.min_replicas,
            use_async_quorum=settings.async_quorum,
            timeout=manager_timeout,
            quorum_timeout=timedelta(seconds=settings.quorum),
            connect_timeout=manager_timeout,
            rank=0,
            world_size=1,
            store_addr="localhost",
            store_port=self._store.port,
            lighthouse_addr=birth.lighthouse,
            replica_id=f"replica_{birth.replica}",
            hostname="localhost",
            checkpoint_transport=self._transport,
        )
        gc.collect()
        gc.freeze()  # so that later collections look at what has been made since
        voice.tell("joined", pid=os.getpid(), digest=self._digest())

    def hear(self, command: dict[str, Any]) -> None:
        """A command of the director, on the thread that listens."""
        if "finish_at" in command:
            self._finish_at = command["finish_at"]
        elif "cut" in command:
            from . import sockets

            sockets.cut(self._transport.port, command["cut"])
        else:
            self._striker.hear(command)

    def train(self) -> None:
        """Step after step, until one that the director has named."""
        while self._manager.current_step() < self._finish_at:
            self._step()
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + _HEALTH_INTERVAL
                self._voice.tell("health", **_health())

    def _step(self) -> None:
        manager, transport = self._manager, self._transport
        transport.new_step()
        manager.start_quorum()
        self._forward()
        direction = torch.rand(WIDTH, generator=self._generator) - 0.5
        manager.allreduce(direction).wait()
        error = manager.errored()
        committed = manager.should_commit()
        where = {"quorum": self._group.quorum, "members": self._group.members}
        # Before the optimizer steps, with all that forward has written to since.
        where["buffers"] = buffers_digest(self._state.state_dict())
        if committed:
            self._state.apply(direction)
            step = manager.current_step()
            self._voice.tell("commit", step=step, digest=self._digest(), **where)
            return
        if error is not None:
            self._group.break_off()
        text = "" if error is None else f"{error.original_exception}"[:200]
        cause = transport.cause or ("group" if text else "few")
        self._voice.tell("failed", step=manager.current_step(), cause=cause, error=text, **where)

    def _forward(self) -> None:
        """Forward, again and again until the quorum is there, and with it the state that has landed meanwhile."""
        quorum = self._manager._quorum_future
        self._state.forward(self._generator)
        while quorum is not None and not quorum.done():
            time.sleep(_BETWEEN_FORWARDS)
            self._state.forward(self._generator)

    def _digest(self) -> str:
        return digest(without_buffers(self._state.state_dict()), self._manager.state_dict())

    def leave(self) -> None:
        """End what this replica began, and tell what is left."""
        self._voice.tell("health", last=True, **_health())
        self._manager.shutdown()
        self._group.abort()
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("ft_transport")]
        self._voice.tell("left", threads=left)


def _health() -> dict[str, Any]:
    """What this process holds between two steps, without what only awaits the collector: a failed step's exception
    holds the group that failed, in cycles.
    """
    gc.collect()
    names = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("ft_transport"))
    with open("/proc/self/statm") as statm:
        rss = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "rss": rss,
        "ours": names,
    }
