"""Sparse tensors and nested ones: the strided tensors they are made of travel, and must make one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import noise, raw_bytes

from ft_transport._state.geometry import geometry
from ft_transport._state.kinds.base import KINDS, flatten_leaf, kind_of
from state.kinds.leaves import there_and_back

pytestmark = pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")

DENSE = torch.tensor([[0.0, 1, 0, 2], [3, 0, 0, 0], [0, 0, 0, 0], [0, 4, 0, 5]])
SPARSE = {
    "coo": DENSE.to_sparse_coo,
    "coo twice the same place": lambda: torch.sparse_coo_tensor([[1, 1]], [1.0, 2.0], (3,)),
    "hybrid coo": lambda: torch.sparse_coo_tensor([[0, 2]], noise((2, 3), 1), (4, 3)),
    "no values": lambda: torch.zeros(3, 4).to_sparse_coo(),
    "csr": DENSE.to_sparse_csr,
    "csc": DENSE.to_sparse_csc,
    "bsr": lambda: DENSE.to_sparse_bsr((2, 2)),
    "bsc": lambda: DENSE.to_sparse_bsc((2, 2)),
    "grad": lambda: DENSE.to_sparse_coo().requires_grad_(),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_tensors_come_back(name: str) -> None:
    leaf = SPARSE[name]()
    assert kind_of(leaf) is KINDS["sparse"]
    again = there_and_back(leaf)
    assert (again.layout, again.shape, again.requires_grad) == (leaf.layout, leaf.shape, leaf.requires_grad)
    for one, other in zip(flatten_leaf(leaf)[1], flatten_leaf(again)[1], strict=True):
        assert raw_bytes(one) == raw_bytes(other)
    if leaf.layout is torch.sparse_coo:
        assert again.is_coalesced() == leaf.is_coalesced(), "whether it is decides what an operation does first"


INDICES, VALUES = geometry(torch.int64, (1, 2), (2, 1)), geometry(torch.float32, (2,), (1,))


@pytest.mark.parametrize(
    ("inner", "changed"),
    [
        ([INDICES], {}),
        ([INDICES, None], {}),
        ([INDICES, VALUES, VALUES], {}),
        ([geometry(torch.float32, (1, 2), (2, 1)), VALUES], {}),
        ([geometry(torch.int64, (2, 2), (2, 1)), VALUES], {}),
        ([INDICES, geometry(torch.float32, (3,), (1,))], {}),
        ([INDICES, geometry(torch.int32, (2,), (1,))], {4: True}),
        ([INDICES, VALUES], {0: "torch.strided"}),
        ([INDICES, VALUES], {1: (-3,)}),
        ([INDICES, VALUES], {2: "no"}),
        ([INDICES, VALUES], {3: 1}),
    ],
)
def test_what_makes_no_sparse_tensor_is_refused_before_it_is_built(inner: list[Any], changed: dict[int, Any]) -> None:
    good = [str(torch.sparse_coo), (3,), False, False, False]
    KINDS["sparse"].check([INDICES, VALUES], tuple(good))
    with pytest.raises((ValueError, TypeError, KeyError, RuntimeError)):
        KINDS["sparse"].check(inner, tuple(changed.get(place, value) for place, value in enumerate(good)))


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([noise((2, 3), 1), noise((4, 3), 2)])


def test_nested_tensors_come_back() -> None:
    leaf = nested()
    assert kind_of(leaf) is KINDS["nested"]
    again = there_and_back(leaf)
    assert again.is_nested
    assert [raw_bytes(row) for row in again.unbind()] == [raw_bytes(row) for row in leaf.unbind()]


@pytest.mark.parametrize(
    ("place", "value"), [(2, (0, 10)), (2, (-1, 6)), (2, (0,)), (0, ((2, 3), (40, 3))), (0, ((2, 3), (12,))), (4, None)]
)
def test_rows_outside_of_the_buffer_are_refused(place: int, value: Any) -> None:
    """torch's own kernels do not look, and would read the memory behind."""
    part, (buffer,) = flatten_leaf(nested())
    shape = geometry(buffer.dtype, tuple(buffer.shape), buffer.stride())
    KINDS["nested"].check([shape], part.context)
    context = list(part.context)
    context[place] = value
    with pytest.raises((ValueError, TypeError)):
        KINDS["nested"].check([shape], tuple(context))
