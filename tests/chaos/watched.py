"""The transport and the group of a replica, watched: how long each call takes, what it moved, and where it is."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
from torchft.checkpointing.transport import CheckpointTransport
from torchft.process_group import ProcessGroupGloo

from ft_transport import LaneTransport, PGTransport, Progress, TornStateError

from . import sockets
from .settings import Settings
from .state import State, buffers_digest, digest, without_buffers
from .striker import Striker
from .voice import Voice

__all__ = ["Group", "Watched"]

CPU = torch.device("cpu")
# Shorter calls of disallow_checkpoint, which comes in every step, are not told of.
_WORTH_TELLING = 0.05


class Group(ProcessGroupGloo):
    """The group, which knows which replica each rank is.

    Attributes:
        quorum: Id of the newest quorum, -1 before the first.
        members: Replica of each rank.
    """

    def __init__(self, timeout: timedelta, voice: Voice) -> None:
        super().__init__(timeout=timeout)
        self._voice = voice
        self.quorum = -1
        self.members: list[int] = []

    def configure(self, store_addr: str, replica_id: str, rank: int, world_size: int, *more: Any, **named: Any) -> None:
        quorum, _, _, members = more
        self.quorum, self.members = quorum, list(members)
        with self._voice.call("configure", quorum=quorum, members=self.members):
            super().configure(store_addr, replica_id, rank, world_size, *more, **named)

    def reconfigure(self, opts: Any) -> Any:
        """The same for torchft's nightlies, whose Manager calls no ``configure``."""
        with self._voice.call("configure", quorum=opts.uuid):
            work = super().reconfigure(opts)
        # Known from the handles, once they are read.
        self.quorum, self.members = opts.uuid, list(self._global_ranks)
        return work

    def break_off(self) -> None:
        """Leave the group for good, so that all others notice at once.

        In gloo's ring only the neighbours of a rank that died notice it, and a third one would wait for its time-out. A
        wait that expires closes all pairs of this rank; ``abort`` alone does not.
        """
        for rank in range(len(self.members)):
            if rank == self._rank or self._pg is None:
                continue
            try:
                self.recv([torch.empty(1)], rank, 0).wait(timedelta(milliseconds=1))
            except RuntimeError:
                pass  # as meant, or that one was gone already
        self.abort()


class Watched(CheckpointTransport[dict[str, Any]]):
    """Passes every call on.

    Attributes:
        cause: Which call has raised in this step: ``"send"``, ``"torn"`` for one that refused to serve a torn state,
            ``"receive"``, or empty for none.
        port: That the transport listens on, 0 if it does not.
    """

    def __init__(
        self,
        settings: Settings,
        group: Group,
        state: State,
        voice: Voice,
        striker: Striker,
    ) -> None:
        self.cause = ""
        self.port = 0
        self._settings = settings
        self._group = group
        self._voice = voice
        self._striker = striker
        timeout = timedelta(seconds=settings.transfer)
        self._in_forward = state.in_forward
        template = state.state_dict
        self._inner: LaneTransport[Any] | PGTransport[Any]
        if settings.transport == "lanes":
            stall = timedelta(seconds=settings.stall)
            self._inner = LaneTransport(
                timeout, CPU, state_dict=template, stall_timeout=stall, on_progress=self._progress, host="127.0.0.1"
            )
            self.port = _port(self._inner.metadata())
            sockets.slow_down(self.port, settings.pace)
        else:
            self._inner = PGTransport(group, timeout, CPU, state_dict=template, on_progress=self._progress)

    def new_step(self) -> None:
        """Forget what the step before did."""
        self.cause = ""

    def metadata(self) -> str:
        return self._inner.metadata()

    def disallow_checkpoint(self) -> None:
        begin = time.monotonic()
        self._inner.disallow_checkpoint()
        seconds = time.monotonic() - begin
        if seconds > _WORTH_TELLING:
            self._voice.tell("end", call="disallow", number=-1, seconds=round(seconds, 4), error="")

    def shutdown(self, wait: bool = True) -> None:
        with self._voice.call("shutdown"):
            self._inner.shutdown(wait)

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:
        members = self._group.members
        to = [members[rank] for rank in dst_ranks]
        with self._voice.call("send", step=step, quorum=self._group.quorum, to=to) as result:
            try:
                # Between two forwards: so what leaves, or is copied to leave later, is known.
                with self._in_forward:
                    buffers = buffers_digest(state_dict["user"]["default"])
                    self._voice.tell("offered", step=step, quorum=self._group.quorum, buffers=buffers)
                    self._inner.send_checkpoint(dst_ranks, step, state_dict, timeout)
            except Exception as exc:
                self.cause = "torn" if isinstance(exc, TornStateError) else "send"
                raise
            finally:
                report = self._inner.last_report
                result["served"] = [] if report is None else [peer.outcome for peer in report.peers]

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, Any]:
        source = self._group.members[src_rank]
        where = {"step": step, "quorum": self._group.quorum, "source": source}
        with self._voice.call("receive", **where) as result:
            self._striker.begin(_port(metadata), **where)
            try:
                received = self._inner.recv_checkpoint(src_rank, metadata, step, timeout)
            except Exception:
                self.cause = "receive"
                raise
            finally:
                result.update(self._figures())
            # Not the buffers: forward is writing to them. They are looked at when the step is committed.
            result["digest"] = digest(without_buffers(received["user"]["default"]), received["torchft"])
        self._striker.done()
        return received

    def _figures(self) -> dict[str, Any]:
        report = self._inner.last_report
        if report is None or report.role != "destination":
            return {}
        return {
            "nbytes": sum(peer.nbytes for peer in report.peers),
            "nbytes_total": report.nbytes_total,
            "nbytes_kept": report.nbytes_kept,
            "num_repaired": report.num_repaired,
            "torn": report.torn,
            "outcome": report.peers[0].outcome if report.peers else "",
        }

    def _progress(self, progress: Progress) -> None:
        if progress.role != "destination" or not progress.nbytes_total:
            return
        if self._settings.transport == "pg":
            # From the thread that moves the bytes; over lanes the kernel slows them down.
            time.sleep(0.01)
        self._striker.move(progress.nbytes_done / progress.nbytes_total)


def _port(metadata: str) -> int:
    """The port in what a transport gives out, 0 if there is none."""
    from ft_transport._net.endpoint import Endpoint

    return Endpoint.decode(metadata).port if metadata.startswith("ft-lanes") else 0
