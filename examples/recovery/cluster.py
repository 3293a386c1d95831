"""The replica processes: start, kill, command, hear, and never leave one behind."""

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
    """Something that happened to one incarnation of a replica, ``time`` seconds after the origin."""

    time: float
    replica: int
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
    incarnation: int
    reader: threading.Thread


class Cluster:
    """N replica processes, each in a session of its own, so that Ctrl-C reaches only their parent.

    Args:
        settings: Settings of replica 0; the others differ in index, incarnation and pipe.
        folder: Where each replica's log goes.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._members: dict[int, _Member] = {}
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
        incarnation = self._members[replica].incarnation + 1 if replica in self._members else 0
        read_fd, write_fd = os.pipe()
        settings = dataclasses.replace(self._settings, replica=replica, incarnation=incarnation, events_fd=write_fd)
        self._post(replica, incarnation, "started")
        try:
            process = self._popen(settings)
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        reader = threading.Thread(target=self._read, args=(os.fdopen(read_fd), replica, incarnation), daemon=True)
        self._members[replica] = _Member(process, incarnation, reader)
        reader.start()

    def kill(self, replica: int) -> None:
        """SIGKILL a replica and wait until it is gone."""
        member = self._members[replica]
        self._post(replica, member.incarnation, "killed")
        os.killpg(member.process.pid, signal.SIGKILL)
        member.process.wait(EXIT_TIMEOUT)
        self._post(replica, member.incarnation, "reaped")

    def tell(self, replica: int, do: str, **arguments: Any) -> None:
        """Send a command; a replica that has just died does not hear it."""
        stdin = self._members[replica].process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            stdin.flush()

    def exit_status(self, replica: int) -> int | None:
        """The replica's exit status, negative for a signal, None while it runs."""
        return self._members[replica].process.poll()

    def join(self) -> bool:
        """Ask all to exit; whether all did, with status 0, in ``EXIT_TIMEOUT`` seconds."""
        for replica in self._members:
            self.tell(replica, "exit")
        deadline = time.monotonic() + EXIT_TIMEOUT
        for member in self._members.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                member.process.wait(max(0.0, deadline - time.monotonic()))
        return all(member.process.poll() == 0 for member in self._members.values())

    def stop(self) -> None:
        """SIGKILL what still runs and collect it. For a second call there is nothing left to do."""
        for member in self._members.values():
            if member.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(member.process.pid, signal.SIGKILL)
        for member in self._members.values():
            member.process.wait(EXIT_TIMEOUT)
            member.reader.join(EXIT_TIMEOUT)
            if member.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    member.process.stdin.close()

    def log_tail(self, replica: int, num_lines: int = 12) -> str:
        """The last lines of a replica's log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self._log(replica).read_text(errors="replace").splitlines()[-num_lines:])
        return ""

    def _log(self, replica: int) -> Path:
        return self._folder / f"replica_{replica}.log"

    def _popen(self, settings: Settings) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
        with self._log(settings.replica).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "recovery.replica", json.dumps(dataclasses.asdict(settings))],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[settings.events_fd],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )

    def _post(self, replica: int, incarnation: int, event: str, **fields: Any) -> None:
        self._events.put(Event(self.now(), replica, incarnation, event, fields))

    def _read(self, pipe: IO[str], replica: int, incarnation: int) -> None:
        with pipe:
            for line in pipe:
                # A process killed in mid-write leaves half a line.
                with contextlib.suppress(json.JSONDecodeError):
                    fields = json.loads(line)
                    at, event = fields.pop("time"), fields.pop("event")
                    self._events.put(Event(at, replica, incarnation, event, fields))
        self._post(replica, incarnation, "gone")
