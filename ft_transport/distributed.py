"""The transport for a plain ``torch.distributed`` group, without torchft.

Same names and calls as ``torch.distributed.checkpoint._pg_transport``; the engine behind is this package's own.

The description of the state is pickled, as upstream's is, and unpickled on the receiving side: **whoever can send
to this group can run code in its processes.** Use it only among ranks that trust each other as one program;
``ft_transport.PGTransport`` never unpickles by default.

The wire has one direction only, so the source learns that its messages left, not that they arrived whole, and a
destination that does not accept a state breaks the group to let the source know.
"""

from __future__ import annotations

import ctypes
import io
import logging
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils import _pytree as pytree

from ft_transport._deadline import Deadline
from ft_transport._device import brought, settle
from ft_transport._group.channel import GroupChannel
from ft_transport._group.control import CONTROL_TAG, FRAME_TAG
from ft_transport._group.fan_out import in_parallel
from ft_transport._group.one_way import description, land_all, send_all
from ft_transport._group.source import LAST_WORDS
from ft_transport._options import CPU, Options
from ft_transport._plan.blocks import storage_as
from ft_transport._plan.compare import compare
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.expected import tree_of
from ft_transport._plan.placement import note_state
from ft_transport._plan.rebuild import mark_changed
from ft_transport._plan.source import place
from ft_transport._plan.template import match_template
from ft_transport._plan.torn import Attempt
from ft_transport._process import no_collection
from ft_transport._state.classes import imported_class
from ft_transport._state.describe import Tensors, describe
from ft_transport._state.geometry import geometry, geometry_of
from ft_transport._state.kinds.base import VALUE, Part, Surroundings
from ft_transport._state.manifest import Leaf, Leaves, Manifest, Storage, View
from ft_transport._state.pickles import Load
from ft_transport._state.tree import LEAF, Node, Path, format_path
from ft_transport._telemetry.report import PeerReport, Role, TransferReport
from ft_transport._transport import TransportBase, check_ranks
from ft_transport._wire.frames import MAX_FRAME_BYTES
from ft_transport._wire.layout import Layout, Limits, lay_out
from ft_transport.errors import (
    LocalProtocolError,
    PeerFailure,
    RemoteProtocolError,
    TransferError,
    TransferTimeout,
    ended,
    reason_of,
)

__all__ = ["PGTransport"]

logger = logging.getLogger("ft_transport")


@dataclass
class _TensorMeta:
    """One tensor: shape, strides and offset in elements, and the size in bytes of its storage.

    Tensors with the same ``storage`` share it; None is a storage of its own.
    """

    shape: torch.Size
    dtype: torch.dtype
    storage_offset: int
    stride: tuple[int, ...]
    nbytes: int
    storage: int | None = None


@dataclass
class _LeafMeta:
    """A leaf of a kind of its own: a Parameter, a DTensor, an object with tensors. See ``_state.kinds.base.Part``."""

    kind: str
    tensors: list[_TensorMeta]
    context: Any
    parts: tuple[Part, ...] = ()


@dataclass
class _StateDictMeta:
    """The description of a state dict that crosses, pickled.

    Attributes:
        treespec: The nesting: nodes in preorder, or a ``TreeSpec`` of torch's pytree.
        paths: Path of each leaf.
        non_tensor_leaves: For each leaf its plain value, or what describes its tensors.
        same: For each leaf that is the same object as an earlier one, the index of the first.
        shared: The same for containers, by index of their nodes.
    """

    treespec: list[Node] | pytree.TreeSpec
    paths: Sequence[Any]
    non_tensor_leaves: list[object]
    same: dict[int, int] = field(default_factory=dict)
    shared: dict[int, int] = field(default_factory=dict)


@dataclass
class _Failure:
    """What crosses in the place of a description that cannot be made."""

    reason: str


# ------------------------------------------------------------------------------------------ describe


def _cast_tensor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The whole storage of ``tensor`` as a flat tensor of ``dtype``; it shares the memory."""
    return storage_as(tensor, dtype)


def _prepare_tensor(tensor: torch.Tensor) -> tuple[torch.Tensor, _TensorMeta]:
    """The bytes of a tensor's whole storage, and what describes the tensor as a view of them."""
    # Upstream's own function, by name and result: programs that use it (and the shared tests) describe single tensors
    # with it.
    view = View(0, geometry_of(tensor), int(tensor.storage_offset()))
    return _cast_tensor(tensor, torch.uint8), _tensor_meta(view, tensor.untyped_storage().nbytes(), None)


def _tensor_meta(view: View, nbytes: int, storage: int | None) -> _TensorMeta:
    shape = view.geometry
    return _TensorMeta(torch.Size(shape.shape), shape.dtype, view.offset, shape.stride, nbytes, storage)


def _prepare_state_dict(state_dict: object, device: torch.device) -> tuple[_StateDictMeta, list[torch.Tensor]]:
    """Describe a state dict.

    Returns:
        What crosses, and the memory of each distinct byte range of the state.

    Raises:
        LocalProtocolError: A leaf cannot travel; every such path is named.
    """
    meta, tensors = _describe(state_dict)
    manifest = _from_meta(meta)
    return meta, place(manifest, lay_out(manifest, Limits()), tensors, device).memory()


def _describe(state_dict: object) -> tuple[_StateDictMeta, Tensors]:
    """What crosses, and the tensors behind its views."""
    manifest, tensors = describe(state_dict)
    return _to_meta(manifest), tensors


def _to_meta(manifest: Manifest) -> _StateDictMeta:
    def tensor(view: View) -> _TensorMeta:
        nbytes = manifest.storages[view.storage].nbytes if view.storage >= 0 else 0
        return _tensor_meta(view, nbytes, view.storage)

    leaves: list[object] = []
    for leaf in manifest.leaves:
        if leaf.kind == VALUE:
            leaves.append(leaf.context)
        elif leaf.kind == "tensor" and leaf.context is None:
            leaves.append(tensor(leaf.views[0]))
        else:
            leaves.append(_LeafMeta(leaf.kind, [tensor(view) for view in leaf.views], leaf.context, leaf.parts))
    return _StateDictMeta(manifest.nodes, manifest.paths, leaves, manifest.same, manifest.shared)


def _from_meta(meta: _StateDictMeta) -> Manifest:
    """The manifest that a description stands for; it may come from upstream's own code.

    Both sides lay out what this gives, so that they number the storages alike.
    """
    storages: dict[object, tuple[int, Storage]] = {}

    def view(tensor: _TensorMeta) -> View:
        storage = -1
        # What has no elements has no bytes, and two such tensors may claim one storage of any size.
        if 0 not in tensor.shape:
            # Upstream's code says of no tensors that they share memory: each has a storage of its own, then.
            key: object = ("own", id(tensor)) if tensor.storage is None else tensor.storage
            storage, _ = storages.setdefault(key, (len(storages), Storage(tensor.nbytes, "cpu")))
        shape = geometry(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride))
        return View(storage, shape, tensor.storage_offset)

    leaves = []
    for leaf in meta.non_tensor_leaves:
        if isinstance(leaf, _TensorMeta):
            leaves.append(Leaf("tensor", (view(leaf),)))
        elif isinstance(leaf, _LeafMeta):
            leaves.append(Leaf(leaf.kind, tuple(map(view, leaf.tensors)), leaf.context, leaf.parts))
        else:
            leaves.append(Leaf(VALUE, (), leaf))
    paths = [_plain_path(path) for path in meta.paths]
    found = [storage for _, storage in storages.values()]
    # Of upstream's own code, again: its nesting is torch's, and its paths are pytree's entries.
    if isinstance(meta.treespec, pytree.TreeSpec):
        return Manifest([LEAF] * len(leaves), Leaves.of(leaves), found, paths=paths, treespec=meta.treespec)
    nodes = [LEAF if node == LEAF else node for node in meta.treespec]  # the one object, which is quick to tell
    return Manifest(nodes, Leaves.of(leaves, meta.same), found, same=meta.same, shared=meta.shared, paths=paths)


def _plain_path(path: Iterable[Any]) -> Path:
    """A path of keys, from one of pytree's entries (``MappingKey``, ``SequenceKey``, ``GetAttrKey``)."""
    plain = []
    for entry in path:
        # Of pytree's entry classes alone: a user's key may well be an object that has a ``name``.
        for name in ("key", "idx", "name"):
            if type(entry).__module__ == pytree.__name__ and hasattr(entry, name):
                entry = getattr(entry, name)
                break
        plain.append(entry)
    return tuple(plain)


# ----------------------------------------------------------------------------------------- transport


class PGTransport(TransportBase):
    """Sends and receives state dicts over a ``torch.distributed`` process group.

    Args:
        pg: The group.
        timeout: Upper bound of each transfer as a whole.
        device: Where messages live: what the group can send.
        state_dict: Gives the template, whose tensors receive the state in place.

    Threading: one call at a time.
    """

    def __init__(
        self,
        pg: ProcessGroup,
        timeout: timedelta,
        device: torch.device,
        state_dict: Callable[[], object] | None = None,
    ) -> None:
        # Nothing to choose here, as in upstream's API.
        where = torch.device(device)
        super().__init__(Options(where, in_order=where.type != "cpu"), state_dict, timeout)
        self._pg = pg

    def send_checkpoint(self, dst_ranks: list[int], state_dict: object) -> None:
        """Send ``state_dict`` to all ``dst_ranks`` at once.

        Args:
            dst_ranks: Ranks in the group, without this one.
            state_dict: The state; must not change until this returns.

        Raises:
            LocalProtocolError: A leaf cannot travel, or another transfer is under way: nothing was sent. Or a rank is
                not that of another one of the group, or there twice: nobody was told.
            TornStateError: This rank is torn; nothing was sent.
            TransferTimeout: The time-out passed before every destination had taken everything.
            PeerFailure: A destination is gone. The others have what they took.

        After an error: nothing reads the state any more; the group must be made anew.
        """
        report = self._report("source")
        deadline = self._limit(self._timeout)
        with self._transfer(report):
            self._meet(report, dst_ranks)
            with self._watching(report, deadline):
                self._send(report, state_dict, deadline)

    def _send(self, report: TransferReport, state_dict: object, deadline: Deadline) -> None:
        device = self._options.device
        channels = [GroupChannel(self._pg, peer.rank, device) for peer in report.peers]
        try:
            self._guard.check_source()
            with report.phase("describe"), no_collection():
                meta, tensors = _describe(state_dict)
                manifest = _from_meta(meta)
                layout = lay_out(manifest, Limits())
                streams = settle(tensors.tensors, deadline, device)
                placement = place(manifest, layout, tensors, device)
                data = _pickle(meta)
        except BaseException as exc:
            if not isinstance(exc, Exception):  # Ctrl-C, or a class's own code ends the process: no time to wait
                deadline = Deadline(min(deadline.remaining(), LAST_WORDS))
            _send_failure(channels, exc, deadline, self._options.device)
            raise
        note_state(report, manifest, layout)
        # Of one destination, as everything in the report that is not of a peer.
        report.nbytes_staged = placement.staged_bytes(range(report.num_messages))
        frames = description(data, device)

        def send(index: int) -> None:
            send_all(channels[index], frames, layout, placement, device, deadline, report.peers[index], streams)

        errors = [error for error in in_parallel(channels, send, streams) if error is not None]
        try:
            # Not before all the others are served. One that has failed has broken the group, so the call raises, unlike
            # that of torchft's transports: without answers this side is the only one to notice.
            if errors:
                raise min(errors, key=_consequence)
        finally:
            # Its traceback will hold this frame.
            errors.clear()

    def recv_checkpoint(self, src_rank: int) -> object:
        """Receive a state dict from ``src_rank``.

        Leaves land in the template where shape, dtype and layout agree; others are new, on the CPU.

        Returns:
            State dict with the sender's nesting. It aliases the template.

        Raises:
            TransferTimeout: The time-out passed.
            PeerFailure: The source is gone, or could not describe its state and said why.
            RemoteProtocolError: The state does not fit the template; every path is listed.
            LocalProtocolError: This side has no room, or its own code has raised (the template's function, a class), or
                another transfer is under way, or ``src_rank`` is not that of another rank of the group.

        After an error: nothing writes to the template any more; if ``error.torn``, it holds a mix of two states.
            The group must be made anew.
        """
        report = self._report("destination")
        deadline = self._limit(self._timeout)
        with self._transfer(report):
            self._meet(report, [src_rank])
            channel = GroupChannel(self._pg, src_rank, self._options.device)
            with self._watching(report, deadline), self._guard.receiving(report) as attempt:
                try:
                    return self._recv(channel, report, deadline, attempt)
                except BaseException:
                    channel.abort()  # nothing else here tells the source that its state was not taken
                    raise
                finally:
                    channel.drop()
                    report.peers[0].nbytes_wire = channel.nbytes_wire

    def _recv(self, channel: GroupChannel, report: TransferReport, deadline: Deadline, attempt: Attempt) -> object:
        device = self._options.device
        (peer,) = report.peers
        with peer.enter("agree", "destination"):
            data = self._recv_description(channel, deadline)
            with no_collection():
                landing, layout = self._agree(data, report)
            streams = settle(landing.device_memory(), deadline, device)
        attempt.landing = landing
        try:
            with peer.enter("move", "destination"):
                report.torn = landing.in_place
                # Nothing is compared afterwards: this wire has no digests, as upstream's has none.
                with streams.use():
                    land_all(channel, layout, landing, device, deadline, report, streams)
            with peer.enter("rebuild", "destination"), no_collection():
                landing.check()
                report.torn = report.torn or landing.copies
                # The user's classes are built here. What they raise ends the receive, and leaves the template torn if
                # bytes are in it.
                result = landing.rebuild(streams)
                landing.check()
                # At once, unlike under torchft: here the caller decides when to receive, and no backward of another
                # thread is under way.
                mark_changed(landing.written())
        except BaseException:
            # In this order: an operation of the group that never ends would keep a copy waiting.
            channel.abort()
            streams.abandon()
            raise
        report.torn = False
        peer.outcome = "complete"
        return result

    def _agree(self, data: bytes, report: TransferReport) -> tuple[DestinationPlan, Layout]:
        # Every class is allowed, and runs its own code: see the top of this file.
        meta = _unpickle(data)
        if isinstance(meta, _Failure):
            raise ended(PeerFailure(f"the peer gave up: {meta.reason}", phase="agree"), "failed")
        manifest = _from_meta(meta)
        layout = lay_out(manifest, Limits())
        matched = match_template(manifest, tree_of(self._state_dict), report) if self._state_dict else {}
        targets, disagreements = compare(manifest, matched, report)
        if disagreements:
            raise ended(RemoteProtocolError("; ".join(disagreements), phase="agree"), "refused")
        # Planned as a whole, as the other transports do: the template is not touched before every leaf has its place.
        landing = DestinationPlan(
            manifest,
            layout,
            matched,
            targets,
            self._options.device,
            report,
            fresh_device=CPU,
            surroundings=_TRUSTING,
        )
        note_state(report, manifest, layout)
        return landing, layout

    def _recv_description(self, channel: GroupChannel, deadline: Deadline) -> bytes:
        # Two messages, as upstream sends them: gloo ends the process whose receive is shorter than the message, so the
        # length comes first.
        length = torch.zeros(1, dtype=torch.int64, device=self._options.device)
        channel.wait(channel.recv(length, CONTROL_TAG), deadline)
        nbytes = int(brought(length, deadline).item())
        # Whoever sends may run code here anyway; the bound is for a wire that carries something else (another program
        # on this group), whose first eight bytes would be taken for a size.
        if not 0 < nbytes <= MAX_FRAME_BYTES:
            raise RemoteProtocolError(f"a description of {nbytes} bytes, expected 1 to {MAX_FRAME_BYTES}")
        data = torch.empty(nbytes, dtype=torch.uint8, device=self._options.device)
        channel.wait(channel.recv(data, FRAME_TAG), deadline)
        # Of a group whose messages live on an accelerator.
        local = brought(data, deadline)
        return ctypes.string_at(local.data_ptr(), nbytes)

    def _report(self, role: Role) -> TransferReport:
        # With the module's name: two of this package's transports are called PGTransport.
        return TransferReport(role, f"distributed.{type(self).__name__}", None)

    def _meet(self, report: TransferReport, ranks: Sequence[int]) -> None:
        """Note the peers; raises LocalProtocolError if a rank is not one of them."""
        # Of what is none of torch's own groups (torchft's, a stand-in as upstream's tests have) it is not known whether
        # it knows its rank.
        own = self._pg.rank() if type(self._pg).__module__.startswith("torch.") else None
        size: object = self._pg.size()
        check_ranks(ranks, size if isinstance(size, int) else None, own)
        report.peers = [PeerReport(rank) for rank in ranks]


def _consequence(error: BaseException) -> int:
    """By how far an error is from what went wrong first, where several destinations have one each."""
    # A deadline that has passed closes every pair of the group, and the other destinations see nothing but that.
    return 2 if isinstance(error, PeerFailure) else int(isinstance(error, TransferTimeout))


def _send_failure(channels: list[GroupChannel], exc: BaseException, deadline: Deadline, device: torch.device) -> None:
    """Send the destinations, instead of a description, the reason why there will be none. Never raises."""
    # A destination waits for a description and nothing else. Over this wire there is no other way to tell it that
    # none will come than to send one that says so.
    length, body = description(pickle.dumps(_Failure(reason_of(exc))), device)

    def tell(index: int) -> None:
        channel = channels[index]
        try:
            for pending in [channel.send(length, CONTROL_TAG), channel.send(body, FRAME_TAG)]:
                channel.wait(pending, deadline)
        except TransferError as error:
            logger.warning("rank %d could not be told: %s", channel.peer_rank, error)
        finally:
            channel.drop()

    # Not one after the other: whoever stands still would have the deadline of all.
    in_parallel(channels, tell)


def _pickle(meta: _StateDictMeta) -> bytes:
    try:
        return pickle.dumps(meta)
    except Exception as exc:  # the classes' own code, which may raise anything
        # Only now that it has failed: to try each leaf takes as long as to pickle the state.
        bad = [path for path, leaf in zip(meta.paths, meta.non_tensor_leaves, strict=True) if not _can_be_pickled(leaf)]
        paths = ", ".join(map(format_path, bad)) or "a key"
        raise LocalProtocolError(f"{paths}: a plain value cannot be pickled: {exc}", phase="describe") from exc


def _can_be_pickled(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return False
    return True


def _unpickle(data: bytes) -> _StateDictMeta | _Failure:
    meta = pickle.loads(data)
    # Both ends must be of this package or of upstream; anything else that unpickles is somebody else's message.
    if not isinstance(meta, (_StateDictMeta, _Failure)):
        raise RemoteProtocolError(f"expected a description of a state, got {type(meta).__name__}")
    return meta


class _Unpickler(pickle.Unpickler):
    """Reads an object whose tensors were taken out."""

    def __init__(self, file: io.BytesIO, load: Load) -> None:
        super().__init__(file)
        self._load = load

    def persistent_load(self, pid: Any) -> object:
        return self._load(pid)


def _unpickle_object(data: bytes, load: Load) -> object:
    return _Unpickler(io.BytesIO(data), load).load()


# Whoever sends to this transport is trusted with code, so every class is allowed.
_TRUSTING = Surroundings(find_class=imported_class, unpickle=_unpickle_object)
