"""How bytes are fingerprinted, to find what a broken network, memory or a changing source did to them.

A digest reads every byte once more, on both sides, and where there is no idle core for that it costs a fifth of the
throughput. So large messages may be *sampled*: one block in 32 is read, another one in each transfer.
That finds a source whose state changed, bytes in the wrong place, and damage of any extent, but not a single flipped
bit. Not a defence against an attacker, who could send matching digests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import xxhash

from ft_transport._process import memory_at

__all__ = ["ALGORITHMS", "NUM_SAMPLES", "Lent", "digest_bytes", "digest_message"]

# "xxh3": XXH3 with 64 bits, of memory that the CPU can read. "sum": the bytes as int64, summed modulo 2^64,
# on the device where they are; it misses bytes that changed places.
# Not cryptographic: 30 GB/s where sha256 has one and a half, and what is looked for are accidents. A peer who lies can
# send digests that agree with the lie.
ALGORITHMS = ("xxh3", "sum")

# Of every 2 MiB of a sampled message one block of 64 KiB is read; messages below 2 MiB are read whole.
NUM_SAMPLES = 32
_BLOCK = 64 << 10
# Of a user's memory so much is read at once: whoever gives it back waits for it.
_PIECE = 1 << 20
_SAMPLED_FROM = NUM_SAMPLES * _BLOCK


class Lent(Protocol):
    """A user's memory on the CPU, which may be taken away at any moment (``_plan.blocks.Held``)."""

    @property
    def view(self) -> memoryview: ...
    def reads(self, update: Callable[[memoryview], object]) -> Callable[[memoryview], object]: ...


def digest_bytes(data: bytes | memoryview) -> int:
    """XXH3 with 64 bits, as an unsigned integer."""
    return xxhash.xxh3_64_intdigest(data)


def digest_message(message: torch.Tensor, algorithm: str, sample: int = -1, held: Lent | None = None) -> int:
    """Fingerprint of a flat, contiguous uint8 tensor, as an unsigned integer of 64 bits.

    Args:
        message: The bytes.
        algorithm: One of :data:`ALGORITHMS`.
        sample: With "xxh3", which block of each :data:`NUM_SAMPLES` is read if the message is large; -1 for all.
        held: Set if the message is a user's memory on the CPU.

    Raises:
        LocalProtocolError: That memory was taken away.
    """
    if algorithm == "sum":
        return _sum(message)
    # A copy if it was on an accelerator; there "sum" is meant, which stays on the device.
    local = message.cpu()
    # Needs no NumPy to reach the memory, and xxhash releases the GIL while it reads.
    memory = memory_at(local.data_ptr(), local.numel()) if held is None else held.view
    whole = sample < 0 or local.numel() < _SAMPLED_FROM
    if whole and held is None:
        return digest_bytes(memory)
    digest = xxhash.xxh3_64()
    update = digest.update if held is None else held.reads(digest.update)
    first, step, nbytes = (0, _PIECE, _PIECE) if whole else (sample * _BLOCK, NUM_SAMPLES * _BLOCK, _BLOCK)
    for begin in range(first, len(memory), step):
        update(memory[begin : begin + nbytes])
    return digest.intdigest()


def _sum(message: torch.Tensor) -> int:
    whole = message.numel() - message.numel() % 8
    # Cloned, since a slice of bytes need not be aligned to eight of them; addition wraps, as torch's integers do on
    # every device.
    total = int(message[:whole].clone().view(torch.int64).sum()) if whole else 0
    tail = int.from_bytes(bytes(message[whole:].tolist()), "little")
    return (total + tail) % (1 << 64)
