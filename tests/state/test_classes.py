"""Names of classes and dtypes, as they travel, and which a peer may name."""

from __future__ import annotations

import collections
import sys
from typing import Any

import numpy
import pytest
import torch
from helpers import Config, Point

from ft_transport._state.classes import (
    STORAGE,
    NotAllowed,
    advice,
    allowed_class,
    class_name,
    dtype_name,
    dtype_of,
    expect,
    expect_class,
    imported_class,
    is_allowed,
    numpy_descr,
    numpy_dtype,
)


class Outer:
    class Inner:
        pass


def test_dtype_name() -> None:
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"
    assert dtype_of("float8_e4m3fn") is torch.float8_e4m3fn
    for other in ("Tensor", "torch.float32", 5, None):
        with pytest.raises((KeyError, TypeError)):
            dtype_of(other)


@pytest.mark.parametrize("cls", [Config, Outer.Inner, collections.OrderedDict, len])
def test_a_class_is_found_by_its_name(cls: Any) -> None:
    assert imported_class(class_name(cls)) is cls


def test_a_class_that_nobody_else_would_find_has_no_name() -> None:
    class Local:
        pass

    hidden = type("Config", (), {"__module__": "helpers"})
    for cls in (Local, hidden):
        with pytest.raises(ValueError, match="cannot be found by its name"):
            class_name(cls)
    with pytest.raises(ValueError, match="cannot be found"):
        imported_class("no_such_module.Class")


def test_the_list_of_the_receiver_decides() -> None:
    assert allowed_class("builtins.int") is int
    assert not is_allowed("helpers.Config")
    with pytest.raises(NotAllowed) as caught:
        allowed_class("helpers.Config")
    assert caught.value.names == {"helpers.Config"}
    with torch.serialization.safe_globals([Config]):
        assert is_allowed("helpers.Config")
        assert allowed_class("helpers.Config") is Config


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["helpers.Config"], "class helpers.Config is not allowed; if you trust it, call import helpers, torch; "
                             "torch.serialization.add_safe_globals([helpers.Config]) on the receiver"),
        (["helpers.Config", "helpers.Point"], "add_safe_globals([helpers.Config, helpers.Point]) on the receiver"),
        (["exceptions.ValueError"], '[(ValueError, "exceptions.ValueError")]'),
        ([f"{__name__}.Outer.Inner"], f"add_safe_globals([{__name__}.Outer.Inner])"),
        (["decimal.Decimal"], "add_safe_globals([decimal.Decimal])"),
    ],
)  # fmt: skip
def test_the_advice_is_code_that_can_be_pasted(names: list[str], expected: str) -> None:
    assert expected in advice(names)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (STORAGE, "a bare storage cannot travel"),
        ("os.system", "torch reads nothing of os"),
        ("subprocess.Popen", "only classes that hold values"),
        ("torch.load", "it may run code"),
        ("numpy.load", "it may run code"),
        ("builtins.eval", "only classes that hold values"),
        ("builtins.map", "only classes that hold values"),
        ("functools.partial", "only classes that hold values"),
        ("math.pi", "it is no class"),
    ],
)
def test_no_advice_that_harms(name: str, why: str) -> None:
    assert why in advice([name])
    assert "add_safe_globals" not in advice([name])


def test_advice_imports_nothing() -> None:
    assert "add_safe_globals([wave.Wave_read])" not in advice(["antigravity.anything"])
    assert "antigravity" not in sys.modules


def test_types_must_be_exactly_these() -> None:
    assert expect(int, 5) == 5
    assert expect_class(Point) is Point
    for cls, value in ((int, True), (float, 1), (str, b"x"), (tuple, Point(1, 2))):
        with pytest.raises(TypeError, match=f"expected {cls.__name__}, got {type(value).__name__}"):
            expect(cls, value)
    with pytest.raises(TypeError, match="expected a class, got function"):
        expect_class(advice)


@pytest.mark.parametrize("dtype", ["<f4", ">i8", "S3", "<U2", "M8[ns]", "V5", [("a", "<i4"), ("b", "<f8", (2,))]])
def test_numpy_dtypes_come_back(dtype: Any) -> None:
    wanted = numpy.dtype(dtype)
    descr = numpy_descr(wanted)
    assert numpy_dtype(descr) == wanted
    assert numpy_dtype(descr).fields == wanted.fields


@pytest.mark.parametrize("descr", ["|O", [("a", "|O")], ("ml_dtypes", "numpy"), ("ml_dtypes", 5)])
def test_numpy_dtypes_that_are_refused(descr: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        numpy_dtype(descr)
