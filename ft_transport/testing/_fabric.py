"""A one-sided transport that goes wrong when it is told to, and needs neither torch 2.15 nor a network."""

from __future__ import annotations

import json
import threading
import weakref
from types import TracebackType
from typing import TypeVar

import torch

from ft_transport._net.cma import TOKEN_BYTES, PeerMemory, ShownToken, new_token
from ft_transport._net.one_sided import register, unregister
from ft_transport._process import memory_at

__all__ = ["FaultyFabric"]

B = TypeVar("B", bound="FaultyFabric")


class FaultyFabric:
    """A backend like those of ``torch.distributed._transport`` that reads within a machine, with faults.

    Its faults are this process's, as is what it counts.

    ::

        with FaultyFabric("faulty").stall_at(3) as fabric:
            transport = LaneTransport(timeout, device, fabric="faulty")

    Each call adds a fault, and gives this object. Reads are counted from 0, over all endpoints of this process.

    Args:
        name: By which transports ask for it. Both sides' processes must have it.

    Attributes:
        num_reads: Begun so far.
        num_made: Endpoints so far.
        num_open: Endpoints that are not closed.
        num_registered: Registrations so far.

    Threading: any.
    """

    def __init__(self, name: str = "faulty") -> None:
        self.num_reads = self.num_made = self.num_open = self.num_registered = 0
        self._name = name
        self._faults: dict[int, str] = {}
        self._unmade = False
        self._late: list[_Work] = []
        self._lock = threading.Lock()
        register(name, self._new)

    def stall_at(self: B, read: int) -> B:
        """Let a read move half of its bytes and never end; nor does the endpoint's ``close``."""
        return self._add(read, "stall")

    def die_at(self: B, read: int) -> B:
        """Let a read move half of its bytes and fail."""
        return self._add(read, "die")

    def delay_at(self: B, read: int) -> B:
        """Let a read move nothing until :meth:`land`, and then all."""
        return self._add(read, "delay")

    def forget_at(self: B, read: int) -> B:
        """Let a read stand still, and the endpoint be closed meanwhile; :meth:`land` writes all the same."""
        return self._add(read, "forget")

    def fail_to_make(self: B) -> B:
        """Let no endpoint be made any more."""
        self._unmade = True
        return self

    def _add(self: B, read: int, what: str) -> B:
        self._faults[read] = what
        return self

    def land(self) -> int:
        """Let all that stands still go on to its end: late bytes are written now. Gives how many reads."""
        with self._lock:
            late, self._late = self._late, []
        for work in late:
            work.land()
        return len(late)

    @property
    def num_late(self) -> int:
        """How many reads stand still."""
        return len(self._late)

    def close(self) -> None:
        """There is no such backend any more. What stands still is let go on."""
        unregister(self._name)
        self.land()

    def __enter__(self: B) -> B:
        return self

    def __exit__(
        self, cls: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _new(self) -> _Transport:
        if self._unmade:
            raise RuntimeError("failed to create transport")
        with self._lock:
            self.num_made += 1
            self.num_open += 1
        return _Transport(self)

    def _begin(self, view: _View, remote: _Remote, peer: tuple[int, int, bytes]) -> _Work:
        memory = PeerMemory(*peer)
        with self._lock:
            fault = self._faults.get(self.num_reads, "")
            self.num_reads += 1
            work = _Work(view, remote, memory, fault)
            if fault in ("stall", "delay", "forget"):
                self._late.append(work)
        return work


# What follows has the names that torch's interface has.


class _Remote:
    def __init__(self, address: int, length: int) -> None:
        self.address, self.length = address, length

    def serialize(self) -> bytes:
        return json.dumps([self.address, self.length]).encode()

    @classmethod
    def deserialize(cls, data: bytes) -> _Remote:
        address, length = json.loads(data)
        return cls(address, length)


class _View:
    def __init__(self, memory: _Memory, offset: int, length: int) -> None:
        memory.check()
        if not 0 <= offset <= offset + length <= memory.nbytes:
            raise ValueError("view exceeds the registered memory")
        # As a network card: what it was told once it writes to, whatever has become of it.
        self.address, self.length = memory.address + offset, length
        self._kept = memory.tensor()


class _Memory:
    def __init__(self, transport: _Transport, tensor: torch.Tensor) -> None:
        # Whoever registers memory keeps it; what is under way does.
        self.transport, self.tensor = transport, weakref.ref(tensor)
        self.address, self.nbytes = tensor.data_ptr(), tensor.nbytes

    def check(self) -> None:
        if self.transport.is_closed:
            raise RuntimeError("memory has been unregistered")

    def to_mutable_view(self, offset: int, length: int) -> _View:
        return _View(self, offset, length)

    def to_remote_buffer(self) -> _Remote:
        self.check()
        return _Remote(self.address, self.nbytes)


class _Work:
    def __init__(self, view: _View, remote: _Remote, memory: PeerMemory, fault: str) -> None:
        self._view, self._remote, self._memory = view, remote, memory
        self.fault, self._error, self.is_over = fault, "", False
        if fault in ("stall", "die"):
            self._move(view.length // 2)
        if fault == "die":
            self._error, self.is_over = "the link is down", True
        elif not fault:
            self.land()

    def land(self) -> None:
        self._move(self._view.length)
        self.is_over = True

    def _move(self, nbytes: int) -> None:
        try:
            self._memory.read_into(self._remote.address, memory_at(self._view.address, nbytes))
        except OSError as exc:
            self._error = str(exc)

    def is_completed(self) -> bool:
        return self.is_over

    def wait(self) -> bool:
        assert self.is_over, "whoever waits here cannot be told to stop"
        if self._error:
            raise RuntimeError(f"transfer failed: {self._error}")
        return True


class _Transport:
    def __init__(self, fabric: FaultyFabric) -> None:
        self.is_closed = False
        self._fabric = fabric
        self._token = ShownToken(new_token())
        self._peer: tuple[int, int, bytes] | None = None
        self._works: list[_Work] = []
        self._registered: list[_Memory] = []

    def bind(self) -> bytes:
        token = memory_at(self._token.address, TOKEN_BYTES)
        return json.dumps([self._token.pid, self._token.address, bytes(token).hex()]).encode()

    def connect(self, peer: bytes) -> int:
        pid, address, token = json.loads(peer)
        self._peer = pid, address, bytes.fromhex(token)
        PeerMemory(*self._peer)
        return 0

    def register_memory(self, tensor: torch.Tensor) -> _Memory:
        if self.is_closed or not tensor.is_contiguous():
            raise ValueError("expected an open transport and a contiguous tensor")
        self._fabric.num_registered += 1
        self._registered.append(_Memory(self, tensor))
        return self._registered[-1]

    def read(self, view: _View, remote: _Remote, *, async_op: bool) -> _Work:
        assert async_op, "whoever reads waits by itself"
        assert self._peer is not None
        if view.length > remote.length:
            raise ValueError("local view does not fit in the remote buffer")
        self._works.append(self._fabric._begin(view, remote, self._peer))
        return self._works[-1]

    def close(self, *, timeout: float) -> None:
        if any(not work.is_over and work.fault != "forget" for work in self._works):
            raise TimeoutError("transport wait timed out; operation remains pending")
        if not self.is_closed:
            self.is_closed = True
            # Nobody begins to read any more; what is under way goes on.
            memory_at(self._token.address, TOKEN_BYTES)[:] = bytes(TOKEN_BYTES)
            with self._fabric._lock:
                self._fabric.num_open -= 1
