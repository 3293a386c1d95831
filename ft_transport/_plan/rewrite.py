"""Writes a received state again where forward has written meanwhile. No I/O.

Strategy: under an asynchronous quorum, torchft's default, a state lands in the live tensors while the training thread
runs forward and backward on them, and forward writes: BatchNorm's statistics, the vectors of spectral norm, histories
of FP8 maxima, biases of a router, metrics. ``load_state_dict``, which comes after that, is given the same memory and
so repairs nothing. What the optimizer then steps from must be the source's all the same, so:

* small messages, which are staged anyway, are kept as they came, up to ``SMALL_BYTES``, and written again before the
  step: whatever wrote there, torch need not have counted it (BatchNorm's kernel does not). Beyond that bound they are
  compared with their digests;
* of larger tensors torch's count of in-place operations from before the first byte is compared. Loading counts, too,
  where it copies a tensor onto itself: the digests tell these from what is really another state. Over lanes those that
  change before all has landed are fetched again, *beside* the template; what changes later, and has no copy here, is
  lost, and the replica torn.

Not here: with a synchronous quorum nothing is written while the state lands, and what is written later is training.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from ft_transport._device import wait_for
from ft_transport._plan.buffers import Arena, aligned
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.unchanged import Reading
from ft_transport._wire.digest import digest_message
from ft_transport._wire.layout import SMALL_BYTES, Layout

__all__ = ["Received", "Rewrite"]


class Rewrite:
    """What is kept of one receive until the optimizer may step. :meth:`take` and what follows it: any thread.

    Args:
        layout: The messages.
        landing: Where they land. Counts are noted here and now: before the first byte.
    """

    def __init__(self, layout: Layout, landing: DestinationPlan) -> None:
        self._layout = layout
        self._landing = landing
        self._lock = threading.Lock()
        self._arena = Arena()
        # What landed fresh is in nobody's module yet, so forward cannot have written there.
        self._room = SMALL_BYTES if landing.in_place else 0
        self._taken: dict[int, torch.Tensor] = {}
        self._kept: dict[int, torch.Tensor] = {}
        self._digests: Mapping[int, int] = {}
        self._algorithm, self._sample = "xxh3", -1
        self._reading: Reading | None = None
        self._counts: dict[int, list[tuple[torch.Tensor, int]]] = {
            # Before the first byte. A forward that writes while a message lands would otherwise be taken for what was
            # there before.
            which: [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
            for which, tensors in landing.large.items()
        }

    # ------------------------------------------------------------------------------ while it lands

    def take(self, message: int) -> torch.Tensor | None:
        """Memory to stage a small message in, which :meth:`keep` keeps; None where there is no room."""
        nbytes = self._layout.sizes[message]
        with self._lock:
            taken = self._taken.get(message)
            if taken is None and aligned(nbytes) <= self._room:
                self._room -= aligned(nbytes)
                # A message that comes twice, damaged the first time, has one place.
                taken = self._taken[message] = self._arena.allocate(nbytes)
            return taken

    def take_aside(self, message: int) -> torch.Tensor:
        """Memory for a message that must not land in the template: forward writes there."""
        with self._lock:
            taken = self._taken.get(message)
            if taken is None:
                taken = self._taken[message] = self._arena.allocate(self._layout.sizes[message])
            return taken

    def taken(self, message: int) -> torch.Tensor | None:
        """The memory that was taken for a message."""
        return self._taken.get(message)

    def kept(self, message: int) -> torch.Tensor | None:
        """A message's bytes, where they are kept."""
        return self._kept.get(message)

    def keep(self, message: int, data: torch.Tensor) -> None:
        """These are a message's bytes, verified where there are digests, and stay as they are from now on."""
        with self._lock:
            self._kept[message] = data

    def keep_if_room(self, data: Mapping[int, torch.Tensor]) -> bool:
        """As :meth:`keep`, of memory that was allocated elsewhere: all of it, or none; gives which."""
        nbytes = sum(aligned(each.numel()) for each in data.values())
        with self._lock:
            # All of a flight or none: half of a bucket kept would be half of a BatchNorm's statistics.
            if nbytes > self._room:
                return False
            self._room -= nbytes
            self._kept.update(data)
            return True

    def is_written(self, message: int) -> bool:
        """Whether somebody has written to the template's tensor that a large message lands in."""
        counts = self._counts
        # torch's count goes up with each in-place operation, also of ours; ours are made on tensors with a count of
        # their own.
        return bool(counts) and any(
            tensor._version != before
            for which in self._layout.owners[message]
            for tensor, before in counts.get(which, ())
        )

    def written(self) -> list[int]:
        """The messages that must be fetched again: written to, and not kept."""
        return [
            message
            for message in range(len(self._layout.sizes))
            if message not in self._kept and self.is_written(message)
        ]

    def note_digests(self, digests: Mapping[int, int], algorithm: str, sample: int = -1) -> None:
        """By which messages are told from what the source sent, see ``_wire.digest``; without, nobody can tell."""
        self._digests, self._algorithm, self._sample = digests, algorithm, sample

    # ----------------------------------------------------------------------- before the optimizer steps

    def watch(self, settle: Callable[[], None]) -> None:
        """Call ``settle`` before any optimizer steps on what has landed: who steps has loaded by then, and what a step
        writes is training."""
        # A user may step before the Manager's vote (DiLoCo's inner optimizer does). Then what forward wrote must be
        # repaired before that step, and not undone after it.
        self._reading = Reading(self._layout, self._landing.placement.memory, lambda _: settle())

    def write(self) -> list[str]:
        """Make the state the source's again. Once, on the thread that trains, after forward and load.

        Returns:
            Paths of the leaves that are not the source's, and of which nothing is kept.
        """
        if self._reading is not None:
            self._reading.release()
        # Order matters. Where is the memory now; then what is kept, written again; then what was copied in the end; and
        # only then is compared what is left, since the steps before may have repaired it.
        lost = self._landing.find_again()
        messages: Iterable[int] = range(len(self._layout.sizes))
        if lost:
            messages = [message for message in messages if lost.isdisjoint(self._layout.owners[message])]
        for message in filter(self._kept.__contains__, messages):
            self._landing.placement.scatter(message, self._kept[message])
        self._landing.copy_again()
        suspects = {*self.written(), *self._not_kept()}.intersection(messages)
        changed = [message for message in sorted(suspects) if not self._is_as_sent(message)]
        return self._landing.paths_of(lost.union(*map(self._layout.owners.__getitem__, changed)))

    def _not_kept(self) -> list[int]:
        """The small messages for which there was no room. Of so many small tensors the counts are not looked at."""
        if not self._landing.in_place:
            return []
        # Counts of small ones would cost a call for each of thousands, and BatchNorm's are not true.
        messages = filter(self._layout.is_small, range(len(self._layout.sizes)))
        return [message for message in messages if message not in self._kept]

    def _is_as_sent(self, message: int) -> bool:
        # Without digests nobody can tell. ``docs/faults.md`` says so, and that a chain is not made then.
        if message not in self._digests:
            return True
        data = self._landing.placement.direct(message)
        if data is None:
            data = torch.empty(self._layout.sizes[message], dtype=torch.uint8)
            self._landing.placement.gather(message, data)
            wait_for(self._landing.placement.memory_of(message))
        return digest_message(data, self._algorithm, self._sample) == self._digests[message]

    def paths(self, messages: Iterable[int]) -> list[str]:
        """The leaves that these messages are of."""
        return self._landing.paths_of(set().union(*map(self._layout.owners.__getitem__, messages)))


class Received(NamedTuple):
    """A received state, whatever it came over.

    Attributes:
        state: The state dict.
        written: The template's tensors that hold a new value; autograd has not been told of it.
        rewrite: Makes it the source's again before the optimizer steps; None if nobody trains meanwhile.
    """

    state: object
    written: list[torch.Tensor]
    rewrite: Rewrite | None
