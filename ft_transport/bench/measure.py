"""Memory and bytes on the wire, as the system counts them."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

__all__ = ["MemoryPeak", "free_memory", "loopback_nbytes"]


def free_memory() -> None:
    """Give back to the system what earlier transfers left behind.

    A replica that heals has just been started, and its memory is fresh. A transport that came after another here
    would otherwise find pages which that one has already touched.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class MemoryPeak:
    """How much resident memory this process takes at most, beyond what it had to begin with."""

    def __init__(self) -> None:
        # 5: forget the peak so far (proc_pid_clear_refs(5)).
        self._known = _write(Path("/proc/self/clear_refs"), "5")
        self._before = _status_nbytes("VmRSS")

    def extra_nbytes(self) -> int | None:
        """Bytes beyond those at the time this was made; None where the system does not tell."""
        peak = _status_nbytes("VmHWM")
        if not self._known or peak is None or self._before is None:
            return None
        return max(0, peak - self._before)


def loopback_nbytes() -> int | None:
    """Bytes that have passed the loopback interface, headers included, of every process that shares it.

    The only count that covers all transports alike, also those which open a connection for each transfer.
    """
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    counters = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(counters[0][0]) if counters else None


def _status_nbytes(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [line.split() for line in lines if line.startswith(f"{name}:")]
    return int(values[0][1]) * 1024 if values else None


def _write(path: Path, text: str) -> bool:
    try:
        path.write_text(text)
    except OSError:
        return False
    return True
