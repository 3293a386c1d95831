"""A manifest becomes bytes.

Strategy: shapes are written once each and numbered, since a state has few; plain tensors, nearly all of a state, go all
at once, without a step of Python for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from ft_transport._state.classes import class_name, dtype_name
from ft_transport._state.kinds.base import VALUE, Part, check_readable
from ft_transport._state.manifest import Leaf, Manifest
from ft_transport._state.tree import LEAF, NAMES_A_CLASS, Node, check_names, format_path, path_of_container
from ft_transport._state.values import encode_value
from ft_transport._wire.frames import Frame, ManifestHeader, encode_frame
from ft_transport.errors import LocalProtocolError

__all__ = ["encode_manifest", "manifest_body"]


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
    all_views = manifest.views
    # By the order in which they come first, so that equal states have equal bytes: the fingerprint that resuming goes
    # by is taken of these.
    shapes = {shape: number for number, shape in enumerate(dict.fromkeys(all_views.geometries))}
    views = zip(all_views.storages, map(shapes.__getitem__, all_views.geometries), all_views.offsets, strict=True)
    leaves: list[Any] = []
    done = 0
    for index in sorted(manifest.leaves.others):
        # For many leaves, steps of Python for each are all that costs: the plain ones between go all at once.
        leaves += islice(views, index - done)
        done = index + 1
        leaf = manifest.leaves[index]
        try:
            own = list(islice(views, len(leaf.views)))
            leaves.append(manifest.same[index] if index in manifest.same else _encode_leaf(leaf, own))
        except Exception as exc:  # pickling runs the classes' own code, which may raise anything
            path = format_path(manifest.paths[index])
            what = f"value of class {type(leaf.context).__qualname__}" if leaf.kind == VALUE else leaf.kind
            refused.append(f"{path}: a {what} cannot be encoded: {exc}")
    leaves += views
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
    return [
        [header.step, header.limits, header.digest, header.sample],
        nodes,
        [[dtype_name(shape.dtype), shape.shape, shape.stride] for shape in shapes],
        leaves,
        manifest.storages,
        list(manifest.shared.items()),
    ]


def _what(node: Node) -> str:
    keys = f" with the keys {str(list(node.keys))[:80]}" if node.keys else ""
    return node.kind + keys


def _encode_leaf(leaf: Leaf, views: Sequence[Any]) -> Any:
    if leaf.kind == VALUE:
        return [encode_value(leaf.context)]
    check_readable(leaf.part)
    return [leaf.kind, views, encode_value(leaf.context), [_encode_part(part) for part in leaf.parts]]


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
