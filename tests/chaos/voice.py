"""How a replica and the director hear each other: lines through pipes, which outlive the one who wrote them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .events import Event, encode

__all__ = ["Voice", "listen"]


class Voice:
    """Tells the director what happens. Any thread may call.

    Args:
        descriptor: Of the pipe.
        origin: Time of the start of the run.
        replica: Who tells.
        incarnation: The same.
    """

    def __init__(self, descriptor: int, origin: float, replica: int, incarnation: int) -> None:
        self._descriptor = descriptor
        self._origin = origin
        self._life = replica, incarnation
        self._lock = threading.Lock()
        self._calls = 0

    def tell(self, name: str, **fields: Any) -> None:
        """One event, of now. It has left this process when this returns."""
        with self._lock:
            line = encode(Event(time.monotonic() - self._origin, *self._life, name, fields)).encode()
            while line:
                line = line[os.write(self._descriptor, line) :]

    @contextmanager
    def call(self, name: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Tell that a call begins, and how it ends; what is put in the dict is told at its end."""
        self._calls += 1
        number = self._calls
        self.tell("begin", call=name, number=number, **fields)
        start = time.monotonic()
        result: dict[str, Any] = {"error": ""}
        try:
            yield result
        except Exception as exc:
            result["error"] = f"{type(exc).__name__}: {exc}"[:300]
            raise
        finally:
            seconds = round(time.monotonic() - start, 4)
            self.tell("end", call=name, number=number, seconds=seconds, **fields, **result)


def listen(descriptor: int, hear: Callable[[dict[str, Any]], None]) -> None:
    """Give each command of the director to ``hear``, in a thread of its own.

    Ends the process when the director is gone.
    """

    def run() -> None:
        with os.fdopen(descriptor) as lines:
            for line in lines:
                hear(json.loads(line))
        os._exit(1)

    threading.Thread(target=run, name="commands", daemon=True).start()
