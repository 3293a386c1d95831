"""Plain tensors and parameters: their class, their flags, and what is lazy."""

from __future__ import annotations

import pytest
import torch
from helpers import difference, noise, succeed, transfer

from ft_transport._state.kinds.base import flatten_leaf
from ft_transport.errors import LocalProtocolError
from state.kinds.leaves import there_and_back


@pytest.mark.parametrize(
    "leaf",
    [
        noise(3, 1),
        noise(3, 1).requires_grad_(),
        torch.nn.Parameter(noise(3, 1)),
        torch.nn.Parameter(noise(3, 1), requires_grad=False),
        torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False),
    ],
)
def test_plain_tensors_come_back_as_they_were(leaf: torch.Tensor) -> None:
    _, (inner,) = flatten_leaf(leaf)
    assert inner is leaf
    again = there_and_back(leaf)
    assert difference(again, leaf) == ""
    assert again.is_leaf


def test_lazy_conjugates_and_negatives_travel_as_the_bytes_they_are_of() -> None:
    z = torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    for lazy in (z.conj(), z.conj().imag):
        _, (inner,) = flatten_leaf(lazy)
        assert not inner.is_conj()
        assert not inner.is_neg()
        assert inner.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()
        assert torch.equal(there_and_back(lazy), lazy)


CONJUGATE = torch.tensor([1 + 2j, 3 - 4j]).conj()


LAZY = {
    "conjugate Parameter": torch.nn.Parameter(CONJUGATE),
    "negative Parameter": torch.nn.Parameter(CONJUGATE.imag),
    "conjugate that requires grad": torch.tensor([1 + 2j]).conj().repeat(2).conj().requires_grad_(),
    "negative that requires grad": CONJUGATE.imag.detach().requires_grad_(),
}


@pytest.mark.parametrize("name", LAZY)
@pytest.mark.parametrize("template", ["none", "plain", "lazy"])
def test_what_is_lazy_below_a_parameter_or_with_grad(name: str, template: str) -> None:
    """Its bytes are another's than its values: they land in nothing that reads them otherwise."""
    source = LAZY[name]
    assert source.is_conj() or source.is_neg()
    mine: torch.Tensor | None = None
    if template == "plain":
        mine = torch.zeros(2, dtype=source.dtype)
    elif template == "lazy":
        mine = torch.zeros(2, dtype=torch.complex64).conj()
        mine = mine if source.dtype.is_complex else mine.imag
    if mine is not None and isinstance(source, torch.nn.Parameter):
        mine = torch.nn.Parameter(mine)
    elif mine is not None:
        mine.requires_grad_()
    got = succeed({"w": source}, (lambda: {"w": mine}) if mine is not None else None).destination.result["w"]
    assert type(got) is type(source)
    assert got.requires_grad
    assert torch.equal(got.detach().resolve_conj().resolve_neg(), source.detach().resolve_conj().resolve_neg())
    assert (got is mine) == (template == "lazy")


def test_a_plain_parameter_does_not_land_in_a_conjugate_one() -> None:
    source = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 4j]))
    mine = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64).conj())
    ends = succeed({"w": source}, lambda: {"w": mine})
    assert torch.equal(ends.destination.result["w"].resolve_conj(), source)
    assert "lazy" in ends.destination.report.not_in_place["w"]


def test_an_attribute_that_hides_a_method_is_refused_at_the_source() -> None:
    """A receiver would refuse it, too, and not before all bytes have landed."""
    tensor = torch.ones(3)
    tensor.mean = 0.5  # type: ignore[assignment, method-assign]
    with pytest.raises(LocalProtocolError, match="w: an attribute of a tensor called mean"):
        transfer({"v": torch.ones(3), "w": tensor})
