"""How a manifest becomes bytes, and is read back without trust.

Strategy: a frame is a fixed header and one msgpack value made of nil, booleans, integers, floats, strings,
binary and arrays; nothing in it can name code but the classes of ``_state.values``, which the receiver must have
allowed. Every number is checked before it is used. Whatever is wrong with a frame is a :class:`RemoteProtocolError`.
"""

from __future__ import annotations

import math
import struct
import sys
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Hashable, Iterator, Sequence
from enum import IntEnum
from itertools import chain, islice, repeat
from operator import is_, itemgetter
from typing import Any, NamedTuple, NoReturn

import msgpack
from torch.utils import _pytree as pytree

from ft_transport._plan.blocks import physical_bytes
from ft_transport._state.geometry import QUANTIZED, Geometry, checked_geometry, merge
from ft_transport._state.kinds.base import VALUE, Part, check_parts, check_readable
from ft_transport._state.manifest import ALIGNMENT, Leaf, Manifest, Storage, View, covered, made, plain_leaves
from ft_transport._state.tree import CONTAINERS, LEAF, Node, check_tree, format_path, paths_of
from ft_transport._state.values import (
    NotAllowed,
    advice,
    allowed_class,
    check_keys,
    class_name,
    decode_value,
    dtype_name,
    dtype_of,
    encode_value,
    expect,
    not_allowed_in,
)
from ft_transport._wire.digest import NUM_SAMPLES
from ft_transport._wire.layout import Limits
from ft_transport.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["MAX_FRAME_BYTES", "Frame", "Header", "decode_frame", "decode_manifest", "encode_frame", "encode_manifest"]

MAGIC = b"FTCT"
VERSION = 1
_HEADER = struct.Struct("<4sBB2x")

# Bounds what a peer can make us allocate for a frame. A leaf takes some 15 to 40 bytes, so this is room for millions.
MAX_FRAME_BYTES = 64 << 20
# Bounds a message and with it a bucket; above 1 GiB a message gains nothing.
MAX_MESSAGE_BYTES = 1 << 30
# Bounds a flight, of which a side that stages it holds two.
MAX_FLIGHT_BYTES = 1 << 30
# Bounds the operations that are posted at once.
MAX_WINDOW = 1 << 10
# Bounds the messages that large ranges are cut into, some 250 bytes each: enough for 4 TiB with our limits.
MAX_CUTS = 1 << 20
# Bounds nodes and views: each becomes some objects of a hundred bytes and more. Large states have 100,000.
MAX_NODES = 4 << 20
# Bounds the elements that are gone through to find the gaps between views of one storage, some seconds.
MAX_GAP_STEPS = 1 << 32
# Memory for each such element: whether it is of a view, and where it is.
_PLACE_BYTES = 9
# Bounds what is said, sent back and logged about a manifest that is refused, in characters: it quotes what was sent.
MAX_TEXT = 4_000


class Frame(IntEnum):
    """What a frame is for."""

    MANIFEST = 1
    READY = 2
    REFUSE = 3
    DIGESTS = 4
    DONE = 5
    FAILED = 6


class Header(NamedTuple):
    """What both sides must agree on before anything else.

    Attributes:
        step: Step of the state, None where the API has none.
        limits: How the source cuts messages.
        digest: Algorithm of the messages' digests, empty for none.
        sample: Which block of large messages the digests read, -1 for all (see ``_wire.digest``).
    """

    step: int | None
    limits: Limits
    digest: str
    sample: int = -1


def encode_frame(kind: Frame, body: object) -> bytes:
    """Header and msgpack of ``body``."""
    packed: bytes = msgpack.packb(body, use_bin_type=True, unicode_errors="surrogatepass")
    return _HEADER.pack(MAGIC, VERSION, kind) + packed


def decode_frame(data: bytes) -> tuple[Frame, Any]:
    """Kind and body of a frame.

    Raises:
        RemoteProtocolError: The bytes are not a frame of this version.
    """
    if len(data) < _HEADER.size:
        raise RemoteProtocolError(f"expected a frame of at least {_HEADER.size} bytes, got {len(data)}")
    magic, version, kind = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"expected magic {MAGIC!r}, got {magic!r}: the peer is no ft_transport")
    if version != VERSION:
        raise RemoteProtocolError(f"expected version {VERSION} of the wire, got {version}")
    try:
        return Frame(kind), _unpack(memoryview(data)[_HEADER.size :])
    except (ValueError, RecursionError, msgpack.UnpackException) as exc:
        raise RemoteProtocolError(f"damaged frame: {exc or type(exc).__name__}") from exc


def _unpack(packed: memoryview) -> Any:
    """The value; in memory of at most some 30 times its bytes, because no array claims more than is there."""
    # Walks through without making anything. An array is made as large as it claims to be, and arrays nest.
    unpacker = msgpack.Unpacker(max_buffer_size=len(packed))
    unpacker.feed(packed)
    unpacker.skip()
    return msgpack.unpackb(
        packed,
        raw=False,
        use_list=False,
        unicode_errors="surrogatepass",
        object_pairs_hook=_refuse_map,
        max_ext_len=0,
        ext_hook=_refuse_extension,
    )


def _refuse_map(pairs: object) -> NoReturn:
    raise ValueError("a map: frames have none")


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension {code}: frames have none")


# ------------------------------------------------------------------------------------------- encode


def encode_manifest(manifest: Manifest, header: Header) -> bytes:
    """The MANIFEST frame.

    Raises:
        LocalProtocolError: A plain value or a key cannot be encoded; each is named.
    """
    refused: list[str] = []
    all_views = list(chain.from_iterable(map(itemgetter(1), manifest.leaves)))
    shapes = {shape: number for number, shape in enumerate(dict.fromkeys(map(itemgetter(1), all_views)))}
    views = _encode_views(all_views, shapes)
    leaves: list[Any] = []
    done = 0
    for index in _not_plain(manifest):
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
    nodes: list[Any] = [None] * len(manifest.nodes)
    for index in [index for index, node in enumerate(manifest.nodes) if node is not LEAF]:
        node = manifest.nodes[index]
        try:
            nodes[index] = _encode_node(node)
        except Exception as exc:
            path = _path_of_container(manifest.nodes, index)
            refused.append(f"{path}: a {_what(node)} cannot be encoded: {exc}")
    if refused:
        raise LocalProtocolError("; ".join(refused), phase="describe")
    body = [
        [header.step, header.limits, header.digest, header.sample],
        nodes,
        [[dtype_name(shape.dtype), shape.shape, shape.stride] for shape in shapes],
        leaves,
        manifest.storages,
        list(manifest.shared.items()),
    ]
    try:
        return encode_frame(Frame.MANIFEST, body)
    except ValueError as exc:
        raise LocalProtocolError(f"the description of the state cannot be encoded: {exc}", phase="describe") from exc


def _path_of_container(nodes: list[Node], index: int) -> str:
    which = sum(node is not LEAF for node in nodes[:index])
    return format_path(paths_of(nodes, of_containers=True)[which])


def _what(node: Node) -> str:
    keys = f" with the keys {str(list(node.keys))[:80]}" if node.keys else ""
    return node.kind + keys


def _encode_views(views: list[View], shapes: dict[Geometry, int]) -> Iterator[tuple[int, int, int]]:
    if not views:
        return iter(())
    storages, geometries, offsets = zip(*views, strict=True)
    return zip(storages, map(shapes.__getitem__, geometries), offsets, strict=True)


def _not_plain(manifest: Manifest) -> list[int]:
    """The leaves that are not one plain tensor without a context, or are the same as an earlier one."""
    leaves, same = manifest.leaves, manifest.same
    kinds, contexts = map(itemgetter(0), leaves), map(itemgetter(2), leaves)
    if {*kinds} == {"tensor"} and all(map(is_, contexts, repeat(None))) and not same:
        return []
    return [
        index
        for index, (kind, _, context, _) in enumerate(leaves)
        if kind != "tensor" or context is not None or index in same
    ]


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
        _check_names(node)
    if node.kind == "pytree":
        extra = [class_name(extra[0]), encode_value(extra[1]), *extra[2:]]
    elif node.kind in _CLASSES and extra is not None:
        extra = class_name(extra)
    return [node.kind, node.num_children, [encode_value(key) for key in node.keys], node.num_attrs, extra]


# Nodes whose ``extra`` is a class, if any.
_CLASSES = frozenset({"namedtuple", "dataclass", "defaultdict", "subdict", "attrdict", "sublist"})


# ------------------------------------------------------------------------------------------- decode


def decode_manifest(body: Any) -> tuple[Manifest, Header]:
    """Read the body of a MANIFEST frame; every number in it is checked before it is used.

    Raises:
        RemoteProtocolError: The body describes no state, names a class that is not allowed, or lies about sizes.
    """
    try:
        header, nodes, shapes, leaves, storages, shared = body
        header = _decode_header(*header)
        if len(nodes) > MAX_NODES:
            raise ValueError(f"{len(nodes)} nodes, at most {MAX_NODES} are accepted")
        tree, refused = _decode_nodes(nodes)
        num_leaves = check_tree(tree)
        if len(leaves) != num_leaves:
            raise ValueError(f"expected {num_leaves} leaves, got {len(leaves)}")
        manifest = Manifest(tree, [], _decode_storages(storages))
        not_allowed = [(_path_of_container(tree, index), exc) for index, exc in refused]
        not_allowed += _decode_leaves(leaves, [_decode_shape(*shape) for shape in shapes], manifest)
        if not_allowed:
            raise RemoteProtocolError(_all_not_allowed(not_allowed), phase="agree")
        manifest.shared = _decode_shared(shared, tree)
        _check_storages(manifest, header.limits)
        if not _ALWAYS_BUILT.issuperset(map(itemgetter(0), tree)):
            # What cannot be built must be found before a byte lands, not after the last one has.
            manifest.build([leaf.context if leaf.kind == VALUE else None for leaf in manifest.leaves])
        return manifest, header
    except Exception as exc:
        damage = f"damaged manifest: {type(exc).__name__}: {exc}"
        text = exc.message if isinstance(exc, RemoteProtocolError) else damage
        # Not "from exc": a traceback would show, as it came, what the peer has chosen.
        raise RemoteProtocolError(text[:MAX_TEXT], phase="agree") from None


# Nodes that can be built whatever their children are, or whose class may look at them.
_ALWAYS_BUILT = frozenset({"leaf", "dict", "list", "tuple", "OrderedDict", "pytree"})


def _decode_header(step: Any, limits: Any, digest: Any, sample: Any) -> Header:
    if step is not None:
        expect(int, step)
    if not -1 <= expect(int, sample) < NUM_SAMPLES:
        raise ValueError(f"sample {sample} of {NUM_SAMPLES}")
    return Header(step, _decode_limits(limits), expect(str, digest), sample)


def _decode_limits(data: Any) -> Limits:
    limits = Limits._make(expect(int, value) for value in data)
    # What is packed is never cut, so a bucket is no larger than a message only if no packed range is.
    if not 64 <= limits.message_bytes <= MAX_MESSAGE_BYTES or not 0 <= limits.pack_below <= limits.message_bytes:
        raise ValueError(f"limits out of range: {limits}")
    if not limits.message_bytes <= limits.flight_bytes <= MAX_FLIGHT_BYTES or limits.pack_from < 1:
        raise ValueError(f"limits out of range: {limits}")
    if not 1 <= limits.window <= MAX_WINDOW:
        raise ValueError(f"limits out of range: {limits}")
    return limits


class _NotRegistered(ValueError):
    """A class of a node that this side has not registered."""


_Refused = NotAllowed | _NotRegistered


def _all_not_allowed(found: list[tuple[str, _Refused]]) -> str:
    """The first paths and all classes at once: whoever allows them heals next time."""
    names = {name for _, exc in found if isinstance(exc, NotAllowed) for name in exc.names}
    others = dict.fromkeys(str(exc) for _, exc in found if not isinstance(exc, NotAllowed))
    paths = ", ".join(path for path, _ in found[:_MAX_PATHS])
    more = f" and {len(found) - _MAX_PATHS} more" if len(found) > _MAX_PATHS else ""
    return f"{paths}{more}: {'; '.join([*([advice(names)] if names else []), *others])}"


# Paths that an error about classes names.
_MAX_PATHS = 8


def _decode_nodes(data: Any) -> tuple[list[Node], list[tuple[int, _Refused]]]:
    """The nodes, and the indices of those whose class is not allowed, with what to do about it."""
    nodes = [LEAF] * len(data)
    refused: list[tuple[int, _Refused]] = []
    for index in [index for index, node in enumerate(data) if node is not None]:
        node = data[index]
        try:
            nodes[index] = _decode_node(*node)
        except (NotAllowed, _NotRegistered) as exc:
            refused.append((index, exc))
            nodes[index] = Node("tuple", expect(int, node[1]))
    return nodes, refused


def _decode_node(kind: Any, num_children: Any, keys: Any, num_attrs: Any, extra: Any) -> Node:
    decoded: tuple[Hashable, ...] = tuple([key if type(key) is str else decode_value(key) for key in keys])
    check_keys(decoded)
    if not 0 <= expect(int, num_attrs) <= expect(int, num_children):
        raise ValueError(f"{num_attrs} attributes among {num_children} children")
    is_keyed = kind in _KEYED or (kind == "namedtuple" and num_attrs)
    # Items and attributes of a mapping may have the same names.
    split = len(decoded) - (num_attrs if kind in _MAPPINGS else 0)
    num_distinct = len(set(decoded[:split])) + len(set(decoded[split:]))
    if len(decoded) != (num_children if is_keyed else 0) or num_distinct != len(decoded):
        raise ValueError(f"{kind} of {num_children} children has {num_distinct} distinct keys")
    if num_attrs and kind not in _WITH_ATTRS:
        raise ValueError(f"{kind} has no attributes")
    if kind not in CONTAINERS:
        raise ValueError(f"unknown kind of node {kind!r}")
    node = Node(kind, num_children, decoded, num_attrs, _decode_extra(kind, extra))
    _check_names(node)
    if kind == "namedtuple" and len(node.extra._fields) != num_children - num_attrs:
        raise ValueError(f"{extra} of {len(node.extra._fields)} fields has {num_children - num_attrs} of them")
    if kind == "namedtuple" and num_attrs and decoded[:-num_attrs] != node.extra._fields:
        raise ValueError(f"{extra} has other fields than {decoded[:-num_attrs]}")
    return node


_MAPPINGS = frozenset({"OrderedDict", "defaultdict", "subdict"})
_KEYED = _MAPPINGS | {"dict", "dataclass", "attrdict", "sublist"}
_WITH_ATTRS = frozenset({"OrderedDict", "defaultdict", "subdict", "sublist", "namedtuple"})


def _check_names(node: Node) -> None:
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


def _decode_extra(kind: str, extra: Any) -> Any:
    if kind == "deque":
        return extra if extra is None else expect(int, extra)
    if kind == "pytree":
        name, context, *locked = extra
        cls = _registered_class(expect(str, name))
        if locked and (locked != [True] or not callable(getattr(cls, "lock_", None))):
            raise ValueError(f"a {name} that is locked: {locked!r}")
        return cls, decode_value(context), *locked
    if kind not in _CLASSES:
        if extra is not None:
            raise ValueError(f"{kind} with {extra!r}")
        return None
    if extra is None and kind == "defaultdict":
        return None
    cls = allowed_class(expect(str, extra))
    if kind != "defaultdict" and not (isinstance(cls, type) and _IS_A[kind](cls)):
        raise TypeError(f"{extra} is no {kind}")
    return cls


_IS_A: dict[str, Callable[[type], bool]] = {
    "namedtuple": lambda cls: hasattr(cls, "_fields"),
    "dataclass": lambda cls: hasattr(cls, "__dataclass_fields__"),
    "subdict": lambda cls: issubclass(cls, dict),
    "attrdict": lambda cls: issubclass(cls, dict) and hasattr(cls, "__dict__"),
    "sublist": lambda cls: issubclass(cls, list),
}


def _registered_class(name: str) -> type:
    """A class that this process has registered with torch's pytree, which is leave to build it."""
    for cls in pytree.SUPPORTED_NODES:
        # torch's own call what the context names, and have kinds of node of their own.
        if cls not in _HAVE_A_KIND and f"{cls.__module__}.{cls.__qualname__}" == name:
            found: type = cls
            return found
    raise _NotRegistered(f"class {name} is not registered with torch.utils._pytree on the receiver")


_HAVE_A_KIND: frozenset[Any] = frozenset({dict, list, tuple, OrderedDict, defaultdict, deque, namedtuple})


def _decode_shared(pairs: Any, tree: list[Node]) -> dict[int, int]:
    shared: dict[int, int] = {}
    before = -1
    for later, first in pairs:
        # In order, so that each node is compared once: there may be many keys to compare.
        if not before < expect(int, later):
            raise ValueError(f"node {later} comes after node {before}")
        before = later
        if not 0 <= expect(int, first) < expect(int, later) < len(tree):
            raise ValueError(f"node {later} is the same as node {first} of {len(tree)}")
        if tree[first] != tree[later] or tree[first] is LEAF:
            raise ValueError(f"node {later} is said to be the same as {first}, which differs")
        shared[later] = first
    return shared


def _decode_leaves(data: Any, shapes: list[Geometry], manifest: Manifest) -> list[tuple[str, _Refused]]:
    """Decode the leaves and check that every view lies in its storage; gives those that name what is not allowed.

    A leaf is [value], [storage, shape, offset] for a plain tensor, [kind, views, context, parts] for another one, or
    the index of an earlier leaf that is the same object.
    """
    leaves, storages = manifest.leaves, manifest.storages
    refused: list[tuple[str, _Refused]] = []
    others = [index for index, leaf in enumerate(data) if type(leaf) is not tuple or len(leaf) != 3]
    plain = _decode_plain([leaf for leaf in data if type(leaf) is tuple and len(leaf) == 3], shapes, storages)
    for index in others if plain is not None else range(len(data)):
        if plain is not None:
            leaves += islice(plain, index - len(leaves))
        leaf = data[index]
        try:
            if type(leaf) is int:
                if not 0 <= leaf < index:
                    raise ValueError(f"the same as leaf {leaf}")
                manifest.same[index] = manifest.same.get(leaf, leaf)
                leaves.append(leaves[leaf])
            elif len(leaf) == 3:
                leaves.append(Leaf("tensor", (_decode_view(leaf, shapes, storages),)))
            elif len(leaf) == 1:
                leaves.append(Leaf(VALUE, (), decode_value(leaf[0])))
            else:
                leaves.append(_decode_composite(leaf, shapes, storages))
        except NotAllowed as exc:
            refused.append((format_path(manifest.paths[index]), NotAllowed(exc.names | not_allowed_in(leaf))))
            leaves.append(Leaf(VALUE, (), None))  # nothing is made of it, since all of them raise in the end
        except Exception as exc:
            reason = exc.message if isinstance(exc, RemoteProtocolError) else f"{type(exc).__name__}: {exc}"
            if isinstance(exc, ValueError):
                reason = str(exc)
            raise RemoteProtocolError(f"{format_path(manifest.paths[index])}: {reason}", phase="agree") from exc
    leaves += plain or ()
    return refused


def _decode_plain(data: list[Any], shapes: list[Geometry], storages: list[Storage]) -> Iterator[Leaf] | None:
    """Plain tensors with elements, all at once; None if anything about any of them needs a closer look."""
    if not data:
        return None
    geometries: list[Geometry] = []
    num_shapes, num_storages = len(shapes), len(storages)
    for storage, number, offset in data:
        if not type(storage) is type(number) is type(offset) is int:
            return None
        if not (0 <= number < num_shapes and 0 <= storage < num_storages and offset >= 0):
            return None
        shape = shapes[number]
        if not shape.numel or offset * shape.itemsize + shape.span > storages[storage][0]:
            return None
        geometries.append(shape)
    which, offsets = map(itemgetter(0), data), map(itemgetter(2), data)
    return iter(plain_leaves(made(View, zip(which, geometries, offsets, strict=True))))


def _decode_composite(data: Any, shapes: list[Geometry], storages: list[Storage]) -> Leaf:
    kind, views, context, parts = data
    decoded = tuple([_decode_view(view, shapes, storages) for view in views])
    leaf = Leaf(expect(str, kind), decoded, decode_value(context), tuple([_decode_part(part) for part in parts]))
    if kind == VALUE or leaf.part.num_views != len(decoded) or (kind == "tensor" and leaf.parts):
        raise ValueError(f"a leaf of kind {kind} with {len(decoded)} views")
    check_parts(leaf.part, iter([view.geometry for view in decoded]))
    return leaf


def _decode_part(data: Any) -> Part:
    if data is None:
        return Part("tensor")
    kind, context, parts = data
    part = Part(expect(str, kind), decode_value(context), tuple([_decode_part(below) for below in parts]))
    if kind == VALUE or (kind == "tensor" and parts):
        raise ValueError(f"a part of kind {kind} with {len(parts)} parts")
    return part


def _decode_view(data: Any, shapes: list[Geometry], storages: list[Storage]) -> View:
    storage, number, offset = data
    if type(storage) is not int or type(number) is not int or type(offset) is not int or offset < 0 or number < 0:
        raise ValueError(f"a view of {storage!r}, {number!r}, {offset!r}")
    shape = shapes[number]
    if storage < 0 or not shape.numel:
        if storage >= 0 or shape.numel:
            raise ValueError(f"{shape} in storage {storage}")
    elif offset * shape.itemsize + shape.span > storages[storage].nbytes:
        raise ValueError(f"{shape} at {offset} is outside of its storage of {storages[storage].nbytes} bytes")
    return View(storage, shape, offset)


def _decode_shape(dtype: Any, shape: Any, stride: Any) -> Geometry:
    found = dtype_of(dtype)
    if found in QUANTIZED:  # their bytes travel as those of other dtypes
        raise ValueError(f"{dtype} is no dtype of plain bytes")
    return checked_geometry(found, shape, stride)


def _decode_storages(data: Any) -> list[Storage]:
    if not data:
        return []
    if {*map(len, data)} != {2}:
        raise ValueError("a storage that is no pair")
    sizes, device_types = zip(*data, strict=True)
    if {*map(type, sizes)} != {int} or {*map(type, device_types)} != {str}:
        raise ValueError("a storage whose size is no integer, or whose device is no text")
    if min(sizes) < 0 or max(sizes) > sys.maxsize:
        raise ValueError(f"storages of {min(sizes)} to {max(sizes)} bytes")
    return made(Storage, data)


def _check_storages(manifest: Manifest, limits: Limits) -> None:
    """Every storage is no larger than what its views refer to, and the messages are not too many."""
    views: list[View] = list(chain.from_iterable(map(itemgetter(1), manifest.leaves)))
    if len(views) > MAX_NODES:
        raise ValueError(f"{len(views)} tensors, at most {MAX_NODES} are accepted")
    if not all(shape.dense for shape in {*map(itemgetter(1), views)}):
        _check_gaps(manifest)
    storages = manifest.storages
    num_of = Counter(map(itemgetter(0), views))
    num_of.pop(-1, None)
    if len(num_of) < len(storages):
        raise ValueError(f"{len(storages)} storages, of which {len(num_of)} are referred to")
    step = limits.message_bytes - limits.message_bytes % 64
    num_cuts = 0
    # Storages with several views: the extents of these.
    shared: dict[int, list[tuple[int, int]]] = {}
    for storage, shape, offset in views:
        if storage in num_of and num_of[storage] > 1:
            begin = offset * shape.itemsize
            shared.setdefault(storage, []).append((begin, begin + shape.span))
        elif storage >= 0:
            num_cuts += shape.span // step
            nbytes = storages[storage][0]
            if nbytes > shape.span:
                _check_size(nbytes, shape.span, 1)
    for storage, extents in shared.items():
        ranges = merge(extents)
        num_cuts += sum((end - begin) // step for begin, end in ranges)
        _check_size(storages[storage].nbytes, sum(end - begin for begin, end in ranges), len(ranges))
    if num_cuts > MAX_CUTS:
        raise ValueError(f"more than {MAX_CUTS} messages of {limits.message_bytes} bytes")


def _check_size(nbytes: int, referenced: int, num_ranges: int) -> None:
    if nbytes > referenced + 2 * ALIGNMENT * num_ranges:
        raise ValueError(f"a storage of {nbytes} bytes, of which {referenced} are referred to")


def _check_gaps(manifest: Manifest) -> None:
    """Finding what lies between views, as ``_wire.layout`` does, takes bounded time, and memory that there is."""
    with_gaps = {view.storage for leaf in manifest.leaves for view in leaf.views if not view.geometry.dense}
    found: dict[int, set[View]] = {storage: set() for storage in with_gaps if storage >= 0}
    for leaf in manifest.leaves if found else ():
        for view in leaf.views:
            if view.storage in found:
                found[view.storage].add(view)
    num_steps = num_elements = 0
    for views in found.values():
        in_order = sorted(views, key=_begin)
        for begin, end in merge((view.begin, view.end) for view in views):
            inside = in_order[bisect_left(in_order, begin, key=_begin) : bisect_left(in_order, end, key=_begin)]
            if not covered(inside, begin, end):
                nbytes = end - begin + sum(_num_written(view.geometry) * view.geometry.itemsize for view in inside)
                unit = min(view.geometry.itemsize for view in inside)
                num_steps += nbytes // unit
                num_elements += (end - begin) // unit
    if num_steps > MAX_GAP_STEPS:
        raise ValueError(f"views with gaps that take {num_steps} steps, at most {MAX_GAP_STEPS} are accepted")
    if num_elements * _PLACE_BYTES > physical_bytes() // 2:
        raise ValueError(f"views with gaps that take {num_elements * _PLACE_BYTES} bytes, more than half of the memory")


def _begin(view: View) -> int:
    return view.begin


def _num_written(shape: Geometry) -> int:
    """Elements without those that a stride of zero repeats, but with those that overlap in another way."""
    return math.prod(size if step else 1 for size, step in zip(shape.shape, shape.stride, strict=True))
