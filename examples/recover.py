"""Watch a training replica die and heal.

Starts a Lighthouse and several replica processes that train a character-level language model over
torchft, kills one with SIGKILL, starts it again, and shows how it gets its state back: live, as a table
with every duration, as checks (equal bit for bit, in place, the loss goes on falling) and as a picture.

    python examples/recover.py
    python examples/recover.py --replicas 4 --kills 2 --width 512 --transport torchft-http
    python examples/recover.py --standby    # a process that has everything ready takes the dead one's place
    python examples/recover.py --compare    # one kill without a standby, one with

Exit status: 0 when every check holds, 1 when one does not, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from recovery.cluster import Cluster, Event
from recovery.replica import Settings
from recovery.show import LiveView, PlainView, View, print_result
from recovery.story import Story
from rich.console import Console
from rich.text import Text

TRANSPORTS = ("ft_transport", "lanes", "torchft-pg", "torchft-http")
POLL_INTERVAL = 0.05  # seconds
MANAGER_TIMEOUT = 20.0  # seconds
JOIN_TIMEOUT_MS = 2000  # how long a quorum waits for a replica that lives but has not joined
STANDBY_NOTICE = 1.0  # seconds that a standby waits, for all to see, before a replica is killed
FINISH_NOTICE = 1.0  # seconds ahead of the last step in which every replica surely learns of it


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


class Director:
    """Lets the replicas go, kills them on time, starts them again, and brings all to the same last step.

    Replicas train until they are told where to end, which is after the last heal: a replica that comes
    back needs the others.
    """

    def __init__(self, options: argparse.Namespace, cluster: Cluster, story: Story, view: View) -> None:
        self._options = options
        self._cluster = cluster
        self._story = story
        self._view = view
        self._gone_on = False
        self._num_killed = 0
        self._num_standbys = 0
        self._finish_at: int | None = None
        self.events: list[Event] = []

    def run(self) -> None:
        """Direct until all have finished; a ``DemoError`` when one fails or time runs out."""
        for replica in range(self._options.replicas):
            self._cluster.start(replica)
        while not self._story.finished:
            self._hear(self._cluster.next_event(POLL_INTERVAL))
            self._act()
            if self._cluster.now() > self._options.timeout:
                states = ", ".join(f"replica {row.replica} {row.state}" for row in self._story.rows)
                raise DemoError(f"timed out after {self._options.timeout:.0f} s: {states}")
        if not self._cluster.join():
            raise DemoError("a replica did not exit properly")

    def _hear(self, event: Event | None) -> None:
        if event is not None:
            self.events.append(event)
            self._story.apply(event)
        self._view.update(event, self._cluster.now())
        if event is None:
            return
        if event.replica is None:
            if event.event == "gone":
                raise DemoError(f"the standby ended by itself:\n{self._cluster.log_tail(None)}")
            return
        row = self._story.rows[event.replica]
        if event.event == "gone" and event.incarnation == row.incarnation and row.state != "dead":
            raise DemoError(f"replica {event.replica} ended by itself:\n{self._cluster.log_tail(event.replica)}")
        if event.event == "reaped":
            if self._story.standby_waits:
                self._cluster.hand_over(event.replica)
            else:
                self._cluster.start(event.replica)
        if event.event == "ready" and event.incarnation:
            self._cluster.tell(event.replica, "go")

    def _act(self) -> None:
        story = self._story
        if not self._gone_on and all(row.state == "ready" for row in story.rows):
            # All at once, so that the first quorum has them all.
            self._gone_on = True
            for row in story.rows:
                self._cluster.tell(row.replica, "go")
        # Events from before a kill may still be queued: the story does not know of the kill before they are told.
        if not story.healthy or len(story.recoveries) < self._num_killed:
            return
        if self._num_killed < self._options.kills:
            if self._needs_standby() and not self._standby_waits():
                return
            victim = (self._options.replicas - 1 - self._num_killed) % self._options.replicas
            if story.rows[victim].step >= self._kill_step(self._num_killed):
                self._cluster.kill(victim)
                self._num_killed += 1
        elif self._finish_at is None and story.step_seconds():
            notice = math.ceil(FINISH_NOTICE / story.step_seconds())
            self._finish_at = max(self._options.steps, story.step + notice)
            for row in story.rows:
                self._cluster.tell(row.replica, "finish_at", step=self._finish_at)

    def _needs_standby(self) -> bool:
        """Whether the next kill is one for a standby: each with ``--standby``, all but the first with ``--compare``."""
        return self._options.standby or (self._options.compare and self._num_killed > 0)

    def _standby_waits(self) -> bool:
        """Whether a standby has waited long enough to be seen; one is started where there is none.

        Not before all train: what it costs to start one is taken from whoever trains on the same cores.
        """
        story = self._story
        if self._num_standbys == sum(recovery.standby for recovery in story.recoveries):
            self._num_standbys += 1
            self._cluster.start_standby()
        waiting = story.standbys[-1].waiting if story.standby_waits else None
        return waiting is not None and self._cluster.now() > waiting + STANDBY_NOTICE

    def _kill_step(self, index: int) -> int:
        first, last = self._options.kill_step, self._options.steps
        return first + index * (last - first) // self._options.kills


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--replicas", type=int, default=3, help="replica processes (default: %(default)s)")
    add("--steps", type=int, default=80, help="steps to train; more if a heal takes longer (%(default)s)")
    add("--kill-step", type=int, default=30, help="step after which the first kill comes (%(default)s)")
    add("--kills", type=int, default=1, help="kills, evenly spread over the rest (%(default)s)")
    add("--standby", action="store_true", help="a process that is ready but for its Manager takes a dead one's place")
    add("--compare", action="store_true", help="the first kill without a standby, the others, at least one, with")
    # Short: the replicas are on this machine, and a Manager's heartbeats, each 100 ms, are not Python's. See
    # docs/first-heal.md for a network.
    add("--heartbeat-timeout-ms", type=int, default=500, help="after which a silent replica is dead (%(default)s)")
    add("--width", type=int, default=320, help="model width, a multiple of 64 (%(default)s)")
    add("--transport", choices=TRANSPORTS, default=TRANSPORTS[0], help="what moves the state (%(default)s)")
    add(
        "--in-place",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="receive into the replica's own tensors; torchft-http cannot (%(default)s)",
    )
    add("--seed", type=int, default=0, help="of data and first weights (%(default)s)")
    add("--output", type=Path, default=Path("recovery"), help="folder for results (%(default)s)")
    add("--timeout", type=float, default=300.0, help="seconds for the whole demo (%(default)s)")
    options = parser.parse_args(arguments)
    if options.replicas < 2:
        parser.error("--replicas: two at least, one to die and one to heal from")
    if not 0 < options.kill_step < options.steps:
        parser.error("--kill-step: expected a step between 0 and --steps")
    if options.width < 64 or options.width % 64:
        parser.error("--width: expected a multiple of 64")
    if options.heartbeat_timeout_ms < 1:
        parser.error("--heartbeat-timeout-ms: expected 1 or more")
    if not 0 < options.timeout < 1e6:
        parser.error("--timeout: expected more than 0 seconds, and less than 1e6")
    if options.kills < 0:
        parser.error("--kills: expected 0 or more")
    if options.standby and options.compare:
        parser.error("--compare: is without a standby first; leave --standby out")
    if options.compare:
        options.kills = max(options.kills, 2)
    return options


def divert_native_log(path: Path) -> None:
    """Send what native code writes to stderr into a file: it would tear the live view.

    The Lighthouse logs every quorum there. Python keeps the stderr that it had.
    """
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with path.open("wb") as log:
        os.dup2(log.fileno(), 2)


def min_replicas(num_replicas: int) -> int:
    """How many replicas the rest of the job needs to go on.

    Not all but one: when a replica dies in gloo's ring allreduce, only its neighbours in the ring notice.
    Another one waits until they leave the group, which they do when the quorum goes on without it.
    """
    return max(1, num_replicas // 2)


def start_lighthouse(num_replicas: int, heartbeat_timeout_ms: int) -> Any:
    """A torchft Lighthouse in this process, on a free port."""
    from torchft.coordination import LighthouseServer

    return LighthouseServer(
        bind="[::]:0",
        min_replicas=min_replicas(num_replicas),
        join_timeout_ms=JOIN_TIMEOUT_MS,
        heartbeat_timeout_ms=heartbeat_timeout_ms,
    )


def write_events(events: list[Event], path: Path) -> None:
    """One JSON object a line, in the order of time."""
    ordered = sorted(events, key=lambda event: event.time)
    path.write_text("".join(json.dumps(event.as_dict()) + "\n" for event in ordered))


def write_summary(options: argparse.Namespace, story: Story, seconds: float, path: Path) -> None:
    """All results and what they were measured with, as one JSON object."""
    import torch
    import torchft

    checks = {check.name: {"passed": check.passed, "detail": check.detail} for check in story.checks()}
    equal, in_place = story.checks()[1:3]
    means = story.mean_losses()
    shares = story.standby_share()
    summary = {
        "passed": all(check.passed is not False for check in story.checks()),
        "equal": equal.passed,
        "in_place": in_place.passed,
        "mean_loss": means and {"before": means[0], "after": means[1], "num_steps": means[2]},
        "checks": checks,
        "standby_share": shares and {"with": shares[0], "without": shares[1], "share": shares[0] / shares[1]},
        "recoveries": [recovery.as_dict() for recovery in story.recoveries],
        "finals": [row.finished for row in story.rows],
        "seconds": seconds,
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchft": getattr(torchft, "__version__", "unknown"),
        },
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")


def _on_terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def direct(options: argparse.Namespace, console: Console, origin: float) -> tuple[Story, list[Event]]:
    """Run the whole demo; no process is left, however it ends."""
    divert_native_log(options.output / "lighthouse.log")
    lighthouse = start_lighthouse(options.replicas, options.heartbeat_timeout_ms)
    settings = Settings(
        replica=0,
        num_replicas=options.replicas,
        min_replicas=min_replicas(options.replicas),
        incarnation=0,
        width=options.width,
        seed=options.seed,
        transport=options.transport,
        in_place=options.in_place and options.transport != "torchft-http",
        timeout=MANAGER_TIMEOUT,
        lighthouse=lighthouse.address(),
        origin=origin,
        events_fd=-1,
        parent_pid=os.getpid(),
    )
    story = Story(options.replicas, options.kills, settings.in_place)
    how = "in place" if settings.in_place else "not in place"
    title = f"{options.replicas} replicas heal over {options.transport}, {how}"
    view: View = PlainView(console, story, title)
    if console.is_terminal:
        view = LiveView(console, story, title, options.steps)
    try:
        with Cluster(settings, options.output) as cluster, view:
            director = Director(options, cluster, story, view)
            try:
                director.run()
            finally:
                write_events(director.events, options.output / "events.jsonl")
    finally:
        lighthouse.shutdown()
    story.measure_pauses()
    return story, director.events


def main() -> int:
    options = parse_options(sys.argv[1:])
    options.output.mkdir(parents=True, exist_ok=True)
    for log in [*options.output.glob("replica_*.log"), options.output / "standby.log"]:
        log.unlink(missing_ok=True)
    # Set even where this process was started with SIGINT ignored, as a shell does for a background job.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _on_terminate)
    signal.signal(signal.SIGHUP, _on_terminate)
    console = Console()
    origin = time.monotonic()
    try:
        story, _ = direct(options, console, origin)
    except KeyboardInterrupt:
        console.print("interrupted; every process has ended")
        return 128 + signal.SIGINT
    except DemoError as error:
        console.print(Text("failed: ", "bold red").append(str(error), "default"), soft_wrap=True)
        console.print(f"logs: {options.output}", highlight=False, soft_wrap=True)
        return 1
    seconds = time.monotonic() - origin
    print_result(console, story)
    write_summary(options, story, seconds, options.output / "summary.json")
    from recovery.picture import draw

    draw(story, options.output / "recovery.png")
    console.print(f"picture, events, summary and logs: {options.output}", highlight=False)
    return 0 if all(check.passed is not False for check in story.checks()) else 1


if __name__ == "__main__":
    sys.exit(main())
