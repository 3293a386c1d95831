"""The processes of replicas and standbys: start, kill, command, hear, and never leave one behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from recovery.replica import Settings

__all__ = ["Cluster", "Event"]

EXAMPLES = Path(__file__).resolve().parent.parent
EXIT_TIMEOUT = 5.0  # seconds for a process to end after it was asked to, and again after SIGKILL


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to one incarnation of a replica, ``time`` seconds after the origin.

    ``replica`` is None for a standby that has not taken a replica's place; ``incarnation`` counts standbys then.
    """

    time: float
    replica: int | None
    incarnation: int
    event: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The event as one flat JSON object."""
        return {
            "time": round(self.time, 6),
            "replica": self.replica,
            "incarnation": self.incarnation,
            "event": self.event,
            **self.fields,
        }


@dataclasses.dataclass
class _Member:
    process: subprocess.Popen[bytes]
    replica: int | None
    incarnation: int
    log: Path
    reader: threading.Thread | None = None


class Cluster:
    """Replica processes and at most one standby, each in a session of its own: Ctrl-C reaches only their parent.

    Args:
        settings: Settings of replica 0; the others differ in index, incarnation and pipe.
        folder: Where each replica's log goes.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._members: dict[int, _Member] = {}
        self._standby: _Member | None = None
        self._num_standbys = 0
        self._events: queue.Queue[Event] = queue.Queue()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def now(self) -> float:
        """Seconds since the origin."""
        return time.monotonic() - self._settings.origin

    def next_event(self, timeout: float) -> Event | None:
        """The next event, None when ``timeout`` seconds brought none."""
        with contextlib.suppress(queue.Empty):
            return self._events.get(timeout=timeout)
        return None

    def start(self, replica: int) -> None:
        """Start a replica, or start it again after a kill."""
        self._members[replica] = self._spawn(replica, self._next_incarnation(replica))

    def start_standby(self) -> None:
        """Start a process that takes the place of whichever replica dies next."""
        assert self._standby is None
        self._standby = self._spawn(None, self._num_standbys)
        self._num_standbys += 1

    def hand_over(self, replica: int) -> None:
        """Let the standby take the place of a replica that is dead."""
        member = self._standby
        assert member is not None
        # Set before it is told, so that whatever it sends from then on counts as the replica's.
        member.incarnation, member.replica = self._next_incarnation(replica), replica
        self._members[replica] = member
        self._standby = None
        self._post(replica, member.incarnation, "handed_over")
        self.tell(replica, "become", replica=replica, incarnation=member.incarnation)

    def _next_incarnation(self, replica: int) -> int:
        return self._members[replica].incarnation + 1 if replica in self._members else 0

    def _spawn(self, replica: int | None, incarnation: int) -> _Member:
        log = self._folder / ("standby.log" if replica is None else f"replica_{replica}.log")
        read_fd, write_fd = os.pipe()
        settings = dataclasses.replace(self._settings, replica=replica, incarnation=incarnation, events_fd=write_fd)
        self._post(replica, incarnation, "started")
        try:
            process = self._popen(settings, log)
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        member = _Member(process, replica, incarnation, log)
        member.reader = threading.Thread(target=self._read, args=(os.fdopen(read_fd), member), daemon=True)
        member.reader.start()
        return member

    def kill(self, replica: int) -> None:
        """SIGKILL a replica and wait until it is gone."""
        member = self._members[replica]
        self._post(replica, member.incarnation, "killed")
        os.killpg(member.process.pid, signal.SIGKILL)
        member.process.wait(EXIT_TIMEOUT)
        self._post(replica, member.incarnation, "reaped")

    def tell(self, replica: int, do: str, /, **arguments: Any) -> None:
        """Send a command; a replica that has just died does not hear it."""
        self._tell(self._members[replica], do, **arguments)

    def _tell(self, member: _Member, do: str, /, **arguments: Any) -> None:
        stdin = member.process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            stdin.flush()

    def exit_status(self, replica: int) -> int | None:
        """The replica's exit status, negative for a signal, None while it runs."""
        return self._members[replica].process.poll()

    def join(self) -> bool:
        """Ask all to exit; whether all did, with status 0, in ``EXIT_TIMEOUT`` seconds."""
        members = self._all()
        for member in members:
            self._tell(member, "exit")
        deadline = time.monotonic() + EXIT_TIMEOUT
        for member in members:
            with contextlib.suppress(subprocess.TimeoutExpired):
                member.process.wait(max(0.0, deadline - time.monotonic()))
        return all(member.process.poll() == 0 for member in members)

    def _all(self) -> list[_Member]:
        return [*self._members.values(), *([self._standby] if self._standby is not None else [])]

    def stop(self) -> None:
        """SIGKILL what still runs and collect it. For a second call there is nothing left to do."""
        for member in self._all():
            if member.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(member.process.pid, signal.SIGKILL)
        for member in self._all():
            member.process.wait(EXIT_TIMEOUT)
            if member.reader is not None:
                member.reader.join(EXIT_TIMEOUT)
            if member.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    member.process.stdin.close()

    def log_tail(self, replica: int | None, num_lines: int = 12) -> str:
        """The last lines of what a replica's process has written, or the standby's."""
        member = self._standby if replica is None else self._members.get(replica)
        if member is None:
            return ""
        return "\n".join(member.log.read_text(errors="replace").splitlines()[-num_lines:])

    def _popen(self, settings: Settings, log_path: Path) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
        with log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "recovery.replica", json.dumps(dataclasses.asdict(settings))],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[settings.events_fd],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )

    def _post(self, replica: int | None, incarnation: int, event: str, **fields: Any) -> None:
        self._events.put(Event(self.now(), replica, incarnation, event, fields))

    def _read(self, pipe: IO[str], member: _Member) -> None:
        with pipe:
            for line in pipe:
                # A process killed in mid-write leaves half a line.
                with contextlib.suppress(json.JSONDecodeError):
                    fields = json.loads(line)
                    at, event = fields.pop("time"), fields.pop("event")
                    self._events.put(Event(at, member.replica, member.incarnation, event, fields))
        self._post(member.replica, member.incarnation, "gone")
