"""Every dtype that this torch lists, every bit pattern that it has."""

from __future__ import annotations

import functools
import io
import warnings
from typing import Any

import torch
from helpers import noise, randomized

from corpus.case import Table

__all__ = ["CASES"]

CASES = Table("dtypes")

# By name, each once: some have several names.
DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
QUANTIZED = {name: dtype for name, dtype in DTYPES.items() if "qint" in name or "quint" in name}
PLAIN = {name: dtype for name, dtype in DTYPES.items() if name not in QUANTIZED}


def _torch_keeps(tensor: torch.Tensor) -> bool:
    file = io.BytesIO()
    try:
        torch.save(tensor, file)
        file.seek(0)
        torch.load(file)
    except (KeyError, RuntimeError):
        return False
    return True


def _one(dtype: torch.dtype) -> torch.Tensor:
    with warnings.catch_warnings():
        # Of complex halves torch says once that they are experimental.
        warnings.simplefilter("ignore")
        return torch.empty(1, dtype=dtype)


def _plain(dtype: torch.dtype, seed: int) -> Any:
    return {
        "vector": noise(7, seed, dtype),
        "matrix": noise((3, 5), seed + 1, dtype),
        "scalar": noise((), seed + 2, dtype),
        "empty": torch.empty((2, 0), dtype=dtype),
        "one": noise((1, 1), seed + 3, dtype),
        "transposed": noise((4, 3), seed + 4, dtype).t(),
        "every second": noise(12, seed + 5, dtype)[::2],
        "offset": noise(9, seed + 6, dtype)[3:8],
    }


def _trainable(dtype: torch.dtype, seed: int) -> Any:
    return {
        "parameter": torch.nn.Parameter(noise((3, 2), seed, dtype)),
        "requires grad": noise(5, seed + 1, dtype).requires_grad_(),
    }


for _name, _dtype in PLAIN.items():
    CASES.add(_name, functools.partial(_plain, _dtype), torch_keeps=_torch_keeps(_one(_dtype)))
    if _dtype.is_floating_point or _dtype.is_complex:
        CASES.add(
            f"trainable {_name}",
            functools.partial(_trainable, _dtype),
            torch_keeps=_torch_keeps(_one(_dtype).requires_grad_()),
        )


def _per_tensor(dtype: torch.dtype, seed: int) -> Any:
    quantized = torch._empty_affine_quantized((3, 4), scale=0.25 + seed, zero_point=seed, dtype=dtype)
    return {"quantized": randomized(quantized, seed), "beside": noise(3, seed)}


def _per_channel(dtype: torch.dtype, seed: int) -> Any:
    floating = dtype in (torch.quint4x2, torch.quint2x4)
    scales = torch.rand(4, generator=torch.Generator().manual_seed(seed)) + 0.1
    zeros = torch.arange(4, dtype=torch.float32 if floating else torch.int64) + seed
    values = torch.randn((4, 8), generator=torch.Generator().manual_seed(seed))
    return {"quantized": torch.quantize_per_channel(values, scales, zeros, 0, dtype), "beside": noise(3, seed)}


for _name, _dtype in QUANTIZED.items():
    if "x" not in _name:
        CASES.add(f"{_name} per tensor", functools.partial(_per_tensor, _dtype))
    if _name != "qint32":
        CASES.add(f"{_name} per channel", functools.partial(_per_channel, _dtype))


# -------------------------------------------------------------------------------------- bit patterns


def _from_bits(bits: list[int], integer: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    size = 8 * integer.itemsize
    signed = [value - (1 << size) if value >> (size - 1) else value for value in bits]
    return torch.tensor(signed, dtype=integer).view(dtype)


@CASES.case()
def special_float32(seed: int) -> Any:
    bits = [0x7FC00001, 0x7FA00000, 0xFFC12345, 0x80000000, 0x7F800000, 0xFF800000, 1, 0x807FFFFF, 0x7FFF0000 + seed]
    return {"bits": _from_bits(bits, torch.int32, torch.float32)}


@CASES.case()
def special_float64(seed: int) -> Any:
    bits = [0x7FF8000000000001, 0x7FF4 << 48, 0xFFF8000012345678, 1 << 63, 0x7FF << 52, 1, (1 << 52) - seed]
    return {"bits": _from_bits(bits, torch.int64, torch.float64)}


@CASES.case()
def special_halves(seed: int) -> Any:
    bits = [0x7E01, 0x7D00, 0xFE02, 0x8000, 0x7C00, 0x0001, 0x83FF, seed]
    return {
        "float16": _from_bits(bits, torch.int16, torch.float16),
        "bfloat16": _from_bits([0x7FC1, 0x7FA0, 0xFFC2, 0x8000, 0x7F80, 1, seed], torch.int16, torch.bfloat16),
    }


@CASES.case(varies=False)
def every_byte(seed: int) -> Any:
    every = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    return {name: every.clone().view(dtype) for name, dtype in PLAIN.items() if name.startswith("float8_")}


@CASES.case()
def extremes_of_integers(seed: int) -> Any:
    integers = (
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
    return [torch.tensor([torch.iinfo(i).min, torch.iinfo(i).max, seed], dtype=i) for i in integers]


@CASES.case()
def numbers_as_one_element(seed: int) -> Any:
    return {"nan": torch.tensor(float("nan")), "minus zero": torch.tensor(-0.0), "true": torch.tensor(True), "n": seed}
