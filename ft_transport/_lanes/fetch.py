"""Fetches messages over the lanes to one supplier, and lands them.

Strategy: each lane has a thread, which takes a message from the work that all lanes share, asks for it, and lands the
answer; a slow lane so takes fewer. What is asked for on a lane that breaks goes back to the others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ft_transport._lanes.options import CPU, LaneOptions
from ft_transport._lanes.pending import Work
from ft_transport._lanes.protocol import Conversation, Frame, Header, Role, encode
from ft_transport._lanes.relay import Relay
from ft_transport._lanes.session import Talk, fingerprint
from ft_transport._net.connection import Bell, Connection, Patience, Silence
from ft_transport._net.dial import Contexts, dial
from ft_transport._net.handshake import Invitation
from ft_transport._plan.blocks import Bucket, aligned, memory_at
from ft_transport._plan.destination import Landing
from ft_transport._plan.rewrite import Rewrite
from ft_transport._telemetry.report import TransferReport
from ft_transport._threads import Crew, insist
from ft_transport._wire.layout import Layout
from ft_transport.errors import LocalProtocolError, RemoteProtocolError, TransferError, TransferTimeout

__all__ = ["Fetcher", "Route", "Sink"]

logger = logging.getLogger("ft_transport")

# Messages that one lane has asked for: while one is on its way, the next ones are asked for already.
_WINDOW = 3
# How often one message may come damaged from the same supplier.
_MAX_DAMAGED = 3


class _Incurable(RemoteProtocolError):
    """A message always comes damaged."""


class Sink:
    """Where messages land. Its methods are called by the lanes, each for another message.

    Args:
        layout: The messages.
        landing: Where they land.
        work: Learns which are here.
        report: Learns how many bytes are.
        verified: Whether messages have digests.
        claims: Messages that may be here already, with their digests; None where it is still to be taken.
        rewrite: Keeps what forward may overwrite; None if nobody trains meanwhile.

    Attributes:
        relay: Passes on what has landed, None if nobody would ask.
        sizes: Bytes of each message.
    """

    def __init__(
        self,
        layout: Layout,
        landing: Landing,
        work: Work,
        report: TransferReport,
        claims: dict[int, int | None],
        *,
        verified: bool,
        rewrite: Rewrite | None = None,
    ) -> None:
        self.todo = work
        self.relay: Relay | None = None
        self.verified = verified
        self.sizes = layout.sizes
        self._is_small = layout.is_small
        self._landing = landing
        self._report = report
        self._claims = claims
        self._claimed: dict[int, int] = {}
        self._rewrite = rewrite
        self._counted: set[int] = set()  # messages that the report counts
        self._lock = threading.Lock()

    def fetch_written_again(self) -> bool:
        """Ask again for the large messages that forward has written to, to keep them; gives whether there are any."""
        written = self._rewrite.written() if self._rewrite is not None else []
        if written:
            logger.info("forward has written to what had landed: %d messages are fetched again", len(written))
            self.todo.again(written)
        return bool(written)

    def bitmap(self) -> bytes:
        """Which messages may be here already: bit ``i % 8`` of byte ``i // 8``, the lowest bit first."""
        bits = bytearray(-(-len(self.sizes) // 8))
        for message in self._claims:
            bits[message // 8] |= 1 << message % 8
        return bytes(bits) if self._claims else b""

    def claim(self, message: int, bucket: Bucket) -> int | None:
        """The digest of a message that may be here already, as its memory is now; None if it is not."""
        if message not in self._claims or self.todo.was_damaged(message) or self._is_written(message):
            return None
        held = self._landing.held(message)
        if held is None:
            staged = self._take(message, bucket)
            self._landing.gather(message, staged)
            here = memory_at(staged.data_ptr(), staged.numel())
        else:
            here = held.view
        self._claimed[message] = digest = fingerprint(here, held)
        return digest if self._claims[message] in (None, digest) else None

    def land(self, talk: Talk, header: Header, bucket: Bucket, patience: Patience) -> bool:
        """Receive a message whose header is here; gives whether it came sound.

        Raises:
            TransferError: It did not come.
        """
        message, nbytes = header.number, self.sizes[header.number]
        held = aside = staged = None
        if self._rewrite is not None and self._is_written(message):
            aside = self._rewrite.take_aside(message)
            view = memory_at(aside.data_ptr(), nbytes)
        elif (held := self._landing.held(message)) is None:
            staged = self._take(message, bucket)
            view = memory_at(staged.data_ptr(), nbytes)
        else:
            view = held.view
            self._note_torn(message)
        digest = talk.hear_message(header, view, verify=self.verified, patience=patience, held=held)
        if digest is None:
            return False
        if staged is not None:
            self._note_torn(message)
            self._landing.scatter(message, staged)
            if self._rewrite is not None and self._rewrite.taken(message) is staged:
                self._rewrite.keep(message, staged)
            elif self.relay is not None:
                self.relay.keep(message, staged)
        if aside is not None and self._rewrite is not None:
            self._rewrite.keep(message, aside)
        with self._lock:
            if message not in self._counted:
                self._counted.add(message)
                self._report.peers[0].nbytes += nbytes
                self._report.nbytes_staged += nbytes if staged is not None else 0
        self.todo.landed(message, digest)
        return True

    def _is_written(self, message: int) -> bool:
        """Whether forward has written where a large message lands, which so must land aside."""
        return self._rewrite is not None and self._rewrite.is_written(message)

    def named(self, error: LocalProtocolError) -> LocalProtocolError:
        """The error with the paths, if memory of the template was taken away."""
        try:
            self._landing.check()
        except LocalProtocolError as exc:
            return exc
        return error

    def _take(self, message: int, bucket: Bucket) -> torch.Tensor:
        taken = self._rewrite.take(message) if self._rewrite is not None and self._is_small(message) else None
        if taken is None:
            bucket.reset(aligned(self.sizes[message]))
            taken = bucket.take(self.sizes[message])
        return taken

    def _note_torn(self, message: int) -> None:
        """A message is about to be written to where it belongs."""
        if not self._report.torn and self._landing.touches_template(message):
            self._report.torn = True

    def note_damage(self, message: int) -> None:
        """A message came damaged.

        Raises:
            RemoteProtocolError: It always does.
        """
        with self._lock:
            self._report.num_repaired += 1
        times = self.todo.damaged(message)
        logger.warning("message %d came damaged and is fetched again", message)
        if times >= _MAX_DAMAGED:
            raise _Incurable(
                f"message {message} of {len(self.sizes)} differs from what the source sent, {times} times: "
                "damaged on the way, or changed at the source while it was sent"
            )

    def keep(self, message: int) -> None:
        """A message was here already, as :meth:`claim` has said."""
        with self._lock:
            self._counted.add(message)
            self._report.nbytes_kept += self.sizes[message]
        if self._rewrite is not None and (taken := self._rewrite.taken(message)) is not None:
            self._rewrite.keep(message, taken)
        self.todo.landed(message, self._claimed[message])


class Route(NamedTuple):
    """Where to fetch.

    Attributes:
        invitation: The supplier's.
        ident: Of the supply there.
        from_source: Whether it is the source's own.
    """

    invitation: Invitation
    ident: bytes
    from_source: bool

    @property
    def label(self) -> str:
        """The supplier, for messages."""
        return "the source" if self.from_source else "the destination before this one"


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
        self._crew = Crew()
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
        return isinstance(self.error, (Silence, _Incurable))

    def close(self) -> None:
        """End all lanes; when this returns, nothing lands any more. May be called twice."""
        insist(self._close)

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
        if self._options.progress is not None or self._sink.todo.complete:
            self._bell.ring()
