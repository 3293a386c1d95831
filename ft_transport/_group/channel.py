"""How messages reach one peer. The only user of p2p calls and of ``Work``.

Strategy: a peer that dies in the middle of a large message does not wake whoever waits for that message, and a
wait that expires closes every pair of a gloo group. So nobody waits for a large message: each is followed by a
small one in the same direction, and only small ones are waited for. A small one is pending when the peer dies,
and a pending operation raises at once. Messages of one direction arrive in order; once the small one is there,
so are the large ones before it.

Foreign exceptions are translated here and nowhere else.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any, NoReturn, Protocol

import torch

from ft_transport._deadline import MIN_WAIT, Deadline
from ft_transport.errors import PeerFailure, TransferError, TransferTimeout

__all__ = ["Channel", "GroupChannel", "Pending"]

# A tag that no transfer reaches: its receive never completes.
_NEVER = (1 << 30) - 1


class Pending:
    """One posted operation. Holds its tensor and its ``Work`` until it was waited for or dropped."""

    # One for each operation that is under way, of which a window of small messages has thousands.
    __slots__ = ("tensor", "work")

    def __init__(self, work: Any, tensor: torch.Tensor) -> None:
        self.work = work
        self.tensor: torch.Tensor | None = tensor

    def drop(self) -> None:
        """Let go of work and tensor, so that nobody who keeps this object keeps them."""
        self.work = None
        self.tensor = None


class Channel(Protocol):
    """One peer, two directions, messages in order. Tensors are flat, contiguous uint8 or int64.

    Attributes:
        peer_rank: Rank of the peer.
        nbytes_wire: Bytes so far, in both directions, of operations that were waited for.
        broken: Whether the group behind the channel must be configured anew before its next use.
        in_order: Whether operations run one after the other as they were posted, sends and receives alike, and tags are
            dropped (NCCL). Then an operation meets the peer's at the same place in its order, so both sides post alike.
    """

    peer_rank: int
    nbytes_wire: int
    broken: bool
    in_order: bool

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        """Post a send; the tensor must not change until the operation was waited for."""
        ...

    def recv(self, tensor: torch.Tensor, tag: int) -> Pending:
        """Post a receive of exactly this many bytes."""
        ...

    def wait(self, pending: Pending, deadline: Deadline) -> None:
        """Wait for one posted operation; each exactly once.

        Raises:
            TransferTimeout: The deadline passed. The channel, and its whole group, are broken now.
            PeerFailure: The peer, or the channel to it, is gone.
        """
        ...

    def drop(self) -> None:
        """Let go of every operation that is still posted."""
        ...

    def abort(self) -> None:
        """Break the channel, so that nothing posted can touch memory any more and the peer learns of it."""
        ...


class GroupChannel:
    """A channel over a process group: torchft's, or one of torch.distributed.

    Args:
        pg: The group.
        peer_rank: Rank of the peer in it.
        device: Where control messages live.
        lock: Held during every call into the group, where a group cannot take calls from several threads.
        in_order: As of ``Channel``.
    """

    def __init__(
        self,
        pg: Any,
        peer_rank: int,
        device: torch.device,
        lock: threading.Lock | None = None,
        *,
        in_order: bool = False,
    ) -> None:
        self.peer_rank = peer_rank
        self.in_order = in_order
        self.nbytes_wire = 0
        self.broken = False
        self._pg = pg
        self._device = device
        self._lock: Any = lock or contextlib.nullcontext()
        self._posted: list[Pending] = []

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        return self._post("send", tensor, tag)

    def recv(self, tensor: torch.Tensor, tag: int) -> Pending:
        return self._post("recv", tensor, tag)

    def _post(self, operation: str, tensor: torch.Tensor, tag: int) -> Pending:
        # A send of gloo is a rendezvous: what the tensor holds when the peer posts its receive is what arrives, and its
        # Work holds the group. So neither is let go of before it was waited for, or the pair is closed.
        error = work = None
        try:
            with self._lock:
                work = getattr(self._pg, operation)([tensor], self.peer_rank, tag=tag)
        except Exception as exc:
            error = [self._translate(exc, None)]
        if error is not None:
            _raise_alone(error)
        # A Work that is dropped while the group lives wedges its pair, and a thread of gloo spins on a core from then
        # on.
        pending = Pending(work, tensor)
        self._posted.append(pending)
        return pending

    def wait(self, pending: Pending, deadline: Deadline) -> None:
        # Once and no more: a second wait on a finished Work waits for a second completion, which does not come,
        # expires, and closes every pair of the group.
        work, tensor, error = pending.work, pending.tensor, None
        if work is None or tensor is None:  # dropped, by another thread that has aborted the channel meanwhile
            raise PeerFailure("the channel was aborted", peer_rank=self.peer_rank)
        nbytes = tensor.nbytes
        del tensor
        with contextlib.suppress(ValueError):  # as above
            self._posted.remove(pending)
        try:
            with self._lock:
                # No way to poll: is_completed() says False until somebody waits, and a short wait that expires closes
                # every pair. What remains is never below a millisecond: gloo takes 0 for "none given", which is its own
                # minute.
                work.wait(deadline.remaining())
            self.nbytes_wire += nbytes
        except Exception as exc:
            error = [self._translate(exc, deadline)]
        finally:
            del work
            pending.drop()
        if error is not None:
            _raise_alone(error)

    def _translate(self, exc: Exception, deadline: Deadline | None) -> TransferError:
        text = f"{type(exc).__name__}: {exc}".splitlines()[0]
        # Gloo knows no classes of errors. This text is of a wait that has expired, "Timed out waiting 100ms for recv
        # operation to complete"; that of a peer that went away is "Connection closed by peer".
        if deadline is not None and (deadline.expired() or "imed out waiting" in text):
            self.broken = True
            return TransferTimeout(f"timed out after {deadline.timeout.total_seconds():g} s", peer_rank=self.peer_rank)
        # Somebody else's wait on this group has expired: "Application timeout caused pair closure". It looks like a
        # peer that is gone, and is none.
        if "pair closure" in text or isinstance(exc, TimeoutError) or "imed out" in text:
            self.broken = True
            return PeerFailure(
                "the process group is no longer usable, a wait on it has timed out; it must be configured anew "
                f"({text})",
                peer_rank=self.peer_rank,
            )
        return PeerFailure(f"the channel broke: {text}", peer_rank=self.peer_rank)

    def drop(self) -> None:
        for pending in self._posted:
            pending.drop()
        self._posted.clear()

    def abort(self) -> None:
        self.broken = True
        try:
            with self._lock:
                # Neither abort() nor configure() of a group wakes who waits, or stops what is posted: a message that is
                # under way lands in the user's tensor afterwards, in silence. Only the end of the pair does, and this
                # is the way to end it that gloo has: when a wait expires, every pair closes. MIN_WAIT is the shortest
                # that gloo does not take for "none".
                never = torch.empty(1, dtype=torch.int64, device=self._device)
                self._pg.recv([never], self.peer_rank, tag=_NEVER).wait(MIN_WAIT)
        except Exception:
            pass  # it was meant to fail
        self.drop()


def _raise_alone(error: list[TransferError]) -> NoReturn:
    """Raise what is in the list, outside of any ``except``, and leave no reference to it behind.

    A foreign exception as its context has a traceback, that has frames, and these have the Work, which keeps the
    group: whoever keeps the error would keep them all.
    """
    raise error.pop()
