"""The torchft transport over lanes of its own.

See ``pg.py`` for how torchft's Manager calls it.
"""

from __future__ import annotations

import os
import platform
import secrets
import ssl
import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Literal, TypeVar

import torch

from ft_transport._deadline import Deadline
from ft_transport._lanes.destination import LocalPeer
from ft_transport._lanes.dispatcher import Dispatcher
from ft_transport._lanes.growth import MOST_LANES
from ft_transport._lanes.protocol import FirstFrame, first_frame
from ft_transport._lanes.source import SourceTransfer
from ft_transport._net.cma import let_others_read
from ft_transport._net.endpoint import SECRET_BYTES, Endpoint, interfaces, rank_addresses, resolve
from ft_transport._net.listener import Listener
from ft_transport._net.one_sided import available, await_closed
from ft_transport._options import CPU, Fabric, LaneOptions
from ft_transport._plan.rewrite import Received
from ft_transport._plan.torn import Attempt
from ft_transport._telemetry.events import EventCallback
from ft_transport._telemetry.report import Copies, OnMismatch, PeerReport, ProgressCallback, TransferReport
from ft_transport._telemetry.teller import Teller
from ft_transport._torchft.managed import ManagedTransport, StateDict
from ft_transport._torchft.under_way import SHUT_DOWN, Receiving, Serving
from ft_transport._transport import check_duration, check_ranks, check_step
from ft_transport.errors import LocalProtocolError

__all__ = ["LaneTransport"]

T = TypeVar("T")

# How long a shutdown waits for endpoints of a fabric that failed receives have left: a peer that is stopped keeps them
# open for as long as it is.
_CLOSING = timedelta(seconds=2)


class LaneTransport(ManagedTransport[T]):
    """Moves a healthy replica's state to recovering ones over TCP connections of its own, apart from training.

    The source does not wait: training goes on while the state is fetched from it, until
    :meth:`disallow_checkpoint`. The process group is never touched.

    Args:
        timeout: Upper bound of each transfer as a whole; as for ``PGTransport``.
        device: Where received leaves live that the template lacks and that were on an accelerator at the source.
        state_dict: Gives the template; as for ``PGTransport``.
        lanes: TCP connections that this side opens for a state's bytes, 1 to 16. ``"auto"``: 2 within a machine; to
            another one as many as its round trip asks for, and more as long as that makes it quicker.
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
        fabric: How bytes move within a machine. ``"auto"``: the destination reads the source's memory
            (``process_vm_readv``) where the system lets it, else TCP. ``"cma"``: also lets processes of this user read
            this one where Yama forbids it, as a debugger does (``PR_SET_PTRACER``). ``"tcp"``: neither side's is read.
            Experimental, between any machines: the name of a one-sided transport of torch's (2.15 and later), such as
            ``"nixl"``, or ``"torch"`` for the one that there is; on trusted networks, see ``docs/security.md``. Both
            sides must have it, else TCP serves.
        verify: As a source, give each message a digest of its bytes. A message that comes damaged is moved again.
        strict: Refuse a state that the template does not cover; as for ``PGTransport``.
        on_progress: Called while bytes move, a source's from a thread of its own. One that is slow misses some.
        shadow: As for ``PGTransport``. A receive that broke is not resumed then, but begins anew.
        on_event: As for ``PGTransport``; but a source's is called from a thread of its own, for which
            :meth:`disallow_checkpoint` waits two seconds.
        on_mismatch: What becomes of a leaf that does not fit the template's; as for ``PGTransport``.

    Raises:
        LocalProtocolError: It cannot listen on the port, or has no address to be reached at.
        TypeError: A time-out or ``state_dict`` is of another type.
        ValueError: An argument is out of range, or there is no such host or interface.

    Threading: one call at a time. Listens until :meth:`shutdown`, or until it is collected.
    """

    def __init__(
        self,
        timeout: timedelta,
        device: torch.device,
        state_dict: StateDict = None,
        *,
        lanes: int | Literal["auto"] = LaneOptions.lanes,
        host: str | None = None,
        interface: str | None = None,
        port: int = 0,
        ssl_context: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
        topology: Literal["chain", "star"] = "chain",
        stall_timeout: timedelta = LaneOptions.stall,
        blocking: bool = False,
        skip_unchanged: bool = False,
        fabric: Fabric = LaneOptions.fabric,
        verify: bool = True,
        strict: bool = False,
        on_progress: ProgressCallback | None = None,
        shadow: bool = False,
        on_event: EventCallback | None = None,
        on_mismatch: OnMismatch = "fresh",
    ) -> None:
        # Before all others: torchft's transport takes a group in this place.
        check_duration("timeout", timeout)
        fabric = _fabric(fabric, ssl_context is not None)
        options = LaneOptions(
            CPU,
            verify=verify,
            strict=strict,
            on_progress=on_progress,
            shadow=shadow,
            on_event=on_event,
            on_mismatch=on_mismatch,
            copies=Copies(),
            fresh_device=torch.device(device),
            stall=stall_timeout,
            lanes=lanes,
            chain=topology == "chain",
            skip_unchanged=skip_unchanged,
            fabric=fabric,
        )
        _check(options, topology)
        super().__init__(options, state_dict, timeout)
        self._options: LaneOptions = options
        self._blocking = blocking
        # Calls the user's code in the place of the listener's thread, whose silence is taken for the source's death.
        self._teller = Teller()
        self._serving, self._receiving = Serving(), Receiving()
        self._local, self._listener = _open(fabric, host, interface, port, ssl_context)
        # The listener's thread knows the dispatcher alone, so a transport that nobody holds any more can be collected.
        self._finalizer = weakref.finalize(self, _close, self._listener, self._local.dispatcher)

    def mark_restored(self) -> None:
        """As ``PGTransport.mark_restored``; a receive that broke is not resumed then, but begins anew."""
        super().mark_restored()
        # What is left of a broken receive is not in the template any more.
        self._receiving.kept = None

    def metadata(self) -> str:
        """What the Manager hands to the recovering side: addresses, port, and a secret. Keep it out of logs.

        torchft calls it before each quorum, and :meth:`disallow_checkpoint` counts on that.
        """
        self._begin_quorum()
        # One for the transport's whole life: torchft asks when nobody knows yet whether there will be a transfer.
        return self._local.metadata

    def disallow_checkpoint(self) -> None:
        """Wait until the state is no longer read; afterwards it may change.

        Waits for destinations that are being served, until the deadline of their transfer at most, and ends what is
        left then. Makes what was received the source's again where forward has written meanwhile, and tells autograd
        about it (see ``PGTransport.disallow_checkpoint``).

        Raises:
            TornStateError: As ``PGTransport.disallow_checkpoint``, after all that.
            RemoteProtocolError: Likewise. Nothing else.
        """
        self._serving.finish()
        self._before_step()

    def shutdown(self, wait: bool = True) -> None:
        """End every transfer and stop listening. May be called twice, and from any thread.

        A receive that is under way in another thread fails with :class:`LocalProtocolError`, as does every later call
        that would move a state.

        Args:
            wait: Return only when no thread is left, and nothing writes to the template any more.
        """
        is_receiving = self._receiving.shut_down()
        # Whoever receives holds the lock until the receive has failed; only then nothing writes to the template.
        end = partial(_end_all, self._serving, self._busy if is_receiving else nullcontext())
        if wait:
            end()
        else:
            threading.Thread(target=end, name="ft_transport-end", daemon=True).start()
        # Also where nobody waits: from now on no visitor is let in.
        self._finalizer()
        if wait:
            self._listener.join()
            await_closed(_CLOSING)
            self._teller.drain(Deadline(self._timeout))

    def _publish(self, report: TransferReport) -> None:
        # In the order of things: the end of an earlier transfer may still be on its way from the listener's thread.
        self._teller.call(partial(super()._publish, report))

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta | None = None) -> None:
        """Offer ``state_dict`` to ``dst_ranks``, and return: they fetch it while training goes on.

        Small tensors are copied before this returns, so forward may change buffers. A destination that dies, refuses,
        fails or is slow costs the others nothing and raises nothing anywhere: ``last_report`` says what became of it.

        Args:
            dst_ranks: Replica ranks of the destinations. Lanes do not know which destination is which rank: if there is
                more than one, ``rank`` in their reports is -1, and ``name`` and ``address`` tell them apart. Empty:
                whoever comes is served, until :meth:`disallow_checkpoint`.
            step: Step of the state.
            state_dict: The state; must not change, but for its small tensors, until :meth:`disallow_checkpoint` has
                returned.
            timeout: Upper bound of the whole transfer. None: the constructor's alone.

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
        with self._transfer(report, goes_on=True):
            if self._receiving.is_shut_down:
                raise LocalProtocolError(SHUT_DOWN)
            self._serving.end()
            check_step(step)
            report.peers = _peers(dst_ranks)
            # It is the transfer's, and goes on when this has returned: a transfer that nobody comes for ends then.
            deadline = self._limit(timeout)
            transfer = SourceTransfer(self._options, deadline, report, self._local.dispatcher, self._teller)
            self._serving.serve(transfer, state_dict, self._guard, blocking=self._blocking)

    def _receive(
        self, report: TransferReport, src_rank: int, metadata: str, deadline: Deadline, attempt: Attempt, trains: bool
    ) -> Received:
        from_itself = metadata == self._local.metadata
        # A relay of an earlier receive still reads the template that this one is about to write.
        self._serving.end(keep_source=from_itself)
        report.peers = [PeerReport(src_rank, phase="agree")]
        transfer = self._receiving.begin(
            Endpoint.decode(metadata), self._local, self._options, deadline, report, attempt, trains=trains
        )
        with self._watching(report, deadline):
            # What the template holds is what is sent, if this side is the source, too.
            received, relay = self._receiving.run(transfer, None if from_itself else self._template())
        self._serving.relay = relay
        return received

    def _end_receive(self, arrived: Received) -> None:
        super()._end_receive(arrived)
        if (relay := self._serving.relay) is not None:
            relay.let_training_go_on()


def _peers(dst_ranks: list[int]) -> list[PeerReport]:
    check_ranks(dst_ranks)
    # Whoever comes proves that it knows the secret, not which rank it is: torchft hands the same metadata to all. With
    # one there is nothing to mistake.
    return [PeerReport(rank if len(dst_ranks) == 1 else -1) for rank in dst_ranks]


def _end_all(serving: Serving, receive_is_over: AbstractContextManager[object]) -> None:
    with receive_is_over:
        pass
    serving.end()


def _check(options: LaneOptions, topology: str) -> None:
    if topology not in ("chain", "star"):
        raise ValueError(f"topology: expected 'chain' or 'star', got {topology!r}")
    check_duration("stall_timeout", options.stall)
    if options.lanes != "auto" and not (type(options.lanes) is int and 1 <= options.lanes <= MOST_LANES):
        raise ValueError(f"lanes: expected 'auto' or 1 to {MOST_LANES}, got {options.lanes!r}")
    if options.shadow and options.skip_unchanged:
        raise ValueError("skip_unchanged: expected False with shadow, which never looks at the template")


def _fabric(chosen: object, is_encrypted: bool) -> str:
    """The fabric by its name; raises ValueError if there is none of that."""
    if chosen in ("auto", "tcp", "cma"):
        return str(chosen)
    backends = available()
    # torch's own first; both sides must come to the same.
    name = next(iter(sorted(backends, key=lambda each: each != "nixl")), "") if chosen == "torch" else chosen
    if not isinstance(name, str) or name not in backends:
        names = ", ".join(("auto", "tcp", "cma", "torch", *backends)) if backends else "auto, tcp, cma"
        raise ValueError(f"fabric: expected one of {names} with torch {torch.__version__}, got {chosen!r}")
    if is_encrypted:
        raise ValueError(f"fabric: expected auto, tcp or cma with ssl_context, got {chosen!r}, which encrypts nothing")
    return name


def _are_two_contexts(found: object) -> bool:
    return isinstance(found, tuple) and len(found) == 2 and all(isinstance(each, ssl.SSLContext) for each in found)


def _open(
    fabric: Fabric,
    host: str | None,
    interface: str | None,
    port: int,
    contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None,
) -> tuple[LocalPeer, Listener[FirstFrame]]:
    """Begin to listen, and say where; let memory be read, if that is asked for.

    Raises:
        LocalProtocolError: It cannot listen on the port, or has no address to be reached at.
        ValueError: An argument is out of range, or there is no such host or interface.
    """
    # type and not isinstance: True is an int.
    if type(port) is not int or not 0 <= port < 1 << 16:
        raise ValueError(f"port: expected 0 to 65535, got {port!r}")
    if contexts is not None and not _are_two_contexts(contexts):
        raise ValueError(f"ssl_context: expected two of ssl.SSLContext, got {contexts!r}")
    if fabric == "cma":
        let_others_read()
    # First what can be said of the arguments, so that a wrong one is a ValueError, whatever this machine's network is
    # like.
    hosts = resolve(host) if host is not None else []
    try:
        addresses = rank_addresses(interfaces(), hosts, interface, os.environ)
    except OSError as exc:
        raise LocalProtocolError(f"the addresses of this machine cannot be listed: {exc}") from None
    # New for each transport, and never written down: it goes to the other replicas by way of torchft's servers, in the
    # metadata.
    secret = secrets.token_bytes(SECRET_BYTES)
    dispatcher = Dispatcher()
    try:
        listener = Listener(
            secret, port, contexts[0] if contexts else None, first_frame, dispatcher.dispatch, dispatcher.tick
        )
    except OSError as exc:
        raise LocalProtocolError(f"cannot listen on port {port}: {exc}") from None
    metadata = Endpoint(addresses, listener.port, secret, contexts is not None).encode()
    # For people alone, in the source's report.
    name = f"{platform.node()} pid {os.getpid()}"
    return LocalPeer(secrets.token_bytes(16), name, metadata, dispatcher, contexts), listener


def _close(listener: Listener[FirstFrame], dispatcher: Dispatcher) -> None:
    # No waiting in here: where the transport was forgotten this runs wherever its last reference went.
    listener.close()
    dispatcher.close_all()
