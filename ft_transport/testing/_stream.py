"""Finds the messages in the bytes of a lane, and does to them what is due. No I/O."""

from __future__ import annotations

from ft_transport._lanes.protocol import HEADER_BYTES, TRAILER, LaneFrame, LaneHeader, decode_header
from ft_transport.errors import RemoteProtocolError
from ft_transport.testing._faults import Faults, damaged

__all__ = ["HANDSHAKE_BYTES", "FrameStream"]

# What the handshake has before the first frame: knock and enter on the way to the listener, answer on the way back.
HANDSHAKE_BYTES = {"up": 75 + 32, "down": 64}


class FrameStream:
    """The bytes of one connection in one direction.

    Args:
        faults: What is done to which message.
        direction: ``"up"``, to the listener, or ``"down"``, from it.
    """

    def __init__(self, faults: Faults, direction: str) -> None:
        self._faults = faults
        self._handshake = HANDSHAKE_BYTES[direction]
        self._held = bytearray()
        self._passing = 0  # bytes of the frame under way that pass as they come
        # Whether the bytes are no frames, or nobody cares.
        self._lost = not any(fault.message != -1 for fault in faults._faults)

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes; gives what passes on now in their place."""
        passed = bytearray()
        if self._handshake and not self._lost:
            # Nonces and MACs, of a length that is known, before the first header.
            passed += data[: self._handshake]
            data, self._handshake = data[self._handshake :], max(0, self._handshake - len(data))
        while data:
            if self._lost or self._passing:
                count = len(data) if self._lost else min(self._passing, len(data))
                passed += data[:count]
                data, self._passing = data[count:], self._passing - count
                continue
            data = self._hold(data, passed)
        return bytes(passed)

    def _hold(self, data: bytes, passed: bytearray) -> bytes:
        """Hold back the frame that begins until it is known whether anything is done to it; gives what follows."""
        data = self._fill(data, HEADER_BYTES)
        if len(self._held) < HEADER_BYTES:
            return b""
        try:
            header = decode_header(self._held[:HEADER_BYTES])
        except RemoteProtocolError:
            self._lost = True
            passed += self._release()
            return data
        rest = header.nbytes + (TRAILER.size if header.frame is LaneFrame.MESSAGE else 0)
        faults = self._faults._of(_message(header))
        if not faults:
            passed += self._release()
            # Nothing is done to it, so its bytes go on as they come: to hold back each frame of 16 MiB would change
            # the timing that a test is about.
            self._passing = rest
            return data
        data = self._fill(data, HEADER_BYTES + rest)
        if len(self._held) == HEADER_BYTES + rest:
            frame = self._release()
            for fault in faults:
                if fault.due():
                    frame = damaged(frame, (HEADER_BYTES, HEADER_BYTES + header.nbytes), fault, self._faults._random)
            passed += frame
        return data

    def _fill(self, data: bytes, nbytes: int) -> bytes:
        missing = max(0, nbytes - len(self._held))
        self._held += data[:missing]
        return data[missing:]

    def _release(self) -> bytes:
        held, self._held = bytes(self._held), bytearray()
        return held


def _message(header: LaneHeader) -> int | str:
    return header.number if header.frame is LaneFrame.MESSAGE else header.frame.name
