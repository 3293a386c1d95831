"""Memory into a socket without a copy, where the system can (Linux): what is sent stays where it is.

Strategy: ``vmsplice`` puts references to the memory's pages into a pipe, ``splice`` moves these into the socket. The
system then reads the memory when the bytes leave, and again when they are sent again: it must stay as it is until the
peer has them, which the caller has to see to.
"""

from __future__ import annotations

import ctypes
import fcntl
import os

from ft_transport._process import address_of

__all__ = ["Extent", "Splicer", "new_splicer"]

# Bytes that the pipe is asked to hold; the most that a user without privileges gets.
_PIPE_BYTES = 1 << 20
# A pipe that holds less would be filled so often that a copy is quicker. A user's pipes together are bounded.
_MIN_PIPE_BYTES = 256 << 10
# A copy of fewer bytes is quicker than three more calls.
SPLICE_FROM = 256 << 10


class Extent(ctypes.Structure):
    """``struct iovec``: some memory, as system calls take it."""

    _fields_ = [("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]


class Splicer:
    """A pipe of one connection. Not for two threads at once.

    Raises:
        OSError: This system has none, or no descriptors are left.
    """

    def __init__(self) -> None:
        # Python has os.splice since 3.10, and no vmsplice.
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(os, "splice") or not hasattr(libc, "vmsplice"):
            raise OSError("this system cannot splice")
        self._vmsplice = libc.vmsplice
        self._vmsplice.restype = ctypes.c_ssize_t
        self._inside = 0
        self._out, self._in = os.pipe()
        try:
            if fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, _PIPE_BYTES) < _MIN_PIPE_BYTES:
                raise OSError("no room in a pipe")
        except BaseException:
            self.close()
            raise

    @property
    def empty(self) -> bool:
        """Whether everything that was put in has left."""
        return not self._inside

    def fill(self, view: memoryview) -> int:
        """Put the beginning of some memory in, which must be :attr:`empty` before; gives how many bytes.

        Raises:
            OSError: Pages of this memory cannot be referred to.
        """
        assert self.empty
        # By address: from now on the kernel holds the pages, also if the memory is given back meanwhile. That their
        # bytes stay as they are is for the caller to see to.
        extent = Extent(address_of(view), len(view))
        # No SPLICE_F_GIFT: the pages stay the user's, who goes on to train with them.
        count: int = self._vmsplice(self._in, ctypes.byref(extent), 1, 0)
        if count <= 0:
            raise OSError(ctypes.get_errno(), "vmsplice")
        self._inside = count
        return count

    def drain(self, descriptor: int) -> int:
        """Move what is inside into a socket; gives how many bytes have left.

        Raises:
            OSError: As a ``send`` would, ``BlockingIOError`` when the socket's time-out has passed.
        """
        # As MSG_MORE: a message's next piece, or its digest, follows at once.
        count = os.splice(self._out, descriptor, self._inside, flags=os.SPLICE_F_MORE)
        self._inside -= count
        return count

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._out)
        os.close(self._in)


def new_splicer() -> Splicer | None:
    """One, if this system has them and there is room for another."""
    try:
        return Splicer()
    except OSError:
        return None
