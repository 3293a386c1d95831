"""Frames and signals: what the two sides of a transfer say to each other over a channel.

A *control* message is one int64. Positive: the length of a frame that follows, and that is followed by its length
once more, so that nobody has to wait for the frame itself (see ``_group.channel``). Negative: signal number
``-1 - value``.
"""

from __future__ import annotations

import ctypes
from collections import deque
from datetime import timedelta
from typing import Any

import torch

from ft_transport._deadline import Deadline
from ft_transport._device import brought
from ft_transport._group.channel import Channel, Pending
from ft_transport._wire.frames import MAX_FRAME_BYTES, Frame, decode_frame, encode_frame
from ft_transport.errors import PeerFailure, RemoteProtocolError, TransferError, ended

__all__ = ["CONTROL_TAG", "FIRST_MESSAGE_TAG", "FRAME_TAG", "Control", "Posted"]

# Gloo matches by tag, whatever the order. NCCL, and torchft's group over torchcomms, have none and match by order, so
# each side also posts in the order in which the other one does.
CONTROL_TAG = 1
FRAME_TAG = 2
FIRST_MESSAGE_TAG = 3

# How long a side that gives up waits for its reason to leave, before it breaks the channel.
_LAST_WORDS = timedelta(seconds=1)

# A posted receive of a control message, and where it lands.
Posted = tuple[torch.Tensor, Pending]


class Control:
    """One side of the conversation with one peer.

    Args:
        channel: To the peer.
        device: Where control messages live.
        deadline: Of the whole call.

    Attributes:
        peer_gave_up: Whether the peer has said that it will not go on.
        is_over: Whether either side has said why it ends here, and the other one has taken it in: nobody listens.
    """

    def __init__(self, channel: Channel, device: torch.device, deadline: Deadline) -> None:
        self.channel = channel
        self.deadline = deadline
        self.peer_gave_up = False
        self.is_over = False
        self._mid_frame = False
        self._device = device
        self._ahead: deque[Posted] = deque()
        # Sends of frames, reclaimed when the peer has answered.
        self._unconfirmed: list[Pending] = []

    def send_frame(self, data: bytes) -> None:
        """Send a frame; :meth:`flush`, or the next frame received, confirms that it has left."""
        # A copy, because torch warns of memory that cannot be written to, and bytes cannot.
        body = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        # If one of the three cannot be posted the peer has half a frame, and waits for the other half.
        self._mid_frame = True
        self._unconfirmed += [
            self._send_number(len(data)),
            self.channel.send(body, FRAME_TAG),
            self._send_number(len(data)),
        ]
        self._mid_frame = False

    def send_signal(self, number: int) -> Pending:
        """Send a signal; the caller waits for it once the peer must have it."""
        return self._send_number(-1 - number)

    def _send_number(self, number: int) -> Pending:
        tensor = torch.tensor([number], dtype=torch.int64, device=self._device)
        return self.channel.send(tensor, CONTROL_TAG)

    def flush(self, deadline: Deadline | None = None) -> None:
        """Wait until every frame sent so far has left."""
        # The last one first: it is small, and once it has left so have the others.
        while self._unconfirmed:
            self.channel.wait(self._unconfirmed.pop(), deadline or self.deadline)

    def recv_frame(self, expected: Frame) -> Any:
        """The body of the next frame.

        Raises:
            RemoteProtocolError: The peer refuses, or the frame is another one.
            PeerFailure: The peer gave up.
        """
        return self.check(expected, self.recv_bytes())

    def recv_bytes(self) -> bytes:
        """The bytes of the next frame, still to be checked."""
        number = self._take(self._next())
        if number <= 0:
            raise RemoteProtocolError(f"expected a frame, got signal {-1 - number}")
        data = self._recv_body(number)
        self.flush()
        return data

    def check(self, expected: Frame, data: bytes) -> Any:
        """The body of a frame, which must be of this kind; raises as :meth:`recv_frame`."""
        kind, body = decode_frame(data)
        if kind is not expected:
            self._fail(kind, body)
        return body

    def expect(self) -> Posted:
        """Post the receive of the next control message."""
        number = torch.zeros(1, dtype=torch.int64, device=self._device)
        # Posted and not yet waited for: a receive that is pending when the peer dies raises within a tenth of a second.
        # One of a large message, of which some bytes have come, does not.
        return number, self.channel.recv(number, CONTROL_TAG)

    def expect_ahead(self) -> None:
        """Post the receive of a control message that comes behind what is posted already; the next one taken is it."""
        # At its own place, for channels that run in order: there a receive that is posted only when it is waited for
        # stands behind those of the next flights, and meets the wrong message.
        self._ahead.append(self.expect())

    def _next(self) -> Posted:
        return self._ahead.popleft() if self._ahead else self.expect()

    def recv_signal(self, expected: int, posted: Posted | None = None) -> None:
        """Wait for a signal, on a receive that was posted before or on a new one.

        Raises:
            RemoteProtocolError: It is another one.
            PeerFailure: The peer gave up.
        """
        number = self._take(posted or self._next())
        if number > 0:
            self._fail(*decode_frame(self._recv_body(number)))
        if -1 - number != expected:
            raise RemoteProtocolError(f"expected signal {expected}, got {-1 - number}")

    def _take(self, posted: Posted) -> int:
        number, pending = posted
        self.channel.wait(pending, self.deadline)
        return int(brought(number, self.deadline).item())

    def _recv_body(self, nbytes: int) -> bytes:
        if nbytes > MAX_FRAME_BYTES:
            raise RemoteProtocolError(f"a frame of {nbytes} bytes, at most {MAX_FRAME_BYTES} are accepted")
        # Only now, since the number is the peer's. It must be exact: a receive that is shorter than the message ends
        # the process (SIGABRT), and one that is longer leaves its tail as it was, without an error.
        body = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        pending = self.channel.recv(body, FRAME_TAG)
        # Behind the body, and small: once it is here, so is the body, and if the peer dies before, it raises.
        again = self._take(self._next())
        self.channel.wait(pending, self.deadline)
        if again != nbytes:
            raise RemoteProtocolError(f"a frame of {nbytes} bytes ends with {again}")
        # bytes(tensor) would make a Python number of every byte first.
        local = brought(body, self.deadline)
        return ctypes.string_at(local.data_ptr(), nbytes)

    def _fail(self, kind: Frame, body: Any) -> None:
        """Raise what a REFUSE or FAILED frame says; anything else is out of order."""
        # Text alone: the text of anything else may be longer than its bytes, or nested too deep to be made.
        # A peer of another version, or another mind, may send anything in the place of a list of texts.
        reasons = "; ".join(reason for reason in body if isinstance(reason, str)) if isinstance(body, tuple) else ""
        if kind is Frame.REFUSE:
            self.is_over = True
            raise ended(RemoteProtocolError(f"the destination refuses this state: {reasons}"), "refused")
        if kind is Frame.FAILED:
            self.peer_gave_up = True
            raise ended(PeerFailure(f"the peer gave up: {reasons}"), "failed")
        raise RemoteProtocolError(f"a frame out of order: {kind.name}")

    def give_up(self, reason: str, kind: Frame = Frame.FAILED) -> None:
        """Tell the peer, which waits for a frame, why it will not come. The channel stays whole."""
        # What becomes of the group is for the caller to say: a source goes on serving the others over it.
        self.send_frame(encode_frame(kind, [reason]))
        self.flush()
        self.is_over = True

    def last_words(self, reason: str) -> None:
        """Tell the peer why, if it still listens, and break the channel. Never raises."""
        try:
            # Half a frame makes the peer wait for its other half; a message of another length would abort it.
            if not self._mid_frame:
                self.send_frame(encode_frame(Frame.FAILED, [reason]))
                self.flush(Deadline(min(self.deadline.remaining(), _LAST_WORDS)))
        except TransferError:
            pass
        self.channel.abort()

    def await_closure(self) -> None:
        """Wait for a peer that gave up to close its side: only then nothing posted moves any more. Never raises."""
        try:
            self._take(self._next())
        except TransferError:
            pass
