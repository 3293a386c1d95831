"""Frames: there and back, and damaged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_transport import RemoteProtocolError
from ft_transport._wire.frames import Frame, decode_frame, encode_frame
from wire.manifests import decode, read, small_frame


@pytest.mark.parametrize("kind", Frame)
def test_frames_come_back_as_they_were(kind: Frame) -> None:
    decoded, body = decode_frame(encode_frame(kind, ["a", 1, None, b"x", [2.5, True]]))
    assert decoded is kind
    assert list(body)[:4] == ["a", 1, None, b"x"]
    assert list(body[4]) == [2.5, True]


def test_every_truncation_is_refused() -> None:
    data = small_frame()
    for length in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            decode(data[:length])


def test_trailing_bytes_are_refused() -> None:
    for extra in (b"\xc0", b"\x00", b"\xff", small_frame()):
        with pytest.raises(RemoteProtocolError):
            decode(small_frame() + extra)


@pytest.mark.parametrize("change", ["lowest bit", "highest bit", "zero", "ff", "nil", "next"])
def test_every_single_damaged_byte(change: str) -> None:
    damages = {
        "lowest bit": lambda b: b ^ 1,
        "highest bit": lambda b: b ^ 0x80,
        "zero": lambda b: 0,
        "ff": lambda b: 0xFF,
        "nil": lambda b: 0xC0,
        "next": lambda b: (b + 1) % 256,
    }
    data = small_frame()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] = damages[change](damaged[place])
        read(bytes(damaged))


def test_every_byte_of_the_header_counts() -> None:
    data = small_frame()
    for place in range(6):
        damaged = bytearray(data)
        damaged[place] ^= 0x40
        with pytest.raises(RemoteProtocolError):
            decode_frame(bytes(damaged))


@given(st.binary(max_size=200))
def test_random_bytes_behind_a_valid_header(noise_bytes: bytes) -> None:
    read(encode_frame(Frame.MANIFEST, None)[:8] + noise_bytes)


@given(st.lists(st.tuples(st.integers(min_value=8), st.integers(0, 255)), min_size=1, max_size=6))
def test_random_damage(damages: list[tuple[int, int]]) -> None:
    data = bytearray(small_frame())
    for place, byte in damages:
        data[place % len(data)] = byte
    read(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FTCT",
        b"HTTP/1.1 200 OK",
        b"FTCT\x01\x01\x00\x00\xc0",
        b"FTCT\x02\x63\x00\x00\xc0",
        b"FTCT\x02\x01\x00\x00",
    ],
    ids=["nothing", "short", "another protocol", "another version", "another kind", "no body"],
)
def test_what_is_no_frame(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_frame(data)


@pytest.mark.parametrize("version", [0, 1, 3, 255])
def test_another_version_is_refused_by_name(version: int) -> None:
    data = small_frame()
    with pytest.raises(RemoteProtocolError, match=f"expected version 2 of the wire, got {version}"):
        decode_frame(data[:4] + bytes([version]) + data[5:])
