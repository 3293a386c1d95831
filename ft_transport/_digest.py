"""How bytes are fingerprinted, to find what a broken network, memory or a changing source did to them.

Not a defence against an attacker, who could send matching digests.
"""

from __future__ import annotations

import ctypes

import torch
import xxhash

__all__ = ["ALGORITHMS", "digest_bytes", "digest_message"]

# "xxh3": XXH3 with 64 bits, of memory that the CPU can read. "sum": the bytes as int64, summed modulo 2^64,
# on the device where they are; it misses bytes that changed places.
ALGORITHMS = ("xxh3", "sum")


def digest_bytes(data: bytes | memoryview) -> int:
    """XXH3 with 64 bits, as an unsigned integer."""
    return xxhash.xxh3_64_intdigest(data)


def digest_message(message: torch.Tensor, algorithm: str) -> int:
    """Fingerprint of a flat, contiguous uint8 tensor, as an unsigned integer of 64 bits."""
    nbytes = message.numel()
    if algorithm == "xxh3":
        if message.device.type != "cpu":
            message = message.cpu()
        # Releases the GIL while it reads, and needs no NumPy to reach the memory.
        return xxhash.xxh3_64_intdigest((ctypes.c_char * nbytes).from_address(message.data_ptr()))
    whole = nbytes - nbytes % 8
    total = int(message[:whole].clone().view(torch.int64).sum()) if whole else 0
    tail = int.from_bytes(bytes(message[whole:].tolist()), "little")
    return (total + tail) % (1 << 64)
