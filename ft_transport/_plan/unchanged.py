"""Whether a state has changed while it was sent, and optimizers that wait so that it does not. No I/O.

Strategy: torch counts the in-place operations on each tensor, for autograd. Whoever has the count from before the
first byte was read and the same count after the last one knows that no operation has ended in between, without reading
a byte. Fused optimizers do not count, so optimizers are watched as well, through the hook that torch calls before any
optimizer steps: what it is about to write (its parameters, its state) is compared, by address, with what is read, and
it waits until that is read no more. Only if the time for that has passed does the step count as a change.

What has been copied before is read no more, and is nobody's concern.

Not seen: what else writes past autograd (NumPy, ``.data``, raw pointers), and in-place operations on ranges in which
several views lie between each other. But torchft's DiLoCo, which writes through ``.data``, does so in a hook of its
inner optimizer, where it has asked for the quorum as well: :meth:`Reading.within_step` tells, and then nothing is read
any more when the call that it waits for returns.

Small ranges do not count, but for optimizers: forward may change small buffers (BatchNorm), which both transports copy
(see ``_group.source``).
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ft_transport._deadline import Deadline
from ft_transport._state.manifest import Manifest
from ft_transport._state.tree import format_path
from ft_transport._wire.layout import Layout
from ft_transport.errors import LocalProtocolError

__all__ = ["Reading", "ChangeDetector", "watch_optimizers"]

# Paths that an error names: an optimizer that stepped too early changes all of them.
_MAX_NAMED = 8
# How long what reads may take to end once its deadline has passed.
# A lane that has timed out is closed within a heartbeat or two. After that the optimizer steps, and the transfer is
# void: training does not stand still for a heal.
_GRACE = timedelta(seconds=1)


class Reading:
    """Memory that is read for others, from now on until :meth:`release`: optimizers do not write to it meanwhile.

    Args:
        layout: What is read.
        memory: Gives what holds each of the layout's ranges, in their order.
        await_end: Waits until nothing is read any more, as long as it may; then it has called :meth:`release`. Called
            with this, in the thread of an optimizer that is about to step. None if nobody can tell.
        copied: Messages that are taken from copies.
    """

    def __init__(
        self,
        layout: Layout,
        memory: Callable[[], Sequence[torch.Tensor]],
        await_end: Callable[[Reading], object] | None = None,
        copied: Container[int] = (),
    ) -> None:
        self._layout = layout
        self._memory = memory
        self._await_end = await_end
        self._copied = copied
        self._stepped: set[int] = set()  # ranges that an optimizer has not waited for
        self._changed = threading.Condition()
        self._over = False
        self._servers: set[int] = set()
        watch_optimizers()
        _watch(self)

    def release(self) -> None:
        """Nothing is read any more. May be called twice, and from any thread."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        _unwatch(self)

    def await_release(self, deadline: Deadline) -> None:
        """Wait until :meth:`release` was called, for a moment longer than the deadline of what reads."""
        with self._changed:
            self._changed.wait_for(lambda: self._over, (deadline.remaining() + _GRACE).total_seconds())

    @contextmanager
    def here(self) -> Iterator[None]:
        """This thread reads. An optimizer that it steps, in a callback of the user's, cannot wait for it."""
        ident = threading.get_ident()
        self._servers.add(ident)
        try:
            yield
        finally:
            self._servers.discard(ident)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step: let it wait until what it writes is read no more."""
        if self._over:
            return
        touched = self._touched(optimizer)
        if not touched:
            return
        # A callback of the user's on a thread that serves may step an optimizer, too. It cannot wait for itself.
        if self._await_end is not None and threading.get_ident() not in self._servers:
            self._await_end(self)
        if not self._over:
            self._stepped |= touched

    def within_step(self) -> bool:
        """Whether an optimizer of what is read is in its step, in any thread.

        What runs then is the step's closure, or a hook behind it: either may write to the state as soon as the call
        that asked for a quorum has returned.
        """
        # Copied: another thread's step may end meanwhile.
        optimizers = [optimizer for _, known in list(_stepping) if (optimizer := known()) is not None]
        return any(self._touched(optimizer) for optimizer in optimizers if not self._over)

    def _touched(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """The ranges that are read, and that an optimizer writes to."""
        copied = self._copied
        read = {which for message, own in enumerate(self._layout.owners) if message not in copied for which in own}
        if not read:
            return set()
        written, memory = _Addresses(_written_by(optimizer)), self._memory()
        return {which for which in read for begin, end in _extents(memory[which]) if written.overlap(begin, end)}


class ChangeDetector(Reading):
    """The counts of a described state's large tensors, as they are now; from now on, whether an optimizer steps.

    Args:
        manifest: Of the state.
        layout: Its messages.
        memory: What holds each of the layout's ranges, in their order.
        await_end: As for :class:`Reading`.
    """

    def __init__(
        self,
        manifest: Manifest,
        layout: Layout,
        memory: Sequence[torch.Tensor],
        await_end: Callable[[Reading], object] | None = None,
    ) -> None:
        self._manifest = manifest
        large = [(which, memory[which]) for which in layout.large]
        try:
            self._noted = [(which, tensor, tensor._version) for which, tensor in large]
        # Looked for only when torch raises: nearly no state has one, and asking each tensor is a call for each.
        except RuntimeError:  # an inference tensor has no count
            self._noted = [(which, each, each._version) for which, each in large if not each.is_inference()]
        super().__init__(layout, lambda: memory, await_end)

    def note_copied(self, messages: Container[int]) -> None:
        """From now on these messages are taken from copies."""
        self._copied = messages

    def check(self) -> None:
        """Call when all bytes have been read.

        Raises:
            LocalProtocolError: A tensor has changed; the text names the paths.
        """
        changed = {which for which, tensor, before in self._noted if tensor._version != before} | self._stepped
        if not changed:
            return
        paths = self._paths(changed)
        more = f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
        raise LocalProtocolError(
            f"the state changed while it was sent: {', '.join(paths[:_MAX_NAMED])}{more}; it must not, before "
            "disallow_checkpoint() has returned"
        )

    def _paths(self, changed: set[int]) -> list[str]:
        range_of, manifest = self._layout.range_of, self._manifest
        return [
            format_path(manifest.paths[index])
            for index, leaf in enumerate(manifest.leaves)
            if any(view.storage >= 0 and range_of(view.storage, view.begin) in changed for view in leaf.views)
        ]


# ------------------------------------------------------------------------------------------ addresses


class _Addresses:
    """Some ranges of addresses, half-open, which may overlap."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        # Sorted once, with the furthest end so far: whether one of a thousand parameters overlaps is then a single
        # bisection, in a hook that every step runs.
        known = sorted(ranges)
        self._begins = [begin for begin, _ in known]
        self._reached = list(accumulate((end for _, end in known), max))

    def overlap(self, begin: int, end: int) -> bool:
        """Whether one of them has an address in common with this one."""
        below = bisect_left(self._begins, end)
        return below > 0 and self._reached[below - 1] > begin


def _written_by(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, int]]:
    """The addresses that a step may write to: of the parameters, whatever else is in their groups, and the state."""
    # However nested: some optimizers keep lists of lists (Shampoo), or a master copy of each parameter, among their
    # groups or in their state.
    pending: list[object] = [getattr(optimizer, "param_groups", ()), getattr(optimizer, "state", ())]
    known: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            yield from _extents(value)
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in known:
            known.add(id(value))  # they may hold themselves
            pending += value.values() if isinstance(value, dict) else value


def _extents(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """The addresses of a tensor, of those inside of it where it is a subclass (a DTensor's shard)."""
    try:
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                yield from _extents(getattr(tensor, name))
        elif tensor.numel() and (begin := tensor.data_ptr()):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            yield begin, begin + (sum((size - 1) * step for size, step in steps) + 1) * tensor.element_size()
    except Exception:
        pass  # it has no address (sparse, fake), and what its class raises then, or warns of, is no concern of a step


# ---------------------------------------------------------------------------------------------- hooks


# What is being read. Replaced as a whole, because an optimizer may be going through it in another thread; by reference
# only, since whoever reads may be dropped without a word.
_watching: tuple[weakref.ref[Reading], ...] = ()
# Optimizers within their step, each with its thread, in the order in which they began. One that raised stays until it
# steps again, or is no more.
_stepping: list[tuple[int, weakref.ref[torch.optim.Optimizer]]] = []
_adding = threading.Lock()


def _watch(reading: Reading) -> None:
    global _watching
    with _adding:
        _watching = (*(known for known in _watching if known() is not None), weakref.ref(reading))


def _unwatch(reading: Reading) -> None:
    global _watching
    with _adding:
        _watching = tuple(known for known in _watching if known() not in (None, reading))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return  # a compiled step counts, and does not wait
    for known in _watching:
        if (reading := known()) is not None:
            reading.before_step(optimizer)
    with _adding:
        _stepping.append((threading.get_ident(), weakref.ref(optimizer)))


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    own = threading.get_ident()
    with _adding:
        begun = next((i for i, (ident, known) in enumerate(_stepping) if ident == own and known() is optimizer), None)
        if begun is not None:  # and with it those that began within it, of which some may have raised
            _stepping[begun:] = [entry for entry in _stepping[begun:] if entry[0] != own and entry[1]() is not None]


def watch_optimizers() -> None:
    """From now on, be told of each step of every optimizer of this process. Once; any thread, as often as it likes.

    Whoever reads is watched for at the latest when it begins. But a step that has begun before is not known, and DiLoCo
    asks for its first quorum within one: whoever may be called by a Manager calls this when it is made.
    """
    global _is_told
    if _is_told:
        return
    with _adding:
        if not _is_told:
            # Never again, nor taken back: torch goes through its global hooks without a lock, in every thread that
            # steps, and raises there if one is added or removed meanwhile.
            register_optimizer_step_pre_hook(_before_step)
            register_optimizer_step_post_hook(_after_step)
            _is_told = True


_is_told = False
