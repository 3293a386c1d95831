"""Many integers as bytes: a column of what there may be 100,000 of, with no step of msgpack for each.

Strategy: little-endian two's complement, all of one size: 1, 2, 4 or 8 bytes, the least that holds them. Which one
follows from the length, as both sides know how many there are.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

__all__ = ["pack_column", "unpack_column"]

# Of the ``array`` module, by their size in bytes.
_CODES = {1: "b", 2: "h", 4: "i", 8: "q"}


def pack_column(values: Sequence[int]) -> bytes:
    """The bytes of some integers; raises OverflowError if one does not fit into 64 bits."""
    if not any(values):  # as offsets mostly are
        return bytes(len(values))
    for code in "bhi":
        # Tried, and not looked for the largest: that would be another pass, and what does not fit mostly comes early.
        with suppress(OverflowError):
            return _little(array(code, values)).tobytes()
    return _little(array("q", values)).tobytes()


def unpack_column(data: Any, count: int) -> list[int]:
    """So many integers; raises ValueError if the bytes are not of as many."""
    size = len(data) // count if type(data) is bytes and count else 0
    if type(data) is not bytes or len(data) != count * size or (count and size not in _CODES):
        what = f"{len(data)} bytes" if type(data) is bytes else f"a {type(data).__name__}"
        raise ValueError(f"expected a column of {count} integers, got {what}")
    return _little(array(_CODES[size], data)).tolist() if count else []


def _little(values: array[int]) -> array[int]:
    if sys.byteorder == "big":
        values.byteswap()
    return values
