"""Kinds of leaf: how each is taken apart into plain strided tensors, and put together again.

Strategy: a kind knows the *inner* tensors of its leaves, and a *context* of plain values that travels in the manifest.
Inner tensors may be of any kind themselves and are taken apart in turn, until only plain tensors are left, whose bytes
travel. What no kind claims is a plain value (``_state.values``).

Not here: the kinds that the package brings (``_state.kinds.strided``, ``_state.kinds.distributed``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from ft_transport._state.classes import FindClass, allowed_class, if_imported
from ft_transport._state.geometry import QUANTIZED, Geometry
from ft_transport._state.pickles import Load, unpickle_allowed
from ft_transport._state.values import check_cost, is_native

__all__ = [
    "KINDS",
    "PLAIN",
    "VALUE",
    "Kind",
    "Maker",
    "Part",
    "Surroundings",
    "attributes_of",
    "bools",
    "check_grad",
    "check_parts",
    "check_readable",
    "flatten_leaf",
    "grad_of",
    "is_plain",
    "kind_of",
    "plain",
    "refresh",
    "register_kind",
    "unflatten_leaf",
    "with_grad",
]


class Surroundings(NamedTuple):
    """What the receiver has, for kinds whose leaves are put together from more than bytes.

    Attributes:
        meshes: The template's device meshes, by what describes them.
        find_class: Finds a class by its name, or raises ``ValueError`` if it is not allowed.
        unpickle: Reads a pickle, with what gives the leaves and values that were taken out of it.
        template: The template's leaf in whose place this one comes; None if there is none.
    """

    # One dict for one receive: a mesh that is made for one leaf is there for the next.
    meshes: dict[Any, Any] = {}  # noqa: RUF012
    find_class: FindClass = allowed_class
    unpickle: Callable[[bytes, Load], object] = unpickle_allowed
    template: object = None


class Kind:
    """One kind of leaf. To teach the package a new one, subclass it and call :func:`register_kind` on both sides.

    Attributes:
        name: How the manifest calls it. Part of the wire.
        types: The exact classes of its leaves.
        late_types: The same by module and name, for classes whose module is not imported for our sake.
        claims_subclasses: Whether leaves of classes derived from these are of this kind, too, if they are no tensors.
        family: Leaves of one family, of the same shape and dtype, can land in each other; empty: of this kind only.
        is_tried: Whether :meth:`unflatten` finds more wrong with a context than :meth:`check`, whatever bytes the
            tensors hold. Then it is tried before the first byte lands.
        looks_at_bytes: Whether :meth:`unflatten` checks what has landed. Then a leaf of the template that holds the
            new bytes is not taken as it is, but given to :meth:`refresh`.
        not_in_place: Why bytes are never written into a leaf that the template has; empty if they may be.
        not_in_place_inside: The same of what is inside of another leaf.
        is_lazy: Whether it is a lazy conjugate or negative, which its context says, of what is inside.
        num_tensors_in_place: How many of the inner tensors, from the first on, must hold the new bytes for the
            template's leaf to count as the source's; None for all.
        always_new: Whether leaves have content beside their tensors, which the template's own would not get.
        not_compared: Places in the context, 0 if it is no tuple, of what two leaves may differ in and be equal to
            ``state_digest`` all the same: strides, a device, whether it is a Parameter and requires grad.
    """

    # All of it is data or small pure functions, so that a kind can be tested without a transfer; nothing here is called
    # while bytes move.
    name: str = ""
    types: tuple[type, ...] = ()
    late_types: tuple[tuple[str, str], ...] = ()
    claims_subclasses: bool = False
    family: str = ""
    not_in_place: str = ""
    not_compared: tuple[int, ...] = ()
    not_in_place_inside: str = ""
    is_lazy: bool = False
    num_tensors_in_place: int | None = None
    always_new: bool = False
    is_tried: bool = False
    looks_at_bytes: bool = False

    def claims(self, leaf: torch.Tensor) -> bool:
        """Whether a tensor whose class no kind has is of this kind."""
        return False

    def obstacle(self, leaf: Any) -> str:
        """Why bytes must not be written into this leaf of the template; empty if they may be."""
        return self.not_in_place

    def flatten(self, leaf: Any) -> tuple[Sequence[Any], Any]:
        """The inner tensors, in a fixed order, and the context: plain values and tuples of them.

        Raises:
            ValueError: This leaf cannot travel; the text says why.
        """
        raise NotImplementedError

    def check(self, inner: Sequence[Geometry | None], context: Any) -> None:
        """Check what a peer sent, before a byte lands: :meth:`unflatten` should not fail on it later.

        Args:
            inner: Geometry of each inner tensor, None for one that is not plain.
            context: What claims to be a context of this kind.

        Raises:
            Exception: It is none.
        """

    def label(self, context: Any) -> str:
        """What errors call such a leaf."""
        return self.name

    def caches(self, context: Any) -> Collection[int]:
        """Positions of inner tensors that are not compared with a template's leaf: what the class works out from the
        others when it is asked, so that one of two equal leaves may have it. What arrives is what the source has."""
        return ()

    def disagreement(self, context: Any, mine: Any) -> str:
        """Why a template's leaf with context ``mine`` cannot take one with ``context``, beyond what its inner
        tensors say; empty if it can."""
        return ""

    def unflatten(self, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        """A new leaf that owns ``inner``."""
        raise NotImplementedError

    def pickle_in(self, context: Any) -> bytes:
        """The pickle in a context of this kind, if any: the source sends none that no receiver can read."""
        return b""

    def refresh(self, mine: Any, inner: Sequence[Any], context: Any, here: Surroundings) -> Any:
        """The leaf for the state, where the inner tensors of the template's leaf hold the new bytes already and
        its context differs."""
        return self.unflatten(inner, context, here)


class Part(NamedTuple):
    """A leaf, or a tensor inside of one, without its bytes.

    Attributes:
        kind: Name of its kind, ``"tensor"`` for a plain tensor, ``"value"`` for a plain value.
        context: See :class:`Kind`; the value itself for a plain value.
        parts: The inner tensors; none for a plain tensor, which is one itself.
    """

    kind: str
    context: Any = None
    parts: tuple[Part, ...] = ()

    @property
    def num_views(self) -> int:
        """How many plain tensors it is made of."""
        return 1 if self.kind == "tensor" else sum(part.num_views for part in self.parts)


PLAIN = Part("tensor")
VALUE = "value"

# In the order of registration, which is the order of precedence, newest first.
KINDS: dict[str, Kind] = {}
_BY_TYPE: dict[type, Kind] = {}
# Of classes that were not imported when their kind was registered, by module and name.
_LATE: dict[tuple[str, str], Kind] = {}


def register_kind(kind: Kind) -> None:
    """Make a kind known to this process. The newest one that claims a leaf has it.

    Raises:
        ValueError: Another kind has that name.
    """
    # The same class again is allowed: whoever sets up twice in one process does no harm.
    if not kind.name or kind.name == VALUE or (kind.name in KINDS and type(KINDS[kind.name]) is not type(kind)):
        raise ValueError(f"name: expected one that no other kind has, got {kind.name!r}")
    KINDS[kind.name] = kind
    _LATE.update(dict.fromkeys(kind.late_types, kind))
    _look_for_late()  # before the exact ones: what an older kind waits for may be among them
    for cls in kind.types:
        _BY_TYPE[cls] = kind


def _kind_by_type(cls: type) -> Kind | None:
    """The kind of exactly this class."""
    if cls not in _BY_TYPE:
        _look_for_late()
    return _BY_TYPE.get(cls)


def _look_for_late() -> None:
    """Find classes that have been imported since their kind was registered: a leaf of one is not there before."""
    # Entered before it is taken off, since leaves are looked at on more than one thread: none finds a class in neither.
    for late, kind in list(_LATE.items()):
        if (found := if_imported(*late)) is not None:
            _BY_TYPE[found] = kind
            _LATE.pop(late, None)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a ``torch.Tensor`` or ``Parameter`` is nothing but strided bytes."""
    return (
        _traits(tensor) == _OF_PLAIN
        and not tensor.is_neg()
        and (not tensor.__dict__ or not attributes_of(tensor))
        and not (tensor.dtype.is_complex and tensor.is_conj())
    )


def all_plain(tensors: Sequence[torch.Tensor], dtypes: Iterable[torch.dtype], *, on_cpu: bool) -> bool:
    """Whether these ``torch.Tensor``, of these dtypes, are all plain, have no attributes, and none requires grad."""
    dtypes = {*dtypes}
    return (
        dtypes.isdisjoint(QUANTIZED)
        and {*map(attrgetter("layout"), tensors)} == {torch.strided}
        and not any(map(attrgetter("is_nested"), tensors))
        and (on_cpu or not any(map(attrgetter("is_meta"), tensors)))
        and not any(map(attrgetter("requires_grad"), tensors))
        and not any(map(attrgetter("__dict__"), tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
        and not (any(dtype.is_complex for dtype in dtypes) and any(map(torch.Tensor.is_conj, tensors)))
    )


# Looked up in one call, because this is asked of every tensor.
_traits = attrgetter("layout", "is_quantized", "is_nested", "is_meta")
_OF_PLAIN = (torch.strided, False, False, False)


def attributes_of(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor's Python attributes, without what torch's compiler notes there about the process."""
    return {name: value for name, value in tensor.__dict__.items() if not name.startswith("_dynamo_")}


def kind_of(leaf: object) -> Kind | None:
    """The kind of a leaf, None for a plain value.

    Raises:
        ValueError: A tensor of a class that no kind claims.
    """
    kind = _kind_by_type(type(leaf))
    if kind is not None:
        return kind
    # Kinds that have no exact class for it are asked, one after the other: a tensor is something for its layout, for
    # being quantized or lazy, for its dispatch, for what it derives from.
    if isinstance(leaf, torch.Tensor):
        for kind in reversed(KINDS.values()):
            if kind.claims(leaf):
                return kind
        raise ValueError(f"a tensor of class {type(leaf).__qualname__} cannot travel")
    # Plain values are the rest of a state: learning rates, steps, names.
    if is_native(leaf):
        return None
    for cls in type(leaf).__mro__[1:-1]:
        if (kind := _BY_TYPE.get(cls)) is not None and kind.claims_subclasses:
            return kind
    # Whatever else Python can pickle.
    return KINDS["object"]


def flatten_leaf(leaf: Any) -> tuple[Part, Sequence[torch.Tensor]]:
    """What describes a leaf, and the plain tensors that hold its bytes.

    Raises:
        ValueError: It cannot travel.
    """
    cls = type(leaf)
    if (cls is torch.Tensor or cls is torch.nn.Parameter) and is_plain(leaf):
        if cls is torch.Tensor and not leaf.requires_grad:
            return PLAIN, (leaf,)
        return Part("tensor", (cls is torch.nn.Parameter, leaf.requires_grad)), (leaf,)
    kind = kind_of(leaf)
    if kind is None:
        return Part(VALUE, leaf), ()
    parts: list[Part] = []
    tensors: list[torch.Tensor] = []
    try:
        # What is inside may be of any kind again: a DTensor of a float8 wrapper of plain tensors. So down to plain
        # ones.
        inner, context = kind.flatten(leaf)
        taken = [(tensor, *flatten_leaf(tensor)) for tensor in inner]
    # A kind's own code may be as deep as the leaf, and the leaf may hold itself.
    except RecursionError:
        raise ValueError(
            f"a leaf of class {cls.__qualname__} cannot travel: what is inside of it refers back to it, "
            "or is nested deeper than Python recurses"
        ) from None
    for tensor, part, below in taken:
        # A kind that names an int among its inner tensors has a bug, which would show at the receiver.
        if part.kind == VALUE:
            raise ValueError(f"a {type(tensor).__name__} inside of a {kind.name}, where a tensor is expected")
        parts.append(part)
        tensors += below
    return Part(kind.name, context, tuple(parts)), tensors


def check_parts(part: Part, shapes: Iterator[Geometry]) -> None:
    """Check a part that a peer described, and all below it.

    Args:
        part: The part.
        shapes: Geometry of each of its plain tensors.

    Raises:
        Exception: Its kind is unknown, or does not accept it.
    """
    if part.kind == "tensor":
        _check_plain(next(shapes), part.context)
        return
    direct: list[Geometry | None] = []
    for below in part.parts:
        if below.kind == "tensor":
            direct.append(next(shapes))
            _check_plain(direct[-1], below.context)
        else:
            check_parts(below, shapes)
            direct.append(None)
    # A kind of the user's must be registered on both sides; the wire knows only its name.
    kind = KINDS.get(part.kind)
    if kind is None:
        raise ValueError(f"unknown kind of leaf {part.kind!r}: register it on the receiver")
    kind.check(direct, part.context)


def check_readable(part: Part) -> None:
    """Raise ``ValueError`` if a receiver's unpickler cannot build a part, whatever classes it allows."""
    if part.kind in KINDS and (data := KINDS[part.kind].pickle_in(part.context)):
        check_cost(data)


def _check_plain(shape: Geometry | None, context: Any) -> None:
    if context is not None and shape is not None:
        is_parameter, requires_grad = context
        if type(is_parameter) is not bool or type(requires_grad) is not bool:
            raise TypeError(f"a tensor's context: {context!r}")
        check_grad(shape.dtype, requires_grad)


def check_grad(dtype: torch.dtype, requires_grad: object) -> None:
    """Raise if a tensor of this dtype cannot require grad, or it is no question of yes or no."""
    if type(requires_grad) is not bool:
        raise TypeError(f"expected a bool, got {requires_grad!r}")
    # torch would raise as well, once the leaf is built: after its bytes have landed.
    if requires_grad and not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"a tensor of {dtype} requires grad")


def unflatten_leaf(part: Part, makers: Iterator[Maker], here: Surroundings) -> Any:
    """A new leaf from what makes its plain tensors, in the order of :func:`flatten_leaf`."""
    if part.kind == "tensor":
        return next(makers)(part.context)
    if part.kind == VALUE:
        return part.context
    inner = [unflatten_leaf(below, makers, here) for below in part.parts]
    return KINDS[part.kind].unflatten(inner, part.context, here)


# Gives a plain tensor with the context that it is asked for.
Maker = Callable[[Any], torch.Tensor]


def plain(tensor: torch.Tensor, context: Any) -> torch.Tensor:
    """A plain tensor that holds the memory of ``tensor``, with the context of a part."""
    if context is None:
        return tensor
    is_parameter, requires_grad = context
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad)


def refresh(part: Part, makers: Iterator[Maker], mine: Any, here: Surroundings) -> Any:
    """The template's leaf, whose plain tensors hold the new bytes already, or a new one that owns them."""
    if part.kind == "tensor" or (not KINDS[part.kind].looks_at_bytes and flatten_leaf(mine)[0] == part):
        return mine
    inner = [unflatten_leaf(below, makers, here) for below in part.parts]
    return KINDS[part.kind].refresh(mine, inner, part.context, here)


def with_grad(leaf: torch.Tensor, is_parameter: bool, requires_grad: bool) -> torch.Tensor:
    if is_parameter:
        return torch.nn.Parameter(leaf, requires_grad=requires_grad)
    return leaf.requires_grad_() if requires_grad else leaf


def grad_of(leaf: torch.Tensor) -> tuple[bool, bool]:
    return isinstance(leaf, torch.nn.Parameter), leaf.requires_grad


def bools(*values: Any) -> None:
    if any(type(value) is not bool for value in values):
        raise TypeError(f"expected bools, got {values!r}")
