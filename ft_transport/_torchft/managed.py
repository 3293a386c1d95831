"""What both torchft transports share: what an application may ask, and what a Manager means by its calls.

Strategy: torchft calls a transport in a fixed order, once in each step: ``metadata()`` before the quorum, then a send
or a receive on the quorum's thread, then ``disallow_checkpoint()`` on the thread that trains, after the vote and before
the optimizer steps. Neither the first nor the last is in a ``try`` of the Manager's: what they raise ends the process,
so only a state that must not be trained with is worth it.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
from torchft.checkpointing.transport import CheckpointTransport

from ft_transport._deadline import Deadline
from ft_transport._options import Options
from ft_transport._plan.rebuild import mark_changed
from ft_transport._plan.rewrite import Received, Rewrite
from ft_transport._plan.torn import Attempt
from ft_transport._plan.unchanged import watch_optimizers
from ft_transport._process import undisturbed
from ft_transport._telemetry.report import TransferReport
from ft_transport._torchft.manager import RegisteredState, calling_manager, goes_on_training, has_failed
from ft_transport._transport import TransportBase, check_step
from ft_transport.state_digest import StateDigest, state_digest

__all__ = ["ManagedTransport", "StateDict"]

logger = logging.getLogger("ft_transport")

T = TypeVar("T")

# What a constructor takes as ``state_dict``.
StateDict = Callable[[], object] | Literal["manager"] | None


class ManagedTransport(TransportBase, CheckpointTransport[T]):  # type: ignore[misc]
    """A transport that a Manager calls.

    Args:
        options: The caller's choices.
        state_dict: Gives the template; or ``"manager"``: all that is registered with the Manager that calls.
        timeout: Upper bound of each transfer as a whole.
    """

    def __init__(self, options: Options, state_dict: StateDict, timeout: timedelta) -> None:
        if isinstance(state_dict, str) and state_dict != "manager":
            raise ValueError(f"state_dict: expected a function or 'manager', got {state_dict!r}")
        if state_dict is not None and not isinstance(state_dict, str) and not callable(state_dict):
            # Else it would come up in the first heal, and fail that on the source as well.
            raise TypeError(f"state_dict: expected a function that gives it, got {type(state_dict).__name__}")
        # Not with the first transfer: DiLoCo asks for that within a step of its optimizer, which would not be known.
        watch_optimizers()
        self._registered = RegisteredState()
        super().__init__(options, self._registered if state_dict == "manager" else state_dict, timeout)
        # A list, since a template may be None.
        self._captured: list[object] = []  # what capture_template() has found; empty without
        self._from_manager = False
        self._changed: list[torch.Tensor] = []  # written to by a receive, and autograd does not know it yet
        self._rewrite: Rewrite | None = None

    def mark_restored(self) -> None:
        """Say that the whole template holds one state again, which came from elsewhere: a durable checkpoint.

        Raises:
            LocalProtocolError: A receive is under way.
        """
        self._guard.mark_restored()
        self._rewrite = None

    def capture_template(self) -> None:
        """Take the template now, on the calling thread, and keep its tensors for all receives that follow.

        Without, the ``state_dict`` function is called in each receive, on torchft's quorum thread; with an asynchronous
        quorum that is under a running forward, which modules whose ``state_dict()`` moves their parameters (FSDP2,
        which reshards) do not bear. Call it on the thread that trains, when the model is built, and again when tensors
        have been replaced or added: after the optimizer's first step.

        Raises:
            ValueError: There is no ``state_dict`` function to call.
        After an error: what was captured before is kept.
        """
        self._captured = [self._state()]

    def state_digest(self, state_dict: object = None) -> StateDigest:
        """Fingerprint a state, to compare it with other replicas'; see ``ft_transport.state_digest``.

        Args:
            state_dict: None for what the function gives that the constructor got.
        """
        # The template is what this replica trains with, so its digest is the replica's.
        return state_digest(self._state() if state_dict is None else state_dict)

    def _state(self) -> object:
        if self._state_dict is None:
            raise ValueError("state_dict: expected one, since the transport was given no function that gives it")
        return self._state_dict()

    def _template(self) -> Callable[[], object] | None:
        """What gives the template in a receive that is beginning."""
        if self._captured:
            # The tensors and not the function: called here, under a running forward, FSDP2's state_dict() would
            # reshard, and break the thread that trains.
            (captured,) = self._captured
            return lambda: captured
        return self._state_dict

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta | None = None) -> T:
        """Receive the state dict of ``step`` from replica ``src_rank``.

        Tensors land in the template given to the constructor where shape, dtype and layout agree with the
        sender's; other leaves are new. The result aliases the template. Over lanes what an earlier receive of the same
        step has left in the template is compared and not moved again.

        Args:
            src_rank: Replica rank of the source in the configured process group; over lanes for the report alone.
            metadata: What the source's ``metadata()`` returned. A ``LaneTransport``'s own: all leaves are new then.
            step: Step that both sides must agree on.
            timeout: Upper bound of the whole call. None: the constructor's alone.

        Returns:
            State dict with the sender's nesting. Over lanes it may be read for another destination until
            :meth:`disallow_checkpoint` has returned, or until an optimizer is about to step on it, which waits for
            that. Within an optimizer's step, this waits for it.

        Raises:
            TransferTimeout: The deadline passed; ``phase`` and ``nbytes_done`` say where.
            PeerFailure: The source is gone, or gave up and said why; over lanes also: it has been silent for too long,
                or has gone on to a later step.
            RemoteProtocolError: The source sent another step, a state that does not fit the template (every path
                is listed; the template is untouched), or bytes that do not agree with their digests.
            LocalProtocolError: ``src_rank`` is not in the group, or this side has no room, or was shut down.

        After an error: nothing reads or writes the template any more. If ``error.torn``, it holds a mix of two states,
            and this replica cannot serve or commit until it has healed. A group must be configured anew.
        Threading: torchft's quorum thread; one call at a time.
        """
        report = TransferReport("destination", type(self).__name__, step)
        with self._transfer(report), self._guard.receiving(report) as attempt:
            # Before anything else can fail: whether this call came from a Manager counts also where it fails.
            trains = self._begin_receive()
            check_step(step)
            arrived = self._receive(report, src_rank, metadata, self._limit(timeout), attempt, trains)
            self._end_receive(arrived)
            return cast(T, arrived.state)

    @abstractmethod
    def _receive(
        self, report: TransferReport, src_rank: int, metadata: str, deadline: Deadline, attempt: Attempt, trains: bool
    ) -> Received:
        """Move a state here; ``trains`` says whether the training thread goes on meanwhile."""

    # ------------------------------------------------------------------- what the Manager's calls mean

    def _begin_quorum(self) -> None:
        """A Manager asks for the metadata: a new step begins. Somebody else may ask at any time, which means nothing.

        Who never had a Manager is taken at its word.
        """
        manager = calling_manager()
        if manager is not None:
            goes_on_training(manager)  # one that does not say must not get as far as a heal
            self._registered.note(manager)
        # A test, or a probe of the application, between two steps must not make a torn replica look as if nobody had
        # tried to heal it. But where receives come without a Manager (another library calls as torchft does), whoever
        # asks begins a step.
        if manager is not None or not self._from_manager:
            self._guard.begin_quorum()

    def _begin_receive(self) -> bool:
        """Forget what was received before; gives whether the training thread goes on meanwhile."""
        self._rewrite = None
        manager = calling_manager()
        self._from_manager = manager is not None
        self._registered.note(manager)
        return goes_on_training(manager)

    def _end_receive(self, arrived: Received) -> None:
        """Remember what has been received, until :meth:`_before_step`."""
        self._changed, self._rewrite = arrived.written, arrived.rewrite
        if arrived.rewrite is not None:
            # From now on an optimizer that is about to step settles it first: with streaming DiLoCo the inner one steps
            # before the Manager calls disallow_checkpoint().
            arrived.rewrite.watch(self._settle)

    def _before_step(self) -> None:
        """The step is about to be taken: let it be taken with the source's state, or not at all.

        Raises:
            TornStateError, RemoteProtocolError: See ``TornGuard.check_step``.
        """
        self._settle()
        changed, self._changed = self._changed, []
        # Not when they landed: that is between forward and backward under async quorum, and backward, whose gradients
        # torchft discards, would raise in the thread that trains.
        mark_changed(changed)
        # Last: all that was under way is over, whether this raises or not.
        # A quorum whose group could not be configured (it counts one that has just died) has tried no heal, and its
        # step is not committed: the next one can still heal this replica.
        self._guard.check_step(failed=has_failed(calling_manager()))

    def _settle(self) -> None:
        """Make what was received the source's again, whatever forward has written. Never raises."""
        rewrite, self._rewrite = self._rewrite, None
        if rewrite is None:
            return
        try:
            with undisturbed():
                lost = rewrite.write()
        except Exception as exc:
            # Not raised: this runs in an optimizer's hook or between vote and step, where what is raised ends the
            # process. The guard stops the replica by name.
            logger.exception("a received state could not be written again")
            # The replica counts as torn: nobody can say which bytes are the source's any more.
            lost = [f"an unknown part of the state ({exc})"]
        if lost:
            self._guard.lose(lost)
