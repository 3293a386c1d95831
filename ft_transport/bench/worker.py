"""One rank: takes the turns of one case and tells what it saw through the store.

Nothing here decides what to do about a failure: the rank says so and leaves, and ``run.py`` does the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from ft_transport.bench.check import differences, distinct_nbytes, fingerprint, landed_in_place, storages, tensors
from ft_transport.bench.limits import LIMITS
from ft_transport.bench.measure import MemoryPeak, free_memory, loopback_nbytes, touch_free_memory
from ft_transport.bench.plan import Job, Turn
from ft_transport.bench.results import Sample, Size
from ft_transport.bench.states import STEP, State, build, fill_constant, fill_random
from ft_transport.bench.store import PrefixStore, Store, TCPStore, barrier, get_text, set_text
from ft_transport.bench.subjects import SUBJECTS, Connection, Subject, SubjectKind

__all__ = ["run_rank"]


def run_rank(job: Job, rank: int, address: tuple[str, int], log: str) -> None:
    """Take all turns of ``job`` as ``rank``: what a worker process does.

    Args:
        address: Host and port of the store.
        log: File that takes what this process would print.
    """
    _leave_with_parent()
    _print_to(log)
    host, port = address
    patience = timedelta(seconds=job.patience_seconds)
    store = PrefixStore(str(job.attempt), TCPStore(host, port, is_master=False, timeout=patience))
    worker = _Worker(job, rank, store, f"{host}:{port}/{job.attempt}")
    for turn in job.turns:
        sample = worker.take(turn)
        store.set(f"sample/{turn.index}/{rank}", sample.to_json())
        # Once the sample is in the store: from here on the supervisor may see a death, and looks for its cause there.
        if sample.error:
            # Not by way of the interpreter's end: the threads of a broken group may never join.
            os._exit(1)
    worker.close()


class _Worker:
    def __init__(self, job: Job, rank: int, store: Store, address: str) -> None:
        self._job = job
        self._rank = rank
        self._store = store
        self._address = address
        self._in_place = job.case.mode == "in-place"
        self._device = _device(job.device, rank)
        self._subjects: dict[str, Subject] = {}
        if rank == 0:
            state = self._state
            size = Size(distinct_nbytes(state), sum(1 for _ in tensors(state)), len(storages(state)))
            store.set("size", json.dumps(dataclasses.asdict(size)))
        self._size = Size(**json.loads(store.get("size")))

    @functools.cached_property
    def _state(self) -> State:
        """The source's state; a receiver's template; nothing where it receives afresh."""
        if self._rank == 0:
            state = build(self._job.case.state, self._job.scale, STEP, self._device)
            fill_random(state, self._job.seed)
            return self._published("state", state)
        # Never the source's values: a transport that moves nothing would then be told as equal.
        return build(self._job.case.state, self._job.scale, step=0, device=self._device) if self._in_place else {}

    @functools.cached_property
    def _bytes(self) -> State:
        """What limits move in the state's place."""
        if self._rank == 0:
            return self._published("bytes", {"bytes": torch.cat([storage.cpu() for storage in storages(self._state)])})
        return {"bytes": torch.empty(self._size.nbytes, dtype=torch.uint8)} if self._in_place else {}

    def _published(self, name: str, state: State) -> State:
        # Digests and not the state: sent by way of the store it would be the very transfer that is to be checked.
        set_text(self._store, f"fingerprint/{name}", json.dumps(fingerprint(state)))
        return state

    def take(self, turn: Turn) -> Sample:
        """Take one turn. What a transport raises is in the sample."""
        sample = Sample(turn.index, self._rank)
        try:
            what = "bytes" if turn.transport in LIMITS else "state"
            state = self._bytes if what == "bytes" else self._state
            subject = self._subject(turn.transport, state)
            if self._rank == 0:
                self._serve(subject, turn, state, sample)
                return sample
            received = self._receive(subject, turn, state, sample)
            if _kind(turn.transport).brings:
                self._check(received, what, state, sample)
        except Exception as exc:
            sample.error = f"{type(exc).__name__}: {exc}"
        return sample

    def close(self) -> None:
        for subject in self._subjects.values():
            subject.close()

    def _subject(self, transport: str, state: State) -> Subject:
        """The rank's end of a transport, made when its first turn comes, so that a failure counts as its own."""
        if transport not in self._subjects:
            prefix = transport.replace(" ", "-")
            connection = Connection(
                store=PrefixStore(prefix, self._store),
                address=f"{self._address}/{prefix}",
                rank=self._rank,
                world_size=self._job.world_size,
                timeout=timedelta(seconds=self._job.timeout_seconds),
                nbytes=self._size.nbytes,
                template=(lambda: state) if self._in_place or (transport in LIMITS and self._rank == 0) else None,
                device=self._device,
            )
            self._subjects[transport] = _kind(transport).make(connection)
        return self._subjects[transport]

    def _serve(self, subject: Subject, turn: Turn, state: State, sample: Sample) -> None:
        # In each turn anew, as before each quorum: an HTTP server or a listener may have another address by then.
        self._store.set(f"metadata/{turn.index}", subject.metadata())
        receivers = list(range(1, self._job.world_size))
        free_memory()
        wire = loopback_nbytes() if self._job.one_machine else None
        with self._measured(turn, sample):
            subject.send(receivers, state)
        after = loopback_nbytes()
        if wire is not None and after is not None:
            sample.nbytes_wire = after - wire
        subject.finish()

    def _receive(self, subject: Subject, turn: Turn, state: State, sample: Sample) -> object:
        metadata = self._store.get(f"metadata/{turn.index}").decode()
        fill_constant(state)
        free_memory()
        if not self._in_place and not self._job.cold:
            touch_free_memory(self._size.nbytes * 5 // 4)  # The state and some buffers.
        with self._measured(turn, sample):
            return subject.receive(metadata)

    @contextmanager
    def _measured(self, turn: Turn, sample: Sample) -> Iterator[None]:
        """Begin together with the other ranks; measure what is inside; leave when all are done."""
        memory = MemoryPeak()
        barrier(self._store, f"begin/{turn.index}", self._job.world_size)
        # After the barrier, which ends on all ranks within a millisecond. Whoever measured from its own begin of the
        # turn would measure how long the others had filled and freed memory.
        start, cpu = time.perf_counter(), time.process_time()
        yield
        if self._device.type != "cpu":
            # A copy that a transport has begun and not waited for is no state that somebody has.
            torch.accelerator.synchronize(self._device)
        # If the transfer raises, nothing is taken and no second barrier entered, so the others' wait ends by the
        # store's time-out or by the supervisor.
        sample.seconds = time.perf_counter() - start
        barrier(self._store, f"end/{turn.index}", self._job.world_size)
        # After the barrier: a source may have threads that serve after its call has returned.
        sample.cpu_seconds = time.process_time() - cpu
        sample.nbytes_memory = memory.extra_nbytes()

    def _check(self, received: object, what: str, state: State, sample: Sample) -> None:
        # After the last barrier, outside of all that is measured: to read 1.5 GB once more is a tenth of a quick
        # transfer.
        expected = json.loads(get_text(self._store, f"fingerprint/{what}"))
        sample.wrong = differences(expected, fingerprint(received))[:10]
        if self._in_place:
            sample.in_place = landed_in_place(state, received)


def _kind(transport: str) -> SubjectKind:
    return LIMITS[transport] if transport in LIMITS else SUBJECTS[transport]


def _device(kind: str, rank: int) -> torch.device:
    """A rank's device. Where there are fewer than ranks, some share one."""
    if kind == "cpu":
        return torch.device(kind)
    device = torch.device(kind, rank % torch.accelerator.device_count())
    torch.accelerator.set_device_index(device.index)
    return device


def _print_to(log: str) -> None:
    """Send this process's output, also that of C++ code, to a file."""
    # The descriptors, not sys.stdout: gloo's complaints come from C++, and would tear the table that is being drawn.
    # To append, since the workers of the next attempt write to the same file.
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _leave_with_parent() -> None:
    """End this process when its parent is gone, even if that was killed and this one hangs in a transfer."""
    # Not PR_SET_PDEATHSIG: the kernel's parent of this process is the fork server, not the process that watches over
    # it.
    parent = multiprocessing.parent_process()
    if parent is not None:

        def leave() -> None:
            # A thread of its own: it waits on a pipe without the GIL, and so wakes also while the main thread hangs in
            # gloo.
            parent.join()
            os._exit(1)

        threading.Thread(target=leave, daemon=True).start()
