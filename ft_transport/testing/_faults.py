"""The vocabulary: which faults there are, and where each strikes. No I/O."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Fault", "Faults", "damaged"]

F = TypeVar("F", bound="Faults")

# What a message is: the number of a message of the state, or the name of a frame of the conversation.
Message = int | str


@dataclass
class Fault:
    """One fault.

    Attributes:
        what: Which; the name of the method that made it.
        message: Which message it is done to.
        nbytes: After how many bytes, or to how many.
        amount: Seconds, or bytes per second.
        times: How often it may still happen; -1 without end.
        operation: Of a channel, at which it happens; -1 where that does not matter.
        error: What is raised.
    """

    what: str
    message: Message = -1
    nbytes: int = 0
    amount: float = 0.0
    times: int = -1
    operation: int = -1
    error: BaseException | None = None

    def due(self) -> bool:
        """Whether it happens now; counts it."""
        if self.times == 0:
            return False
        # -1 stays -1: without end.
        self.times -= self.times > 0
        return True


class Faults:
    """What is to go wrong on the way between a source and a destination. Each call adds a fault, and gives this object.

    A *message* is the number of a message of the state, counted from 0 (``report.num_messages`` of them), or the name
    of a frame of ``docs/protocol.md``: ``"MANIFEST"``, ``"READY"``, ``"DIGESTS"``, ``"ROUTE"``, ``"DONE"``, …

    Args:
        seed: For what is left to chance: which bit is flipped.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self._faults: list[Fault] = []
        # Its own generator: whoever draws from the global one, a sampler or dropout, would change which bit is
        # flipped.
        self._random = random.Random(seed)

    def _add(self: F, fault: Fault) -> F:
        self._faults.append(fault)
        return self

    def drop_after(self: F, nbytes: int, *, lanes: int = 0) -> F:
        """Cut the connection once so many bytes have gone to the destination, as the death of the source would.

        Args:
            nbytes: Of all connections together; with ``lanes``, of each.
            lanes: Cut only the first so many connections that get so far, and let new ones in. 0 cuts all, for good.
        """
        # `times` counts down with each lane that is cut; `amount` keeps whether lanes are counted one by one.
        return self._add(Fault("drop_after", nbytes=nbytes, times=lanes or -1, amount=float(lanes)))

    def freeze_after(self: F, nbytes: int) -> F:
        """Once so many bytes have gone to the destination, let nothing pass any more, and close nothing."""
        return self._add(Fault("freeze_after", nbytes=nbytes))

    def delay(self: F, seconds: float) -> F:
        """Let everything arrive so much later. Latency: it does not make a long message longer."""
        return self._add(Fault("delay", amount=seconds))

    def throttle(self: F, bytes_per_second: float) -> F:
        """Let no more than so many bytes pass in a second, to either side, of all connections together."""
        if bytes_per_second <= 0:
            raise ValueError(f"bytes_per_second: expected more than 0, got {bytes_per_second:g}")
        return self._add(Fault("throttle", amount=bytes_per_second))

    def corrupt(self: F, message: Message, *, times: int = 1) -> F:
        """Flip a bit of a message, the first so many times that it passes; -1 without end."""
        return self._add(Fault("corrupt", message, times=times))

    def truncate(self: F, message: Message, nbytes: int = 1, *, times: int = 1) -> F:
        """Lose the last bytes of a message, but not its first one."""
        return self._add(Fault("truncate", message, nbytes, times=times))

    def duplicate(self: F, message: Message, *, times: int = 1) -> F:
        """Let a message pass twice."""
        return self._add(Fault("duplicate", message, times=times))

    # --------------------------------------------------------------------- what those who carry them out ask

    def _amount(self, what: str) -> float:
        """The seconds of all delays together, or the lowest of all rates; 0 for none."""
        amounts = [fault.amount for fault in self._faults if fault.what == what]
        # As of links one after another: latencies add up, the narrowest sets the rate.
        return (sum(amounts) if what == "delay" else min(amounts)) if amounts else 0.0

    def _of(self, message: Message) -> list[Fault]:
        """Those that are done to a message, if any is left."""
        return [fault for fault in self._faults if fault.message == message and fault.times != 0]

    def _after(self, what: str) -> list[Fault]:
        return [fault for fault in self._faults if fault.what == what]


def damaged(data: bytes, content: tuple[int, int], fault: Fault, chosen: random.Random) -> bytes:
    """What becomes of the bytes of a message.

    Args:
        data: All of them, with what surrounds them on the wire.
        content: Byte range of what a flipped bit is in; empty for anywhere.
        fault: What is done to it.
        chosen: Chooses the bit.
    """
    if fault.what == "corrupt":
        # In the content where there is one: a flipped bit of a header is refused as nonsense, and the digest, which is
        # what `corrupt` is there to try, is never asked.
        begin, end = content if content[0] < content[1] else (0, len(data))
        changed = bytearray(data)
        # One bit: what a bad memory cell does, and what TCP's 16 bit sum misses when a second one cancels it.
        changed[chosen.randrange(begin, end)] ^= 1 << chosen.randrange(8)
        return bytes(changed)
    if fault.what == "truncate":
        # At least one byte is left, or it would be a message that is missing, which is another fault.
        return data[: max(1, len(data) - fault.nbytes)]
    assert fault.what == "duplicate"
    return data + data
