"""The API without torchft: its helpers, and what crosses, without a group."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from helpers import CPU, noise, raw_bytes
from states import STATES
from torch.utils import _pytree as pytree

from ft_transport import LocalProtocolError
from ft_transport import distributed as seed
from ft_transport._state.describe import describe
from ft_transport._wire.layout import Limits, lay_out

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def test_cast_tensor_is_the_whole_storage() -> None:
    base = noise((4, 4), 1)
    for tensor in (base, base.t(), base[1:3, 2:], base[3, 3]):
        flat = seed._cast_tensor(tensor, torch.uint8)
        assert flat.dtype == torch.uint8
        assert flat.shape == (64,)
        assert flat.data_ptr() == base.data_ptr()
    assert seed._cast_tensor(base, torch.float64).shape == (8,)


def test_prepare_tensor_describes_a_view_of_its_storage() -> None:
    base = noise((4, 6), 1)
    view = base[1:3, ::2].t()
    flat, meta = seed._prepare_tensor(view)
    assert flat.data_ptr() == base.data_ptr()
    assert (meta.shape, meta.dtype, meta.storage_offset, meta.stride) == ((3, 2), torch.float32, 6, (2, 6))
    assert meta.nbytes == 96
    assert type(meta.shape) is torch.Size
    again = torch.empty(0).set_(flat.untyped_storage(), meta.storage_offset, meta.shape, meta.stride)
    assert raw_bytes(again) == raw_bytes(view)


def test_prepare_state_dict_gives_each_distinct_range_once() -> None:
    shared = noise(10, 1)
    meta, tensors = seed._prepare_state_dict({"a": shared, "b": shared, "c": noise(3, 2), "n": 5}, CPU)
    assert len(tensors) == 2
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 52
    assert len(meta.paths) == len(meta.non_tensor_leaves) == 4
    assert meta.non_tensor_leaves[3] == 5
    assert isinstance(meta.non_tensor_leaves[0], seed._TensorMeta)


def test_prepare_state_dict_names_what_cannot_travel() -> None:
    with pytest.raises(LocalProtocolError, match=r"x\.y"):
        seed._prepare_state_dict({"x": {"y": (i for i in ())}}, CPU)


@pytest.mark.parametrize("name", STATES)
def test_what_crosses_describes_the_same_layout(name: str) -> None:
    """Sender and receiver derive their messages from two manifests: they must agree."""
    manifest, _ = describe(STATES[name](1))
    decoded = seed._from_meta(pickle.loads(pickle.dumps(seed._to_meta(manifest))))
    assert decoded.paths == manifest.paths
    assert decoded.nodes == manifest.nodes
    for limits in (Limits(), Limits(256, 256, 100, 4, 2)):
        ours, theirs = lay_out(manifest, limits), lay_out(decoded, limits)
        assert theirs.sizes == ours.sizes
        assert theirs.nbytes == ours.nbytes
    for leaf, other in zip(manifest.leaves, decoded.leaves, strict=True):
        assert (leaf.kind, len(leaf.views)) == (other.kind, len(other.views))
        for mine, his in zip(leaf.views, other.views, strict=True):
            assert his.geometry is mine.geometry
            assert his.offset == mine.offset


def test_a_description_by_upstreams_own_code_is_read() -> None:
    """Its paths are pytree's, its nesting a TreeSpec, and every tensor has a storage of its own."""
    state: dict[str, Any] = {"a": [noise((2, 3), 1)], "n": 4}
    leaves, treespec = pytree.tree_flatten_with_path(state)
    metas = [seed._prepare_tensor(leaf)[1] if isinstance(leaf, torch.Tensor) else leaf for _, leaf in leaves]
    manifest = seed._from_meta(seed._StateDictMeta(treespec, [path for path, _ in leaves], metas))
    assert manifest.paths == [("a", 0), ("n",)]
    assert [storage.nbytes for storage in manifest.storages] == [24]
    assert manifest.build([1, 2]) == {"a": [1], "n": 2}


def test_tensors_without_elements_have_no_storage() -> None:
    manifest = seed._from_meta(seed._to_meta(describe({"a": torch.empty(0, 3)})[0]))
    assert manifest.storages == []
    assert manifest.leaves[0].views[0].storage == -1


def test_a_transport_takes_a_device_by_name() -> None:
    from datetime import timedelta

    transport = seed.PGTransport(None, timedelta(seconds=1), "cpu")  # type: ignore[arg-type]
    assert transport.last_report is None
