"""Leaves there and back, without a transfer."""

from __future__ import annotations

import functools
from typing import Any

import msgpack

from ft_transport._state.geometry import geometry_of
from ft_transport._state.kinds.base import Part, Surroundings, check_parts, flatten_leaf, plain, unflatten_leaf
from ft_transport._state.values import decode_value, encode_value


def over_the_wire(context: Any) -> Any:
    packed = msgpack.packb(encode_value(context), unicode_errors="surrogatepass")
    return decode_value(msgpack.unpackb(packed, use_list=False, unicode_errors="surrogatepass"))


def there_and_back(leaf: Any, here: Surroundings | None = None) -> Any:
    """Taken apart, described over the wire, checked, and put together from copies of the tensors."""
    part, tensors = flatten_leaf(leaf)
    again = Part(part.kind, over_the_wire(part.context), _over_the_wire(part.parts))
    assert again == part
    check_parts(again, iter([geometry_of(tensor) for tensor in tensors]))
    makers = [functools.partial(plain, tensor.detach().clone()) for tensor in tensors]
    return unflatten_leaf(again, iter(makers), here or Surroundings())


def _over_the_wire(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(Part(part.kind, over_the_wire(part.context), _over_the_wire(part.parts)) for part in parts)
