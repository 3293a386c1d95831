"""How memory of another process on the same machine is read: cross-memory attach, ``process_vm_readv`` (Linux).

Strategy: a supplier says where its bytes lie, and the destination has the kernel copy them from there to where they
belong: one copy, no socket, no packet, and nobody on the other side who is woken up for it. The call is synchronous, so
nothing can land late; where memory is not there, on either side, it gives an error and ends no process.

Whether it works is tried, not concluded. The destination draws a token, the supplier puts it into its memory and says
where, and the destination reads it: so both run on one kernel and see the same processes (containers number their own),
are one user's, and neither Yama nor seccomp forbids it. And no peer can lead us to a process that is not its own.

Not here: what is read (``_lanes``), and whether it is what was meant, which digests say.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import secrets
from collections.abc import Callable
from typing import Any

from ft_transport._net.zero_copy import Extent
from ft_transport._process import address_of

__all__ = ["TOKEN_BYTES", "PeerMemory", "ShownToken", "let_others_read", "new_token"]

TOKEN_BYTES = 16

# Of <linux/prctl.h>. Where Yama lets a process be read by its ancestors alone (as Ubuntu ships it), it may name one
# other process, or any of its user's: several destinations may come, so any.
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


def new_token() -> bytes:
    """What a supplier is to show."""
    return secrets.token_bytes(TOKEN_BYTES)


class ShownToken:
    """A token in the memory of this process, for as long as this is kept.

    Attributes:
        pid: Of this process, as it sees itself.
        address: Of the token's first byte.
    """

    def __init__(self, token: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(token, len(token))
        # Asked for each time: a fork has another.
        self.pid = os.getpid()
        self.address = ctypes.addressof(self._buffer)


def let_others_read() -> None:
    """Let other processes of this user read this one where Yama forbids it. They may do then what a debugger may."""
    # Gives EINVAL where there is no Yama, and so nothing to allow.
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


@functools.cache
def _system_call() -> Callable[..., int] | None:
    """Reads; None where the system cannot. The interpreter's lock is given back meanwhile."""
    call: Any = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if call is not None:
        extents = ctypes.POINTER(Extent)
        call.argtypes = [ctypes.c_int, extents, ctypes.c_ulong, extents, ctypes.c_ulong, ctypes.c_ulong]
        call.restype = ctypes.c_ssize_t
    return call  # type: ignore[no-any-return]


class PeerMemory:
    """Memory of a process that has shown a token. Any thread.

    Args:
        pid: As the peer has said.
        address: Where it has put the token.
        token: As it was drawn here.

    Raises:
        OSError: It cannot be read, or is not the peer's.
    """

    def __init__(self, pid: int, address: int, token: bytes) -> None:
        call = _system_call()
        # ctypes would cut a larger number, to that of some other process.
        if call is None or not 0 < pid < 1 << 31:
            raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
        self._call = call
        self._pid = pid
        found = bytearray(len(token))
        self.read_into(address, memoryview(found))
        if found != token:
            raise OSError(f"process {pid} is not the peer's")

    def read_into(self, address: int, view: memoryview) -> None:
        """Fill ``view`` from an address on.

        Raises:
            OSError: Some of it is not memory (any more), there or here. ``view`` holds some, all or none of it.
        """
        left, begin = len(view), address_of(view)
        if not 0 < address < (1 << 64) - left:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        # In one go, unless a page is not there: what came before it is read then, and the next call says why.
        while left:
            ours, theirs = Extent(begin, left), Extent(address, left)
            count = self._call(self._pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
            if count <= 0:
                code = ctypes.get_errno() if count else errno.EFAULT
                raise OSError(code, os.strerror(code))
            begin, address, left = begin + count, address + count, left - count
