"""The messages of a described state, for those who fetch them over lanes.

Strategy: a source does not stop training, so what is read here may change underneath. Small tensors do, in forward, and
are copied before ``send_checkpoint`` returns; large ones do only when an optimizer steps, which waits, or when somebody
writes to them by hand, which is noticed (``_plan.unchanged``) and makes the whole transfer void.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

from ft_transport._net.stall import HEARTBEAT
from ft_transport._options import CPU
from ft_transport._plan.blocks import Held
from ft_transport._plan.buffers import Bucket, aligned
from ft_transport._plan.source import SourcePlan
from ft_transport._process import let_others_run
from ft_transport._wire.layout import SMALL_BYTES
from ft_transport.errors import LocalProtocolError

__all__ = ["StateMessages"]


class StateMessages:
    """The messages of a described state; see ``_lanes.supplier.MessageStore``.

    The small ones are to be copied before training goes on, see :meth:`copy_small`: forward changes small buffers
    (BatchNorm).

    Args:
        plan: The described state.
        fabric: By what destinations may read it from here themselves; empty for none.

    Attributes:
        frame: The manifest, as it travels.
        streams: To copy in.
        error: Why the state is not what it was any more, once somebody has looked.
    """

    # Whoever writes to large tensors voids the transfer anyway, so they may leave by their pages, without a copy.
    steady = is_whole_transfer = True

    def __init__(self, plan: SourcePlan, *, fabric: str = "") -> None:
        self.sizes = plan.layout.sizes
        self.verified = bool(plan.header.digest)
        self.frame = plan.frame
        self.streams = plan.streams
        self.fabric = fabric
        self.error: LocalProtocolError | None = None
        self._gone: LocalProtocolError | None = None
        self._is_small = plan.layout.is_small
        self._placement = plan.placement
        self._versions = plan.versions
        self._digests: dict[int, int] = {}
        self._copies: dict[int, memoryview] = {}
        self._bucket = Bucket(CPU, pinned=self.streams.cross)  # kept as long as the copies, which are views of it
        self._changed = threading.Condition()
        self._is_copied = False
        self._failure = ""

    def copy_small(self) -> None:
        """Copy the small messages. Destinations may fetch those that are copied meanwhile, and no others.

        Raises:
            LocalProtocolError: Memory of the state was taken away.
            TransferTimeout: They were not copied from an accelerator by the deadline.
        """
        small, room = [], SMALL_BYTES
        # In the layout's order, as far as there is room: 64 MiB hold the buffers of any model, and copying more would
        # make the source wait for what forward never writes to.
        for message in range(len(self.sizes)):
            nbytes = aligned(self.sizes[message])
            if self._is_small(message) and nbytes <= room:
                room -= nbytes
                small.append(message)
        self._bucket.reset(SMALL_BYTES - room)
        with self.streams.use():
            for message in small:
                let_others_run()
                self._copies[message] = self._placement.view(message, self._bucket)
                with self._changed:
                    self._changed.notify_all()
        self.streams.begun().finish()
        self._versions.note_copied(self._copies)

    def let_read(self, failure: str = "") -> None:
        """The small messages are copied, or will not be, and why."""
        with self._changed:
            self._failure, self._is_copied = failure, True
            self._changed.notify_all()

    def await_offer(self) -> None:
        """Wait until :meth:`let_read` was called."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_copied)

    def check_unchanged(self) -> None:
        """Raises LocalProtocolError if the state has changed or moved since (see ``_plan.unchanged``), or was not
        copied."""
        try:
            self._check_copied()
            # Memory first: what was given back or exchanged has no counter that could be compared.
            self._placement.check()
            if self._gone is not None:
                raise self._gone
            self._versions.check()
        except LocalProtocolError as exc:
            self.error = exc
            raise

    def here(self) -> AbstractContextManager[None]:
        """Be one of the threads that serve it: an optimizer that steps in one of them does not wait for itself."""
        return self._versions.here()

    def within_step(self) -> bool:
        """Whether the state may change before whoever offers it is drained; see ``_plan.unchanged``."""
        return self._versions.within_step()

    def release(self) -> None:
        """Nothing is read any more: optimizers need not wait."""
        self._versions.release()

    def has(self, message: int) -> bool:
        # What is read from the state itself only once the copies are there: they may fail, and then ``send_checkpoint``
        # does, behind which nothing is read.
        if message not in self._copies:
            self._check_copied()
            return self._is_copied
        return True

    def _check_copied(self) -> None:
        if self._failure:
            raise LocalProtocolError(self._failure)

    def await_message(self, message: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.has(message), HEARTBEAT.total_seconds())

    def view(self, message: int, bucket: Bucket) -> memoryview:
        copied = self._copies.get(message)
        return self._placement.view(message, bucket) if copied is None else copied

    def held(self, message: int) -> Held | None:
        return self._placement.held(message) if message not in self._copies else None

    def note_error(self, error: LocalProtocolError) -> None:
        self._gone = error

    def digest(self, message: int) -> int | None:
        return self._digests.get(message)

    def note_digest(self, message: int, digest: int) -> None:
        # The first one to read a message says what it is for all: whoever reads it later, and finds it changed, is told
        # so by its own destination, for which the digest does not agree.
        self._digests.setdefault(message, digest)
