"""The nesting of a state dict: flatten to leaves with paths, and build it again.

Strategy: a tree becomes its nodes in preorder, so that encoding, decoding and building are loops and not
recursion (a state may be nested deeper than Python likes to recurse). A node is a leaf or one of the
containers below; everything else, registered pytree nodes included, is a leaf as a whole.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ft_transport.errors import LocalProtocolError

__all__ = ["LEAF", "Node", "Path", "flatten", "format_path", "unflatten"]

Path = tuple[Hashable, ...]

# Bounds the nesting. Real states stay below 20; torch.save fails near 1,000 (Python's recursion limit).
MAX_DEPTH = 1_000


class Node(NamedTuple):
    """One node in preorder.

    Attributes:
        kind: ``"leaf"`` or the container's name.
        num_children: Subtrees that follow, 0 for a leaf.
        keys: Keys of a mapping; names of attributes come last.
        num_attrs: How many of the last children are attributes of the mapping (``_metadata``).
        extra: ``default_factory``, the class of a namedtuple, or ``maxlen`` of a deque.
    """

    kind: str
    num_children: int = 0
    keys: tuple[Hashable, ...] = ()
    num_attrs: int = 0
    extra: Any = None


LEAF = Node("leaf")


def flatten(tree: object) -> tuple[list[Node], list[Path], list[object]]:
    """Flatten ``tree`` into its nodes in preorder, and the path and value of each leaf.

    Raises:
        LocalProtocolError: The tree contains itself or is nested deeper than 1,000 levels.
    """
    nodes: list[Node] = []
    paths: list[Path] = []
    leaves: list[object] = []
    pending: list[tuple[Path, object]] = [((), tree)]
    while pending:
        path, value = pending.pop()
        opened = _open(value)
        if opened is None:
            nodes.append(LEAF)
            paths.append(path)
            leaves.append(value)
            continue
        if len(path) >= MAX_DEPTH:
            raise LocalProtocolError(
                f"{format_path(path[:8])}…: nested deeper than {MAX_DEPTH} levels, or it contains itself",
                phase="describe",
            )
        node, keys, children = opened
        nodes.append(node)
        pending.extend(reversed([((*path, key), child) for key, child in zip(keys, children, strict=True)]))
    return nodes, paths, leaves


def _open(value: object) -> tuple[Node, Iterable[Hashable], Sequence[object]] | None:
    """The node of a container with the keys and values of its children, None for a leaf."""
    cls = type(value)
    if cls in _MAPPINGS:
        return _open_mapping(value, _MAPPINGS[cls])
    if isinstance(value, (list, tuple, deque)):
        num_children = len(value)
        if cls in _SEQUENCES:
            extra = value.maxlen if isinstance(value, deque) else None
            return Node(_SEQUENCES[cls], num_children, extra=extra), range(num_children), tuple(value)
        fields = getattr(cls, "_fields", None)
        if fields is not None and issubclass(cls, tuple) and len(fields) == num_children:
            return Node("namedtuple", num_children, extra=cls), fields, tuple(value)
    return None


def _open_mapping(value: Any, kind: str) -> tuple[Node, Iterable[Hashable], Sequence[object]]:
    attrs = getattr(value, "__dict__", {})
    keys = (*value.keys(), *attrs)
    children = (*value.values(), *attrs.values())
    extra = value.default_factory if kind == "defaultdict" else None
    return Node(kind, len(children), keys, len(attrs), extra), keys, children


_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", defaultdict: "defaultdict"}
_SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", deque: "deque", torch.Size: "Size"}


def unflatten(nodes: Sequence[Node], leaves: Sequence[object]) -> object:
    """Build the tree again from its nodes in preorder and its leaves.

    Raises:
        ValueError: Nodes and leaves do not make one tree.
    """
    rest = list(leaves)
    built: list[object] = []
    # Backwards through a preorder, the children of a node lie on top of the stack, the first one topmost.
    for node in reversed(nodes):
        if node.kind == "leaf":
            if not rest:
                raise ValueError("more leaf nodes than leaves")
            built.append(rest.pop())
            continue
        if len(built) < node.num_children:
            raise ValueError(f"{node.kind} of {node.num_children} children, got {len(built)}")
        children = [built.pop() for _ in range(node.num_children)]
        built.append(_build(node, children))
    if rest or len(built) != 1:
        raise ValueError(f"expected one tree, got {len(built)} with {len(rest)} leaves over")
    return built[0]


def _build(node: Node, children: list[object]) -> object:
    if node.kind in ("dict", "OrderedDict", "defaultdict"):
        return _build_mapping(node, children)
    if node.kind == "list":
        return children
    if node.kind == "tuple":
        return tuple(children)
    if node.kind == "deque":
        return deque(children, node.extra)
    if node.kind == "Size":
        return torch.Size(children)  # type: ignore[arg-type]
    if node.kind == "namedtuple":
        return node.extra._make(children)
    raise ValueError(f"unknown kind of node: {node.kind!r}")


def _build_mapping(node: Node, children: list[object]) -> object:
    split = node.num_children - node.num_attrs
    items = zip(node.keys[:split], children[:split], strict=True)
    mapping: Any
    if node.kind == "defaultdict":
        mapping = defaultdict(node.extra, items)
    else:
        mapping = OrderedDict(items) if node.kind == "OrderedDict" else dict(items)
    for name, attr in zip(node.keys[split:], children[split:], strict=True):
        setattr(mapping, str(name), attr)
    return mapping


def format_path(path: Path) -> str:
    """``model.layers.3.weight``, or ``<root>`` for a state that is one leaf."""
    return ".".join(map(str, path)) if path else "<root>"
