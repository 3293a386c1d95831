"""Fingerprints: known values, every byte counts, both algorithms, any place in memory."""

from __future__ import annotations

import pytest
import torch
import xxhash
from helpers import noise

from ft_transport._wire.digest import ALGORITHMS, NUM_SAMPLES, digest_bytes, digest_message


def test_known_values() -> None:
    assert digest_bytes(b"") == 0x2D06800538D394C2
    message = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 1], dtype=torch.uint8)
    assert digest_message(message, "sum") == 3 + 7 + 256
    assert digest_message(message, "xxh3") == xxhash.xxh3_64_intdigest(bytes(message.tolist()))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 64, 1000])
def test_the_place_in_memory_does_not_matter(algorithm: str, nbytes: int) -> None:
    base = noise(nbytes + 16, 1, torch.uint8)
    digests = set()
    for offset in range(9):
        base[offset : offset + nbytes] = noise(nbytes, 2, torch.uint8)
        digests.add(digest_message(base[offset : offset + nbytes], algorithm))
    assert len(digests) == 1
    assert 0 <= digests.pop() < 1 << 64


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_byte_counts(algorithm: str) -> None:
    message = noise(21, 3, torch.uint8)
    right = digest_message(message, algorithm)
    for place in range(21):
        message[place] ^= 1
        assert digest_message(message, algorithm) != right
        message[place] ^= 1
    assert digest_message(message, algorithm) == right


def test_the_sum_wraps_around() -> None:
    message = torch.full((24,), 255, dtype=torch.uint8)
    assert digest_message(message, "sum") == (1 << 64) - 3


def test_bytes_and_messages_agree() -> None:
    message = noise(100, 4, torch.uint8)
    assert digest_message(message, "xxh3") == digest_bytes(bytes(message.tolist()))


def test_samples_together_read_every_byte_of_a_large_message() -> None:
    message = torch.zeros((2 << 20) + 5000, dtype=torch.uint8)
    right = [digest_message(message, "xxh3", sample) for sample in range(NUM_SAMPLES)]
    for place in (0, 65535, 65536, 1 << 20, 2 << 20, message.numel() - 1):
        message[place] = 1
        changed = [digest_message(message, "xxh3", sample) != right[sample] for sample in range(NUM_SAMPLES)]
        assert sum(changed) == 1, "each byte is in one sample"
        message[place] = 0
    assert digest_message(message, "xxh3") not in right


def test_small_messages_are_read_whole_whatever_the_sample() -> None:
    message = noise(1000, 5, torch.uint8)
    assert len({digest_message(message, "xxh3", sample) for sample in (-1, 0, NUM_SAMPLES - 1)}) == 1
