"""Tells whether replicas hold the same state, and where they do not.

Strategy: every leaf is taken apart as for a transfer, and what is in it fingerprinted in the order of its elements,
so that only what a training run can see counts: not strides, not which tensors share memory, not the device, not the
order of a dict's keys. Nothing is copied but what lies with gaps or on an accelerator, a piece at a time.

XXH3 with 64 bits for a leaf and 128 for the whole: no defence against somebody who wants two states to look alike.
"""

from __future__ import annotations

import pickletools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack
import torch
import xxhash

from ft_transport._device import on_host, seam
from ft_transport._options import CPU
from ft_transport._plan.blocks import CARRIERS, copy_elements
from ft_transport._plan.buffers import Bucket, aligned
from ft_transport._process import memory_at, no_collection, undisturbed
from ft_transport._state.classes import ATOMIC, class_name, dtype_name
from ft_transport._state.kinds.base import KINDS, VALUE, Part, flatten_leaf
from ft_transport._state.tree import Node, Path, flatten, format_path, paths_of
from ft_transport._state.values import encode_value
from ft_transport._wire.digest import digest_bytes
from ft_transport.errors import LocalProtocolError

__all__ = ["LeafDigest", "StateDigest", "state_digest"]

# Bounds what is copied at a time of a tensor that cannot be read where it is.
_PIECE_BYTES = 16 << 20
# Bounds how much of a plain value is shown.
_SHOWN = 40


class LeafDigest(NamedTuple):
    """One entry of a state.

    Attributes:
        what: What it is, in words: ``"float32 (768, 768)"``, ``"int 7"``, ``"list of 2"``.
        digest: 16 hex digits for what is in it; of a container, whose leaves have entries of their own, for its keys
            where their text does not say which they are (7 or "7", "a.b"), else empty.
    """

    what: str
    digest: str


@dataclass(frozen=True)
class StateDigest:
    """Fingerprints of one state. Two are equal if their wholes are.

    Attributes:
        whole: 32 hex digits for all of it.
        by_path: An entry for each leaf, in the order of the state dict, and for each container that is empty, no
            mapping, or one with other keys than text without dots. Paths are written with dots; where two would be
            written alike, as tuples of keys.
    """

    # Equality is of the wholes alone: two replicas compare one line of a log.
    whole: str
    by_path: Mapping[str, LeafDigest] = field(compare=False, repr=False)

    @staticmethod
    def of(by_path: Mapping[str, LeafDigest]) -> StateDigest:
        """The digest of a state with these entries, in any order."""
        # Of 128 bits, since thousands of replicas over thousands of steps compare them; a leaf has 64, which two
        # replicas compare with each other.
        hashed = xxhash.xxh3_128()
        # Sorted: a mapping's order is none of the state's, and differs between replicas that registered keys in another
        # order.
        for path, entry in sorted(by_path.items()):
            hashed.update(f"{path}\0{entry.what}\0{entry.digest}\n".encode("utf-8", "surrogatepass"))
        return StateDigest(hashed.hexdigest(), by_path)

    def diff(self, other: StateDigest) -> list[str]:
        """Where another state differs from this one: a line for each path, empty if nowhere.

        ``"model.weight: values differ"``, ``"step: int 7 here, int 5 there"``,
        ``"model.bias: float32 (3,) only here"``; *here* is this state, *there* the other.
        """
        lines = []
        for path, mine in self.by_path.items():
            theirs = other.by_path.get(path)
            if theirs is None:
                lines.append(f"{path}: {mine.what} only here")
            elif mine.what != theirs.what:
                lines.append(f"{path}: {mine.what} here, {theirs.what} there")
            elif mine.digest != theirs.digest:
                what = "keys" if mine.what.endswith(_KEYS) else "values"
                lines.append(f"{path}: {what} differ ({mine.what})")
        # What only the other one has comes last: most often it is all there is, when one replica is a version behind.
        more = [(path, entry.what) for path, entry in other.by_path.items() if path not in self.by_path]
        return lines + [f"{path}: {what} only there" for path, what in more]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON; about 60 bytes for each leaf."""
        return {"whole": self.whole, "by_path": {path: list(entry) for path, entry in self.by_path.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> StateDigest:
        """What :meth:`as_dict` gave.

        Raises:
            ValueError: It was not, or not all of it.
        """
        try:
            entries = data["by_path"].items()
            found = StateDigest.of({str(path): LeafDigest(str(what), str(digest)) for path, (what, digest) in entries})
            # Cut off in a log, or edited: both happen to lines of 60 bytes for each leaf.
            if found.whole != data["whole"]:
                raise ValueError(f"expected whole {data['whole']}, the entries make {found.whole}")
        except (AttributeError, KeyError, TypeError) as exc:
            raise ValueError(f"no digest of a state: {type(exc).__name__}: {exc}") from None
        return found


def state_digest(state_dict: object) -> StateDigest:
    """Fingerprint a state: what one replica logs, or sends to the others, to find out whether they agree.

    Reads every byte once, at about the speed of the memory, and takes some microseconds for each leaf. Counted are the
    nesting, keys, types, plain values, and of tensors kind, dtype, shape and every bit; not counted are the order of a
    mapping's keys, whether it is an ``OrderedDict``, strides, shared storages, devices, and ``requires_grad``.

    Args:
        state_dict: The state, of whatever a transport can send; must not change meanwhile.

    Raises:
        LocalProtocolError: A leaf cannot travel, so that it cannot be compared either; every such path is named.

    Threading: any thread; reads tensors on an accelerator in the current stream.
    """
    with no_collection(), undisturbed():
        # By the same functions that a transfer uses, so that what travels and what is compared cannot drift apart.
        nodes, leaves, _ = flatten(state_dict)
        reader = _Reader()
        entries: list[tuple[Path, LeafDigest]] = []
        refused: list[str] = []
        for path, leaf in zip(paths_of(nodes), leaves, strict=True):
            try:
                entries.append((path, reader.entry(leaf)))
            except Exception as exc:  # a kind's, or a class's own code when it is pickled, which may raise anything
                reason = str(exc) if isinstance(exc, ValueError) else f"{type(exc).__name__}: {exc}"
                refused.append(f"{format_path(path)}: {reason}")
        if refused:
            raise LocalProtocolError("; ".join(refused), phase="describe")
        containers = [node for node in nodes if node.kind != "leaf"]
        if any(_counts(node) for node in containers):
            paths = paths_of(nodes, of_containers=True)
            entries += [
                (path, LeafDigest(_container(node), _digest_of_keys(node)))
                for path, node in zip(paths, containers, strict=True)
                if _counts(node)
            ]
        return StateDigest.of(_by_text(entries))


def _by_text(entries: Sequence[tuple[Path, LeafDigest]]) -> dict[str, LeafDigest]:
    texts = [format_path(path) for path, _ in entries]
    # {"a.b": 1} and {"a": {"b": 1}} are written alike.
    if len(set(texts)) < len(texts):
        several = {text for text, count in Counter(texts).items() if count > 1}
        texts = [repr(path) if text in several else text for text, (path, _) in zip(texts, entries, strict=True)]
    return dict(zip(texts, (entry for _, entry in entries), strict=True))


# ----------------------------------------------------------------------------------------- containers

# What a training run cannot tell apart as long as it looks things up by key.
_MAPPINGS = frozenset({"dict", "OrderedDict", "defaultdict"})


def _counts(node: Node) -> bool:
    """Whether a container needs an entry: its leaves' paths do not say what it is."""
    return node.kind not in _MAPPINGS or not node.num_children or not _are_plain(node.keys)


def _are_plain(keys: Iterable[object]) -> bool:
    """Whether the text of a path says which keys these are."""
    return all(type(key) is str and key and "." not in key for key in keys)


def _digest_of_keys(node: Node) -> str:
    if _are_plain(node.keys):
        return ""
    return _hex(_packed(sorted(_packed(_canonical(encode_value(key))) for key in node.keys)))


# Ends what is said of a mapping.
_KEYS = " keys"


def _container(node: Node) -> str:
    if node.kind in _MAPPINGS:
        return f"dict of {node.num_children}{_KEYS}" if node.num_children else "empty dict"
    cls = node.extra[0] if node.kind == "pytree" else node.extra
    name = class_name(cls) if isinstance(cls, type) else node.kind
    limit = f" with maxlen {node.extra}" if node.kind == "deque" and node.extra is not None else ""
    return f"{name} of {node.num_children}{limit}"


# --------------------------------------------------------------------------------------------- leaves


class _Reader:
    """Fingerprints leaves, one after the other. What occurs twice is read once."""

    def __init__(self) -> None:
        self._bucket = Bucket(CPU)
        self._shapes: dict[tuple[torch.dtype, torch.Size], str] = {}
        # By memory and view of it: of leaves alone, which the state holds meanwhile. What a kind makes when it is taken
        # apart is gone at once, and the next one may lie where it was.
        self._known: dict[tuple[Any, ...], LeafDigest] = {}

    def entry(self, leaf: object) -> LeafDigest:
        """What a leaf is, and the digest of what is in it."""
        # Type and value: 1, 1.0 and True are equal to Python, and are three things to a training step.
        if type(leaf) in ATOMIC:
            return LeafDigest(_shown(leaf), _hex(_packed(encode_value(leaf))))
        part, tensors = flatten_leaf(leaf)
        if part.kind == "tensor":
            return self._once(tensors[0])
        if part.kind == VALUE:
            return LeafDigest(_shown(leaf), _hex(_packed(_canonical(encode_value(leaf)))))
        return self._part(part, iter(tensors))

    def _part(self, part: Part, tensors: Iterator[torch.Tensor]) -> LeafDigest:
        if part.kind == "tensor":
            return self._plain(next(tensors))
        inner = [self._part(below, tensors) for below in part.parts]
        kind, context = KINDS[part.kind], part.context
        # Strides, devices, ``requires_grad``: replicas may differ in them and train alike.
        if kind.not_compared:
            values = context if isinstance(context, tuple) else (context,)
            context = tuple(value for place, value in enumerate(values) if place not in kind.not_compared)
        digest = _hex(_packed([_canonical(encode_value(context)), *map(list, inner)]))
        label = kind.label(part.context)
        return LeafDigest(f"{label} of {', '.join(entry.what for entry in inner)}" if inner else label, digest)

    def _once(self, leaf: torch.Tensor) -> LeafDigest:
        key = leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride(), leaf.device
        entry = self._known.get(key)
        if entry is None:
            entry = self._known[key] = self._plain(leaf)
        return entry

    def _plain(self, tensor: torch.Tensor) -> LeafDigest:
        dtype, shape = tensor.dtype, tensor.shape
        what = self._shapes.get((dtype, shape))
        if what is None:
            what = self._shapes[dtype, shape] = f"{dtype_name(dtype)} {tuple(shape)}"
        return LeafDigest(what, f"{self._read(tensor):016x}")

    def _read(self, tensor: torch.Tensor) -> int:
        if not tensor.numel():
            return digest_bytes(b"")
        # As in ``_state.describe``: a tensor whose storage was taken away has a shape, and no memory to read.
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = (tensor.storage_offset() + span) * tensor.element_size()
        if not tensor.data_ptr() or end > tensor.untyped_storage().nbytes():
            raise ValueError("a tensor that has no memory")
        if on_host([tensor]) and tensor.is_contiguous():
            return digest_bytes(memory_at(tensor.data_ptr(), tensor.nbytes))
        return self._read_in_pieces(seam().reach(tensor))

    def _read_in_pieces(self, tensor: torch.Tensor) -> int:
        carrier = CARRIERS[tensor.element_size()]
        elements = tensor.detach().view(carrier)
        if elements.is_contiguous():
            elements = elements.view(-1)
        hashed, most = xxhash.xxh3_64(), _PIECE_BYTES // carrier.itemsize
        for begin in range(0, elements.numel(), most):
            nbytes = min(most, elements.numel() - begin) * carrier.itemsize
            self._bucket.reset(aligned(nbytes))
            piece = self._bucket.take(nbytes)
            copy_elements(elements, begin, piece.view(carrier), to_flat=True)
            hashed.update(memory_at(piece.data_ptr(), nbytes))
        return hashed.intdigest()


def _canonical(data: Any) -> Any:
    """What ``encode_value`` gave, with sets and dicts in an order that does not depend on the process."""
    if isinstance(data, bytes) and data.startswith(b"\x80\x02") and data.endswith(b"."):
        return _without_memo(data)
    if not isinstance(data, list):
        return data
    tag, *rest = map(_canonical, data)
    # Their order hangs on the hashes of text, which Python salts anew for each process.
    if tag in ("set", "frozenset"):
        rest.sort(key=_packed)
    elif tag == "{}":
        pairs = sorted(zip(rest[::2], rest[1::2], strict=True), key=lambda pair: _packed(pair[0]))
        rest = [item for pair in pairs for item in pair]
    return [tag, *rest]


def _without_memo(data: bytes) -> Any:
    """The steps of a pickle, with each text in full; what is none, as it is.

    A pickle says a text once and then points at it, if it is the same object. Which texts are is none of the state's:
    names in a program are one object, and what was read from somewhere is another one that is equal.
    """
    steps: list[Any] = []
    memo: dict[Any, Any] = {}
    num_kept = 0
    try:
        for operation, given, _ in pickletools.genops(data):
            name = operation.name
            if name.endswith("GET"):
                steps.append(memo[given])
            elif not name.endswith("PUT"):
                steps.append([name, given if isinstance(given, str) else repr(given)])
            elif steps[-1][0] == "BINUNICODE":
                memo[given] = steps[-1]
            else:
                memo[given], num_kept = ["GET", num_kept], num_kept + 1
    except (ValueError, KeyError, IndexError):
        return data  # somebody's bytes that begin and end as one does
    return steps


def _packed(data: Any) -> bytes:
    packed: bytes = msgpack.packb(data, unicode_errors="surrogatepass")
    return packed


def _hex(data: bytes) -> str:
    return f"{digest_bytes(data):016x}"


def _shown(value: object) -> str:
    """The type of a plain value, and the value itself where it is short."""
    name = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, (bool, float)) or (isinstance(value, int) and value.bit_length() <= 64):
        return f"{name} {value!r}"
    if isinstance(value, str):
        return f"{name} {value!r}" if len(value) <= _SHOWN else f"{name} of {len(value)}"
    return f"{name} of {len(value)}" if isinstance(value, bytes) else name
