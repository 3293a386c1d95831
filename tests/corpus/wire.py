"""Two ranks of one process over real Gloo groups: the source in the caller's thread, the destination in another."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torchft.process_group import ProcessGroupGloo

import ft_transport
import ft_transport.distributed
from ft_transport.bench.groups import join

__all__ = ["PROMPT", "TRANSPORTS", "Outcome", "Wire", "wires"]

# Only a transfer that hangs takes as long.
TIMEOUT = timedelta(seconds=15)
# Seconds in which a side must have learned that the other one does not go on: before its deadline, and no matter how
# busy the machine is.
PROMPT = 7.0
CPU = torch.device("cpu")
STEP = 7

Template = Callable[[], object] | None


@dataclass
class Outcome:
    """How a transfer ended on both sides; ``seconds`` until the destination was done."""

    result: Any
    error: BaseException | None
    report: ft_transport.TransferReport | None
    source_error: BaseException | None
    source_report: ft_transport.TransferReport | None
    seconds: float

    def check(self) -> None:
        """Raise what went wrong."""
        for error in (self.error, self.source_error):
            if error is not None:
                raise error


class Wire:
    """One transport with a pair of groups, which serve all transfers until one breaks them."""

    name = ""

    def __init__(self, store: dist.TCPStore, helper: ThreadPoolExecutor) -> None:
        self._store = store
        self._helper = helper
        self._number = itertools.count()
        self._groups: list[Any] = []

    def transfer(self, state: object, template: Template = None, *, settle: bool = False, **options: Any) -> Outcome:
        """Send a state from rank 0 to rank 1. Options go to the destination's transport.

        With ``settle``, what follows a receive in a training loop is called as well.
        """
        if not self._groups:
            self._groups = self._connect()
        source = self._make(self._groups[0], None)
        destination = self._make(self._groups[1], template, **options)
        start = time.monotonic()
        received = self._helper.submit(_guarded, lambda: self._recv(destination))
        _, source_error, _ = _guarded(lambda: self._send(source, state))
        reports = (destination.last_report, source.last_report)
        if source_error is not None and not wait([received], PROMPT).done:
            # It has not learned of the source's error; without a peer it need not wait for its own deadline.
            self.close()
            source = None
        result, error, end = received.result()
        if settle:
            self._settle(destination)
        if error is not None or source_error is not None:
            self.close()
        return Outcome(result, error, reports[0], source_error, reports[1], end - start)

    def close(self) -> None:
        """Take the groups down; the next transfer makes new ones."""
        groups, self._groups = self._groups, []
        for group in groups:
            self._disconnect(group)

    def _both(self, connect: Callable[[int], Any]) -> list[Any]:
        """What ``connect`` gives for each rank, called for both at once."""
        other = self._helper.submit(connect, 1)
        return [connect(0), other.result()]

    def _connect(self) -> list[Any]:
        raise NotImplementedError

    def _disconnect(self, group: Any) -> None:
        raise NotImplementedError

    def _make(self, group: Any, template: Template, **options: Any) -> Any:
        raise NotImplementedError

    def _send(self, transport: Any, state: object) -> None:
        raise NotImplementedError

    def _recv(self, transport: Any) -> object:
        raise NotImplementedError

    def _settle(self, transport: Any) -> None:
        """What a training loop calls after a receive."""


def _guarded(call: Callable[[], Any]) -> tuple[Any, BaseException | None, float]:
    """What a call returned or raised, and when."""
    try:
        return call(), None, time.monotonic()
    except Exception as exc:
        end = time.monotonic()
        found: BaseException | None = exc
        while found is not None:
            # The frames would keep the group's operations alive.
            found.__traceback__ = None
            found = found.__cause__ or found.__context__
        return None, exc, end


class Torchft(Wire):
    """``ft_transport.PGTransport`` over torchft's group."""

    name = "PGTransport"

    def _connect(self) -> list[Any]:
        address = f"localhost:{self._store.port}/{next(self._number)}"

        def connect(rank: int) -> Any:
            group = ProcessGroupGloo(timeout=TIMEOUT)
            join(group, address, rank, 2)
            return group

        return self._both(connect)

    def _disconnect(self, group: Any) -> None:
        group.shutdown()

    def _make(self, group: Any, template: Template, **options: Any) -> Any:
        return ft_transport.PGTransport(group, TIMEOUT, CPU, state_dict=template, **options)

    def _send(self, transport: Any, state: object) -> None:
        transport.send_checkpoint([1], STEP, state, TIMEOUT)

    def _recv(self, transport: Any) -> object:
        return transport.recv_checkpoint(0, "", STEP, TIMEOUT)

    def _settle(self, transport: Any) -> None:
        transport.disallow_checkpoint()


class Plain(Wire):
    """``ft_transport.distributed.PGTransport`` over a group of torch.distributed."""

    name = "distributed"

    def _connect(self) -> list[Any]:
        store = dist.HashStore()
        return self._both(lambda rank: dist.ProcessGroupGloo(store, rank, 2, TIMEOUT))

    def _disconnect(self, group: Any) -> None:
        pass  # its pairs close with the last reference

    def _make(self, group: Any, template: Template, **options: Any) -> Any:
        return ft_transport.distributed.PGTransport(group, TIMEOUT, CPU, state_dict=template, **options)

    def _send(self, transport: Any, state: object) -> None:
        transport.send_checkpoint([1], state)

    def _recv(self, transport: Any) -> object:
        return transport.recv_checkpoint(0)


class Lanes(Wire):
    """``ft_transport.LaneTransport``: one source for all transfers, each of which has a destination of its own."""

    name = "LaneTransport"

    def __init__(self, store: dist.TCPStore, helper: ThreadPoolExecutor) -> None:
        super().__init__(store, helper)
        self._destinations: list[ft_transport.LaneTransport[Any]] = []

    def transfer(self, state: object, template: Template = None, *, settle: bool = False, **options: Any) -> Outcome:
        try:
            return super().transfer(state, template, settle=settle, **options)
        finally:
            while self._destinations:
                self._destinations.pop().shutdown()

    def _connect(self) -> list[Any]:
        return [ft_transport.LaneTransport[Any](TIMEOUT, CPU, blocking=True), None]

    def _disconnect(self, group: Any) -> None:
        if group is not None:
            group.shutdown()

    def _make(self, group: Any, template: Template, **options: Any) -> Any:
        if group is not None:
            return group
        self._destinations.append(ft_transport.LaneTransport(TIMEOUT, CPU, state_dict=template, **options))
        return self._destinations[-1]

    def _send(self, transport: Any, state: object) -> None:
        transport.send_checkpoint([1], STEP, state, TIMEOUT)

    def _recv(self, transport: Any) -> object:
        return transport.recv_checkpoint(0, self._groups[0].metadata(), STEP, TIMEOUT)

    def _settle(self, transport: Any) -> None:
        transport.disallow_checkpoint()


TRANSPORTS: dict[str, type[Wire]] = {cls.name: cls for cls in (Torchft, Plain, Lanes)}


@contextlib.contextmanager
def wires() -> Iterator[dict[str, Wire]]:
    """A wire for each transport; and a default group of one rank, which some kinds of tensor ask for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor(1, thread_name_prefix="destination") as helper:
        made = {name: cls(store, helper) for name, cls in TRANSPORTS.items()}
        try:
            yield made
        finally:
            for wire in made.values():
                wire.close()
            dist.destroy_process_group()
