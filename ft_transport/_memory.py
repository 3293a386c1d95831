"""Memory to land in and to stage through.

Strategy: fresh memory costs page faults, which are several times slower than the wire. Large allocations are
therefore asked for in huge pages, and populated piece by piece shortly before the bytes arrive.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Callable

import torch

__all__ = ["Bucket", "allocate", "aligned", "copy_bytes", "copy_elements", "populate"]

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14; older kernels answer EINVAL, and the pages fault in one by one
# Below this a page fault or two costs less than the system calls.
_WORTH_ADVICE = 4 << 20


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]


def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """A flat uint8 tensor of ``nbytes`` with undefined content.

    Raises:
        MemoryError: The device has no room for it.
    """
    try:
        flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
    except RuntimeError as exc:
        raise MemoryError(f"no room for {nbytes} bytes on {device}: {exc}") from exc
    if device.type == "cpu" and nbytes >= _WORTH_ADVICE:
        _advise(flat.data_ptr(), nbytes, _HUGE_PAGE, _MADV_HUGEPAGE, inner=True)
    return flat


def populate(flat: torch.Tensor) -> None:
    """Fault the pages of ``flat`` in at once; its content is kept. Nothing happens where that is not possible."""
    if flat.device.type == "cpu" and flat.numel() >= _WORTH_ADVICE:
        _advise(flat.data_ptr(), flat.numel(), mmap.PAGESIZE, _MADV_POPULATE_WRITE, inner=False)


def _advise(address: int, nbytes: int, page: int, advice: int, *, inner: bool) -> None:
    madvise = _madvise()
    if madvise is None:
        return
    if inner:
        begin, end = address + -address % page, (address + nbytes) // page * page
    else:
        begin, end = address // page * page, address + nbytes + -(address + nbytes) % page
    if end > begin:
        madvise(begin, end - begin, advice)


class Bucket:
    """Memory on the wire's device that messages are staged in; grows to what one flight needs, then is reused."""

    __slots__ = ("_device", "_flat", "_used")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: torch.Tensor | None = None
        self._used = 0

    def reset(self, nbytes: int) -> None:
        """Give back everything taken, and have room for ``nbytes`` in takes of any number."""
        self._used = 0
        if nbytes and (self._flat is None or self._flat.numel() < nbytes):
            self._flat = None  # before the new one is allocated
            self._flat = allocate(nbytes, self._device)

    def take(self, nbytes: int) -> torch.Tensor:
        """The next ``nbytes`` as a flat uint8 tensor, aligned to 64 bytes."""
        assert self._flat is not None, "reset() comes first"
        taken = self._flat[self._used : self._used + nbytes]
        assert taken.numel() == nbytes, "more taken than asked for in reset()"
        self._used += aligned(nbytes)
        return taken


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to 64 bytes, what one take from a bucket uses."""
    return nbytes + -nbytes % 64


def copy_elements(strided: torch.Tensor, begin: int, flat: torch.Tensor, *, to_flat: bool) -> None:
    """Copy elements of ``strided``, numbered in row-major order from ``begin``, to or from ``flat``.

    Args:
        strided: Any strides that do not overlap, any device.
        begin: Number of the first element.
        flat: 1-D, contiguous, of the same dtype; its length says how many elements.
        to_flat: Gather into ``flat`` if true, else scatter from it.
    """
    if strided.dim() <= 1:
        part = strided.reshape(-1)[begin : begin + flat.numel()] if strided.dim() else strided.reshape(1)
        _copy(part, flat, to_flat)
        return
    row = math.prod(strided.shape[1:])
    done = 0
    while done < flat.numel():
        index, inside = divmod(begin + done, row)
        left = flat.numel() - done
        if inside or left < row:
            count = min(row - inside, left)
            copy_elements(strided[index], inside, flat[done : done + count], to_flat=to_flat)
        else:
            rows = left // row
            count = rows * row
            _copy(strided[index : index + rows], flat[done : done + count].view(rows, *strided.shape[1:]), to_flat)
        done += count


# Bit patterns are moved, not numbers, and copy_ does not know every dtype: any of the same size will do.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def copy_bytes(strided: torch.Tensor, begin: int, flat: torch.Tensor, *, to_flat: bool) -> None:
    """:func:`copy_elements` where ``flat`` is uint8, of any alignment, and ``begin`` counts bytes."""
    carrier = _CARRIERS[strided.dtype.itemsize]
    memory = strided if strided.dtype == carrier else strided.view(carrier)
    aligned_flat = flat
    if flat.storage_offset() % carrier.itemsize:
        aligned_flat = torch.empty_like(flat) if to_flat else flat.clone()
    copy_elements(memory, begin // carrier.itemsize, aligned_flat.view(carrier), to_flat=to_flat)
    if to_flat and aligned_flat is not flat:
        flat.copy_(aligned_flat)


def _copy(strided: torch.Tensor, flat: torch.Tensor, to_flat: bool) -> None:
    if to_flat:
        flat.copy_(strided)
    else:
        strided.copy_(flat)
