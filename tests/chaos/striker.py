"""Faults inside a replica: knows which are armed, and carries them out when its own heal is where they are due."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from pathlib import Path
from typing import Any

from ft_transport.testing._transport import signal_self

from . import sockets
from .schedule import Fault
from .voice import Voice

__all__ = ["Striker", "claim"]


def claim(folder: Path, fault: int) -> bool:
    """Whether a fault is the caller's: of all processes that ask, one gets it, once."""
    try:
        os.close(os.open(folder / f"fault_{fault}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


class Striker:
    """The faults that are armed.

    A destination strikes itself: no other process would be quick enough. For every other role it tells the director.

    Args:
        voice: Tells of strikes.
        folder: Where faults are claimed.
    """

    def __init__(self, voice: Voice, folder: Path) -> None:
        self._voice = voice
        self._folder = folder
        self._lock = threading.Lock()
        self._armed: dict[int, Fault] = {}
        self._heal: dict[str, Any] = {}
        self._port = 0
        self._share = 0.0

    def hear(self, command: dict[str, Any]) -> None:
        """Arm or disarm."""
        with self._lock:
            if "arm" in command:
                fault = Fault(**command["arm"])
                self._armed[fault.number] = fault
            else:
                self._armed.pop(command["disarm"], None)

    def begin(self, port: int, **heal: Any) -> None:
        """A heal begins; its connections lead to that port."""
        self._port, self._share, self._heal = port, -1.0, heal
        self._reach("agree", 0.0)

    def move(self, share: float) -> None:
        """So much of the state is here."""
        self._reach("move", share)

    def done(self) -> None:
        """The heal has ended well."""
        self._reach("done", 1.0)

    def _reach(self, phase: str, share: float) -> None:
        with self._lock:
            before, self._share = self._share, share
            armed = [f for f in self._armed.values() if f.phase == phase and (phase != "move" or f.share <= share)]
        for fault in armed:
            # One that was armed when the heal was past its share waits for the next heal.
            if phase == "move" and fault.share <= before:
                continue
            if claim(self._folder, fault.number):
                self._strike(fault, phase, share)
                return  # one at a time: who has been killed cannot be struck again

    def _strike(self, fault: Fault, phase: str, share: float) -> None:
        with self._lock:
            self._armed.pop(fault.number, None)
        where = {"phase": phase, "share": round(share, 3), **self._heal}
        if fault.role != "destination":
            self._voice.tell("trigger", fault=fault.number, **where)
            return
        self._voice.tell("strike", fault=dataclasses.asdict(fault), role=fault.role, **where)
        if fault.kind in ("kill", "stop", "stop and kill"):
            signal_self(signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        else:
            sockets.cut(self._port, fault.share if fault.kind == "cut one" else None)
