"""A process group of the simulated accelerator: as NCCL's, it takes its tensors alone, keeps order, and has no tags."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["register"]


class _Work(dist._Work):
    """Something that is done later, by a thread."""

    def __init__(self) -> None:
        super().__init__()
        self._over = threading.Event()
        self.error: BaseException | None = None

    def end(self) -> None:
        self._over.set()

    def wait(self, timeout: timedelta = timedelta(seconds=60)) -> bool:
        if not self._over.wait(timeout.total_seconds()):
            raise TimeoutError("timed out waiting")
        if self.error is not None:
            raise self.error
        return True


class SimGroup(dist.ProcessGroup):
    """Moves what is on the device by way of the host, over Gloo."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)  # type: ignore[call-overload]
        self._timeout = timeout
        # One after the other, as on one stream: what is posted first is first over.
        self._posted: queue.SimpleQueue[tuple[Callable[[], object], _Work]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def getBackendName(self) -> str:  # noqa: N802
        return "simccl"

    @property
    def group_name(self) -> str:
        # C++ would have it of a backend, and this is the group itself.
        return dist.distributed_c10d._world.pg_names[self]

    def _run(self) -> None:
        while True:
            act, work = self._posted.get()
            try:
                act()
            except BaseException as exc:
                work.error = exc
            work.end()

    def _post(self, tensors: list[torch.Tensor], act: Callable[[list[torch.Tensor]], Any]) -> _Work:
        """Do something with the tensors' values on the host, then give them what it has left there."""
        # Behind what the caller's stream was told by now, as a real one waits for that.
        there = [tensor for tensor in tensors if not tensor.is_cpu]
        event = torch.accelerator.current_stream(there[0].device).record_event() if there else None

        def run() -> None:
            if event is not None:
                event.synchronize()
            host = [tensor.cpu() for tensor in tensors]
            work = act(host)
            if work is not None:
                work.wait(self._timeout)
            for tensor, value in zip(tensors, host, strict=True):
                tensor.copy_(value)

        work = _Work()
        self._posted.put((run, work))
        return work

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int = 0) -> _Work:
        _check(tensors)
        return self._post(tensors, lambda host: self._gloo.send(host, dst, 0))

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int = 0) -> _Work:
        _check(tensors)
        return self._post(tensors, lambda host: self._gloo.recv(host, src, 0))

    def broadcast(self, tensors: list[torch.Tensor], options: Any = None) -> _Work:
        return self._post(tensors, lambda host: self._gloo.broadcast(host, options))

    def allreduce(self, tensors: list[torch.Tensor], options: Any = None) -> _Work:
        return self._post(tensors, lambda host: self._gloo.allreduce(host, options))

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], options: Any = None) -> _Work:
        return self._post([*outputs[0], *inputs], lambda host: self._gloo.allgather([host[:-1]], host[-1:]))

    def barrier(self, options: Any = None) -> _Work:
        return self._post([], lambda host: self._gloo.barrier())


def _check(tensors: list[torch.Tensor]) -> None:
    # Of sends and receives alone: torch gathers objects by way of the host where it does not know a group's devices.
    if any(tensor.is_cpu for tensor in tensors):
        raise RuntimeError("simccl: expected a tensor of the device, got one on the CPU")


def register() -> None:
    """Let ``init_process_group("simccl")`` make one."""

    def make(store: dist.Store, rank: int, size: int, timeout: timedelta) -> SimGroup:
        return SimGroup(store, rank, size, timeout)

    dist.Backend.register_backend("simccl", make, devices=["sim"])
