"""How a state is described: which storages, which bytes of them, and what cannot travel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import distinct_nbytes, noise

from ft_transport import LocalProtocolError
from ft_transport._state.describe import describe
from ft_transport._wire.layout import Limits, lay_out


def test_ten_rows_become_a_storage_of_ten_rows() -> None:
    manifest, _ = describe(noise((1000, 16), 1)[500:510])
    assert sum(storage.nbytes for storage in manifest.storages) == 640


def test_distant_views_of_one_storage_stay_together_but_not_what_lies_between() -> None:
    base = noise(10_000, 1)
    state = {"a": base[:10], "b": base[9000:9010]}
    manifest, _ = describe(state)
    (storage,) = manifest.storages
    assert storage.nbytes < 80 + 2 * 64
    assert lay_out(manifest, Limits()).nbytes == distinct_nbytes(state)


@pytest.mark.parametrize("offset", range(5))
def test_views_of_any_dtype_stay_aligned(offset: int) -> None:
    base = noise(1024, 1, torch.uint8)
    state = {
        "bytes": base[offset : offset + 3],
        "doubles": base[512:544].view(torch.float64)[1:3],
        "ints": base[800:840].view(torch.int32)[offset:],
    }
    manifest, _ = describe(state)
    for leaf in manifest.leaves:
        for view in leaf.views:
            assert view.begin % view.geometry.itemsize == 0
            assert view.end <= manifest.storages[view.storage].nbytes


class Dispatching(torch.Tensor):
    """A subclass with a dispatch of its own and nothing that says what is inside."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def test_everything_that_cannot_travel_is_named() -> None:
    state = {"a": lambda: None, "ok": noise(2, 1), "b": [Dispatching(torch.ones(1))]}
    with pytest.raises(LocalProtocolError) as caught:
        describe(state)
    message = caught.value.message
    assert "a: a value of class function cannot be encoded" in message
    assert "b.0: a tensor of class Dispatching cannot travel" in message
    assert "ok" not in message


def test_one_tensor_in_several_places_is_described_once() -> None:
    weight = noise(4, 1)
    manifest, tensors = describe({"a": weight, "b": [weight], "c": weight[:2]})
    assert manifest.same == {1: 0}
    assert len(tensors.tensors) == 2
    assert len(manifest.storages) == 1
    assert manifest.leaves[1] == manifest.leaves[0]
