"""The kinds of leaf that are no tensors: NumPy arrays, generators of random numbers, objects of any other class."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch

try:
    import numpy
except ImportError:  # torch does without it, and so do we
    numpy = None  # type: ignore[assignment]

from ft_transport._state.classes import expect, numpy_descr, numpy_dtype
from ft_transport._state.geometry import Geometry, checked_geometry
from ft_transport._state.kinds.base import Kind, Surroundings, attributes_of, kind_of
from ft_transport._state.pickles import UnpicklingError, check_pickle, pickle_object, unpickle_object
from ft_transport._state.values import is_native

__all__ = [
    "GeneratorKind",
    "KeepsAttributes",
    "NumpyArray",
    "ObjectKind",
    "check_attributes",
    "check_object",
    "pickle_leaf",
    "shape_of",
    "sizes",
    "unpickle_leaf",
    "which_refers_to",
]


def sizes(values: Any) -> tuple[int, ...]:
    """The values, which must be sizes that torch can work with."""
    if not isinstance(values, tuple) or any(type(value) is not int or not 0 <= value < 1 << 48 for value in values):
        raise ValueError(f"expected sizes, got {str(values)[:80]}")
    return values


def shape_of(values: Any) -> tuple[int, ...]:
    """The values, which must be the shape of a tensor that torch can make."""
    return checked_geometry(torch.uint8, sizes(values), (0,) * len(values)).shape


# Samplers, augmentations and data loaders keep NumPy arrays in their state, and replay buffers large ones: so their
# bytes land in place, like a tensor's.
class NumpyArray(Kind):
    """``numpy.ndarray``: its bytes travel, with the bytes of an element as one more dimension.

    Context: (dtype, shape), or (None, shape, elements) for one of objects.
    """

    name = "numpy"
    not_in_place_inside = "an array inside of a leaf"  # whether it can be written to is known of whole leaves alone
    is_tried = True
    types = () if numpy is None else (numpy.ndarray,)

    def obstacle(self, leaf: Any) -> str:
        if leaf.dtype.hasobject or not leaf.flags.writeable or any(step < 0 for step in leaf.strides):
            return "the template's array is read-only, reversed, or one of objects"
        return ""

    def flatten(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        shape = tuple(leaf.shape)
        if leaf.dtype.hasobject:
            if leaf.dtype != object:
                raise ValueError(f"a NumPy array of {leaf.dtype} cannot travel")
            return [], (None, shape, tuple(leaf.ravel()))
        if not leaf.flags.writeable or any(step < 0 for step in leaf.strides):
            leaf = leaf.copy(order="K")
        # The bytes of an element become one more dimension of uint8: NumPy has dtypes (records, datetime64, text) that
        # torch has not, and all of them are bytes to the wire.
        nbytes = leaf.dtype.itemsize
        data = leaf[..., None].view(numpy.uint8) if leaf.size and nbytes else numpy.empty((*shape, nbytes), numpy.uint8)
        return [torch.from_numpy(data)], (numpy_descr(leaf.dtype), shape)

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        descr, shape, *elements = context
        if descr is None:
            if len(elements[0]) != math.prod(sizes(shape)) or inner:
                raise ValueError(f"{len(elements[0])} elements for {shape}")
            return
        (data,) = inner
        wanted = (*sizes(shape), numpy_dtype(descr).itemsize)
        # The bytes of an element must lie together.
        if data is None or data.dtype is not torch.uint8 or data.shape != wanted:
            raise ValueError(f"an array of {descr} {shape} in {data}")
        if elements or (data.numel and wanted[-1] > 1 and data.stride[-1] != 1):
            raise ValueError(f"an array of {descr} {shape} with strides {data.stride}")

    def label(self, context: Any) -> str:
        return f"array {context[0]} {context[1]}"

    def disagreement(self, context: Any, mine: Any) -> str:
        return "" if context[:2] == mine[:2] else f"expected array {mine[0]} {mine[1]}, source has {context[:2]}"

    def unflatten(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        descr, shape, *elements = context
        if descr is None:
            flat = numpy.empty(len(elements[0]), dtype=object)
            for index, element in enumerate(elements[0]):
                flat[index] = element
            return flat.reshape(shape)
        dtype = numpy_dtype(descr)
        if not inner[0].numel():
            return numpy.empty(shape, dtype)
        return inner[0].cpu().numpy().view(dtype)[..., 0]


# Its state is a tensor of bytes, opaque, and of another length on each kind of device.
class GeneratorKind(Kind):
    """``torch.Generator``: its state travels. Context: its device."""

    name = "generator"
    not_compared = (0,)
    types = (torch.Generator,)
    not_in_place = "a torch.Generator"

    def flatten(self, leaf: torch.Generator) -> tuple[Sequence[Any], Any]:
        return [leaf.get_state()], str(leaf.device)

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        (state,) = inner
        # Of any device of that type: the source's own need not be here.
        wanted = torch.Generator(torch.device(expect(str, context)).type).get_state()
        if state is None or state.dtype is not torch.uint8 or state.shape != wanted.shape:
            raise ValueError(f"the state of a Generator in {inner}")

    def unflatten(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        # On the device where it was: its state is of another form there. Which of its type is the template's affair.
        device, mine = torch.device(context), here.template
        if isinstance(mine, torch.Generator) and mine.device.type == device.type:
            device = mine.device
        leaf = torch.Generator(device)
        leaf.set_state(inner[0].cpu())
        return leaf


# A dataloader's, a scheduler's, a tokenizer's: whatever has a ``state_dict`` that is not made of plain values.
class ObjectKind(Kind):
    """An object of any other class: pickled, but for the leaves in it. Context: (pickle, values in it)."""

    name = "object"
    always_new = True
    family = "value"

    def flatten(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        inner: list[Any] = []
        try:
            data, values = pickle_leaf(leaf, inner)
        except Exception as exc:  # pickling runs the class's own code, which may raise anything
            what = type(leaf).__qualname__
            raise ValueError(f"a value of class {what} cannot be encoded: {type(exc).__name__}: {exc}") from exc
        return inner, (data, tuple(values))

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        data, values = context
        check_object(data, values, inner)

    def pickle_in(self, context: Any) -> bytes:
        return context[0]  # type: ignore[no-any-return]

    def unflatten(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        data, values = context
        return unpickle_leaf(data, values, inner, here)


# A tensor is a Python object: attributes that user code has put on it travel with it, as with ``torch.save``.
class KeepsAttributes(Kind):
    """A kind of tensor that keeps its Python attributes, as ``torch.save`` does.

    Its subclasses take apart, check and put together what is below them. Context: theirs, and for a tensor that has
    attributes one value more, ("attributes", pickle, values in it, tensors in it).
    """

    def flatten(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        inner, context = self.flatten_bare(leaf)
        attributes = {name: value for name, value in attributes_of(leaf).items() if name != "_is_param"}
        if not attributes:
            return inner, context
        check_attributes(attributes)
        held: list[Any] = []
        data, values = pickle_leaf(attributes, held)
        if any(each is leaf for each in held):
            what = which_refers_to(leaf)
            raise ValueError(f"a tensor of class {type(leaf).__qualname__} cannot travel: {what} refers back to it")
        return [*inner, *held], (*context, (_ATTRIBUTES, data, tuple(values), len(held)))

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        context, attributes = _split(context)
        num_held = 0
        if attributes:
            _, data, values, num_held = attributes
            if not 0 <= expect(int, num_held) <= len(inner):
                raise ValueError(f"{num_held} tensors in the attributes of one of {len(inner)}")
            check_object(data, values, inner[len(inner) - num_held :])
        self.check_bare(inner[: len(inner) - num_held], context)

    def unflatten(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        bare, attributes = _split(context)
        num_held = attributes[3] if attributes else 0
        leaf = self.unflatten_bare(inner[: len(inner) - num_held], bare, here)
        return self.with_attributes(leaf, inner, context, here)

    def with_attributes(self, leaf: Any, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        """The leaf itself, with the attributes that the context has."""
        _, attributes = _split(context)
        if attributes:
            _, data, values, num_held = attributes
            state = unpickle_leaf(data, values, inner[len(inner) - num_held :], here)
            if type(state) is not dict:
                raise TypeError(f"attributes that are a {type(state).__name__}")
            check_attributes(state)
            vars(leaf).update(state)
        return leaf

    def pickle_in(self, context: Any) -> bytes:
        _, attributes = _split(context)
        return attributes[1] if attributes else b""

    def flatten_bare(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        """As :meth:`Kind.flatten`, without attributes."""
        raise NotImplementedError

    def check_bare(self, inner: Sequence[Geometry | None], context: Any) -> None:
        """As :meth:`Kind.check`, without attributes."""
        raise NotImplementedError

    def unflatten_bare(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        """As :meth:`Kind.unflatten`, without attributes."""
        raise NotImplementedError


_ATTRIBUTES = "attributes"


def _split(context: Any) -> tuple[Any, Any]:
    last = context[-1]
    if type(last) is tuple and len(last) == 4 and type(last[0]) is str and last[0] == _ATTRIBUTES:
        return context[:-1], last
    return context, None


def check_attributes(state: Any) -> None:
    """No attribute hides what a tensor can do, or is more than an attribute."""
    for names in state if isinstance(state, tuple) else (state,):
        for name in names or ():
            if type(name) is not str or name.startswith("__") or hasattr(torch.Tensor, name):
                raise ValueError(f"an attribute of a tensor called {str(name)[:80]}")


# An object that holds a tensor whose attributes hold the object: pickle knows of cycles, but not across what is taken
# out of it.
def which_refers_to(leaf: torch.Tensor) -> str:
    """The attributes of a tensor that hold, at whatever depth, the tensor itself."""
    names = []
    for name, value in attributes_of(leaf).items():
        inner: list[Any] = []
        with contextlib.suppress(Exception):  # whatever the classes of what it holds raise
            pickle_leaf([value], inner)
        if any(each is leaf for each in inner):
            names.append(repr(name))
    return f"its attribute {' and '.join(names)}" if names else "what it is pickled as"


def pickle_leaf(value: Any, inner: list[Any]) -> tuple[bytes, list[object]]:
    def is_leaf(found: Any) -> bool:
        kind = kind_of(found)
        return kind is not None and kind.name != "object"

    return pickle_object(value, inner, is_leaf, is_native)


def unpickle_leaf(data: bytes, values: Any, inner: Sequence[Any], here: Surroundings) -> Any:
    return unpickle_object(data, values, inner, here.unpickle)


# Tried with stand-ins before a byte lands: an allowed class may still refuse what its ``__setstate__`` gets, and a
# receive that fails after the last byte has torn the template for nothing.
def check_object(data: Any, values: Any, inner: Sequence[Geometry | None]) -> None:
    """Check that a pickle can be read: it is, with tensors of zeros in the place of those that have no bytes yet."""
    if type(data) is not bytes:
        raise TypeError(f"expected a pickle, got {type(data).__name__}")
    if not inner:
        unpickle_leaf(data, values, (), Surroundings())
        return
    check_pickle(data)
    shapes = [geometry for geometry in inner if geometry is not None]
    if len(shapes) < len(inner):
        return  # what is inside cannot be made without its bytes
    try:
        unpickle_leaf(data, values, [_stand_in(shape) for shape in shapes], Surroundings())
    except _WHATEVER_THE_BYTES as exc:
        raise ValueError(f"it cannot be built: {type(exc).__name__}: {str(exc)[:1000]}") from exc
    except Exception:  # the class's own code, which may have wanted other bytes
        pass


# What building an object raises whatever bytes its tensors hold. Others may come of the zeros.
_WHATEVER_THE_BYTES = (UnpicklingError, TypeError, AttributeError, NameError, ImportError, NotImplementedError)
# Bounds the memory of a tensor that stands in for another; of larger ones all elements are one.
_STAND_IN_BYTES = 1 << 20


def _stand_in(shape: Geometry) -> torch.Tensor:
    if shape.span <= _STAND_IN_BYTES:
        return torch.empty_strided(shape.shape, shape.stride, dtype=torch.uint8, device="cpu").zero_().to(shape.dtype)
    return torch.zeros((), dtype=torch.uint8, device="cpu").to(shape.dtype).expand(shape.shape)
