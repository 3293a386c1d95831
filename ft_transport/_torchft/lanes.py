"""The torchft transport over lanes of its own.

See ``pg.py`` for how torchft's Manager calls it.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import ssl
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
from torchft.checkpointing.transport import CheckpointTransport

from ft_transport._deadline import Deadline
from ft_transport._lanes.destination import DestinationTransfer, LocalPeer
from ft_transport._lanes.dispatcher import Dispatcher
from ft_transport._lanes.protocol import FirstFrame, first_frame
from ft_transport._lanes.relay import Relay
from ft_transport._lanes.source import SourceTransfer
from ft_transport._net.endpoint import SECRET_BYTES, Endpoint, interfaces, rank_addresses, resolve
from ft_transport._net.listener import Listener
from ft_transport._options import CPU, LaneOptions
from ft_transport._plan.rebuild import mark_changed
from ft_transport._plan.resume import Kept
from ft_transport._plan.rewrite import Rewrite
from ft_transport._plan.torn import Guard
from ft_transport._telemetry.events import EventCallback
from ft_transport._telemetry.progress import watching
from ft_transport._telemetry.report import Copies, OnMismatch, PeerReport, ProgressCallback, TransferReport
from ft_transport._telemetry.teller import Teller
from ft_transport._transport import Asked, Call
from ft_transport.errors import LocalProtocolError, TornStateError

__all__ = ["LaneTransport"]

logger = logging.getLogger("ft_transport")

T = TypeVar("T")

_SHUT_DOWN = "this transport has been shut down"


class LaneTransport(Asked, CheckpointTransport[T]):  # type: ignore[misc]
    """Moves a healthy replica's state to recovering ones over TCP connections of its own, apart from training.

    The source does not wait: training goes on while the state is fetched from it, until
    :meth:`disallow_checkpoint`. The process group is never touched.

    Args:
        timeout: Upper bound of each transfer as a whole; the shorter of this and the Manager's own counts.
        device: Where received leaves live that the template lacks and that were on an accelerator at the source.
        state_dict: Gives the template, whose tensors receive the state in place. Pass the function that the
            Manager gets as ``state_dict``, or one that returns a dict of them by registered key; ``"manager"`` gives
            all that is registered with the Manager that calls, keys that are added later (DiLoCo's fragments) among it.
        lanes: TCP connections that this side opens for the bytes of a state, 1 to 16.
        host: Name or address that others reach this process at; tried before all others.
        interface: Network interface that others reach this process at; tried next. Then those of
            ``GLOO_SOCKET_IFNAME`` and ``NCCL_SOCKET_IFNAME``, then the others.
        port: To listen on, 0 for any that is free.
        ssl_context: For TLS, two contexts: one to accept connections with, one to make them with. All replicas must
            have it, or none.
        topology: As a source with several destinations: ``"chain"`` has each pass the state on to the next one,
            ``"star"`` has all fetch it from the source, and so does ``verify=False``.
        stall_timeout: How long a peer may be silent before it counts as gone.
        blocking: :meth:`send_checkpoint` returns only when every destination is served or has failed.
        skip_unchanged: As a destination, compare the template with the source's state first, and move what differs.
        verify: As a source, give each message a digest of its bytes. A message that comes damaged is moved again.
        strict: Refuse a state when the template lacks one of its tensors, or has a leaf that it lacks, or one that does
            not fit it.
        progress: Called while bytes move, a source's from a thread of its own. One that is slow misses some.
        shadow: As a destination, receive beside the template, and copy into it once everything has arrived and agrees:
            nothing that happens on the wire can tear the replica. Costs the copy, and memory for another state until
            the optimizer may step. A receive that broke is not resumed then, but begins anew.
        on_event: Called with a dict when a transfer is over; see ``docs/operations.md``. What it raises is logged. A
            source's is called from a thread of its own, for which :meth:`disallow_checkpoint` waits two seconds.
        on_mismatch: What becomes of a leaf whose shape, dtype or kind is not the template's. ``"fresh"``: it is new,
            the template's own is left alone, and ``load_state_dict`` judges. ``"refuse"``: the state is refused. Or a
            function of the path, what was expected and what the source has, which returns one of these. A state none of
            whose tensors fits is refused in any case.

    Raises:
        LocalProtocolError: It cannot listen on the port, or has no address to be reached at.
        ValueError: An argument is out of range, or there is no such host or interface.

    Threading: one call at a time; torchft uses its quorum thread. Listens until :meth:`shutdown`, or until it is
        collected.
    """

    def __init__(
        self,
        timeout: timedelta,
        device: torch.device,
        state_dict: Callable[[], object] | Literal["manager"] | None = None,
        *,
        lanes: int = LaneOptions.lanes,
        host: str | None = None,
        interface: str | None = None,
        port: int = 0,
        ssl_context: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
        topology: Literal["chain", "star"] = "chain",
        stall_timeout: timedelta = LaneOptions.stall,
        blocking: bool = False,
        skip_unchanged: bool = False,
        verify: bool = True,
        strict: bool = False,
        progress: ProgressCallback | None = None,
        shadow: bool = False,
        on_event: EventCallback | None = None,
        on_mismatch: OnMismatch = "fresh",
    ) -> None:
        for name, value in (("timeout", timeout), ("stall_timeout", stall_timeout)):
            if value <= timedelta(0):
                raise ValueError(f"{name}: expected more than 0 s, got {value.total_seconds():g} s")
        if type(lanes) is not int or not 1 <= lanes <= 16:
            raise ValueError(f"lanes: expected 1 to 16, got {lanes!r}")
        if type(port) is not int or not 0 <= port < 1 << 16:
            raise ValueError(f"port: expected 0 to 65535, got {port!r}")
        if ssl_context is not None and not _are_two_contexts(ssl_context):
            raise ValueError(f"ssl_context: expected two of ssl.SSLContext, got {ssl_context!r}")
        if isinstance(state_dict, str) and state_dict != "manager":
            raise ValueError(f"state_dict: expected a function or 'manager', got {state_dict!r}")
        if strict and state_dict is None:
            raise ValueError("strict: expected False without state_dict, which gives the template")
        if on_mismatch not in ("fresh", "refuse") and not callable(on_mismatch):
            raise ValueError(f"on_mismatch: expected 'fresh', 'refuse' or a function, got {on_mismatch!r}")
        if topology not in ("chain", "star"):
            raise ValueError(f"topology: expected 'chain' or 'star', got {topology!r}")
        if shadow and skip_unchanged:
            raise ValueError("skip_unchanged: expected False with shadow, which never looks at the template")
        self._timeout = timeout
        self._state_dict = state_dict
        self._blocking = blocking
        self._options = LaneOptions(
            CPU,
            verify=verify,
            strict=strict,
            progress=progress,
            shadow=shadow,
            on_event=on_event,
            on_mismatch=on_mismatch,
            copies=Copies(),
            fresh_device=torch.device(device),
            stall=stall_timeout,
            lanes=lanes,
            chain=topology == "chain",
            skip_unchanged=skip_unchanged,
        )
        self._busy = threading.Lock()
        self._teller = Teller()
        self._guard = Guard()
        self._last_report: TransferReport | None = None
        self._changed: list[torch.Tensor] = []
        self._captured: list[object] = []
        self._manager: weakref.ref[Any] | None = None
        self._from_manager = False
        self._rewrite: Rewrite | None = None
        self._source_transfer: SourceTransfer | None = None
        self._relay: Relay | None = None
        self._destination_transfer: DestinationTransfer | None = None
        self._receiver = 0  # the thread that receives
        self._is_shut_down = False
        self._kept: Kept | None = None
        self._attempts = 0
        self._local, self._listener = _listen(host, interface, port, ssl_context)
        # The listener's thread knows the dispatcher alone, so a transport that nobody holds any more can be collected.
        self._finalizer = weakref.finalize(self, _close, self._listener, self._local.dispatcher)

    @property
    def last_report(self) -> TransferReport | None:
        """The report of the newest transfer, None before the first.

        A source's is complete once :meth:`disallow_checkpoint` has returned.
        """
        return self._last_report

    def restored(self) -> None:
        super().restored()
        self._kept = None

    def metadata(self) -> str:
        """What the Manager hands to the recovering side: addresses, port, and a secret. Keep it out of logs.

        torchft calls it before each quorum, and :meth:`disallow_checkpoint` counts on that.
        """
        self._begin_quorum()
        return self._local.metadata

    def disallow_checkpoint(self) -> None:
        """Wait until the state is no longer read; afterwards it may change.

        Waits for destinations that are being served, until the deadline of their transfer at most, and ends what is
        left then. Makes what was received the source's again where forward has written meanwhile, and tells autograd
        about it (see ``PGTransport.disallow_checkpoint``).

        Raises:
            TornStateError, RemoteProtocolError: As ``PGTransport.disallow_checkpoint``, after all that. Nothing else.
        """
        changed, self._changed = self._changed, []
        try:
            transfer, relay = self._source_transfer, self._relay
            if transfer is not None:
                transfer.drain()
            if relay is not None:
                relay.drain()
            self._end()
        except Exception:
            logger.exception("the transfer could not be ended as it should")
        self._settle()
        mark_changed(changed)
        self._guard.check_step()

    def _end(self, *, keep_offer: bool = False) -> None:
        """End what an earlier call has left under way; nothing reads the state any more then."""
        transfer, relay = None if keep_offer else self._source_transfer, self._relay
        if transfer is not None:
            transfer.close()
        if relay is not None:
            relay.close()
        # Forgotten only now: Ctrl-C may have come.
        if self._source_transfer is transfer:
            self._source_transfer = None
        if self._relay is relay:
            self._relay = None

    def _end_all(self, is_receiving: bool) -> None:
        if is_receiving:
            with self._busy:  # until the receive has failed
                pass
        self._end()

    def shutdown(self, wait: bool = True) -> None:
        """End every transfer and stop listening. May be called twice, and from any thread.

        A receive that is under way in another thread fails with :class:`LocalProtocolError`, as does every later call
        that would move a state.

        Args:
            wait: Return only when no thread is left, and nothing writes to the template any more.
        """
        self._is_shut_down = True
        transfer = self._destination_transfer
        if transfer is not None:
            transfer.cancel(_SHUT_DOWN)
        is_receiving = transfer is not None and self._receiver != threading.get_ident()
        if wait:
            self._end_all(is_receiving)
        else:
            threading.Thread(target=self._end_all, args=(is_receiving,), name="ft_transport-end", daemon=True).start()
        self._finalizer()
        if wait:
            self._listener.join()
            self._teller.drain(Deadline(self._timeout))

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta) -> None:
        """Offer ``state_dict`` to ``dst_ranks``, and return: they fetch it while training goes on.

        Small tensors are copied before this returns, so forward may change buffers. A destination that dies, refuses,
        fails or is slow costs the others nothing and raises nothing anywhere: ``last_report`` and the log say what
        became of each.

        Args:
            dst_ranks: Replica ranks of the destinations. Lanes do not know which destination is which rank: if there is
                more than one, ``rank`` in their reports is -1, and ``name`` and ``address`` tell them apart. Empty:
                whoever comes is served, until :meth:`disallow_checkpoint`.
            step: Step of the state.
            state_dict: The state; must not change, but for its small tensors, until :meth:`disallow_checkpoint` has
                returned.
            timeout: Upper bound of the whole transfer.

        Raises:
            LocalProtocolError: A leaf cannot travel. Nothing was sent, and the destinations are told. Or: the transport
                was shut down.
            TornStateError: This replica is torn. As above.

        An optimizer that is about to step on the state waits until nobody reads it any more. Within an optimizer's step
        (DiLoCo's hook), this waits until then, as with ``blocking``. If the state changes all the same before
        :meth:`disallow_checkpoint` has returned (in-place operations of torch on its large tensors are seen),
        destinations that are not done fail, and ``last_report.error`` names the paths.

        After an error: nothing reads the state any more.
        Threading: torchft's quorum thread; one call at a time.
        """
        report = TransferReport("source", type(self).__name__, step)
        with Call(self, report, goes_on=True, teller=self._teller):
            if self._is_shut_down:
                raise LocalProtocolError(_SHUT_DOWN)
            self._end()
            if len(set(dst_ranks)) != len(dst_ranks):
                raise LocalProtocolError(f"ranks {dst_ranks}: expected each once")
            report.peers = [PeerReport(rank if len(dst_ranks) == 1 else -1) for rank in dst_ranks]
            deadline = Deadline(min(timeout, self._timeout))
            transfer = self._source_transfer = SourceTransfer(
                self._options, deadline, report, self._local.dispatcher, self._teller
            )
            try:
                self._guard.check_source()
            except TornStateError as exc:
                transfer.refuse(exc.message)
                raise
            transfer.open(state_dict)
            if self._blocking or transfer.within_step():
                try:
                    transfer.drain()
                finally:
                    self._end()

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> T:
        """Receive the state dict of ``step`` from whoever gave ``metadata``.

        Tensors land in the template given to the constructor where shape, dtype and layout agree with the
        sender's; other leaves are new. The result aliases the template. What an earlier receive of the same step has
        left in the template is compared and not moved again.

        Args:
            src_rank: Replica rank of the source, for the report.
            metadata: What the source's ``metadata()`` returned. This transport's own: all leaves are new then.
            step: Step that both sides must agree on.
            timeout: Upper bound of the whole call.

        Returns:
            State dict with the sender's nesting. It may be read for another destination until
            :meth:`disallow_checkpoint` has returned, or until an optimizer is about to step on it, which waits for
            that. Within an optimizer's step, this waits for it.

        Raises:
            TransferTimeout: The deadline passed; ``phase`` and ``nbytes_done`` say where.
            PeerFailure: The source is gone, silent for too long, has gone on to a later step, or gave up and said why.
            RemoteProtocolError: The source sent a state that does not fit the template (every path
                is listed; the template is untouched), or bytes that never agree with their digests.
            LocalProtocolError: This side has no room, or was shut down.

        After an error: nothing reads or writes the template any more. If ``error.torn``, it holds a mix of two
            states, and this replica cannot serve or commit until it has healed.
        Threading: torchft's quorum thread; one call at a time.
        """
        report = TransferReport("destination", type(self).__name__, step)
        with Call(self, report, teller=self._teller), self._guard.receiving(report) as attempt:
            self._rewrite = None
            trains = self._trains_meanwhile()
            from_itself = metadata == self._local.metadata
            self._end(keep_offer=from_itself)
            report.peers = [PeerReport(src_rank)]
            deadline = Deadline(min(timeout, self._timeout))
            self._attempts += 1
            endpoint = Endpoint.decode(metadata)
            transfer = DestinationTransfer(
                endpoint, step, self._attempts, self._local, self._options, deadline, report, attempt, trains=trains
            )
            self._destination_transfer, self._receiver = transfer, threading.get_ident()
            if self._is_shut_down:
                transfer.cancel(_SHUT_DOWN)
            earlier, self._kept = self._kept, None
            try:
                with watching(report, deadline):
                    # What the template holds is what is sent, if this side is the source, too.
                    received = transfer.run(None if from_itself else self._template(), earlier)
            finally:
                self._destination_transfer, self._kept = None, transfer.kept
            self._changed, self._relay = received.written, received.relay
            self._keep(received.rewrite)
            if self._relay is not None:
                self._relay.let_training_go_on()
            return cast(T, received.state)


def _are_two_contexts(found: object) -> bool:
    return isinstance(found, tuple) and len(found) == 2 and all(isinstance(each, ssl.SSLContext) for each in found)


def _listen(
    host: str | None,
    interface: str | None,
    port: int,
    contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None,
) -> tuple[LocalPeer, Listener[FirstFrame]]:
    """Begin to listen, and say where."""
    hosts = resolve(host) if host is not None else []
    try:
        addresses = rank_addresses(interfaces(), hosts, interface, os.environ)
    except OSError as exc:
        raise LocalProtocolError(f"the addresses of this machine cannot be listed: {exc}") from None
    secret = secrets.token_bytes(SECRET_BYTES)
    dispatcher = Dispatcher()
    try:
        listener = Listener(
            secret, port, contexts[0] if contexts else None, first_frame, dispatcher.dispatch, dispatcher.tick
        )
    except OSError as exc:
        raise LocalProtocolError(f"cannot listen on port {port}: {exc}") from None
    metadata = Endpoint(addresses, listener.port, secret, contexts is not None).encode()
    name = f"{platform.node()} pid {os.getpid()}"
    return LocalPeer(secrets.token_bytes(16), name, metadata, dispatcher, contexts), listener


def _close(listener: Listener[FirstFrame], dispatcher: Dispatcher) -> None:
    listener.close()
    dispatcher.close_all()
