"""Starts the ranks, watches over them, and goes on when one of them dies or hangs.

Each case is an attempt by fresh processes. When a transport fails in it, the attempt ends, the transport's row says
why, and the others begin the case anew: what a broken transport leaves behind (threads, a spinning core, late writes)
does not reach their results. Where the run is to be cold, each turn is an attempt of its own.

On two machines each has a supervisor with one rank; that of rank 0 leads. They speak through a store that the
leader hosts:

========================  ===========================================================
``joined/<rank>``         a follower is there
``job/<attempt>``         the next job, or ``null`` when the run is over
``left``                  counts the followers that have seen the end
``<attempt>/sample/…``    what a rank saw in a turn (see ``worker.py``)
``<attempt>/died/<rank>`` a worker process ended early: how
``<attempt>/over``        the leader is done with the attempt
========================  ===========================================================
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from types import TracebackType

from ft_transport.bench.limits import LIMITS, limits_of
from ft_transport.bench.plan import Case, Job, Options, Turn, turns
from ft_transport.bench.results import Row, Sample, Size, compare, summarise
from ft_transport.bench.store import POLL_SECONDS, SET, PrefixStore, Store, TCPStore, poll_until
from ft_transport.bench.subjects import OURS, REFERENCE, SUBJECTS
from ft_transport.bench.worker import run_rank

__all__ = ["Site", "Watch", "follow", "lead"]

# For the other ranks to say what they saw of a failure, and for workers to end by themselves.
GRACE_SECONDS = 2.0
# For the other machines to be there.
JOIN_SECONDS = 300.0

OnTurn = Callable[[Case, Turn], None]


class Site:
    """What one machine has: its ranks, the store, a folder for logs.

    Args:
        address: Host and port of the store; port 0 for any.
        ranks: The ranks that run here. Rank 0's site hosts the store.
        world_size: Ranks on all machines.
        folder: Takes the ranks' logs.
    """

    def __init__(self, address: tuple[str, int], ranks: Sequence[int], world_size: int, folder: Path) -> None:
        # Also rank 0's own workers go through the network to it, so that one machine and two run the same code.
        host, port = address
        self.ranks = ranks
        self.folder = folder
        self.world_size = world_size
        self.store = TCPStore(
            host, port, is_master=0 in ranks, wait_for_workers=False, timeout=timedelta(seconds=JOIN_SECONDS)
        )
        self.address = (host, self.store.port)
        for rank in ranks:
            # Workers append to it, one after another, so what an earlier run has left would stay in front.
            self.log(rank).unlink(missing_ok=True)

    def log(self, rank: int) -> Path:
        """The file that takes what a rank's processes print, one after another."""
        return self.folder / f"rank{rank}.log"

    @property
    def others(self) -> list[int]:
        """The ranks on other machines."""
        return [rank for rank in range(self.world_size) if rank not in self.ranks]


class _Workers:
    """The worker processes of one attempt on this machine. None is left after ``with``."""

    def __init__(self, site: Site, job: Job) -> None:
        # Not fork: this process has threads of the store and of rich, and a fork copies the locks they hold but not
        # the threads.
        context = multiprocessing.get_context("forkserver")
        # Forked from a process that has imported torch and done nothing else: as clean as a new one, and seconds
        # sooner there.
        context.set_forkserver_preload([run_rank.__module__])
        # What is blocked in here stays so in that process, and in those that it forks. A terminal sends Ctrl-C to all:
        # this process ends the others, and a worker that raises in mid-transfer would be told as the failure of the
        # transport whose turn it is.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        self._site = site
        self._attempt = job.attempt
        self._told: set[int] = set()
        self._processes = {
            rank: context.Process(target=run_rank, args=(job, rank, site.address, str(site.log(rank))), daemon=True)
            for rank in site.ranks
        }

    def __enter__(self) -> _Workers:
        for process in self._processes.values():
            process.start()
        return self

    def __exit__(self, cls: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for process in self._processes.values():
            if process.pid is not None:
                # SIGKILL, since a rank that hangs in gloo is in C++ and comes to no handler of Python's; nor does one
                # that is stopped.
                process.kill()
                process.join()

    def tell_deaths(self) -> None:
        """Put into the store which workers have ended other than well."""
        for rank, process in self._processes.items():
            # Neither None, which is still running, nor 0.
            if process.exitcode and rank not in self._told:
                self._told.add(rank)
                how = f"{_describe_exit(process.exitcode)}, see rank{rank}.log"
                self._site.store.set(f"{self._attempt}/died/{rank}", how)

    def join(self) -> None:
        """Give the workers time to end by themselves."""
        limit = time.monotonic() + GRACE_SECONDS
        for process in self._processes.values():
            process.join(max(0.0, limit - time.monotonic()))


class Watch:
    """Follows an attempt through the store until all its turns are taken or one of them failed.

    Attributes:
        samples: Of the turns that are complete, by rank.
        failure: Why the attempt ended early, empty if it did not. The culprit is the transport of ``turn``.
    """

    def __init__(self, store: Store, job: Job, on_turn: OnTurn) -> None:
        self._store = PrefixStore(str(job.attempt), store)
        self._job = job
        self._turns = job.turns
        self._on_turn = on_turn
        self._current: dict[int, Sample] = {}
        self._since = time.monotonic()
        self.samples: list[list[Sample]] = []
        self.failure = ""

    @property
    def turn(self) -> Turn:
        """The turn that is being taken."""
        return self._turns[len(self.samples)]

    @property
    def over(self) -> bool:
        """Whether there is nothing more to wait for."""
        return bool(self.failure) or len(self.samples) == len(self._turns)

    def poll(self) -> None:
        """Look once at what the ranks have said."""
        # Deaths first: a rank that died has said before what it had to say.
        deaths = self._deaths()
        self._take()
        while self._complete():
            self.samples.append([self._current[rank] for rank in sorted(self._current)])
            self._current = {}
            self._since = time.monotonic()
            if self.over:
                return
            self._on_turn(self._job.case, self.turn)
            self._take()
        waited = time.monotonic() - self._since
        # One rank's failure is seen at once, its cause often on another: "connection closed by peer" is told first,
        # and why the peer closed it a moment later. Both belong into the row's note.
        if deaths or self._errors():
            time.sleep(GRACE_SECONDS)
            self._take()
            self.failure = _describe_failure({**deaths, **self._errors()})
        elif waited > self._job.patience_seconds:
            self.failure = f"hung: no end after {waited:.0f} s"

    def size(self) -> Size:
        """The size of the state, as the source has counted it."""
        return Size(**json.loads(self._store.get("size")))

    def _take(self) -> None:
        """Take the samples of the current turn that are there."""
        for rank in range(self._job.world_size):
            key = f"sample/{self.turn.index}/{rank}"
            if rank not in self._current and self._store.check([key]):
                self._current[rank] = Sample.from_json(self._store.get(key))

    def _complete(self) -> bool:
        return len(self._current) == self._job.world_size and not self._errors()

    def _errors(self) -> dict[int, str]:
        return {rank: sample.error for rank, sample in self._current.items() if sample.error}

    def _deaths(self) -> dict[int, str]:
        ranks = [rank for rank in range(self._job.world_size) if self._store.check([f"died/{rank}"])]
        return {rank: self._store.get(f"died/{rank}").decode() for rank in ranks}


def lead(site: Site, options: Options, on_turn: OnTurn, on_case: Callable[[list[Row]], None]) -> list[Row]:
    """Run all cases, as the site that has rank 0.

    Args:
        on_turn: Called when a turn begins.
        on_case: Called with the rows of each case when it is over.

    Raises:
        TimeoutError: Another machine did not join.
    """
    _await_followers(site)
    rows: list[Row] = []
    attempt = 0
    try:
        for case in options.cases:
            attempt, of_case = _run_case(site, options, case, attempt, on_turn)
            on_case(of_case)
            rows += of_case
    finally:
        _dismiss_followers(site, attempt)
    return rows


def follow(site: Site) -> None:
    """Take part in the runs that the leader announces, until it says that it is done."""
    for rank in site.ranks:
        site.store.set(f"joined/{rank}", SET)
    attempt = 0
    while True:
        poll_until(site.store, [f"job/{attempt}"], JOIN_SECONDS)
        text = site.store.get(f"job/{attempt}").decode()
        if text == "null":
            site.store.add("left", 1)
            return
        with _Workers(site, Job.from_json(text)) as workers:
            # `check` and a sleep, not `wait`: the store's wait is in C++, and Ctrl-C would do nothing until it has
            # timed out.
            while not site.store.check([f"{attempt}/over"]):
                time.sleep(POLL_SECONDS)
                workers.tell_deaths()
            workers.join()
        attempt += 1


def _run_case(site: Site, options: Options, case: Case, attempt: int, on_turn: OnTurn) -> tuple[int, list[Row]]:
    """One case, by all transports that can, and what bounds them."""
    limits = limits_of(options.transports, not site.others, options.device) if options.limits else []
    rows = {name: Row(case, name, "unsupported", note="cannot receive in place") for name in options.transports}
    able = [name for name in options.transports if case.mode != "in-place" or SUBJECTS[name].in_place]
    run = _run_warm if options.cold is None else _run_cold
    attempt, found = run(site, options, case, [*able, *limits] if able else [], attempt, on_turn)
    rows = {name: found[name] for name in limits if name in found} | rows | found
    compare(list(rows.values()), REFERENCE, OURS, {name: SUBJECTS[name].limits for name in options.transports})
    return attempt, list(rows.values())


def _run_warm(
    site: Site, options: Options, case: Case, able: list[str], attempt: int, on_turn: OnTurn
) -> tuple[int, dict[str, Row]]:
    """By the same processes, attempted until those that are left all took their turns."""
    rows: dict[str, Row] = {}
    while able:
        job = _job(site, options, case, able, options.rounds, attempt)
        watch = _run_attempt(site, job, on_turn)
        attempt += 1
        if not watch.failure:
            for name in able:
                of_name = [seen for turn, seen in zip(job.turns, watch.samples, strict=True) if turn.transport == name]
                # The first transfer pays for what later ones find there: connections, threads, memory of its own.
                rows[name] = summarise(case, name, watch.size(), of_name, 1, name in LIMITS)
            break
        culprit = watch.turn.transport
        rows[culprit] = _failed(case, culprit, watch.failure)
        # What the others had measured before goes too: half of their rounds beside a transport that was failing are no
        # fair sample. A case so ends after as many attempts as there are transports at the latest.
        able = [name for name in able if name != culprit]
    return attempt, rows


def _run_cold(
    site: Site, options: Options, case: Case, able: list[str], attempt: int, on_turn: OnTurn
) -> tuple[int, dict[str, Row]]:
    """By new processes in each turn, whose first transfer counts."""
    assert options.cold is not None
    rows: dict[str, Row] = {}
    samples: dict[str, list[list[Sample]]] = {name: [] for name in able}
    size = Size()
    # As many rounds as are asked for; the row that would warm up is one of them.
    for turn in turns(able, options.rounds - 1):
        name, shown = turn.transport, replace(turn, round=turn.round + 1)
        if name in rows:
            continue
        on_turn(case, shown)
        # Memory that the last processes gave back is free meanwhile, and its host may take it.
        time.sleep(options.cold)
        # One turn: the warm-up of no more rounds.
        job = _job(site, options, case, [name], 0, attempt)
        watch = _run_attempt(site, job, lambda case, _: None)
        attempt += 1
        if watch.failure:
            rows[name] = _failed(case, name, watch.failure)
        else:
            size = watch.size()
            samples[name] += watch.samples
    return attempt, rows | {
        name: summarise(case, name, size, samples[name], 0, name in LIMITS) for name in able if name not in rows
    }


def _failed(case: Case, name: str, why: str) -> Row:
    # A limit that a machine does not have (memory of others may be forbidden) is no failure of a transport.
    return Row(case, name, "unsupported" if name in LIMITS else "failed", note=why)


def _job(site: Site, options: Options, case: Case, transports: list[str], rounds: int, attempt: int) -> Job:
    return Job(
        attempt=attempt,
        case=case,
        transports=transports,
        rounds=rounds,
        receivers=options.receivers,
        scale=options.scale,
        seed=options.seed,
        timeout_seconds=options.timeout_seconds,
        one_machine=not site.others,
        device=options.device,
        cold=options.cold is not None,
    )


def _run_attempt(site: Site, job: Job, on_turn: OnTurn) -> Watch:
    site.store.set(f"job/{job.attempt}", job.to_json())
    watch = Watch(site.store, job, on_turn)
    on_turn(job.case, watch.turn)
    with _Workers(site, job) as workers:
        try:
            while not watch.over:
                time.sleep(POLL_SECONDS)
                workers.tell_deaths()
                watch.poll()
            # Only then: after a failure somebody may hang, and is killed on the way out.
            if not watch.failure:
                workers.join()
        finally:
            site.store.set(f"{job.attempt}/over", SET)
    return watch


def _await_followers(site: Site) -> None:
    poll_until(site.store, [f"joined/{rank}" for rank in site.others], JOIN_SECONDS)


def _dismiss_followers(site: Site, attempt: int) -> None:
    """Say that the run is over, and keep the store until all have heard it."""
    site.store.set(f"job/{attempt}", "null")
    limit = time.monotonic() + GRACE_SECONDS
    # The store lives in this process: to leave first would show the followers an error of the store in place of the
    # end.
    while site.others and site.store.add("left", 0) < len(site.others) and time.monotonic() < limit:
        time.sleep(POLL_SECONDS)


def _describe_failure(by_rank: dict[int, str]) -> str:
    """The same text of several ranks once."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in sorted(by_rank.items()):
        ranks_of.setdefault(text, []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in ranks_of.items())


def _describe_exit(exitcode: int) -> str:
    if exitcode > 0:
        return f"the process ended with exit status {exitcode}"
    return f"the process was ended by {signal.Signals(-exitcode).name}"
