"""What the Manager that calls a transport is like. Reads torchft's Manager, does not import it.

Strategy: torchft hands a transport no word of how it is used, and two things hang on it: whether training goes on while
a state lands (``use_async_quorum``), and which state dicts are registered. Both are attributes of the Manager, whose
method is among the callers; torchft 0.2.0 and its nightly of 2026-10-26 call them alike. Where no Manager is among the
callers (a test, another library) there is None, and the caller decides what that means.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from ft_transport.errors import LocalProtocolError

__all__ = ["RegisteredState", "calling_manager", "goes_on_training", "has_failed"]

# Frames between a transport's method and the Manager's: wrappers, subclasses, profilers.
_MAX_FRAMES = 32


def calling_manager() -> Any:
    """The Manager that has called, directly or through wrappers; None if nobody of that kind has."""
    # Costs microseconds, in calls that move a state or ask for a quorum.
    frame = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        # By name and not by class: nothing here imports torchft's Manager, and a subclass of the user's calls super().
        if frame.f_globals.get("__name__") == "torchft.manager":
            return frame.f_locals.get("self")
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def goes_on_training(manager: Any) -> bool:
    """Whether the replica's training thread runs forward while its state lands, and loads the state after that.

    With a synchronous quorum it waits, loads at once, and what it writes afterwards is training that counts (DiLoCo's
    inner steps among it): that must never be undone. Who calls without a Manager gets the other answer.

    Raises:
        LocalProtocolError: This torchft's Manager does not say. Either guess would make wrong states.
    """
    if manager is None:
        return True
    try:
        # Private: no public name says it. An attribute that is missing is an error and no default, for either default
        # would be wrong for half of the users, in silence.
        return bool(manager._use_async_quorum)
    except AttributeError:
        raise LocalProtocolError(
            "expected a Manager with _use_async_quorum, as in torchft 0.2.0: this one does not say whether training "
            "goes on while a state lands"
        ) from None


def has_failed(manager: Any) -> bool:
    """Whether something has failed in this step, which the Manager has voted not to commit."""
    # ``errored()`` is public. ``should_commit`` votes with it before it calls ``disallow_checkpoint``.
    return manager is not None and manager.errored() is not None


class RegisteredState:
    """Gives what each function gives that is registered with a Manager, by key, as the Manager itself would send it.

    That is the Manager that calls, else the newest that has: the application asks between two calls.
    """

    def __init__(self) -> None:
        # Not held: the Manager holds its transport, and neither should keep the other alive.
        self._manager: weakref.ref[Any] | None = None

    def note(self, manager: Any) -> None:
        """A Manager has called; None for nobody."""
        if manager is not None:
            self._manager = weakref.ref(manager)

    def __call__(self) -> dict[str, object]:
        """The state, now.

        Raises:
            LocalProtocolError: No Manager has called, or it is of a torchft that keeps the functions elsewhere.
        """
        manager = calling_manager()
        if manager is None and self._manager is not None:
            manager = self._manager()
        try:
            # Asked anew each time: DiLoCo registers its fragments when the training has begun.
            functions = dict(manager._user_state_dicts)
        except AttributeError:
            raise LocalProtocolError(
                "state_dict='manager': expected to be called by a Manager of torchft 0.2.0 or its like, "
                f"got {manager!r}"
            ) from None
        return {key: _with_originals(function, function()) for key, function in functions.items()}


def _with_originals(function: Any, state: object) -> object:
    """What a function gives; what a fragment of DiLoCo gives, with its own tensors in the place of copies of them.

    A fragment gives clones of the parameters of its last sync, other ones in each call. What is received into those
    reaches the fragment by a second copy, in fresh memory as large as the model.
    """
    fragment = _self_of(function)
    # By name, as above. What another torchft's fragment gives is taken as it is.
    if type(fragment).__module__ != "torchft.local_sgd" or not isinstance(state, dict):
        return state
    originals: Any = getattr(fragment, "original_parameters", {})
    if state.get("original_parameters", {}).keys() != originals.keys():
        return state
    return {**state, "original_parameters": dict(originals)}


def _self_of(function: Any) -> object:
    """The ``self`` of the method that a function was made in; None where there is none."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, function.__closure__ if names else (), strict=True):
        if name == "self":
            return cell.cell_contents
    return None
