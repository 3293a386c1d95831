"""Heals replicas: moves a healthy replica's state into a recovering one's own tensors.

``ft_transport.PGTransport`` is a ``CheckpointTransport`` for torchft; ``ft_transport.distributed`` has the same
for a plain ``torch.distributed`` group, without torchft.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ft_transport._check import StateCheck, check_state_dict
from ft_transport._state.geometry import Geometry
from ft_transport._state.kinds.base import Kind, Surroundings, register_kind
from ft_transport._telemetry.events import EventCallback, RedactSecrets, transfer_event
from ft_transport._telemetry.progress import progress_bar
from ft_transport._telemetry.report import PeerReport, Progress, TransferReport
from ft_transport._version import __version__
from ft_transport.errors import (
    LocalProtocolError,
    PeerFailure,
    ProtocolError,
    RemoteProtocolError,
    TornStateError,
    TransferError,
    TransferTimeout,
)
from ft_transport.state_digest import LeafDigest, StateDigest, state_digest

if TYPE_CHECKING:
    from ft_transport._torchft.lanes import LaneTransport
    from ft_transport._torchft.pg import PGTransport
    from ft_transport._training.bind import Bound, bind
    from ft_transport._training.materialize import materialize

__all__ = [
    "Bound",
    "EventCallback",
    "Geometry",
    "Kind",
    "LaneTransport",
    "LeafDigest",
    "LocalProtocolError",
    "PGTransport",
    "PeerFailure",
    "PeerReport",
    "Progress",
    "ProtocolError",
    "RedactSecrets",
    "RemoteProtocolError",
    "StateCheck",
    "StateDigest",
    "Surroundings",
    "TornStateError",
    "TransferError",
    "TransferReport",
    "TransferTimeout",
    "__version__",
    "bind",
    "check_state_dict",
    "materialize",
    "progress_bar",
    "register_kind",
    "state_digest",
    "transfer_event",
]


# Imported when they are asked for: ft_transport.distributed is for those without torchft, and who only reads reports
# need not wait for the rest.
_LATE = {
    "Bound": "ft_transport._training.bind",
    "LaneTransport": "ft_transport._torchft.lanes",
    "PGTransport": "ft_transport._torchft.pg",
    "bind": "ft_transport._training.bind",
    "materialize": "ft_transport._training.materialize",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_LATE[name]), name)
    except ModuleNotFoundError as exc:
        if exc.name == "torchft":  # two distributions have it, so neither is a dependency
            exc.msg = f"{exc.msg}: pip install 'ft_transport[torchft]', or torchft-nightly"
        raise
