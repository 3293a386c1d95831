"""A replica process, or a standby for one, as seen from its parent: settings in, commands in, events out.

Events leave as JSON lines through a pipe of their own: what libraries print cannot get between them.
Only the standard library is imported up here, so that the first event marks the interpreter's start.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import queue
import signal
import sys
import threading
import time
from typing import Any

__all__ = ["Parent", "Settings", "main"]

COMMAND_TIMEOUT = 120.0  # seconds; the parent has a shorter limit for everything it waits for


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a replica is told on its command line, as JSON.

    Attributes:
        replica: Index of the replica, 0 to ``num_replicas`` - 1; it chooses the share of the data. None for a
            standby, which learns it when it takes a dead replica's place.
        num_replicas: How many replicas the job has when all are alive.
        min_replicas: How many have to take part for a step to count.
        incarnation: How many times this replica was started before; of a standby, how many standbys were.
        width: Width of the model.
        seed: Seed of the data and, with replica and incarnation, of the initial weights.
        transport: A name from ``transports.TRANSPORTS``.
        in_place: Whether the transport gets the state dict callback.
        timeout: The Manager's time-out in seconds.
        lighthouse: Address of the Lighthouse.
        origin: ``time.monotonic()`` of the parent that counts as 0 s.
        events_fd: File descriptor for the events.
        parent_pid: Process id of the parent.
    """

    replica: int | None
    num_replicas: int
    min_replicas: int
    incarnation: int
    width: int
    seed: int
    transport: str
    in_place: bool
    timeout: float
    lighthouse: str
    origin: float
    events_fd: int
    parent_pid: int


class Parent:
    """The way to the parent process and back. When the parent is gone, this process ends.

    Commands are JSON lines on stdin: ``{"do": "go"}``, ``{"do": "finish_at", "step": 80}``,
    ``{"do": "exit"}``, and to a standby ``{"do": "become", "replica": 2, "incarnation": 1}``.
    """

    def __init__(self, events_fd: int, origin: float) -> None:
        self.finish_at = sys.maxsize
        self._events = os.fdopen(events_fd, "w", buffering=1)
        self._origin = origin
        self._lock = threading.Lock()
        self._arrived = {"go": threading.Event(), "exit": threading.Event()}
        self._roles: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="commands", daemon=True).start()

    def now(self) -> float:
        """Seconds since the parent's origin; one machine has one monotonic clock."""
        return time.monotonic() - self._origin

    def emit(self, event: str, **fields: Any) -> None:
        """Send one event. Any thread may call."""
        line = json.dumps({"time": self.now(), "event": event, **fields})
        with self._lock:
            self._events.write(line + "\n")

    def wait_for(self, command: str) -> None:
        """Block until ``"go"`` or ``"exit"`` was sent."""
        if not self._arrived[command].wait(COMMAND_TIMEOUT):
            raise TimeoutError(f"timed out waiting for {command!r} from the parent")

    def wait_to_become(self) -> tuple[int, int] | None:
        """Block for as long as it takes: replica and incarnation to become, None when none is needed any more."""
        return self._roles.get()

    def _listen(self) -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "finish_at":
                self.finish_at = command["step"]
            elif command["do"] == "become":
                self._roles.put((command["replica"], command["incarnation"]))
            else:
                self._arrived[command["do"]].set()
                if command["do"] == "exit":
                    self._roles.put(None)
        os._exit(1)


def _die_with_parent(parent_pid: int) -> None:
    """Let the kernel end this process when its parent dies, where it can; the end of stdin is the other way."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    _die_with_parent(settings.parent_pid)
    parent = Parent(settings.events_fd, settings.origin)
    parent.emit("interpreter", pid=os.getpid())
    from recovery import training

    training.run(settings, parent)
    sys.stdout.flush()
    sys.stderr.flush()
    # Python takes torch's modules apart before it ends: 1.3 s of CPU in each of these processes, all at once, which
    # took longer than the parent waits where the machine had other work.
    os._exit(0)


if __name__ == "__main__":
    main()
