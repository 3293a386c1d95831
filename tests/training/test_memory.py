"""Two tensors are one where writing to one writes the other, and aliases follow their tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ft_transport._training.memory import Aliases, is_dtensor, is_plain, same_memory

BASE = torch.arange(12.0)
COMPLEX = torch.zeros(6, dtype=torch.complex64)


@pytest.mark.parametrize(
    "made",
    [
        lambda: BASE,
        lambda: BASE.view(3, 4)[:, 1:3],
        lambda: BASE.view(3, 4).t(),
        lambda: COMPLEX.conj(),
        lambda: COMPLEX.conj().imag,
        lambda: torch.nn.Parameter(BASE).detach(),
        lambda: BASE.view(torch.int32),
    ],
)
def test_the_same_view_made_twice_is_the_same_memory(made: Callable[[], torch.Tensor]) -> None:
    assert same_memory(made(), made())
    assert not same_memory(made(), made().clone())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (BASE, BASE[:11]),
        (BASE[1:], BASE[:11]),
        (BASE, BASE.view(3, 4)),
        (BASE.view(3, 4)[:3, :3], BASE.view(3, 4).t()[:3, :3]),
        (BASE, BASE.view(torch.int32)),
        (COMPLEX, COMPLEX.conj()),
        (COMPLEX.imag, COMPLEX.conj().imag),
        (torch.eye(3), torch.eye(3).to_sparse()),
        (torch.eye(3).to_sparse(), torch.eye(3).to_sparse()),
        (BASE, 5),
        (None, BASE),
    ],
)
def test_what_is_read_in_another_way_is_not(one: object, other: object) -> None:
    assert not same_memory(one, other)
    assert not same_memory(other, one)


def test_the_same_object_is_the_same_memory_whatever_it_is() -> None:
    sparse = torch.eye(3).to_sparse()
    assert same_memory(sparse, sparse)
    assert not is_plain(sparse)
    assert not is_dtensor(BASE)
    assert is_plain(torch.nn.Parameter(BASE))


def test_aliases_are_kept_and_only_those_made_again_that_must_be() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))]
    aliases = Aliases(params)
    before = aliases.of(params)
    assert aliases.of(params) is before
    assert all(not alias.requires_grad and same_memory(alias, p) for alias, p in zip(before, params, strict=True))
    params[1].data = torch.ones(4)
    after = aliases.of(params)
    assert after[0] is before[0]
    assert same_memory(after[1], params[1])
    assert not same_memory(after[1], before[1])
    params[1].data = params[1].data.view(2, 2)
    assert aliases.of(params)[1].shape == (2, 2)


def test_aliases_follow_a_change_of_dtype_in_the_same_place() -> None:
    buffer = torch.zeros(4)
    aliases = Aliases([buffer])
    buffer.data = buffer.view(torch.int32)
    assert aliases.of([buffer])[0].dtype is torch.int32


@pytest.mark.parametrize("bits", [torch.conj, lambda tensor: tensor.conj().imag])
def test_aliases_follow_a_change_of_how_the_same_bytes_are_read(bits: Callable[[torch.Tensor], torch.Tensor]) -> None:
    memory = torch.ones(3, dtype=torch.complex64)
    tensor = memory.view_as(memory) if bits is torch.conj else memory.imag
    aliases = Aliases([tensor])
    aliases.of([tensor])
    tensor.data = bits(memory)
    (alias,) = aliases.of([tensor])
    assert same_memory(alias, tensor)
    assert torch.equal(alias, tensor)
