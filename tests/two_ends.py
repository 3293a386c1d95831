"""A source and a destination of torchft's transports in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CPU

from ft_transport import LaneTransport, PGTransport
from ft_transport.errors import TransferError

TIMEOUT = timedelta(seconds=20)
STEP = 7


class Ends:
    """A source and a destination in this process."""

    def __init__(self, source: Any, destination: Any) -> None:
        self.source, self.destination = source, destination
        self.errors: dict[str, BaseException] = {}
        self.seconds: dict[str, float] = {}
        self.result: Any = None

    def move(self, sent: object, timeout: timedelta = TIMEOUT) -> Ends:
        metadata = self.source.metadata()

        def receive() -> None:
            self.result = self.destination.recv_checkpoint(0, metadata, STEP, timeout)

        thread = threading.Thread(target=self._timed, args=("destination", receive))
        thread.start()
        self._timed("source", lambda: self.source.send_checkpoint([1], STEP, sent, timeout))
        thread.join(60)
        assert not thread.is_alive()
        return self

    def _timed(self, who: str, call: Callable[[], None]) -> None:
        begin = time.monotonic()
        try:
            call()
        except TransferError as exc:
            self.errors[who] = exc
        self.seconds[who] = time.monotonic() - begin


def _gloo() -> list[Any]:
    store, made = dist.HashStore(), [None, None]

    def join(rank: int) -> None:
        made[rank] = dist.ProcessGroupGloo(store, rank, 2, TIMEOUT)  # type: ignore[call-overload]

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


@contextmanager
def ends(way: str, template: object = None, *, device: torch.device = CPU, **options: Any) -> Iterator[Ends]:
    """Over lanes or a group; fresh tensors of lanes that were on an accelerator land on ``device``."""
    give = (lambda: template) if template is not None else None
    made: list[Any]
    if way == "lanes":
        options["host"] = "127.0.0.1"
        made = [LaneTransport(TIMEOUT, CPU, host="127.0.0.1"), LaneTransport(TIMEOUT, device, give, **options)]
    else:
        groups = _gloo()
        made = [PGTransport(groups[0], TIMEOUT, CPU), PGTransport(groups[1], TIMEOUT, CPU, give, **options)]
    try:
        yield Ends(*made)
    finally:
        for transport in made:
            transport.disallow_checkpoint() if not transport.torn else None
            transport.shutdown()


WAYS = pytest.mark.parametrize("way", ["lanes", "group"])
