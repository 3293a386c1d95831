"""A channel that misbehaves, around any other."""

from __future__ import annotations

import threading
from typing import TypeVar

import torch

from ft_transport._deadline import Deadline
from ft_transport._group.channel import Channel, Pending
from ft_transport._group.control import FIRST_MESSAGE_TAG, FRAME_TAG
from ft_transport._wire.frames import Frame
from ft_transport.testing._faults import Fault, Faults, Message, damaged

__all__ = ["FaultyChannel"]

C = TypeVar("C", bound="FaultyChannel")

# A tag that nobody else uses: what is posted with it is never matched.
_NOWHERE = 1 << 20
_KIND_AT = 5  # place of a frame's kind, see docs/protocol.md


class FaultyChannel(Faults):
    """A channel to one peer that has the faults it is given.

    Faults that name a message are done to what this end sends. Those with ``_at`` strike at one *operation*, counted
    from 0 over sends and receives alike, so that a test can walk through all of them.

    Args:
        channel: The channel to wrap.
        seed: For what is left to chance.
    """

    def __init__(self, channel: Channel, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self._channel = channel
        self._num_posted = 0
        self._nbytes = 0

    def die_at(self: C, operation: int) -> C:
        """Close the pair instead of posting this operation, as a killed process would."""
        return self._add(Fault("die_at", operation=operation))

    def freeze_at(self: C, operation: int) -> C:
        """Post nothing any more from this operation on, as a stopped process."""
        return self._add(Fault("freeze_at", operation=operation))

    def corrupt_at(self: C, operation: int) -> C:
        """Flip the lowest bit of the first byte of this send."""
        return self._add(Fault("corrupt_at", operation=operation))

    def raise_at(self: C, operation: int, error: BaseException) -> C:
        """Raise instead of posting this operation."""
        return self._add(Fault("raise_at", operation=operation, error=error))

    def duplicate(self: C, message: Message, *, times: int = 1) -> C:
        """Send a message of the state twice; not a frame, whose second copy would end the process of a gloo rank."""
        if isinstance(message, str):
            raise ValueError(f"message: expected the number of a message of the state, got {message!r}")
        return super().duplicate(message, times=times)

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        # Counted before anything else, so that `die_at(n)` strikes at the same place whatever other faults there are.
        tag = self._count(tensor, tag)
        if self._at("corrupt_at"):
            # A copy: the source's own tensor, which it serves again to the next destination, shall not be the one that
            # is wrong.
            tensor = tensor.clone()
            tensor.view(torch.uint8)[0] ^= 1
        times = 1
        for fault in self._of(_message(tensor, tag)):
            if not fault.due():
                continue
            if fault.what == "duplicate":
                times += 1
            else:
                tensor = self._damage(tensor, fault)
        pending, *_ = [self._channel.send(tensor, tag) for _ in range(times)]
        return pending

    def recv(self, tensor: torch.Tensor, tag: int) -> Pending:
        return self._channel.recv(tensor, self._count(tensor, tag))

    def _damage(self, tensor: torch.Tensor, fault: Fault) -> torch.Tensor:
        data = bytes(tensor.cpu().view(torch.uint8).tolist())
        # Of the same length: a gloo receive that meets a shorter message completes without error and keeps its old
        # tail, so what arrives would depend on what the memory held before. With zeros each run is the same.
        found = damaged(data, (0, 0), fault, self._random).ljust(len(data), b"\0")
        return torch.frombuffer(bytearray(found), dtype=torch.uint8).view(tensor.dtype).to(tensor.device)

    def _at(self, what: str) -> Fault | None:
        """The fault that strikes at the operation that was counted last."""
        last = self._num_posted - 1
        return next((fault for fault in self._faults if fault.what == what and fault.operation == last), None)

    def _count(self, tensor: torch.Tensor, tag: int) -> int:
        """Note that an operation begins, and have its faults; gives the tag to post it with."""
        operation = self._num_posted
        self._num_posted += 1
        self._nbytes += tensor.numel() * tensor.element_size()
        raising = self._at("raise_at")
        if raising is not None and raising.error is not None:
            raise raising.error
        if self._at("die_at") or any(fault.nbytes < self._nbytes for fault in self._after("drop_after")):
            # Posts nothing and does not raise here: a killed process raises nothing either. Posting to a pair that is
            # closed does, in the next line of the caller, as it would after a peer's death.
            self._channel.abort()
        frozen = [fault for fault in self._after("freeze_at") if fault.operation <= operation]
        frozen += [fault for fault in self._after("freeze_after") if fault.nbytes < self._nbytes]
        # Posted all the same, so that this end waits on an operation as it does when the peer is stopped: gloo notices
        # nothing of a SIGSTOP, and the wait ends by its time-out alone.
        return tag + _NOWHERE if frozen else tag

    @property
    def num_operations(self) -> int:
        """Operations posted so far."""
        return self._num_posted

    @property
    def peer_rank(self) -> int:
        return self._channel.peer_rank

    @property
    def nbytes_wire(self) -> int:
        return self._channel.nbytes_wire

    @property
    def broken(self) -> bool:
        return self._channel.broken

    @property
    def in_order(self) -> bool:
        return self._channel.in_order

    def wait(self, pending: Pending, deadline: Deadline) -> None:
        rate = self._amount("throttle")
        assert pending.tensor is not None
        late = pending.tensor.numel() * pending.tensor.element_size() / rate if rate else 0.0
        if late := late + self._amount("delay"):
            # Not longer than the budget: what is tested is a slow network, and the wait that then times out is the
            # channel's.
            threading.Event().wait(min(late, deadline.remaining().total_seconds()))
        self._channel.wait(pending, deadline)

    def drop(self) -> None:
        self._channel.drop()

    def abort(self) -> None:
        self._channel.abort()


def _message(tensor: torch.Tensor, tag: int) -> int | str:
    """What a send is, as :class:`Faults` names it."""
    if tag >= FIRST_MESSAGE_TAG:
        return tag - FIRST_MESSAGE_TAG
    if tag == FRAME_TAG and tensor.numel() > _KIND_AT:
        return Frame(int(tensor[_KIND_AT])).name
    return ""
