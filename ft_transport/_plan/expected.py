"""The template, and what a source that holds the same state would send.

Strategy: a receiver waits for its source, which describes its state, as long as it would take to describe its own. So
it does, and what comes is then, in most heals, what it has itself, but for plain values: to see that takes one
comparison of C's for all leaves, in place of reading, checking and comparing each. Whatever is otherwise is read as if
nothing had been expected; nothing is taken from here that the source has not sent in the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from operator import is_, itemgetter
from typing import Any

import torch

from ft_transport._options import Options
from ft_transport._plan.buffers import ReadOnlyMemory
from ft_transport._plan.compare import Plain, compare_plain
from ft_transport._state.classes import ATOMIC
from ft_transport._state.describe import describe_flat
from ft_transport._state.kinds.base import VALUE
from ft_transport._state.manifest import Leaf, Leaves, Manifest
from ft_transport._state.tree import LEAF, Flat, Node, flatten
from ft_transport._state.values import decode_value
from ft_transport._telemetry.report import Copies
from ft_transport._wire.decode import check_storages, decode_manifest, decode_nodes
from ft_transport._wire.encode import manifest_body
from ft_transport._wire.frames import ManifestHeader, pack, unpack
from ft_transport._wire.layout import Layout, Limits, lay_out
from ft_transport.errors import LocalProtocolError

__all__ = ["Template", "read", "template_of", "tree_of"]

logger = logging.getLogger("ft_transport")


class Template:
    """What the ``state_dict`` callback gives, asked for once in a receive.

    Args:
        state_dict: The callback.
        copies: What is known of it. It is called a second time if nothing is; None: it gives no copies.

    Attributes:
        tree: What it has given.
        flat: The same, flattened.
        again: What the second call has given, None without one.

    Raises:
        LocalProtocolError: It has raised.
    """

    def __init__(self, state_dict: Callable[[], object], copies: Copies | None = None) -> None:
        # Called in each receive, and not kept: parameters may have been replaced since, and an optimizer that had no
        # state at step 0 has one now.
        self.tree = tree_of(state_dict)
        self.flat: Flat = flatten(self.tree)
        self.again: object = None
        if copies is not None and copies.paths is None:
            # The second call may move what the first one gave (FSDP2 reshards): it comes before any address is noted.
            try:
                self.again = state_dict()
                known = self.again is self.tree or _same_memory(self.flat, flatten(self.again))
            except Exception:  # it has given a template once, and that one will do
                known = True
            if known:
                copies.paths = frozenset()
        self._expected: _Expected | None = None
        self._read: Manifest | None = None

    def expect(self, limits: Callable[[int], Limits]) -> None:
        """Work out what a source that holds the same state would send.

        Args:
            limits: How it would cut a state of so many bytes; as ``Options.limits``.
        """
        kinds = {*map(type, self.flat.leaves)}
        # Plain tensors are what there may be 100,000 of. What else a leaf can be is described by code of its own, and
        # perhaps the user's, which is not run for a guess.
        if torch.Tensor in kinds and kinds <= ATOMIC | {torch.Tensor}:
            try:
                self._expected = _Expected(self.flat, limits)
            except Exception:  # it cannot travel; what comes may fit all the same, and if not, says so
                self._expected = None

    def read(self, body: Any) -> tuple[Manifest, ManifestHeader, Layout] | None:
        """What :func:`read` gives, if the body of a MANIFEST says what was expected; else None."""
        expected = self._expected
        found = expected.read(body) if expected is not None else None
        if found is not None:
            self._read = found[0]
        return found

    def plain(self, manifest: Manifest) -> tuple[dict[int, object], Plain] | None:
        """For what :meth:`read` has given: the template's leaf for each of the manifest's, and those that fit.

        None if it is to be compared: it was not expected, or the template's memory has been exchanged since.
        """
        expected = self._expected
        # A source may have let us wait for seconds, in which the user's code runs.
        if expected is None or manifest is not self._read or expected.has_moved():
            return None
        return expected.matched, expected.plain


def tree_of(state_dict: Callable[[], object]) -> object:
    """What the callback gives; raises LocalProtocolError if it raises."""
    try:
        return state_dict()
    except Exception as exc:
        # Logged here: the error that goes on its way through the transfer has no traceback of the caller's code.
        logger.exception("the transport's state_dict, which gives the template, has raised")
        raise LocalProtocolError(f"the transport's state_dict raised {type(exc).__name__}: {exc}") from None


def template_of(state_dict: Callable[[], object] | None, options: Options) -> Template | None:
    """What a callback gives, and what is expected by it; None without a callback.

    Args:
        state_dict: The callback.
        options: The receiver's; a source that cuts its state in another way costs a look at each leaf.
    """
    if state_dict is None:
        return None
    template = Template(state_dict, options.copies)
    template.expect(options.limits)
    return template


def read(body: Any, template: Template | None) -> tuple[Manifest, ManifestHeader, Layout]:
    """Read the body of a MANIFEST.

    Raises:
        RemoteProtocolError: As ``_wire.decode.decode_manifest``.
    """
    found = template.read(body) if template is not None else None
    if found is None:
        manifest, header = decode_manifest(body)
        found = manifest, header, lay_out(manifest, header.limits)
    return found


def _same_memory(one: Flat, other: Flat) -> bool:
    """Whether two calls have given the same tensors, or others of the same memory."""
    if all(map(is_, one.leaves, other.leaves)):
        return len(one.leaves) == len(other.leaves) and one.nodes == other.nodes
    tensors = [(mine, theirs) for mine, theirs in zip(one.leaves, other.leaves, strict=False) if mine is not theirs]
    if {*map(type, [leaf for pair in tensors for leaf in pair])} != {torch.Tensor} or one.nodes != other.nodes:
        return False
    try:
        first, second = (list(map(torch.Tensor.data_ptr, column)) for column in zip(*tensors, strict=True))
    except RuntimeError:  # without memory: sparse, fake
        return False
    return first == second


# ------------------------------------------------------------------------------------------ expected


class _Expected:
    """What a source that holds the template's own state would send.

    Attributes:
        matched: The template's leaf for each of that.
        plain: The template's tensors, as they compare with it.
    """

    def __init__(self, flat: Flat, limits: Callable[[int], Limits]) -> None:
        manifest, tensors = describe_flat(flat, between=None)
        # A lazy conjugate, a sparse tensor: its context is not what it is once it was read.
        if not {leaf.kind for leaf in manifest.leaves.others.values()} <= {"tensor", VALUE}:
            raise ValueError("more than plain tensors and values")
        self._limits = limits(sum(map(itemgetter(0), manifest.storages)))
        self._layout = lay_out(manifest, self._limits)
        _, nodes, *rest, _ = manifest_body(manifest, ManifestHeader(None, self._limits, ""))
        self._num_leaves = len(manifest.leaves)
        # In bytes, where 1, 1.0 and True differ, as keys may.
        self._nodes = pack(nodes)
        # As they are read: a key of a subclass of str comes as a str.
        self._tree = list(manifest.nodes)
        for index in [index for index, node in enumerate(self._tree) if node is not LEAF and not _is_simple(node)]:
            (self._tree[index],) = decode_nodes(unpack(pack([nodes[index]])))
        shapes, views, leaves, storages = unpack(pack(rest))
        # In bytes as well.
        self._num_others = len(leaves)
        self._rest = pack([shapes, views, _without_values(leaves), storages])
        self._manifest = manifest
        # A leaf that is the same as an earlier one has no tensor of its own there.
        known = None if manifest.same else tensors
        self.matched = dict(enumerate(flat.leaves))
        self.plain = compare_plain(manifest, self.matched, ReadOnlyMemory(), known)
        _ = self.plain.targets.overlap  # which is kept, and asked for once the source's manifest is here
        self._tensors = tensors

    def has_moved(self) -> bool:
        """Whether a tensor of the template has other memory by now."""
        return list(map(torch.Tensor.data_ptr, self._tensors.tensors)) != self._tensors.addresses

    def read(self, body: Any) -> tuple[Manifest, ManifestHeader, Layout] | None:
        try:
            return self._read(body)
        except Exception:  # damaged, or a class that is not allowed: to be said by who reads all of it
            return None

    def _read(self, body: Any) -> tuple[Manifest, ManifestHeader, Layout] | None:
        header, nodes, shapes, views, leaves, storages, shared = body
        manifest = self._manifest
        num_nodes, num_leaves = len(self._tree), self._num_leaves
        theirs, beyond = leaves[: self._num_others], leaves[self._num_others :]
        # Of what there are many, columns, which are bytes already.
        if pack([shapes, views, _without_values(theirs), storages]) != self._rest:
            return None
        # In one place, or it is to be found by names. Trees of other sizes are not packed.
        root = self._tree[0].num_children
        (start,) = [
            start
            for start, node in zip(_STARTS, nodes, strict=False)
            if (node[1] if node else 0) == root and pack(nodes[start : start + num_nodes]) == self._nodes
        ]
        ties = {later + start: first + start for later, first in manifest.shared.items()}
        if pack(shared) != pack(list(ties.items())):
            return None
        if not all(type(index) is int and _is_value(leaf) for index, leaf in beyond):
            return None
        # What is around the template's tree, torchft's envelope, is read as everything is; in the place of the tree is
        # a leaf. It must hold plain values alone.
        around, read_header = decode_manifest(
            [
                header,
                (*nodes[:start], None, *nodes[start + num_nodes :]),
                (),
                _NO_VIEWS,
                ((0, (None,)), *[(index - num_leaves + 1, leaf) for index, leaf in beyond]),
                _NO_STORAGES,
                (),
            ]
        )
        if not _is_envelope(around.nodes, start):
            return None
        others = dict(manifest.leaves.others)
        for index, leaf in theirs:
            if _is_value(leaf):
                others[index] = Leaf(VALUE, (), decode_value(leaf[0]))
        for index, leaf in enumerate(around.leaves):
            if index:
                others[num_leaves + index - 1] = leaf
        found = Manifest(
            [*around.nodes[:start], *self._tree, *around.nodes[start + 1 :]],
            Leaves(num_leaves + len(around.leaves) - 1, manifest.views, others),
            manifest.storages,
            same=manifest.same,
            shared=ties,
        )
        layout = self._layout
        if read_header.limits != self._limits:
            check_storages(found, read_header.limits)
            layout = lay_out(found, read_header.limits)
        return found, read_header, layout


# Where the template's tree begins among the source's nodes: it is all of the state, all of "user", or what is below the
# only key there.
_STARTS = (0, 1, 2)
# As a body has them.
_NO_VIEWS, _NO_STORAGES = (0, b"", b"", b""), (0, b"", ())


def _is_envelope(nodes: list[Node], start: int) -> bool:
    """Whether what is around a tree at this node is nothing, or what torchft's Manager wraps it in."""
    if start == 0:
        return nodes == [LEAF]
    # {"user": {key: tree}, "torchft": {...}}, in this order.
    if nodes[0].keys[:1] != ("user",) or "torchft" not in nodes[0].keys:
        return False
    return start == 1 or nodes[1].num_children == 1


def _is_simple(node: Node) -> bool:
    """Whether a node is read as it was written."""
    return node.kind in _SIMPLE and {*map(type, node.keys)} <= {str, int}


_SIMPLE = frozenset({"dict", "list", "tuple"})


def _without_values(leaves: Any) -> list[Any]:
    """The leaves that a body lists, of plain values only the index."""
    return [(index,) if _is_value(leaf) else (index, leaf) for index, leaf in leaves]


def _is_value(leaf: Any) -> bool:
    return type(leaf) is tuple and len(leaf) == 1
