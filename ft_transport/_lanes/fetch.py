"""Fetches messages over the lanes to one supplier, and lands them.

Strategy: each lane has a thread, which takes a message from the work that all lanes share, asks for it, and lands the
answer; a slow lane so takes fewer. What is asked for on a lane that breaks goes back to the others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

from ft_transport._lanes.chain import Route
from ft_transport._lanes.protocol import Conversation, Frame, Role, encode
from ft_transport._lanes.session import Talk
from ft_transport._lanes.sink import Incurable, Sink
from ft_transport._net.connection import Bell, Connection
from ft_transport._net.dial import dial
from ft_transport._net.handshake_io import Contexts
from ft_transport._net.stall import Patience, Silence
from ft_transport._options import CPU, LaneOptions
from ft_transport._plan.buffers import Bucket
from ft_transport._threads import ThreadGroup, uninterrupted
from ft_transport.errors import LocalProtocolError, TransferError, TransferTimeout

__all__ = ["Fetcher"]

logger = logging.getLogger("ft_transport")

# Messages that one lane has asked for: while one is on its way, the next ones are asked for already.
_WINDOW = 3


class Fetcher:
    """The lanes to one supplier.

    Args:
        sink: Where messages land.
        bell: Rung when a message has landed or a lane has ended.
        options: How many lanes, and how long they may be silent.
        attempt: As in every header.
        step: As in every header.
        stream: The accelerator's stream to scatter in, None without one.
        num_messages: How many to fetch, over one lane; None for all that are left.

    Attributes:
        nbytes: Bytes of the messages that have landed.
        error: Why a lane has ended, the newest; None while all is well.
        fatal: This side's own trouble.
    """

    def __init__(
        self,
        sink: Sink,
        bell: Bell,
        options: LaneOptions,
        attempt: int,
        step: int,
        stream: Any = None,
        *,
        num_messages: int | None = None,
    ) -> None:
        self.nbytes = 0
        self.error: TransferError | None = None
        self.fatal: Exception | None = None
        self.nbytes_wire = 0
        self._sink = sink
        self._bell = bell
        self._options = options
        self._attempt = attempt
        self._step = step
        self._stream = stream
        self._num_lanes = options.lanes if num_messages is None else 1
        self._num_left = num_messages
        self._lock = threading.Lock()
        self._lanes: set[Connection] = set()
        self._crew = ThreadGroup()
        self._closing = False

    def open(self, route: Route, contexts: Contexts | None, patience: Callable[[str], Patience]) -> None:
        """Open the lanes. What keeps one from opening is in ``error``; the others are opened all the same.

        Raises:
            TransferTimeout: The deadline passed.
        """
        first = encode(Frame.ATTACH, self._attempt, self._step, body=[route.ident])
        invitation = route.invitation
        for _ in range(self._num_lanes):
            own = patience(route.label)
            try:
                connection = dial(invitation, first, own, contexts, route.label)
            except TransferTimeout:
                raise
            except TransferError as exc:
                self.error = exc
                return
            # What has answered once is all that is tried from now on.
            invitation = invitation._replace(addresses=(connection.address,))
            with self._lock:
                self._lanes.add(connection)
            try:
                self._crew.start("lane", self._run, connection, own)
            except RuntimeError as exc:  # no more threads to be had
                with self._lock:
                    self._lanes.discard(connection)
                connection.close()
                self.error = LocalProtocolError(f"a lane cannot be served: {exc}")
                return

    @property
    def alive(self) -> bool:
        """Whether a lane is open."""
        return bool(self._lanes)

    @property
    def hopeless(self) -> bool:
        """Whether opening new lanes to the same supplier would not help."""
        return isinstance(self.error, (Silence, Incurable))

    def close(self) -> None:
        """End all lanes; when this returns, nothing lands any more. May be called twice."""
        uninterrupted(self._close)

    def _close(self) -> None:
        self._closing = True
        self._sink.todo.wake()
        with self._lock:
            for connection in self._lanes:
                connection.abort()
        self._crew.join()

    def _run(self, connection: Connection, patience: Patience) -> None:
        conversation = Conversation(Role.DESTINATION, self._attempt, self._step)
        conversation.sent(Frame.ATTACH)
        talk = Talk(connection, conversation)
        bucket = Bucket(CPU, pinned=True)
        try:
            if self._stream is not None:
                torch.accelerator.set_stream(self._stream)
            while self._ask(talk, bucket, patience):
                self._hear(talk, bucket, patience)
        except LocalProtocolError as exc:
            self.fatal = self._sink.named(exc)
        except TransferError as exc:
            if not self._closing:
                self.error = exc
        except Exception as exc:
            self.fatal = exc
        finally:
            self._sink.todo.give_back(conversation.asked)
            with self._lock:
                self._lanes.discard(connection)
                self.nbytes_wire += connection.nbytes_wire
            connection.close()
            self._bell.ring()

    def _ask(self, talk: Talk, bucket: Bucket, patience: Patience) -> bool:
        """Ask for as much as a lane may have asked for; False at the end."""
        work, asked = self._sink.todo, talk.conversation.asked
        while len(asked) < _WINDOW and self._num_left != 0:
            message = work.take(lambda: self._closing, block=not asked)
            if message is None:
                break
            if self._num_left is not None:
                self._num_left -= 1
            if not asked:
                patience.moved()  # nothing was asked for: it was not the supplier's silence
            claim = self._sink.claim(message, bucket)
            if claim is not None:
                talk.say(Frame.CHECK, patience, message, [claim])
            else:
                talk.say(Frame.REPAIR if work.was_damaged(message) else Frame.WANT, patience, message)
        return bool(asked)

    def _hear(self, talk: Talk, bucket: Bucket, patience: Patience) -> None:
        header = talk.hear_header(patience)
        number = header.number
        if header.frame is Frame.MESSAGE:
            try:
                sound = self._sink.land(talk, header, bucket, patience)
            except BaseException:
                # It had begun to come and so is no longer among those asked for.
                talk.conversation.asked.appendleft(number)
                raise
            if not sound:
                self._sink.note_damage(number)
            else:
                with self._lock:
                    self.nbytes += self._sink.sizes[number]
        else:
            talk.hear_body(header, patience)
            if header.frame is Frame.SAME:
                self._sink.keep(number)
        if self._options.on_progress is not None or self._sink.todo.complete:
            self._bell.ring()
