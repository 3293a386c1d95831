"""Memory and bytes on the wire, as the system counts them."""

from __future__ import annotations

import ctypes
import gc
import mmap
from pathlib import Path

import torch

__all__ = ["MemoryPeak", "free_memory", "free_nbytes", "loopback_nbytes", "touch_free_memory"]


def free_memory() -> None:
    """Give back to the system what earlier transfers left behind.

    A replica that heals has just been started, and its memory is fresh. A transport that came after another here
    would otherwise find pages which that one has already touched.
    """
    gc.collect()
    # glibc keeps freed pages in its arenas for the next malloc. They have been touched, and to touch memory first is
    # most of what a receive into fresh memory costs (1.2 GB/s against 4.4 in place). Other C libraries lack the call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def touch_free_memory(nbytes: int) -> None:
    """See to it that the system has ``nbytes`` of free memory at hand, in huge pages where it has them.

    Under a hypervisor, free memory may have gone back to the host, which takes seconds for each GB to return it. How
    much is gone depends on how long ago the previous turn was and on the size of its pages, not on the transport
    whose turn it is. The pages that a transfer then gets are new to it all the same: the kernel clears them.
    """
    if nbytes == 0:
        return
    # A mapping of its own: the advice then holds for nobody else's memory, and all of it goes back at the end of the
    # block.
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        # Written, not read: reading gives the one page of zeros that all processes share, and takes none.
        torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


class MemoryPeak:
    """How much resident memory this process takes at most, beyond what it had to begin with."""

    def __init__(self) -> None:
        # The kernel's own mark, not VmRSS looked at from a thread: that would miss a peak between two looks, and take
        # the GIL from the transport. But the mark is of the whole life of the process, so it is wiped first.
        # 5: forget the peak so far (proc_pid_clear_refs(5)).
        self._known = _write(Path("/proc/self/clear_refs"), "5")
        self._before = _status_nbytes("VmRSS")

    def extra_nbytes(self) -> int | None:
        """Bytes beyond those at the time this was made; None where the system does not tell."""
        peak = _status_nbytes("VmHWM")
        if not self._known or peak is None or self._before is None:
            return None
        # Of the process, not of torch's allocator: gloo, sockets and numpy take memory that this never sees.
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
    # What lo has received. It has sent the same bytes, so adding both would say that a state goes over the wire twice.
    return int(counters[0][0]) if counters else None


def free_nbytes() -> int | None:
    """Memory of this machine that is free or could be, None where the system does not tell."""
    return _status_nbytes("MemAvailable", Path("/proc/meminfo"))


def _status_nbytes(name: str, file: Path = Path("/proc/self/status")) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    values = [line.split() for line in lines if line.startswith(f"{name}:")]
    # The file says kB and means KiB (proc_pid_status(5)).
    return int(values[0][1]) * 1024 if values else None


def _write(path: Path, text: str) -> bool:
    try:
        path.write_text(text)
    except OSError:
        return False
    return True
