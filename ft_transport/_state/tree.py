"""The nesting of a state dict: flatten to leaves, and build it again.

Strategy: a tree becomes its nodes in preorder, so that encoding, decoding and building are loops and not
recursion (a state may be nested deeper than Python likes to recurse). A node is a leaf or one of the
containers below; everything else is a leaf as a whole. A container that occurs in several places is flattened
in each of them, and noted as shared, so that it comes back as one object.
"""

from __future__ import annotations

import copyreg
import dataclasses
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from ft_transport.errors import LocalProtocolError, RemoteProtocolError, printable

__all__ = [
    "CONTAINERS",
    "LEAF",
    "MAX_DEPTH",
    "NAMES_A_CLASS",
    "Flat",
    "Node",
    "Path",
    "check_names",
    "flatten",
    "format_path",
    "path_of_container",
    "paths_of",
    "unflatten",
]

Path = tuple[Hashable, ...]

# Bounds the nesting. Real states stay below 20; torch.save fails near 1,000 (Python's recursion limit).
MAX_DEPTH = 1_000
# Bounds a state whose containers are shared in so many places that flattening it would not end.
MAX_NODES = 1 << 24


# Bounds the paths of all leaves together, in memory and as text.
MAX_PATHS_BYTES = 256 << 20


class Node(NamedTuple):
    """One node in preorder.

    Attributes:
        kind: ``"leaf"`` or the container's name.
        num_children: Subtrees that follow, 0 for a leaf.
        keys: Keys of a mapping, fields of a dataclass, and of a namedtuple that has attributes; names of attributes
            come last. An item and an attribute may have the same one. An "attrdict" is a dict whose attributes are
            its items (``self.__dict__ = self``).
        num_attrs: How many of the last children are attributes of the container (``_metadata``).
        extra: ``default_factory``, the class of a namedtuple or dataclass, ``maxlen`` of a deque; for a node
            registered with torch's pytree its class and context, and True if it is locked, as a TensorDict can be.
    """

    kind: str
    num_children: int = 0
    keys: tuple[Hashable, ...] = ()
    num_attrs: int = 0
    extra: Any = None


# One object for all leaves: whoever goes through nodes asks ``is LEAF``.
LEAF = Node("leaf")


class Flat(NamedTuple):
    """A flattened tree.

    Attributes:
        nodes: In preorder.
        leaves: In order.
        shared: For each container that is the same object as an earlier one, the index of the first one's node.
    """

    nodes: list[Node]
    leaves: list[object]
    shared: dict[int, int]


_Opened = tuple[Node, Sequence[object]]
_Opener = Callable[[Any], _Opened]


def flatten(tree: object) -> Flat:
    """Flatten ``tree``.

    Raises:
        LocalProtocolError: The tree contains itself or is nested deeper than 1,000 levels.
    """
    nodes: list[Node] = []
    leaves: list[object] = []
    shared: dict[int, int] = {}
    # The object is kept so that its id is not given to another one meanwhile.
    seen: dict[int, tuple[int, object]] = {}
    # An own stack in place of recursion: Python's limit is 1,000 frames, of which the caller has used some already, and
    # a state may be nested as deep as :data:`MAX_DEPTH`.
    openers: dict[type, _Opener | None] = {}
    stack: list[Iterator[object]] = [iter((tree,))]
    while stack:
        for value in stack[-1]:
            cls = type(value)
            try:
                opener = openers[cls]
            except KeyError:
                opener = openers[cls] = _opener(cls)
            if opener is None:
                nodes.append(LEAF)
                leaves.append(value)
                continue
            # A container that holds itself is not looked for: it is nested without end, which this notices, with a path
            # that shows it.
            if len(stack) > MAX_DEPTH or len(nodes) > MAX_NODES:
                raise LocalProtocolError(_too_deep(nodes), phase="describe")
            index = len(nodes)
            first, _ = seen.setdefault(id(value), (index, value))
            if first != index:
                shared[index] = first
            # Containers that are shared are opened each time they are met. They become one object again only if their
            # children have come out the same (see :func:`unflatten`).
            node, children = opener(value)
            nodes.append(node)
            stack.append(iter(children))
            break
        else:
            stack.pop()
    return Flat(nodes, leaves, shared)


def _too_deep(nodes: Sequence[Node]) -> str:
    path = paths_of(nodes, of_containers=True)[-1]
    return (
        f"{format_path(path[:8])}…: nested deeper than {MAX_DEPTH} levels, of more than {MAX_NODES} nodes, "
        "or it contains itself"
    )


def _opener(cls: type) -> _Opener | None:
    """How containers of a class are opened, None for leaves."""
    if cls in _OPENERS:
        return _OPENERS[cls]
    if issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple):
        return _open_namedtuple
    # Before subclasses: whoever registers a class with torch's pytree has said how it is to be opened. A TensorDict
    # registers.
    if cls in pytree.SUPPORTED_NODES:
        flatten_fn = pytree.SUPPORTED_NODES[cls].flatten_fn
        return lambda value: _open_registered(cls, value, *flatten_fn(value))
    for base, kind in _SUBCLASSED.items():
        if issubclass(cls, base) and _pickles_plainly(cls, base):
            return _open_subclass(cls, kind)
    if dataclasses.is_dataclass(cls) and _is_plain_object(cls):
        return _open_dataclass
    return None


def _open_mapping(kind: str) -> _Opener:
    def opened(value: Any) -> _Opened:
        attrs = getattr(value, "__dict__", None) or {}
        keys = (*value, *attrs)
        extra = value.default_factory if kind == "defaultdict" else None
        return Node(kind, len(keys), keys, len(attrs), extra), (*value.values(), *attrs.values())

    return opened


def _open_namedtuple(value: Any) -> _Opened:
    attrs = getattr(value, "__dict__", None)
    if not attrs:
        return Node("namedtuple", len(value), extra=type(value)), tuple(value)
    keys = (*value._fields, *attrs)
    return Node("namedtuple", len(keys), keys, len(attrs), type(value)), (*value, *attrs.values())


def _open_sequence(kind: str) -> _Opener:
    return lambda value: (Node(kind, len(value)), tuple(value))


# The user's own classes of containers. An OrderedDict keeps its order beside the one of the dict that it is.
_SUBCLASSED: dict[type, str] = {OrderedDict: "subdict", dict: "subdict", list: "sublist"}


def _open_subclass(cls: type, kind: str) -> _Opener:
    base: Any = OrderedDict if issubclass(cls, OrderedDict) else dict

    def opened(value: Any) -> _Opened:
        attrs = getattr(value, "__dict__", None) or {}
        if kind == "sublist":
            items = [*list.__iter__(value)]
            return Node(kind, len(items) + len(attrs), (*range(len(items)), *attrs), len(attrs), cls), (
                *items,
                *attrs.values(),
            )
        keys, values = tuple(base.keys(value)), tuple(base.values(value))
        if attrs is value:
            return Node("attrdict", len(keys), keys, extra=cls), values
        return Node(kind, len(keys) + len(attrs), (*keys, *attrs), len(attrs), cls), (*values, *attrs.values())

    return opened


def _pickles_plainly(cls: type, base: type) -> bool:
    """Whether pickle would keep the items and attributes of its instances and nothing else."""
    # A class that tells pickle how to keep it knows of more than its items and attributes; it is left to pickle, as a
    # leaf.
    between = cls.__mro__[: cls.__mro__.index(base)]
    return object in cls.__mro__ and not any(_PICKLE_HOOKS & vars(each).keys() for each in between)


_PICKLE_HOOKS = frozenset(
    {"__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__", "__getstate__", "__setstate__", "__slots__"}
)


_OPENERS: dict[type, _Opener] = {
    dict: lambda value: (Node("dict", len(value), tuple(value)), tuple(value.values())),
    OrderedDict: _open_mapping("OrderedDict"),
    defaultdict: _open_mapping("defaultdict"),
    list: _open_sequence("list"),
    tuple: _open_sequence("tuple"),
    torch.Size: _open_sequence("Size"),
    deque: lambda value: (Node("deque", len(value), extra=value.maxlen), tuple(value)),
}


def _open_registered(cls: type, value: Any, children: Iterable[object], context: object) -> _Opened:
    children = tuple(children)
    # What pytree forgets and pickle keeps: that a TensorDict is locked.
    locked = (True,) if callable(getattr(cls, "lock_", None)) and getattr(value, "is_locked", None) is True else ()
    return Node("pytree", len(children), extra=(cls, context, *locked)), children


def _open_dataclass(value: Any) -> _Opened:
    # Instances may have lost a field, or have one more than the class says: what is there counts, as with pickle.
    names = [*getattr(value, "__dict__", ()), *copyreg._slotnames(type(value))]  # type: ignore[attr-defined]
    names = [name for name in names if hasattr(value, name)]
    return Node("dataclass", len(names), tuple(names), extra=type(value)), tuple(getattr(value, n) for n in names)


def _is_plain_object(cls: type) -> bool:
    """Whether pickle would keep the attributes of its instances and nothing else."""
    if issubclass(cls, (list, dict, tuple, set, frozenset, str, bytes, int, float, BaseException, torch.Tensor)):
        return False
    own = {name for base in cls.__mro__[:-1] for name in vars(base)}
    slots = "__slots__" in vars(cls)
    # ``object`` has a ``__getstate__`` of its own since Python 3.11, which ``own`` leaves out with the last class.
    states = {"__getstate__", "__setstate__"} & own
    # dataclass(slots=True, frozen=True) brings its own pair, which does the same.
    if states and not (slots and getattr(vars(cls).get("__getstate__"), "__module__", "") == "dataclasses"):
        return False
    return not own & {"__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__", "__torch_function__"}


# --------------------------------------------------------------------------------------------- build


def unflatten(nodes: Sequence[Node], leaves: Sequence[object], shared: dict[int, int] | None = None) -> object:
    """Build the tree again from its nodes in preorder and its leaves.

    Args:
        nodes: The nodes.
        leaves: A value for each leaf node.
        shared: As in :class:`Flat`: these containers become one object where their children are the same.

    Raises:
        ValueError: Nodes and leaves do not make one tree.
    """
    # Each container that is one of several, by the node of the first.
    groups = {**shared, **{first: first for first in shared.values()}} if shared else {}
    built_before: dict[int, tuple[list[object], object]] = {}
    built: list[object] = []
    end, left = len(nodes), len(leaves)
    # Backwards through a preorder, the children of a node lie on top of the stack, the first one topmost. Leaves are
    # most of all nodes, and go there in runs.
    containers = [index for index, node in enumerate(nodes) if node is not LEAF and node.kind != "leaf"]
    for index in [*reversed(containers), -1]:
        num_leaves = end - index - 1
        if num_leaves > left:
            raise ValueError("more leaf nodes than leaves")
        built += leaves[left - num_leaves : left][::-1]
        end, left = index, left - num_leaves
        if index < 0:
            break
        node = nodes[index]
        num_children = node.num_children
        if len(built) < num_children:
            raise ValueError(f"{node.kind} of {num_children} children, got {len(built)}")
        children = built[: -num_children - 1 : -1] if num_children else []
        if num_children:
            del built[-num_children:]
        if index in groups:
            before = built_before.get(groups[index])
            # Shared at the source, and different here: the template kept its own object for a leaf of one of them. Then
            # they are two.
            if before is not None and _same_children(before[0], children):
                built.append(before[1])
                continue
        container = _build(node, children)
        if index in groups:
            built_before[groups[index]] = (children, container)
        built.append(container)
    if left or len(built) != 1:
        raise ValueError(f"expected one tree, got {len(built)} with {left} leaves over")
    return built[0]


# Values of these classes have no identity that anybody relies on.
_ATOMIC = (int, float, complex, str, bytes, bool, type(None))


def _same_children(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(
        a is b or (type(a) is type(b) and type(a) in _ATOMIC) for a, b in zip(some, others, strict=True)
    )


def _build(node: Node, children: list[object]) -> object:
    build = _BUILD.get(node.kind)
    if build is None:
        raise ValueError(f"unknown kind of node: {node.kind!r}")
    return build(node, children)


def _build_mapping(node: Node, children: list[object]) -> object:
    split = node.num_children - node.num_attrs
    items = zip(node.keys[:split], children[:split], strict=True)
    mapping: Any = defaultdict(node.extra, items) if node.kind == "defaultdict" else OrderedDict(items)
    for name, attr in zip(node.keys[split:], children[split:], strict=True):
        setattr(mapping, str(name), attr)
    return mapping


def _build_dataclass(node: Node, children: list[object]) -> object:
    # Without ``__init__``, as pickle does: it would ask for arguments, and may do anything.
    value = object.__new__(node.extra)
    for name, child in zip(node.keys, children, strict=True):
        object.__setattr__(value, str(name), child)
    return value


def _build_subclass(node: Node, children: list[object]) -> object:
    split = node.num_children - node.num_attrs
    value = node.extra.__new__(node.extra)
    if node.kind == "attrdict":
        value.__dict__ = value
    if node.kind == "sublist":
        list.extend(value, children[:split])
    else:
        put: Any = (OrderedDict if isinstance(value, OrderedDict) else dict).__setitem__
        for key, child in zip(node.keys[:split], children[:split], strict=True):
            put(value, key, child)
    if not node.num_attrs:
        return value
    vars(value).update(zip(map(str, node.keys[split:]), children[split:], strict=True))
    return value


def _build_namedtuple(node: Node, children: list[object]) -> object:
    split = node.num_children - node.num_attrs
    # Not the constructor: a namedtuple's may have been replaced.
    value: object = node.extra._make(children[:split])
    if node.num_attrs:
        vars(value).update(zip(map(str, node.keys[split:]), children[split:], strict=True))
    return value


def _build_registered(node: Node, children: list[object]) -> object:
    cls, context, *locked = node.extra
    value: Any = pytree.SUPPORTED_NODES[cls].unflatten_fn(children, context)
    if locked:
        value.lock_()
    return value


_BUILD: dict[str, Callable[[Node, list[object]], object]] = {
    "dict": lambda node, children: dict(zip(node.keys, children, strict=True)),
    "OrderedDict": _build_mapping,
    "defaultdict": _build_mapping,
    "list": lambda node, children: list(children),
    "tuple": lambda node, children: tuple(children),
    "Size": lambda node, children: torch.Size(children),  # type: ignore[arg-type]
    "deque": lambda node, children: deque(children, node.extra),
    "namedtuple": _build_namedtuple,
    "dataclass": _build_dataclass,
    "subdict": _build_subclass,
    "attrdict": _build_subclass,
    "sublist": _build_subclass,
    "pytree": _build_registered,
}


# Kinds of node that are no leaf.
CONTAINERS = frozenset(_BUILD)


def paths_of(nodes: Sequence[Node], *, of_containers: bool = False) -> list[Path]:
    """The path of each leaf, or of each container, of a tree that is known to be one.

    Raises:
        RemoteProtocolError: They would take more memory than any real state's do.
    """
    paths: list[Path] = []
    claimed = 0
    stack: list[tuple[Path, Iterator[Hashable]]] = []
    for depth, node in enumerate(nodes):
        path: Path = ()
        if depth:
            while (key := next(stack[-1][1], _END)) is _END:
                stack.pop()
            path = (*stack[-1][0], key)
        is_leaf = node is LEAF or node.kind == "leaf"
        if is_leaf != of_containers:
            paths.append(path)
            # Every leaf below a long key has that key in its path.
            claimed += sum([8 + len(key if type(key) is str else _text(key)) for key in path])
            if claimed > MAX_PATHS_BYTES:
                raise RemoteProtocolError(f"paths of more than {MAX_PATHS_BYTES} bytes")
        if node.num_children:
            stack.append((path, iter(_names(node))))
    return paths


_END: Any = object()


def _names(node: Node) -> Iterable[Hashable]:
    if node.kind == "namedtuple" and not node.keys:
        names: tuple[Hashable, ...] = node.extra._fields
        return names
    if node.num_attrs:
        split = node.num_children - node.num_attrs
        items = {*node.keys[:split]}
        if not items.isdisjoint(node.keys[split:]):  # an item and an attribute of one name are two leaves
            return (*node.keys[:split], *(f"__dict__.{name}" if name in items else name for name in node.keys[split:]))
    return node.keys or range(node.num_children)


def format_path(path: Path) -> str:
    """``model.layers.3.weight``, or ``<root>`` for a state that is one leaf. For people: in one line, with escapes."""
    return printable(".".join(map(_text, path))) if path else "<root>"


def _text(key: Hashable) -> str:
    try:
        return str(key)
    except ValueError:  # an integer with more digits than Python likes to write
        return f"<{type(key).__name__}>"


def path_of_container(nodes: list[Node], index: int) -> str:
    which = sum(node is not LEAF for node in nodes[:index])
    return format_path(paths_of(nodes, of_containers=True)[which])


# Nodes whose ``extra`` is a class, if any.
NAMES_A_CLASS = frozenset({"namedtuple", "dataclass", "defaultdict", "subdict", "attrdict", "sublist"})


def check_names(node: Node) -> None:
    """Raise where an attribute of a container would hide what its class can do."""
    cls = {"OrderedDict": OrderedDict, "defaultdict": defaultdict}.get(node.kind, node.extra)
    for name in node.keys if node.kind == "dataclass" else node.keys[len(node.keys) - node.num_attrs :]:
        if not _is_free_name(name, cls):
            raise ValueError(f"name of an attribute out of range: {str(name)[:80]!r} hides what its class can do")


def _is_free_name(name: object, cls: Any) -> bool:
    """Whether an attribute of this name hides nothing that instances of the class can do."""
    if not isinstance(name, str) or name.startswith("__"):
        return False
    if name in getattr(cls, "__dataclass_fields__", ()):
        return True
    found = getattr(cls, name, None)
    return not callable(found) and not (cls is defaultdict and name == "default_factory")
