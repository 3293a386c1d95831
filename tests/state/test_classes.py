"""Names of classes and dtypes, as they travel."""

from __future__ import annotations

import torch

from ft_transport._state.classes import dtype_name


def test_dtype_name() -> None:
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"
