"""A manifest is read back from bytes, without trust.

Strategy: every number is checked before it is used, and everything that a peer can claim is bounded before memory or
time is spent on it: each bound is a constant here, with the reason for its value. Classes are those that the receiver
has allowed; what is not allowed is found in the whole manifest before it is refused, so that whoever allows it heals
the next time. What comes out can be laid out, and built, without any further check.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

from torch.utils import _pytree as pytree

from ft_transport._process import physical_bytes
from ft_transport._state.classes import NotAllowed, advice, allowed_class, dtype_of, expect
from ft_transport._state.geometry import QUANTIZED, Geometry, checked_geometry, covered, merge
from ft_transport._state.kinds.base import VALUE, Part, check_parts
from ft_transport._state.manifest import (
    ALIGNMENT,
    EMPTY,
    EMPTY_ON_DEVICE,
    Leaf,
    Leaves,
    Manifest,
    Storage,
    View,
    Views,
)
from ft_transport._state.tree import (
    CONTAINERS,
    LEAF,
    MAX_DEPTH,
    NAMES_A_CLASS,
    Node,
    check_names,
    format_path,
    path_of_container,
)
from ft_transport._state.values import check_keys, decode_value, not_allowed_in
from ft_transport._wire.columns import unpack_column
from ft_transport._wire.digest import NUM_SAMPLES
from ft_transport._wire.frames import ManifestHeader
from ft_transport._wire.layout import Limits
from ft_transport.errors import RemoteProtocolError

__all__ = ["check_storages", "check_tree", "decode_manifest", "decode_nodes"]

_T = TypeVar("_T")

# Bounds a message and with it a bucket; above 1 GiB a message gains nothing.
MAX_MESSAGE_BYTES = 1 << 30
# Bounds a flight, of which a side that stages it holds two.
MAX_FLIGHT_BYTES = 1 << 30
# Bounds the operations that are posted at once.
MAX_WINDOW = 1 << 10
# Bounds the messages that large ranges are cut into, some 250 bytes each: enough for 4 TiB with our limits.
MAX_CUTS = 1 << 20
# Bounds nodes, views and storages: each becomes some objects of a hundred bytes and more. Large states have 100,000.
MAX_NODES = 4 << 20
# Bounds the elements that are gone through to find the gaps between views of one storage, some seconds.
MAX_GAP_STEPS = 1 << 32
# Memory for each such element: whether it is of a view, and where it is.
_PLACE_BYTES = 9
# Bounds what is said, sent back and logged about a manifest that is refused, in characters: it quotes what was sent.
MAX_TEXT = 4_000


def decode_manifest(body: Any) -> tuple[Manifest, ManifestHeader]:
    """Read the body of a MANIFEST frame; every number in it is checked before it is used.

    Raises:
        RemoteProtocolError: The body describes no state, names a class that is not allowed, or lies about sizes.
    """
    try:
        header, nodes, shapes, views, leaves, storages, shared = body
        header = _decode_header(*header)
        _check_count(len(nodes), "nodes")
        # Nodes first: their number, and what they say of children, bounds everything that comes after.
        tree, refused = _decode_nodes(nodes)
        num_leaves = check_tree(tree)
        manifest = Manifest(tree, Leaves.of(()), _decode_storages(*storages))
        not_allowed = [(path_of_container(tree, index), exc) for index, exc in refused]
        found = _decode_views(*views, shapes=[_decode_shape(*shape) for shape in shapes])
        not_allowed += _decode_leaves(leaves, num_leaves, found, manifest)
        if not_allowed:
            raise RemoteProtocolError(_all_not_allowed(not_allowed), phase="agree")
        manifest.shared = _decode_shared(shared, tree)
        # Now views are known to lie in their storages. Whether storages are as large as what is seen of them decides
        # how much memory a peer can make us take.
        check_storages(manifest, header.limits)
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


def _decode_header(step: Any, limits: Any, digest: Any, sample: Any) -> ManifestHeader:
    if step is not None:
        expect(int, step)
    if not -1 <= expect(int, sample) < NUM_SAMPLES:
        raise ValueError(f"sample {sample} of {NUM_SAMPLES}")
    return ManifestHeader(step, _decode_limits(limits), expect(str, digest), sample)


def _decode_limits(data: Any) -> Limits:
    # ``_make`` refuses another number of fields; so does a peer of another version.
    limits = Limits._make(expect(int, value) for value in data)
    # What is packed is never cut, so a bucket is no larger than a message only if no packed range is.
    if not 64 <= limits.message_bytes <= MAX_MESSAGE_BYTES or not 0 <= limits.pack_below <= limits.message_bytes:
        raise ValueError(f"limits out of range: {limits}")
    if not limits.message_bytes <= limits.flight_bytes <= MAX_FLIGHT_BYTES or limits.pack_from < 1:
        raise ValueError(f"limits out of range: {limits}")
    if not 1 <= limits.window <= MAX_WINDOW:
        raise ValueError(f"limits out of range: {limits}")
    return limits


# Like NotAllowed, kept until all of the manifest has been read: whoever registers one class wants to hear of the others
# as well.
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


def decode_nodes(data: Any) -> list[Node]:
    """The nodes of a manifest's tree, each by itself; whether they are a tree is for :func:`check_tree`.

    Raises:
        ValueError: A node is none, or its class is not registered.
        NotAllowed: Its class is not allowed.
    """
    nodes, refused = _decode_nodes(data)
    for _, exc in refused:
        raise exc
    return nodes


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
            # A stand-in of as many children, so that the rest of the tree, and what else it names, can be read.
            nodes[index] = Node("tuple", expect(int, node[1]))
    return nodes, refused


def _decode_node(kind: Any, num_children: Any, keys: Any, num_attrs: Any, extra: Any) -> Node:
    # Keys of text, nearly all, need no call.
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
    check_names(node)
    if kind == "namedtuple" and len(node.extra._fields) != num_children - num_attrs:
        raise ValueError(f"{extra} of {len(node.extra._fields)} fields has {num_children - num_attrs} of them")
    if kind == "namedtuple" and num_attrs and decoded[:-num_attrs] != node.extra._fields:
        raise ValueError(f"{extra} has other fields than {decoded[:-num_attrs]}")
    return node


_MAPPINGS = frozenset({"OrderedDict", "defaultdict", "subdict"})
_KEYED = _MAPPINGS | {"dict", "dataclass", "attrdict", "sublist"}
_WITH_ATTRS = frozenset({"OrderedDict", "defaultdict", "subdict", "sublist", "namedtuple"})


def _decode_extra(kind: str, extra: Any) -> Any:
    if kind == "deque":
        return extra if extra is None else expect(int, extra)
    if kind == "pytree":
        name, context, *locked = extra
        cls = _registered_class(expect(str, name))
        if locked and (locked != [True] or not callable(getattr(cls, "lock_", None))):
            raise ValueError(f"a {name} that is locked: {locked!r}")
        return cls, decode_value(context), *locked
    if kind not in NAMES_A_CLASS:
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
    # By name among what this process has registered: nothing is imported, and torch's own classes have kinds of node
    # that say more.
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


def _decode_views(count: Any, storages: Any, numbers: Any, offsets: Any, *, shapes: list[Geometry]) -> Views:
    """The views, whose storages and offsets are any numbers yet."""
    _check_count(count, "tensors")
    geometries = _chosen(shapes, numbers, count, "shapes")
    return Views(unpack_column(storages, count), geometries, unpack_column(offsets, count))


def _decode_leaves(data: Any, count: int, views: Views, manifest: Manifest) -> list[tuple[str, _Refused]]:
    """Decode the leaves and check that every view lies in its storage; gives those that name what is not allowed.

    Of a leaf that is not one plain tensor is said its index, and [value], [kind, number of views, context, parts] or
    the index of an earlier leaf that is the same object.

    Args:
        data: These, in order.
        count: How many leaves there are.
        views: Of all that are not the same as an earlier one.
        manifest: Gets the leaves.
    """
    others: dict[int, Leaf] = {}
    refused: list[tuple[str, _Refused]] = []
    done = number = num_again = 0  # leaves, and their views; and views that are repeated
    for index, leaf in data:
        if not done <= expect(int, index) < count:
            raise ValueError(f"leaf {index} of {count}, after {done}")
        number += index - done  # of the plain ones between
        done = index + 1
        others[index] = Leaf(VALUE, ())
        try:
            if type(leaf) is int:
                if not 0 <= leaf < index:
                    raise ValueError(f"the same as leaf {leaf}")
                # No chain of references can be long, since each is resolved to the first.
                first = manifest.same[index] = manifest.same.get(leaf, leaf)
                # Looked at before they are repeated: a few bytes stand for as many tensors as the first one has.
                num_again += len(others[first].views) if first in others else 1
                _check_count(len(views) + num_again, "tensors")
            elif len(expect(tuple, leaf)) == 1:
                others[index] = Leaf(VALUE, (), decode_value(leaf[0]))
            else:
                num_own = expect(int, leaf[1])
                if not 0 <= num_own <= len(views) - number:
                    raise ValueError(f"{num_own} views of {len(views) - number}")
                own = tuple(map(views.__getitem__, range(number, number + num_own)))
                number += num_own
                others[index] = _decode_composite(leaf, own)
        except NotAllowed as exc:
            # Nothing is made of it, since all of them raise in the end.
            refused.append((format_path(manifest.paths[index]), NotAllowed(exc.names | not_allowed_in(leaf))))
            others[index] = Leaf(VALUE, (), None)
        except Exception as exc:
            raise _wrong(manifest, index, exc) from exc
    number += count - done
    if number != len(views):
        raise ValueError(f"expected {number} tensors, got {len(views)}")
    if not refused:
        leaves = Leaves(count, views, others)
        _check_views(leaves, manifest)
        manifest.leaves = leaves.with_same(manifest.same)
    return refused


def _wrong(manifest: Manifest, index: int, exc: Exception) -> RemoteProtocolError:
    """What is wrong with a leaf, by its path."""
    reason = exc.message if isinstance(exc, RemoteProtocolError) else f"{type(exc).__name__}: {exc}"
    if isinstance(exc, ValueError):
        reason = str(exc)
    return RemoteProtocolError(f"{format_path(manifest.paths[index])}: {reason}", phase="agree")


def _check_views(leaves: Leaves, manifest: Manifest) -> None:
    """Raises RemoteProtocolError, with the path of the first, unless every view lies in its storage."""
    views, sizes = leaves.views, list(map(itemgetter(0), manifest.storages))
    if not views or (min(views.storages) >= 0 and max(views.storages) < len(sizes)):
        # In columns: as many distinct ones as there are shapes, in most states.
        rows = zip(views.geometries, views.offsets, map(sizes.__getitem__, views.storages), strict=True)
        if all(not _misplaced(*row) for row in {*rows}):
            return
    for number, (storage, shape, offset) in enumerate(views):
        reason = f"storage {storage} of {len(sizes)}"
        if storage < 0:
            is_nowhere = storage in (EMPTY, EMPTY_ON_DEVICE) and not shape.numel and offset >= 0
            reason = "" if is_nowhere else f"{shape} in storage {storage}"
        elif storage < len(sizes):
            reason = _misplaced(shape, offset, sizes[storage])
        if reason:
            raise _wrong(manifest, leaves.owners[number], ValueError(reason))


def _misplaced(shape: Geometry, offset: int, nbytes: int) -> str:
    """Why a view is not one of a storage of so many bytes, empty if it is."""
    if not shape.numel:
        return f"{shape} in a storage"
    if offset < 0 or offset * shape.itemsize + shape.span > nbytes:
        return f"{shape} at {offset} is outside of its storage of {nbytes} bytes"
    return ""


def _decode_composite(data: Any, views: tuple[View, ...]) -> Leaf:
    kind, _, context, parts = data
    leaf = Leaf(expect(str, kind), views, decode_value(context), tuple([_decode_part(part) for part in parts]))
    # How many plain tensors a kind has follows from its parts; that a peer says both is for the check.
    if kind == VALUE or leaf.part.num_views != len(views) or (kind == "tensor" and leaf.parts):
        raise ValueError(f"a leaf of kind {kind} with {len(views)} views")
    check_parts(leaf.part, iter([view.geometry for view in views]))
    return leaf


def _decode_part(data: Any) -> Part:
    if data is None:
        return Part("tensor")
    kind, context, parts = data
    part = Part(expect(str, kind), decode_value(context), tuple([_decode_part(below) for below in parts]))
    if kind == VALUE or (kind == "tensor" and parts):
        raise ValueError(f"a part of kind {kind} with {len(parts)} parts")
    return part


def _decode_shape(dtype: Any, shape: Any, stride: Any) -> Geometry:
    found = dtype_of(dtype)
    if found in QUANTIZED:  # their bytes travel as those of other dtypes
        raise ValueError(f"{dtype} is no dtype of plain bytes")
    return checked_geometry(found, shape, stride)


def _decode_storages(count: Any, numbers: Any, distinct: Any) -> list[Storage]:
    _check_count(count, "storages")
    found = [Storage(expect(int, nbytes), expect(str, device_type)) for nbytes, device_type in distinct]
    if not all(0 <= nbytes <= sys.maxsize for nbytes, _ in found):
        raise ValueError(f"storages of {min(found).nbytes} to {max(found).nbytes} bytes")
    return _chosen(found, numbers, count, "storages")


def _chosen(values: list[_T], numbers: Any, count: int, what: str) -> list[_T]:
    """Of each of so many, which of the values it has."""
    which = unpack_column(numbers, count)
    if count and not 0 <= min(which) <= max(which) < len(values):
        raise ValueError(f"{what} {min(which)} to {max(which)} of {len(values)}")
    return list(map(values.__getitem__, which))


def check_storages(manifest: Manifest, limits: Limits) -> None:
    """Check that every storage is no larger than what its views refer to, and that the messages are not too many.

    Raises:
        ValueError: They are not.
    """
    views = manifest.views
    _check_count(len(views), "tensors")
    if not all(shape.dense for shape in {*views.geometries}):
        _check_gaps(views)
    storages = manifest.storages
    # A storage that nobody refers to would be memory that is taken for nothing.
    num_of = Counter(views.storages)
    for nowhere in (EMPTY, EMPTY_ON_DEVICE):
        num_of.pop(nowhere, None)
    if len(num_of) < len(storages):
        raise ValueError(f"{len(storages)} storages, of which {len(num_of)} are referred to")
    step = limits.message_bytes - limits.message_bytes % 64
    num_cuts = 0
    # Storages with several views: the extents of these, once each, as leaves that are one repeat theirs. A dict keeps
    # their order, which is mostly that of the bytes: to sort them takes no time then.
    shared: dict[int, dict[tuple[int, int], None]] = {}
    for storage, shape, offset in zip(views.storages, views.geometries, views.offsets, strict=True):
        if storage in num_of and num_of[storage] > 1:
            begin = offset * shape.itemsize
            shared.setdefault(storage, {})[begin, begin + shape.span] = None
        elif storage >= 0:
            num_cuts += shape.span // step
            nbytes = storages[storage][0]
            # A storage with one view is that view, but for what brings it to a multiple of 64.
            if nbytes > shape.span:
                _check_size(nbytes, shape.span, 1)
    for storage, extents in shared.items():
        ranges = merge(extents)
        num_cuts += sum((end - begin) // step for begin, end in ranges)
        _check_size(storages[storage].nbytes, sum(end - begin for begin, end in ranges), len(ranges))
    if num_cuts > MAX_CUTS:
        raise ValueError(f"more than {MAX_CUTS} messages of {limits.message_bytes} bytes")


def _check_count(count: Any, what: str) -> None:
    if not 0 <= expect(int, count) <= MAX_NODES:
        raise ValueError(f"{count} {what}, at most {MAX_NODES} are accepted")


def _check_size(nbytes: int, referenced: int, num_ranges: int) -> None:
    if nbytes > referenced + 2 * ALIGNMENT * num_ranges:
        raise ValueError(f"a storage of {nbytes} bytes, of which {referenced} are referred to")


def _check_gaps(every: Views) -> None:
    """Finding what lies between views, as ``_wire.layout`` does, takes bounded time, and memory that there is."""
    # Only these cost more than their bytes: what lies between the views has to be found, element by element.
    with_gaps = {view.storage for view in every if not view.geometry.dense}
    found: dict[int, set[View]] = {storage: set() for storage in with_gaps if storage >= 0}
    for view in every if found else ():
        if view.storage in found:
            found[view.storage].add(view)
    num_steps = num_elements = 0
    for views in found.values():
        in_order = sorted(views, key=_begin)
        for begin, end in merge((view.begin, view.end) for view in views):
            inside = in_order[bisect_left(in_order, begin, key=_begin) : bisect_left(in_order, end, key=_begin)]
            if not covered([view.placed for view in inside], begin, end):
                nbytes = end - begin + sum(_num_written(view.geometry) * view.geometry.itemsize for view in inside)
                unit = min(view.geometry.itemsize for view in inside)
                # An expanded dimension is written once; overlapping strides are written each time, which is what a peer
                # would choose.
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


def check_tree(nodes: Sequence[Node]) -> int:
    """Check that nodes in preorder, from a peer, are exactly one tree of bounded depth.

    Returns:
        The number of its leaves.

    Raises:
        ValueError: They are not.
    """
    open_nodes = [1]
    num_leaves, claimed, done = 0, 1, 0

    def count(num_nodes: int) -> None:
        """So many nodes come next, leaves or the roots of subtrees that are over before the next one."""
        while num_nodes:
            while open_nodes and not open_nodes[-1]:
                open_nodes.pop()
            if not open_nodes:
                raise ValueError("nodes after the end of the tree")
            num_here = min(num_nodes, open_nodes[-1])
            open_nodes[-1] -= num_here
            num_nodes -= num_here

    for index in [index for index, node in enumerate(nodes) if node is not LEAF]:
        node = nodes[index]
        count(index - done)
        num_leaves += index - done
        count(1)
        done = index + 1
        if node.num_children:
            # Before the children are listed: they cost nothing to claim.
            claimed += node.num_children
            if claimed > len(nodes):
                raise ValueError(f"the tree ends early: {len(nodes)} nodes of {claimed}")
            open_nodes.append(node.num_children)
            if len(open_nodes) > MAX_DEPTH + 1:
                raise ValueError(f"a tree nested deeper than {MAX_DEPTH} levels")
    count(len(nodes) - done)
    if any(open_nodes):
        raise ValueError("the tree ends early")
    return num_leaves + len(nodes) - done
