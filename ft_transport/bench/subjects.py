"""The transports behind one interface, each with a group of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._pg_transport import PGTransport as TorchPGTransport
from torchft.checkpointing.http_transport import HTTPTransport
from torchft.checkpointing.pg_transport import PGTransport as TorchftPGTransport
from torchft.checkpointing.transport import CheckpointTransport
from torchft.process_group import ProcessGroupGloo

import ft_transport
import ft_transport.distributed
from ft_transport.bench.groups import join
from ft_transport.bench.states import STEP
from ft_transport.bench.store import Store

__all__ = ["OURS", "REFERENCE", "SUBJECTS", "Connection", "Subject", "SubjectKind"]

CPU = torch.device("cpu")

Template = Callable[[], object]


@dataclass(frozen=True)
class Connection:
    """How the ranks of one run meet.

    Attributes:
        store: Store for this subject alone.
        address: The same store as torchft's groups want it: ``host:port/prefix``.
        nbytes: Distinct bytes of the state.
        template: Gives the tensors to receive into, None to receive into new ones. A limit's source has
            its bytes there.
        device: Where new tensors shall be that were on a device. What moves is on the host.
    """

    store: Store
    address: str
    rank: int
    world_size: int
    timeout: timedelta
    nbytes: int
    template: Template | None
    device: torch.device = CPU


class Subject(Protocol):
    """One rank's end of a transport."""

    def metadata(self) -> str:
        """What a receiver needs to know beforehand; torchft's quorum would carry it."""

    def send(self, dst_ranks: list[int], state: object) -> None:
        """Serve ``state`` to all ``dst_ranks``."""

    def receive(self, metadata: str) -> object:
        """The state from rank 0."""

    def finish(self) -> None:
        """Called on the source after each transfer, as the Manager does."""

    def close(self) -> None:
        """Leave nothing behind."""


class TorchftSubject:
    """A ``CheckpointTransport`` of torchft's interface, and the group that it uses, if any."""

    def __init__(
        self, transport: CheckpointTransport[Any], timeout: timedelta, group: ProcessGroupGloo | None = None
    ) -> None:
        self._transport = transport
        self._timeout = timeout
        self._group = group

    def metadata(self) -> str:
        return str(self._transport.metadata())

    def send(self, dst_ranks: list[int], state: object) -> None:
        self._transport.send_checkpoint(dst_ranks, STEP, state, self._timeout)

    def receive(self, metadata: str) -> object:
        return self._transport.recv_checkpoint(0, metadata, STEP, self._timeout)

    def finish(self) -> None:
        self._transport.disallow_checkpoint()

    def close(self) -> None:
        # The transport first: a group that is shut down under a pending receive goes on to write into its tensor.
        self._transport.shutdown(wait=True)
        if self._group is not None:
            self._group.shutdown()


class DistributedSubject:
    """A transport with the interface of torch's ``_pg_transport``."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def metadata(self) -> str:
        return ""

    def send(self, dst_ranks: list[int], state: object) -> None:
        self._transport.send_checkpoint(dst_ranks, state)

    def receive(self, metadata: str) -> object:
        return self._transport.recv_checkpoint(0)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class SubjectKind:
    """How to make a subject.

    Attributes:
        in_place: Whether it can receive into a template.
        limits: Which limits bound it, by their names: the first that there is counts.
        brings: Whether what it receives is the source's; some limits stay within a process.
    """

    make: Callable[[Connection], Subject]
    in_place: bool = True
    limits: tuple[str, ...] = ()
    brings: bool = True


def _over_torchft(transport: Callable[..., CheckpointTransport[Any]]) -> SubjectKind:
    def make(connection: Connection) -> Subject:
        # One for each transport: a wait that times out closes every pair of its gloo group, also those of a neighbour
        # on it.
        group = ProcessGroupGloo(timeout=connection.timeout)
        join(group, connection.address, connection.rank, connection.world_size)
        made = transport(group, connection.timeout, CPU, state_dict=connection.template)
        return TorchftSubject(made, connection.timeout, group)

    return SubjectKind(make, limits=("raw Gloo",))


def _over_lanes(*limits: str, **options: Any) -> SubjectKind:
    def make(connection: Connection) -> Subject:
        made = ft_transport.LaneTransport[Any](
            connection.timeout, connection.device, state_dict=connection.template, **options
        )
        return TorchftSubject(made, connection.timeout)

    return SubjectKind(make, limits=limits)


def _over_distributed(transport: Callable[..., Any]) -> SubjectKind:
    def make(connection: Connection) -> Subject:
        # Once in a process, by whoever comes first. `new_group` then gives each its own pairs.
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo",
                store=connection.store,
                rank=connection.rank,
                world_size=connection.world_size,
                timeout=connection.timeout,
            )
        group = dist.new_group(backend="gloo", timeout=connection.timeout)
        return DistributedSubject(transport(group, connection.timeout, CPU, state_dict=connection.template))

    return SubjectKind(make, limits=("raw Gloo",))


def _over_http(num_chunks: int) -> SubjectKind:
    def make(connection: Connection) -> Subject:
        return TorchftSubject(HTTPTransport(connection.timeout, num_chunks), connection.timeout)

    # It builds the state from the stream that it fetches, and has no argument for where to put it.
    return SubjectKind(make, in_place=False, limits=("raw TCP",))


# Lanes read memory within a machine where the system lets them, and go over TCP elsewhere.
_READ_OR_TCP = ("raw process_vm_readv", "raw TCP")

SUBJECTS: dict[str, SubjectKind] = {
    "lanes": _over_lanes(*_READ_OR_TCP),
    "lanes verify=False": _over_lanes(*_READ_OR_TCP, verify=False),
    "lanes fabric=tcp": _over_lanes("raw TCP", fabric="tcp"),
    "group": _over_torchft(ft_transport.PGTransport),
    "group verify=True": _over_torchft(partial(ft_transport.PGTransport, verify=True)),
    "distributed": _over_distributed(ft_transport.distributed.PGTransport),
    "torchft PGTransport": _over_torchft(TorchftPGTransport),
    "torch _pg_transport": _over_distributed(TorchPGTransport),
    # Without chunks, as the Manager makes it; with eight, since parallel requests are the one knob it has for speed.
    "torchft HTTP": _over_http(num_chunks=0),
    "torchft HTTP x8": _over_http(num_chunks=8),
}

OURS = tuple(name for name in SUBJECTS if name.startswith(("lanes", "group", "distributed")))

# What the ratios are against.
REFERENCE = "torchft PGTransport"
