"""Manifests as bytes and back, and what is refused at the source."""

from __future__ import annotations

import os
import struct
import sys
from typing import Any

import pytest
import torch
from helpers import difference, noise
from hypothesis import given
from hypothesis import strategies as st
from states import STATES, VALUES

from ft_transport import LocalProtocolError
from ft_transport._state.describe import describe
from ft_transport._state.kinds.base import Surroundings, unflatten_leaf
from ft_transport._wire.encode import encode_manifest
from ft_transport._wire.frames import ManifestHeader
from ft_transport._wire.layout import Limits
from wire.manifests import HEADER, decode, encode, same


@pytest.mark.parametrize("name", STATES)
def test_states_come_back_as_they_were(name: str) -> None:
    manifest, _ = describe(STATES[name](1))
    decoded, header = decode(encode_manifest(manifest, HEADER))
    assert header == HEADER
    assert same(decoded, manifest)


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(name: str) -> None:
    value = VALUES[name]
    for state in (value, {"a": [value]}):
        manifest, _ = decode(encode(state))
        got: Any = manifest.build([unflatten_leaf(leaf.part, iter(()), Surroundings()) for leaf in manifest.leaves])
        assert difference(got, state) == ""
        assert type(got) is type(state)


@pytest.mark.parametrize("bits", [0x7FF8000000000001, 0xFFF0000000000000, 0x8000000000000000, 1])
def test_floats_keep_their_bits(bits: int) -> None:
    (value,) = struct.unpack("<d", struct.pack("<Q", bits))
    manifest, _ = decode(encode(value))
    assert struct.pack("<d", manifest.leaves[0].context) == struct.pack("<Q", bits)


@pytest.mark.parametrize(
    "key", [None, True, 0, -5, 1 << 70, 1.5, "", "a.b", "\udcff", b"x", (1, ("a", None)), torch.float32, frozenset({1})]
)
def test_keys_come_back_as_they_were(key: Any) -> None:
    manifest, _ = decode(encode({key: {"inner": 1}}))
    assert manifest.paths == [(key, "inner")]
    assert type(manifest.paths[0][0]) is type(key)


@pytest.mark.parametrize("step", [None, 0, 1, 1 << 40])
@pytest.mark.parametrize("digest", ["", "xxh3", "sum"])
def test_headers_come_back_as_they_were(step: int | None, digest: str) -> None:
    header = ManifestHeader(step, Limits(64, 64, 0, 1, 1), digest)
    assert decode(encode({"a": 1}, header))[1] == header


def test_a_state_nested_as_deep_as_allowed() -> None:
    state: object = noise(2, 1)
    for _ in range(999):
        state = [state]
    manifest, _ = decode(encode(state))
    assert manifest.paths == [(0,) * 999]


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.sampled_from([torch.float16, torch.device("cpu"), ..., slice(1, 2), range(3)]),
    lambda inner: st.tuples(inner, inner) | st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(plain)
def test_any_plain_state_comes_back_as_it_was(state: object) -> None:
    manifest, _ = decode(encode(state))
    got = manifest.build([leaf.context for leaf in manifest.leaves])
    assert repr(got) == repr(state)


def test_every_value_that_cannot_be_encoded_is_named() -> None:
    state = {"good": 1, "lambda": lambda: 0, "deep": [{"generator": (i for i in ())}]}
    with pytest.raises(LocalProtocolError) as caught:
        encode(state)
    assert "lambda: a value of class function" in caught.value.message
    assert "deep.0.generator: a value of class generator" in caught.value.message
    assert "good" not in caught.value.message
    assert caught.value.phase == "describe"


def test_a_key_that_cannot_be_encoded_is_named() -> None:
    with pytest.raises(LocalProtocolError, match=r"a: a dict with the keys .* cannot be encoded"):
        encode({"a": {(lambda: 0): 1}})


@pytest.mark.parametrize("value", [NotImplemented, [NotImplemented], os.getpid, sys.intern, os.stat(".")])
def test_what_no_receiver_can_allow_is_refused_at_the_source(value: Any) -> None:
    with pytest.raises(LocalProtocolError, match=r"a.*: .*cannot travel: no receiver can allow it"):
        encode({"a": value})
