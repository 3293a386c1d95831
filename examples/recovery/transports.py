"""The transports one can choose, and what their transfers did, measured from outside, alike for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path
from torchft import ProcessGroupGloo
from torchft.checkpointing.http_transport import HTTPTransport
from torchft.checkpointing.pg_transport import PGTransport as TorchftPGTransport
from torchft.checkpointing.transport import CheckpointTransport

from recovery.replica import Parent

__all__ = ["MeasuredTransport", "build_transport", "tensor_addresses"]

StateDict = dict[str, Any]
StateDictFn = Callable[[], StateDict]

PROGRESS_INTERVAL = 0.02  # seconds between two progress events; a screen shows no more


def build_transport(
    name: str, pg: ProcessGroupGloo, timeout: timedelta, state_dict: StateDictFn | None, parent: Parent
) -> CheckpointTransport[StateDict]:
    """One of the transports by name; ``state_dict`` is None when nothing should land in place."""
    device = torch.device("cpu")
    if name == "torchft-http":
        return HTTPTransport(timeout, num_chunks=0)
    if name == "torchft-pg":
        return TorchftPGTransport(pg, timeout, device, state_dict and (lambda: _envelope(state_dict())))
    import ft_transport

    progress = _ThrottledProgress(parent)
    if name == "lanes":
        return ft_transport.LaneTransport(timeout, device, state_dict=state_dict, on_progress=progress)
    return ft_transport.PGTransport(pg, timeout, device, state_dict=state_dict, on_progress=progress)


def _envelope(user: StateDict) -> StateDict:
    """What the Manager sends; torchft's PGTransport looks its template's leaves up by their path in there."""
    return {"user": {"default": user}, "torchft": {"step": 0, "batches_committed": 0}}


class _ThrottledProgress:
    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._last = 0.0

    def __call__(self, progress: Any) -> None:
        now = time.monotonic()
        if now - self._last < PROGRESS_INTERVAL or progress.role != "destination":
            return
        self._last = now
        self._parent.emit("progress", nbytes_done=progress.nbytes_done, nbytes_total=progress.nbytes_total)


def tensor_addresses(state_dict: StateDict) -> dict[str, int]:
    """Path to address of each tensor with elements."""
    leaves, _ = tree_flatten_with_path(state_dict)
    return {keystr(path): leaf.data_ptr() for path, leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.numel()}


@dataclass
class _Landing:
    """Bytes of a received state's tensors, and how many lie at the address of the template's tensor."""

    nbytes: int = 0
    in_place_nbytes: int = 0

    @classmethod
    def of(cls, received: StateDict, addresses: dict[str, int]) -> _Landing:
        landing = cls()
        for path, leaf in tree_flatten_with_path(received)[0]:
            if not isinstance(leaf, torch.Tensor):
                continue
            landing.nbytes += leaf.nbytes
            if addresses.get(keystr(path)) == leaf.data_ptr():
                landing.in_place_nbytes += leaf.nbytes
        return landing


class MeasuredTransport(CheckpointTransport[StateDict]):
    """Passes every call on, and tells the parent when it began, when it ended, and where the bytes are.

    Attributes:
        received: Whether a receive has ended well since this was last set to False.
    """

    def __init__(self, transport: CheckpointTransport[StateDict], state_dict: StateDictFn, parent: Parent) -> None:
        self.received = False
        self._transport = transport
        self._state_dict = state_dict
        self._parent = parent

    def metadata(self) -> str:
        return self._transport.metadata()

    def disallow_checkpoint(self) -> None:
        self._transport.disallow_checkpoint()

    def shutdown(self, wait: bool = True) -> None:
        self._transport.shutdown(wait)

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: StateDict, timeout: timedelta) -> None:
        self._parent.emit("sending", step=step, dst_ranks=dst_ranks)
        start = time.perf_counter()
        try:
            self._transport.send_checkpoint(dst_ranks, step, state_dict, timeout)
        except Exception as error:
            self._parent.emit("transfer_failed", role="source", step=step, error=repr(error))
            raise
        self._parent.emit(
            "sent", step=step, dst_ranks=dst_ranks, seconds=time.perf_counter() - start, report=self._report()
        )

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> StateDict:
        addresses = tensor_addresses(self._state_dict())
        self._parent.emit("receiving", step=step, src_rank=src_rank)
        start = time.perf_counter()
        try:
            state_dict = self._transport.recv_checkpoint(src_rank, metadata, step, timeout)
        except Exception as error:
            self._parent.emit("transfer_failed", role="destination", step=step, error=repr(error))
            raise
        seconds = time.perf_counter() - start
        landing = _Landing.of(state_dict["user"]["default"], addresses)
        self.received = True
        self._parent.emit(
            "received",
            step=step,
            src_rank=src_rank,
            seconds=seconds,
            nbytes=landing.nbytes,
            in_place_nbytes=landing.in_place_nbytes,
            report=self._report(),
        )
        return state_dict

    def _report(self) -> dict[str, Any] | None:
        report = getattr(self._transport, "last_report", None)
        return None if report is None else report.as_dict()
