"""The torchft transport over a group.

torchft's Manager calls a transport from its quorum thread: ``send_checkpoint`` on a healthy replica,
``recv_checkpoint`` on a recovering one. What they raise fails the step on that replica and makes the next quorum
configure every group anew.
"""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TypeVar

import torch
from torchft.process_group import ProcessGroup, ProcessGroupBaby

from ft_transport._deadline import Deadline
from ft_transport._device import Streams
from ft_transport._group.channel import Channel, GroupChannel
from ft_transport._group.destination import receive
from ft_transport._group.fan_out import in_parallel
from ft_transport._group.source import LAST_WORDS, send_failure, serve
from ft_transport._options import Options
from ft_transport._plan.rewrite import Received
from ft_transport._plan.source import SourcePlan
from ft_transport._plan.torn import Attempt
from ft_transport._telemetry.events import EventCallback
from ft_transport._telemetry.report import Copies, OnMismatch, PeerReport, ProgressCallback, TransferReport
from ft_transport._torchft.managed import ManagedTransport, StateDict
from ft_transport._transport import check_ranks, check_step
from ft_transport._wire.frames import VERSION
from ft_transport.errors import PeerFailure, RemoteProtocolError, TransferTimeout, reason_of, refused_for_good

__all__ = ["PGTransport"]

T = TypeVar("T")


class PGTransport(ManagedTransport[T]):
    """Moves a healthy replica's state to recovering ones over the process group that the Manager has.

    A drop-in for ``torchft.checkpointing.pg_transport.PGTransport``.

    Args:
        pg: The process group, configured by the Manager before each transfer: one of torchft's, or one of torch's own
            where torchft takes those (see ``docs/versions.md``).
        timeout: Upper bound of each transfer as a whole; the shorter of this and the Manager's own counts. Keep it
            below the Manager's time-out, so that a failed heal ends before the other replicas' collectives do.
        device: Where messages live: what the process group can send (CPU for Gloo, an accelerator for NCCL).
        state_dict: Gives the template, whose tensors receive the state in place. Pass the function that the
            Manager gets as ``state_dict``, or one that returns a dict of them by registered key; ``"manager"`` gives
            all that is registered with the Manager that calls, keys that are added later (DiLoCo's fragments) among it.
        verify: Compare digests of the messages that this side sends as the source: True of every byte, False none.
            None: of every byte where this process has at least four cores, else of every byte of messages below 2 MiB
            and of one block in 32 of larger ones, because there the digests would take time from the transfer.
        strict: Refuse a state when the template lacks one of its tensors, or has a leaf that it lacks, or one that does
            not fit it.
        on_progress: Called with a :class:`Progress` after each flight of up to 64 MiB, from the thread that moves it;
            :func:`progress_bar` gives one that draws a bar.
        shadow: As a destination, receive beside the template, and copy into it once everything has arrived and agrees:
            nothing that happens on the wire can tear the replica. Costs the copy, and memory for another state until
            the optimizer may step.
        on_event: Called with a dict when a transfer is over, from the thread that called; see ``docs/operations.md``.
            What it raises is logged.
        on_mismatch: What becomes of a leaf whose shape, dtype or kind is not the template's. ``"fresh"``: it is new,
            the template's own is left alone, and ``load_state_dict`` judges. ``"refuse"``: the state is refused. Or a
            function of the path, what was expected and what the source has, which returns one of these. A state none of
            whose tensors fits is refused in any case.

    Threading: one call at a time; torchft uses its quorum thread.
    """

    def __init__(
        self,
        pg: ProcessGroup,
        timeout: timedelta,
        device: torch.device,
        state_dict: StateDict = None,
        *,
        verify: bool | None = None,
        strict: bool = False,
        on_progress: ProgressCallback | None = None,
        shadow: bool = False,
        on_event: EventCallback | None = None,
        on_mismatch: OnMismatch = "fresh",
    ) -> None:
        options = Options(
            torch.device(device),
            verify=verify,
            strict=strict,
            on_progress=on_progress,
            shadow=shadow,
            on_event=on_event,
            on_mismatch=on_mismatch,
            copies=Copies(),
            # A Baby group runs in a child: what it is given moves into memory that both share, for good.
            shared=isinstance(pg, ProcessGroupBaby) and torch.device(device).type == "cpu",
            in_order=_is_in_order(pg, torch.device(device)),
        )
        super().__init__(options, state_dict, timeout)
        self._pg = pg
        # Lives as long as the transport: a model's forward writes to the same buffers in every step.
        self._beside: set[str] = set()  # paths that forward has written to while they landed

    def metadata(self) -> str:
        """What the Manager hands to the recovering side: the name and the version of what this one says over the group.

        torchft calls it before each quorum, and :meth:`disallow_checkpoint` counts on that.
        """
        self._begin_quorum()
        return _METADATA

    def disallow_checkpoint(self) -> None:
        """Make what was received the source's again where forward has written meanwhile (``docs/faults.md`` says what
        holds), and tell autograd about the tensors that the receive has written to.

        Not earlier: under async quorum the state lands between forward and backward, and backward, whose gradients
        torchft discards, would raise. A graph that lives on after this call errs if it is used.

        Nothing is waited for: :meth:`send_checkpoint` returns when the state is no longer read.

        Raises:
            TornStateError: The replica is torn, and no receive was tried since the newest :meth:`metadata`, or one that
                the Manager takes for complete: its optimizer must not step. Raised again each time, until it is healed.
            RemoteProtocolError: The newest receive was refused, and the next one would be too: the template cannot take
                the state, or the source has another transport, or another version of it. Each fails the step of the
                healthy replicas. So with the third in a row that either side has refused for another reason. Raised
                again until the next quorum.
        """
        self._before_step()

    def shutdown(self, wait: bool = True) -> None:
        """Nothing to stop: no thread outlives a call. The group is the Manager's."""

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta | None = None) -> None:
        """Send ``state_dict`` to all ``dst_ranks`` at once, and wait until each has answered or failed.

        A destination counts as served when it has answered that everything arrived and agrees. One that dies,
        refuses or fails costs the others nothing and raises nothing here: ``last_report`` and the log say what
        became of each.

        Args:
            dst_ranks: Replica ranks in the configured process group, without this replica's own. Empty: nothing moves.
            step: Step of the state.
            state_dict: The state; must not change until this returns. An optimizer of another thread that is about to
                step on it waits until then.
            timeout: Upper bound of the whole call. None: the constructor's alone.

        Raises:
            LocalProtocolError: A rank is not in the group; nobody was told. Or: a leaf cannot travel; nothing was sent,
                and the destinations have been told. Or: the state has changed while it was sent (in-place operations
                of torch on its large tensors are seen), and destinations that were not done have been told.
            TransferTimeout: The deadline passed for at least one destination, or before an accelerator of this side's
                had done its copies. What the others got is theirs, but the group must be configured anew.
            PeerFailure: The group was unusable from the start.
            TornStateError: This replica is torn. Nothing was sent, and the destinations have been told.

        After an error: nothing reads the state any more.
        Threading: torchft's quorum thread; one call at a time.
        """
        report = TransferReport("source", type(self).__name__, step)
        with self._transfer(report):
            check_step(step)
            # At each call: the Manager configures the group anew for each quorum, and numbers the replicas anew.
            check_ranks(dst_ranks, self._pg.size(), _own_rank(self._pg))
            report.peers = [PeerReport(rank) for rank in dst_ranks]
            deadline = self._limit(timeout)
            with self._watching(report, deadline):
                self._send(report, state_dict, deadline)

    def _send(self, report: TransferReport, state_dict: object, deadline: Deadline) -> None:
        # A Baby group answers on one pipe: calls from several threads would read each other's answers.
        lock = threading.Lock() if isinstance(self._pg, ProcessGroupBaby) else None
        device = self._options.device
        # New ones for each transfer: the Manager has configured the group anew since, and what an old one had posted is
        # gone with the old pairs.
        channels = [self._channel(peer.rank, lock) for peer in report.peers]
        try:
            self._guard.check_source()
            with report.phase("describe", self._options.on_phase):
                outbound = SourcePlan(
                    # An optimizer that is about to write what is read waits until it is read no more, or the deadline
                    # is over: this call returns only then, so nobody else can end it.
                    state_dict,
                    report.step,
                    self._options,
                    report,
                    lambda reading: reading.await_release(deadline),
                    deadline=deadline,
                )
        except BaseException as exc:
            reason = reason_of(exc)
            # The destinations wait for a manifest. Told now they fail within a moment, else at their deadline, and a
            # step of the whole job with them.
            if not isinstance(exc, Exception):  # Ctrl-C, or a class's own code ends the process: no time to wait
                deadline = Deadline(min(deadline.remaining(), LAST_WORDS))
            streams = Streams((), deadline, device)
            in_parallel(channels, lambda i: send_failure(channels[i], device, deadline, reason), streams)
            raise
        try:
            # Described once, read by all of them; each has its own place in it, and its own buckets.
            errors = in_parallel(
                channels, lambda i: serve(channels[i], outbound, deadline, report.peers[i]), outbound.streams
            )
        finally:
            # Optimizers that wait for the end of this may step now. Also after an error: nothing is read any more.
            outbound.versions.release()
        # What a destination has done to itself is not raised: torchft would not commit this step here while the other
        # destinations do, and in the next quorum the source would be healed from them.
        _raise_own(channels, errors)

    def _receive(
        self, report: TransferReport, src_rank: int, metadata: str, deadline: Deadline, attempt: Attempt, trains: bool
    ) -> Received:
        check_ranks([src_rank], self._pg.size(), _own_rank(self._pg))
        report.peers = [PeerReport(src_rank, phase="agree")]
        channel = self._channel(src_rank)
        if (error := _foreign(metadata)) is not None:
            # As in ``receive``: this replica will not take part in the step, and nobody shall wait for it there.
            channel.abort()
            raise error
        with self._watching(report, deadline):
            return receive(
                channel,
                report.step,
                self._template(),
                self._options,
                deadline,
                report,
                attempt=attempt,
                beside=self._beside if trains else None,
            )

    def _channel(self, rank: int, lock: threading.Lock | None = None) -> Channel:
        return GroupChannel(self._pg, rank, self._options.device, lock, in_order=self._options.in_order)


_NAME = "ft-group"
_METADATA = f"{_NAME}/{VERSION}"
# What torchft's own transport over a group says.
_TORCHFTS = "<n/a>"


def _foreign(metadata: str) -> RemoteProtocolError | None:
    """What is wrong with a source whose metadata says that it will send nothing that this side can read.

    It would be waited for until the deadline, in each quorum. Whoever calls by hand may pass anything else.
    """
    said = str(metadata)  # another transport's may be anything
    if said == _METADATA:
        return None
    expected, need = f"version {VERSION} of a state over a group", "release"
    if not said.startswith(f"{_NAME}/"):
        if said != _TORCHFTS and "://" not in said:
            return None
        # No more of it than its scheme: there may be a secret behind.
        said, expected, need = said.partition("://")[0], "the metadata of ft_transport's PGTransport", "transport"
    return refused_for_good(f"expected {expected}, got {said[:20]!r}: all replicas need the same {need}")


def _is_in_order(pg: ProcessGroup, device: torch.device) -> bool:
    """Whether the operations of a pair run as they were posted, and tags are dropped."""
    # NCCL and its like: one stream for each pair. torchft's group over torchcomms has no tags on the CPU either; by
    # name, since importing it imports torchcomms, which few have.
    if device.type != "cpu":
        return True
    inner: object = pg
    while inner is not None:
        if "ProcessGroupTorchComms" in {cls.__name__ for cls in type(inner).__mro__}:
            return True
        inner = getattr(inner, "_pg", None)  # torchft's wrappers: of errors, of a Manager
    return False


def _own_rank(pg: ProcessGroup) -> int | None:
    if isinstance(pg, torch.distributed.ProcessGroup) and not isinstance(pg, ProcessGroup):
        return pg.rank()  # one of torch's own, which torchft's nightlies take
    # torchft's wrappers know their rank only since they were configured; rank() of their base class is always 0.
    found: int | None = getattr(pg, "_rank", None)
    return found


def _raise_own(channels: list[Channel], errors: list[BaseException | None]) -> None:
    """Raise what is this side's own trouble; a destination's is in its report."""
    # This side's first: a state that cannot travel, or that has changed, is why the destinations failed.
    own = [error for error in errors if error is not None and not isinstance(error, _PEERS)]
    broken = [error for channel, error in zip(channels, errors, strict=True) if channel.broken and error is not None]
    # A deadline that has passed explains what came after it: it has closed every pair of the group, and the other
    # destinations' threads have seen nothing but that.
    broken.sort(key=lambda error: not isinstance(error, TransferTimeout))
    for error in own + broken:
        raise error


# Errors that are a destination's trouble, unless the group broke with them.
_PEERS = (TransferTimeout, PeerFailure, RemoteProtocolError)
