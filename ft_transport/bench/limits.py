"""What bounds a transport: as many bytes by the bare call, without a description, a digest, or a promise.

Limits take their turns beside the transports, in the same processes and into the same sort of memory. Whatever the
state is made of, they move one flat tensor of its size, ``{"bytes": tensor}``.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torchft.process_group import ProcessGroupGloo

from ft_transport._net.cma import PeerMemory, ShownToken, new_token
from ft_transport.bench.groups import join
from ft_transport.bench.results import MEMMOVE
from ft_transport.bench.subjects import SUBJECTS, Connection, SubjectKind

__all__ = ["LIMITS", "THREADS", "limits_of"]

# As many as a LaneTransport has lanes within a machine.
THREADS = 2

# What is read again and again where one process alone has bytes: no processor's cache holds it, any machine's memory
# does.
_BLOCK_BYTES = 256 << 20


class _Limit:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def metadata(self) -> str:
        return ""

    def send(self, dst_ranks: list[int], state: Any) -> None:
        pass

    def receive(self, metadata: str) -> object:
        target = self._target()
        self._fill(target, metadata)
        return {"bytes": target}

    def _target(self) -> torch.Tensor:
        if self._connection.template is not None:
            return _bytes(self._connection.template())
        memory = mmap.mmap(-1, self._connection.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)  # as quick as fresh memory can be
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _fill(self, target: torch.Tensor, metadata: str) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Memmove(_Limit):
    """Within the receiver."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._block = _new_block(connection)

    def _fill(self, target: torch.Tensor, metadata: str) -> None:
        def copy(part: torch.Tensor) -> None:
            for begin in range(0, part.numel(), self._block.numel()):
                count = min(part.numel() - begin, self._block.numel())
                # Of ctypes, and so without the interpreter's lock; torch would have threads of its own.
                ctypes.memmove(part.data_ptr() + begin, self._block.data_ptr(), count)

        _at_once(copy, _parts(target))


class _DeviceCopy(_Limit):
    """Between pinned memory and the receiver's device."""

    def __init__(self, connection: Connection, to_device: bool) -> None:
        super().__init__(connection)
        self._to_device = to_device
        self._pinned = _new_block(connection).pin_memory()
        self._on_device = self._pinned.to(connection.device)

    def _target(self) -> torch.Tensor:
        return self._on_device if self._to_device else self._pinned

    def _fill(self, target: torch.Tensor, metadata: str) -> None:
        source = self._pinned if self._to_device else self._on_device
        for begin in range(0, self._connection.nbytes, len(target)):
            left = self._connection.nbytes - begin
            target[:left].copy_(source[:left], non_blocking=True)


class _PeersMemory(_Limit):
    """``process_vm_readv``: what lanes do within a machine."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._token = new_token()
        self._shown = ShownToken(self._token)

    def metadata(self) -> str:
        assert self._connection.template is not None
        address = _bytes(self._connection.template()).data_ptr()
        return json.dumps([self._shown.pid, self._shown.address, self._token.hex(), address])

    def _fill(self, target: torch.Tensor, metadata: str) -> None:
        pid, token_address, token, address = json.loads(metadata)
        memory = PeerMemory(pid, token_address, bytes.fromhex(token))

        def read(part: torch.Tensor) -> None:
            memory.read_into(address + part.data_ptr() - target.data_ptr(), part.numpy().data)

        _at_once(read, _parts(target))


class _Tcp(_Limit):
    """A connection and a thread at either end for each part."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._links: list[tuple[int, socket.socket]] = []
        self._server = socket.create_server(("", 0)) if connection.rank == 0 else None

    def metadata(self) -> str:
        assert self._server is not None
        # The store's host is rank 0's, by a name that the other ranks know.
        return json.dumps([self._connection.address.rpartition(":")[0], self._server.getsockname()[1]])

    def send(self, dst_ranks: list[int], state: Any) -> None:
        assert self._server is not None
        while len(self._links) < THREADS * len(dst_ranks):
            link, _ = self._server.accept()
            self._links.append((link.recv(1)[0], link))
        parts = _parts(_bytes(state))
        _at_once(lambda link: link[1].sendall(parts[link[0]].numpy().data), self._links)

    def _fill(self, target: torch.Tensor, metadata: str) -> None:
        for number in range(len(self._links), THREADS):
            link = socket.create_connection(json.loads(metadata))
            link.sendall(bytes([number]))
            self._links.append((number, link))
        parts = _parts(target)

        def receive(link: tuple[int, socket.socket]) -> None:
            view = parts[link[0]].numpy().data
            while len(view):
                count = link[1].recv_into(view, 0, socket.MSG_WAITALL)
                if not count:
                    raise ConnectionError("the source has closed the connection")
                view = view[count:]

        _at_once(receive, self._links)

    def close(self) -> None:
        for _, link in self._links:
            link.close()
        if self._server is not None:
            self._server.close()


class _Gloo(_Limit):
    """``send`` and ``recv`` of one message."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._group = ProcessGroupGloo(timeout=connection.timeout)
        join(self._group, connection.address, connection.rank, connection.world_size)

    def send(self, dst_ranks: list[int], state: Any) -> None:
        works = [self._group.send([_bytes(state)], rank, 0) for rank in dst_ranks]
        for work in works:
            work.wait()

    def _fill(self, target: torch.Tensor, metadata: str) -> None:
        self._group.recv([target], 0, 0).wait()

    def close(self) -> None:
        self._group.shutdown()


_PEERS_MEMORY = "raw process_vm_readv"
_ON_DEVICES = {
    "pinned to device": SubjectKind(partial(_DeviceCopy, to_device=True), brings=False),
    "device to pinned": SubjectKind(partial(_DeviceCopy, to_device=False), brings=False),
}

LIMITS: dict[str, SubjectKind] = {
    MEMMOVE: SubjectKind(_Memmove, brings=False),
    **_ON_DEVICES,
    _PEERS_MEMORY: SubjectKind(_PeersMemory),
    "raw TCP": SubjectKind(_Tcp),
    "raw Gloo": SubjectKind(_Gloo),
}


def limits_of(transports: Iterable[str], one_machine: bool, device: str) -> list[str]:
    """The limits that bound some transports, in the order of the table."""
    wanted = {MEMMOVE} | {limit for name in transports for limit in SUBJECTS[name].limits}
    if device != "cpu":
        wanted |= set(_ON_DEVICES)
    if not one_machine:
        wanted -= {_PEERS_MEMORY}
    return [name for name in LIMITS if name in wanted]


def _bytes(state: Any) -> torch.Tensor:
    found: torch.Tensor = state["bytes"]
    return found


def _new_block(connection: Connection) -> torch.Tensor:
    return torch.ones(min(connection.nbytes, _BLOCK_BYTES), dtype=torch.uint8)


def _parts(whole: torch.Tensor) -> Sequence[torch.Tensor]:
    """One for each thread."""
    ends = [whole.numel() * part // THREADS for part in range(THREADS + 1)]
    return [whole[begin:end] for begin, end in itertools.pairwise(ends)]


def _at_once(act: Callable[[Any], None], on: Sequence[Any]) -> None:
    """In a thread for each, which are begun and ended here, as a transport's are."""
    with ThreadPoolExecutor(len(on)) as pool:
        list(pool.map(act, on))
