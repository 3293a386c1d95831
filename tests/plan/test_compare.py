"""How a state fits a template: which leaves land in it, which disagree, which are left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import difference, noise, raw_bytes, succeed

from ft_transport._plan.blocks import Block, Blocks, held
from ft_transport._plan.compare import Targets
from ft_transport._state.geometry import geometry_of
from plan.landing import disagreements, land


def test_ties_that_begin_alike_but_run_in_another_order() -> None:
    """Element by element the template shares other memory than the source: one would overwrite the other."""
    base, mine = noise(4, 1), noise(4, 2)
    state = {"a": base.view(2, 2), "b": base[1:3]}
    result, report, _ = land(state, {"a": mine.view(2, 2).t(), "b": mine[1:3]})
    assert difference(result, state) == ""
    assert set(report.not_in_place) == {"a", "b"}


def test_equal_ties_of_other_strides_still_land_in_place() -> None:
    base, mine = noise((3, 4), 1), noise((4, 3), 2).t()
    state = {"a": base, "b": base}
    result, report, _ = land(state, {"a": mine, "b": mine})
    assert difference(result, state) == ""
    assert result["a"] is mine
    assert report.in_place_share == 0.0 or report.nbytes_in_place == 48


def test_each_disagreement_is_one_line_with_expected_and_got() -> None:
    state = {"a": noise(2, 1), "b": {"c": noise((2, 3), 2, torch.bfloat16)}, "d": 1, "e": noise(1, 3)}
    template = {"a": noise(3, 1), "b": {"c": noise((2, 3), 2)}, "d": noise((), 3), "e": "text"}
    assert disagreements(state, template) == [
        "a: expected float32 (3,), source has float32 (2,)",
        "b.c: expected float32 (2, 3), source has bfloat16 (2, 3)",
        "d: expected tensor float32 (), source has a plain int",
        "e: expected a plain str, source has tensor float32 (1,)",
    ]


def test_plain_values_never_disagree() -> None:
    assert disagreements({"a": 1, "w": noise(1, 1)}, {"a": "text", "w": noise(1, 2)}) == []


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.zeros(1, 3).expand(2, 3), "overlaps itself"),
        (lambda: torch.zeros(10).as_strided((2, 3), (2, 1)), "overlaps itself"),
        (lambda: torch.zeros(2, 3, dtype=torch.complex64).conj(), "lazy conjugate"),
    ],
)
def test_template_leaves_that_cannot_be_written_are_named_and_left_alone(make: Any, why: str) -> None:
    mine = make()
    state = {"a": noise((2, 3), 1, mine.dtype), "b": noise(2, 2)}
    result, report, _ = land(state, {"a": mine, "b": noise(2, 3)})
    assert difference(result, state) == ""
    assert why in report.not_in_place["a"]
    assert result["a"] is not mine


def given_back(num_bytes: int, shape: tuple[int, ...] = (2, 3), offset: int = 0) -> torch.Tensor:
    """A tensor whose storage was cut behind it, as FSDP does with what is sharded away."""
    tensor = torch.zeros(100).as_strided(shape, (3, 1), offset)
    tensor.untyped_storage().resize_(num_bytes)
    return tensor


@pytest.mark.parametrize(
    "make",
    [lambda: given_back(0), lambda: given_back(20), lambda: given_back(24, offset=1)],
    ids=["all", "its end", "behind an offset"],
)
@pytest.mark.parametrize("wrapped", [lambda tensor: tensor, torch.nn.Parameter], ids=["plain", "parameter"])
def test_template_leaves_whose_memory_was_given_back_are_named_and_left_alone(make: Any, wrapped: Any) -> None:
    mine, other = wrapped(make()), noise(2, 3)
    state = {"a": noise((2, 3), 1), "b": noise(2, 2)}
    result, report, _ = land(state, {"a": mine, "b": other})
    assert difference(result, state) == ""
    assert report.not_in_place == {"a": "the template's tensor has no memory"}
    assert result["b"] is other


def test_a_template_tensor_that_ends_with_its_storage_is_received_in_place() -> None:
    mine = given_back(28, offset=1)
    result, report, _ = land({"a": noise((2, 3), 1)}, {"a": mine})
    assert (result["a"] is mine, report.not_in_place) == (True, {})


def test_an_empty_leaf_has_no_obstacle() -> None:
    """Whatever its strides are: NumPy's of an empty array are zero."""
    state = {"a": np.zeros((0, 3), np.float32), "b": torch.zeros(0, 3), "c": noise(2, 2)}
    template = {"a": np.zeros((0, 3), np.float32), "b": torch.zeros(0, 1).expand(0, 3), "c": noise(2, 3)}
    _, report, _ = land(state, template)
    assert report.not_in_place == {}


def test_a_subclass_in_the_template_is_left_alone() -> None:
    class Sub(torch.Tensor):
        pass

    mine = torch.zeros(3).as_subclass(Sub)
    result, report, _ = land({"a": noise(3, 1), "b": noise(1, 2)}, {"a": mine, "b": noise(1, 3)})
    assert type(result["a"]) is torch.Tensor
    assert "Sub" in report.not_in_place["a"]


@pytest.mark.parametrize(("narrow", "wide"), [(torch.uint8, torch.float32), (torch.int16, torch.int64)])
@pytest.mark.parametrize("own", [False, True], ids=["missing", "its own"])
def test_a_view_of_another_dtype_where_the_template_begins_between_its_elements(
    narrow: torch.dtype, wide: torch.dtype, own: bool
) -> None:
    whole = noise(256, 1).to(torch.uint8).view(narrow) if narrow is torch.uint8 else torch.arange(64, dtype=narrow)
    source = {"a": whole, "b": whole.view(wide)}
    mine: dict[str, torch.Tensor] = {"a": torch.zeros(whole.numel() + 8, dtype=narrow)[1 : 1 + whole.numel()]}
    if own:
        mine["b"] = torch.zeros(source["b"].shape, dtype=wide)
    got = succeed(source, lambda: mine).destination.result
    assert got["a"] is mine["a"]
    assert not own or got["b"] is mine["b"]
    for name, tensor in source.items():
        assert raw_bytes(got[name]) == raw_bytes(tensor), name


def test_targets_by_the_numbers_of_views() -> None:
    tensors = [noise(3, seed) for seed in range(4)]
    shape = geometry_of(tensors[0])
    targets = Targets(range(3), Blocks.of(held([Block(tensor) for tensor in tensors[:3]])), [shape] * 3)
    assert (list(targets), len(targets), [targets.at(number) for number in (0, 2, 3)]) == ([0, 1, 2], 3, [0, 2, None])
    targets.add([7], [tensors[3]], [shape])
    assert (list(targets), targets.at(7), targets[7].memory is tensors[3]) == ([0, 1, 2, 7], 3, True)
    targets.drop({1, 5})
    assert (list(targets), targets.at(7), 1 in targets, len(targets.geometries)) == ([0, 2, 7], 2, False, 3)
    assert [targets[number].memory for number in targets] == [tensors[0], tensors[2], tensors[3]]
    with pytest.raises(KeyError):
        targets[1]
    assert not Targets.none()
