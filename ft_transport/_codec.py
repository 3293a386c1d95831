"""How a manifest becomes bytes, and is read back without trust.

Strategy: a frame is a fixed header and one msgpack value made of nil, booleans, integers, floats, strings,
binary and arrays; nothing in it can name code. Plain values of other types are tagged arrays, each built by a
line of :data:`_DECODE`. A value of a class that is not listed here is pickled by ``torch.save``, and read by
``torch.load(weights_only=True)``, whose allow-list (``torch.serialization.add_safe_globals``) decides. Whatever
is wrong with a frame is a :class:`RemoteProtocolError`.
"""

from __future__ import annotations

import io
import math
import struct
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn

import msgpack
import torch

from ft_transport._digest import NUM_SAMPLES
from ft_transport._layout import Limits
from ft_transport._leaves import DTYPES, KINDS, dtype_name
from ft_transport._manifest import ALIGNMENT, Geometry, Leaf, Manifest, Storage, View, merge
from ft_transport._pickled import check_pickle
from ft_transport._tree import LEAF, MAX_DEPTH, Node, Path, format_path
from ft_transport.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["MAX_FRAME_BYTES", "Frame", "Header", "decode_frame", "decode_manifest", "encode_frame", "encode_manifest"]

MAGIC = b"FTCT"
VERSION = 1
_HEADER = struct.Struct("<4sBB2x")

# Bounds what a peer can make us allocate for a frame. A leaf takes some 40 bytes, so this is room for millions.
MAX_FRAME_BYTES = 256 << 20
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
# What torch's own operations accept. The product of many sizes would take time by the square of their number.
MAX_DIMS = 64
# Bounds the keys of one container whose hashes are not salted as those of text are: a peer can choose numbers, and
# tuples of them, that a dict needs N² steps to tell apart, which takes seconds with this many. 0, 1, 2, … may be more.
MAX_UNSALTED_KEYS = 1 << 16
# Bounds what is said, sent back and logged about a manifest that is refused, in characters: it quotes what was sent.
MAX_TEXT = 4_000
# Bounds the paths of all leaves together, in memory and as text: every leaf below a long key has that key in its path.
MAX_PATHS_BYTES = 256 << 20


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
        sample: Which block of large messages the digests read, -1 for all (see ``_digest``).
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


# -------------------------------------------------------------------------------------------- values
#
# nil, bool, int of 64 bits, float, str and bytes are themselves; all else is an array [tag, …].

def _encode_value(value: object) -> Any:
    cls = type(value)
    if value is None or cls in (bool, float, str, bytes):
        return value
    if cls is int:
        assert isinstance(value, int)
        return value if -(1 << 63) <= value < 1 << 64 else ["int", str(value)]
    encode = _ENCODE.get(cls)
    return encode(value) if encode is not None else ["object", _pickle(value)]


_ENCODE: dict[type, Callable[[Any], list[Any]]] = {
    tuple: lambda v: ["tuple", *map(_encode_value, v)],
    list: lambda v: ["list", *map(_encode_value, v)],
    frozenset: lambda v: ["frozenset", *map(_encode_value, v)],
    set: lambda v: ["set", *map(_encode_value, v)],
    dict: lambda v: ["dict", *(_encode_value(item) for pair in v.items() for item in pair)],
    bytearray: lambda v: ["bytearray", bytes(v)],
    complex: lambda v: ["complex", v.real, v.imag],
    slice: lambda v: ["slice", *map(_encode_value, (v.start, v.stop, v.step))],
    range: lambda v: ["range", *map(_encode_value, (v.start, v.stop, v.step))],
    torch.dtype: lambda v: ["dtype", dtype_name(v)],
    torch.device: lambda v: ["device", str(v)],
    type(...): lambda v: ["ellipsis"],
}

_DECODE: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "int": lambda args: _big_int(*args),
    "tuple": lambda args: tuple(map(_decode_value, args)),
    "list": lambda args: list(map(_decode_value, args)),
    "frozenset": lambda args: frozenset(_hashable(tuple(map(_decode_value, args)))),
    "set": lambda args: set(_hashable(tuple(map(_decode_value, args)))),
    "dict": lambda args: _decode_dict(args),
    "bytearray": lambda args: bytearray(_expect(bytes, *args)),
    "complex": lambda args: complex(_expect(float, args[0]), _expect(float, args[1])),
    "slice": lambda args: slice(*map(_decode_value, args)),
    "range": lambda args: range(*(_expect(int, _decode_value(arg)) for arg in args)),
    "dtype": lambda args: DTYPES[_expect(str, *args)],
    "device": lambda args: torch.device(_expect(str, *args)),
    "ellipsis": lambda args: ...,
    "object": lambda args: _unpickle(_expect(bytes, *args)),
}


def _decode_value(data: Any) -> Any:
    if not isinstance(data, tuple):
        return data
    return _DECODE[_expect(str, data[0])](data[1:])


def _expect(cls: type, value: Any) -> Any:
    # bool is an int to isinstance, but True is not a size.
    if type(value) is not cls:
        raise TypeError(f"expected {cls.__name__}, got {type(value).__name__}")
    return value


def _decode_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    keys = _hashable(tuple(map(_decode_value, args[::2])))
    return dict(zip(keys, map(_decode_value, args[1::2]), strict=True))


def _hashable(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys, if a set or dict of them can be made in reasonable time."""
    cost = 0
    for key in keys:
        cls = type(key)
        if cls is not str and cls is not bytes:
            cost += 1 if cls is float or (cls is int and -(1 << 63) <= key < 1 << 64) else 4
    if cost > MAX_UNSALTED_KEYS and keys != tuple(range(len(keys))):
        raise ValueError(f"{len(keys)} keys, at most {MAX_UNSALTED_KEYS} that are numbers are accepted")
    return keys


def _big_int(text: object) -> int:
    digits = _expect(str, text)
    # Python's own bound on this conversion, which is quadratic in the number of digits.
    if len(digits.removeprefix("-")) > 4300:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpickle(data: bytes) -> object:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("a compressed object")
        if sum(entry.file_size for entry in entries) > len(data):
            raise ValueError("an object that is larger than its bytes")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                check_pickle(archive.read(entry))
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------------------ manifest


def encode_manifest(manifest: Manifest, header: Header) -> bytes:
    """The MANIFEST frame.

    Raises:
        LocalProtocolError: A plain value or a key cannot be encoded; each is named.
    """
    refused: list[str] = []
    leaves = []
    shapes: dict[Geometry, int] = {}
    for index, leaf in enumerate(manifest.leaves):
        try:
            leaves.append(_encode_leaf(leaf, shapes))
        except Exception as exc:  # pickling runs the classes' own code, which may raise anything
            path, what = format_path(manifest.paths[index]), type(leaf.context).__qualname__
            refused.append(f"{path}: a value of class {what} cannot be encoded: {exc}")
    nodes = []
    for node in manifest.nodes:
        try:
            nodes.append(_encode_node(node))
        except Exception as exc:
            refused.append(f"a key of a {node.kind}, one of {str(list(node.keys))[:80]}, cannot be encoded: {exc}")
    if refused:
        raise LocalProtocolError("; ".join(refused), phase="describe")
    body = [
        [header.step, header.limits, header.digest, header.sample],
        nodes,
        [[dtype_name(shape.dtype), shape.shape, shape.stride] for shape in shapes],
        leaves,
        manifest.storages,
    ]
    return encode_frame(Frame.MANIFEST, body)


def _encode_leaf(leaf: Leaf, shapes: dict[Geometry, int]) -> Any:
    if leaf.kind == "value":
        return [_encode_value(leaf.context)]
    views = [(view.storage, shapes.setdefault(view.geometry, len(shapes)), view.offset) for view in leaf.views]
    if leaf.kind == "tensor" and leaf.context is None:
        return views[0]
    return [leaf.kind, views, leaf.context, None]


def _encode_node(node: Node) -> Any:
    if node.kind == "leaf":
        return None
    extra = node.extra
    if node.kind == "namedtuple" or (node.kind == "defaultdict" and extra is not None):
        extra = f"{extra.__module__}:{extra.__qualname__}"
    return [node.kind, node.num_children, [_encode_value(key) for key in node.keys], node.num_attrs, extra]


def decode_manifest(body: Any) -> tuple[Manifest, Header]:
    """Read the body of a MANIFEST frame; every number in it is checked before it is used.

    Raises:
        RemoteProtocolError: The body describes no state, names a class that is not allowed, or lies about sizes.
    """
    try:
        header, nodes, shapes, leaves, storages = body
        header = _decode_header(*header)
        if len(nodes) > MAX_NODES:
            raise ValueError(f"{len(nodes)} nodes, at most {MAX_NODES} are accepted")
        tree = [_decode_node(node) for node in nodes]
        paths = list(_paths(tree))
        if len(leaves) != len(paths):
            raise ValueError(f"expected {len(paths)} leaves, got {len(leaves)}")
        known = [_decode_shape(*shape) for shape in shapes]
        decoded = [_decode_leaf(path, leaf, known) for path, leaf in zip(paths, leaves, strict=True)]
        manifest = Manifest(tree, paths, decoded, [_decode_storage(storage) for storage in storages])
        _check_bounds(manifest, header.limits)
        if any(node.kind not in _ALWAYS_BUILT for node in tree):
            # What cannot be built must be found before a byte lands, not after the last one has.
            manifest.build([leaf.context if leaf.kind == "value" else None for leaf in decoded])
        return manifest, header
    except Exception as exc:
        damage = f"damaged manifest: {type(exc).__name__}: {exc}"
        text = exc.message if isinstance(exc, RemoteProtocolError) else damage
        raise RemoteProtocolError(text[:MAX_TEXT], phase="agree") from exc


# Nodes that can be built whatever their children are.
_ALWAYS_BUILT = frozenset({"leaf", "dict", "list", "tuple", "OrderedDict"})


def _decode_header(step: Any, limits: Any, digest: Any, sample: Any) -> Header:
    if step is not None:
        _expect(int, step)
    if not -1 <= _expect(int, sample) < NUM_SAMPLES:
        raise ValueError(f"sample {sample} of {NUM_SAMPLES}")
    return Header(step, _decode_limits(limits), _expect(str, digest), sample)


def _decode_limits(data: Any) -> Limits:
    limits = Limits._make(_expect(int, value) for value in data)
    # What is packed is never cut, so a bucket is no larger than a message only if no packed range is.
    if not 64 <= limits.message_bytes <= MAX_MESSAGE_BYTES or not 0 <= limits.pack_below <= limits.message_bytes:
        raise ValueError(f"limits out of range: {limits}")
    if not limits.message_bytes <= limits.flight_bytes <= MAX_FLIGHT_BYTES or limits.pack_from < 1:
        raise ValueError(f"limits out of range: {limits}")
    if not 1 <= limits.window <= MAX_WINDOW:
        raise ValueError(f"limits out of range: {limits}")
    return limits


def _decode_node(data: Any) -> Node:
    if data is None:
        return LEAF
    kind, num_children, keys, num_attrs, extra = data
    decoded: tuple[Hashable, ...] = _hashable(tuple(map(_decode_value, keys)))
    if not 0 <= _expect(int, num_attrs) <= _expect(int, num_children):
        raise ValueError(f"{num_attrs} attributes among {num_children} children")
    mapping = kind in ("dict", "OrderedDict", "defaultdict")
    if len(decoded) != (num_children if mapping else 0) or len(set(decoded)) != len(decoded):
        raise ValueError(f"{kind} of {num_children} children has {len(set(decoded))} distinct keys")
    if num_attrs and kind not in ("OrderedDict", "defaultdict"):
        raise ValueError(f"{kind} has no attributes")
    if not all(map(_is_free_name, decoded[num_children - num_attrs :])):
        raise ValueError("name of an attribute out of range")
    if extra is not None:
        extra = _decode_extra(kind, extra)
    return Node(_expect(str, kind), num_children, decoded, num_attrs, extra)


def _is_free_name(name: object) -> bool:
    """Whether an attribute of this name hides nothing that a mapping has."""
    if not isinstance(name, str) or name.startswith("__"):
        return False
    return not (hasattr(OrderedDict, name) or hasattr(defaultdict, name))


def _decode_extra(kind: str, extra: Any) -> Any:
    if kind == "deque":
        return _expect(int, extra)
    cls = _allowed_classes().get(_expect(str, extra))
    if cls is None:
        module, _, name = extra.partition(":")
        raise RemoteProtocolError(
            f"class {module}.{name} of a {kind} is not allowed; if you trust it, call "
            f"torch.serialization.add_safe_globals([{name}]) on the receiver",
            phase="agree",
        )
    return cls


def _allowed_classes() -> dict[str, Any]:
    allowed = [int, float, complex, str, bytes, bool, list, dict, set, tuple]
    entries = [entry[0] if isinstance(entry, tuple) else entry for entry in torch.serialization.get_safe_globals()]
    return {f"{cls.__module__}:{cls.__qualname__}": cls for cls in (*allowed, *entries) if isinstance(cls, type)}


def _paths(nodes: list[Node]) -> Iterator[Path]:
    """The path of each leaf of a preorder, which must be exactly one tree."""
    # For each open node its path, what that counts towards MAX_PATHS_BYTES, and the keys still to come.
    open_nodes: list[tuple[Path, int, list[Hashable]]] = [((), 0, [None])]
    claimed, paths_bytes = 1, 0
    for index, node in enumerate(nodes):
        while open_nodes and not open_nodes[-1][2]:
            open_nodes.pop()
        if not open_nodes:
            raise ValueError("nodes after the end of the tree")
        path, path_bytes, keys = open_nodes[-1]
        key = keys.pop()
        if index:
            path, path_bytes = (*path, key), path_bytes + 8 + len(key if type(key) is str else str(key))
        if node.kind == "leaf":
            paths_bytes += path_bytes
            if paths_bytes > MAX_PATHS_BYTES:
                raise ValueError(f"paths of more than {MAX_PATHS_BYTES} bytes")
            yield path
            continue
        # Before the children's keys are listed, and before a path grows: both cost nothing to claim.
        claimed += node.num_children
        if claimed > len(nodes):
            raise ValueError(f"the tree ends early: {len(nodes)} nodes of {claimed}")
        if len(path) >= MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        open_nodes.append((path, path_bytes, list(reversed(_names(node)))))
    if any(keys for _, _, keys in open_nodes):
        raise ValueError("the tree ends early")


def _names(node: Node) -> Sequence[Hashable]:
    names: Sequence[Hashable] = node.keys or getattr(node.extra, "_fields", None) or range(node.num_children)
    if len(names) != node.num_children:
        raise ValueError(f"{node.kind} of {len(names)} fields has {node.num_children} children")
    return names


def _decode_leaf(path: Path, data: Any, shapes: list[Geometry]) -> Leaf:
    """A leaf is [value], [storage, shape, offset] for a plain tensor, or [kind, views, context, nil]."""
    try:
        if len(data) == 3:
            return Leaf("tensor", (_decode_view(data, shapes),), None)
        if len(data) == 1:
            return Leaf("value", (), _decode_value(data[0]))
        kind, views, context, _ = data
        if kind not in KINDS:
            raise ValueError(f"unknown kind of leaf {kind!r}")
        decoded = tuple([_decode_view(view, shapes) for view in views])
        KINDS[kind].check([view.geometry.dtype for view in decoded], context)
        return Leaf(kind, decoded, context)
    except Exception as exc:
        raise RemoteProtocolError(f"{format_path(path)}: {exc}", phase="agree") from exc


def _decode_view(data: Any, shapes: list[Geometry]) -> View:
    storage, number, offset = data
    if type(storage) is not int or type(number) is not int or type(offset) is not int:
        raise TypeError(f"a view of {data!r}")
    if offset < 0 or number < 0:
        raise ValueError(f"a view of {data!r}")
    shape = shapes[number]
    if (storage < 0) != (shape.numel == 0):
        raise ValueError(f"{shape} in storage {storage}")
    return View(storage, shape, offset)


def _decode_shape(dtype: Any, shape: Any, stride: Any) -> Geometry:
    if len(shape) > MAX_DIMS:
        raise ValueError(f"{len(shape)} dimensions, at most {MAX_DIMS} are accepted")
    for number in (*shape, *stride):
        if _expect(int, number) < 0:
            raise ValueError(f"shape {shape}, stride {stride}")
    # Even a view without elements is made by torch, whose sizes are 64 bits.
    reach = sum(max(size, 1) * step for size, step in zip(shape, stride, strict=True))
    if max(math.prod(max(size, 1) for size in shape), reach) * 16 > sys.maxsize:
        raise ValueError(f"out of range: shape {shape}, stride {stride}")
    # Not by way of the cache: what a peer sends would stay in it, and equal shapes are one here already.
    return Geometry(DTYPES[_expect(str, dtype)], tuple(shape), tuple(stride))


def _decode_storage(data: Any) -> Storage:
    nbytes, device_type = data
    if not 0 <= _expect(int, nbytes) <= sys.maxsize:
        raise ValueError(f"a storage of {nbytes} bytes")
    return Storage(nbytes, _expect(str, device_type))


def _check_bounds(manifest: Manifest, limits: Limits) -> None:
    """Every view lies in its storage, every storage is no larger than its views, and the messages are not too many."""
    num_cuts = num_views = 0
    step = limits.message_bytes - limits.message_bytes % 64
    extents: list[list[tuple[int, int]]] = [[] for _ in manifest.storages]
    for path, leaf in zip(manifest.paths, manifest.leaves, strict=True):
        for view in leaf.views:
            if view.storage >= len(extents):
                raise ValueError(f"{format_path(path)}: storage {view.storage} of {len(extents)}")
            if view.storage >= 0:
                begin, end = view.begin, view.end
                if end > manifest.storages[view.storage].nbytes:
                    raise ValueError(f"{format_path(path)}: bytes {begin} to {end} are outside of its storage")
                extents[view.storage].append((begin, end))
        num_views += len(leaf.views)
    if num_views > MAX_NODES:
        raise ValueError(f"{num_views} tensors, at most {MAX_NODES} are accepted")
    for storage, found in zip(manifest.storages, extents, strict=True):
        ranges = merge(found)
        referenced = sum(end - begin + 2 * ALIGNMENT for begin, end in ranges)
        if storage.nbytes > referenced or not ranges:
            raise ValueError(f"a storage of {storage.nbytes} bytes, of which {referenced} are referred to")
        num_cuts += sum((end - begin) // step for begin, end in ranges)
        if num_cuts > MAX_CUTS:
            raise ValueError(f"more than {MAX_CUTS} messages of {limits.message_bytes} bytes")
