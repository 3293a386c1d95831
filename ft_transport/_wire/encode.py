"""A manifest becomes bytes.

Strategy: shapes and sizes are written once each and numbered, since a state has few; of the views, and so of plain
tensors, which are nearly all of a state, columns are written, without a step of Python for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from ft_transport._state.classes import class_name, dtype_name
from ft_transport._state.kinds.base import VALUE, Part, check_readable
from ft_transport._state.manifest import Leaf, Manifest
from ft_transport._state.tree import LEAF, NAMES_A_CLASS, Node, check_names, format_path, path_of_container
from ft_transport._state.values import encode_value
from ft_transport._wire.columns import pack_column
from ft_transport._wire.frames import Frame, ManifestHeader, encode_frame
from ft_transport.errors import LocalProtocolError

__all__ = ["encode_manifest", "manifest_body"]

_T = TypeVar("_T")


def encode_manifest(manifest: Manifest, header: ManifestHeader) -> bytes:
    """The MANIFEST frame.

    Raises:
        LocalProtocolError: A plain value or a key cannot be encoded; each is named.
    """
    try:
        # msgpack's own limit, of 4 GiB for a text or an array, is far beyond the frame's.
        return encode_frame(Frame.MANIFEST, manifest_body(manifest, header))
    except ValueError as exc:
        raise LocalProtocolError(f"the description of the state cannot be encoded: {exc}", phase="describe") from exc


def manifest_body(manifest: Manifest, header: ManifestHeader) -> list[Any]:
    """What becomes the body of the MANIFEST frame; raises as :func:`encode_manifest`."""
    refused: list[str] = []
    leaves: list[Any] = []
    for index in sorted(manifest.leaves.others):
        leaf = manifest.leaves[index]
        try:
            leaves.append([index, manifest.same[index] if index in manifest.same else _encode_leaf(leaf)])
        except Exception as exc:  # pickling runs the classes' own code, which may raise anything
            path = format_path(manifest.paths[index])
            what = f"value of class {type(leaf.context).__qualname__}" if leaf.kind == VALUE else leaf.kind
            refused.append(f"{path}: a {what} cannot be encoded: {exc}")
    # A leaf is nil: one byte for each of a hundred thousand.
    nodes: list[Any] = [None] * len(manifest.nodes)
    for index in [index for index, node in enumerate(manifest.nodes) if node is not LEAF]:
        node = manifest.nodes[index]
        try:
            nodes[index] = _encode_node(node)
        except Exception as exc:
            path = path_of_container(manifest.nodes, index)
            refused.append(f"{path}: a {_what(node)} cannot be encoded: {exc}")
    if refused:
        raise LocalProtocolError("; ".join(refused), phase="describe")
    views = manifest.leaves.own_views(manifest.same)
    # By the order in which they come first, so that equal states have equal bytes: the fingerprint that resuming goes
    # by is taken of these.
    shapes, of_views = _numbered(views.geometries)
    storages, of_storages = _numbered(manifest.storages)
    return [
        [header.step, header.limits, header.digest, header.sample],
        nodes,
        [[dtype_name(shape.dtype), shape.shape, shape.stride] for shape in shapes],
        [len(views), pack_column(views.storages), of_views, pack_column(views.offsets)],
        leaves,
        [len(manifest.storages), of_storages, storages],
        list(manifest.shared.items()),
    ]


def _numbered(values: Sequence[_T]) -> tuple[list[_T], bytes]:
    """The distinct ones among some values, and the column of which of them each is."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    which = list(map(numbers.__getitem__, values)) if len(numbers) > 1 else [0] * len(values)
    return list(numbers), pack_column(which)


def _what(node: Node) -> str:
    keys = f" with the keys {str(list(node.keys))[:80]}" if node.keys else ""
    return node.kind + keys


def _encode_leaf(leaf: Leaf) -> Any:
    if leaf.kind == VALUE:
        return [encode_value(leaf.context)]
    check_readable(leaf.part)
    return [leaf.kind, len(leaf.views), encode_value(leaf.context), [_encode_part(part) for part in leaf.parts]]


def _encode_part(part: Part) -> Any:
    if part.kind == "tensor" and part.context is None:
        return None
    check_readable(part)
    return [part.kind, encode_value(part.context), [_encode_part(below) for below in part.parts]]


def _encode_node(node: Node) -> Any:
    extra = node.extra
    if node.num_attrs or node.kind == "dataclass":
        check_names(node)
    # Only the class's name and what its ``flatten_fn`` calls context. The receiver must have registered the class
    # itself.
    if node.kind == "pytree":
        extra = [class_name(extra[0]), encode_value(extra[1]), *extra[2:]]
    elif node.kind in NAMES_A_CLASS and extra is not None:
        extra = class_name(extra)
    # Keys of text, nearly all, need no call.
    keys = [key if type(key) is str else encode_value(key) for key in node.keys]
    return [node.kind, node.num_children, keys, node.num_attrs, extra]
