"""Sets a job up, has it directed, takes it down, and writes what it showed."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from torchft.coordination import LighthouseServer

from .checks import Promise, check
from .director import Director
from .events import Event
from .figures import figures
from .processes import Cluster, warm_up
from .replica import Birth
from .report import page, replay, summary
from .schedule import Plan, draw
from .settings import Settings
from .sockets import listening

__all__ = ["play", "tell"]

_CLOSING_SECONDS = 10.0


def play(plan: Plan, settings: Settings, output: Path) -> int:
    """One run; gives the exit status. However it ends, no process is left and the report is written."""
    warm_up()
    ports = listening()
    claims = Path(tempfile.mkdtemp(prefix="chaos-"))
    lighthouse = _lighthouse(settings)
    address = f"http://localhost:{lighthouse.address().rpartition(':')[2]}"
    cluster = Cluster(Birth(settings, address, output, claims, time.monotonic(), plan.seed, 0, 0))
    status, whole, left = 0, False, []
    with (output / "events.jsonl").open("w") as log:
        director = Director(plan, draw(plan), settings, cluster, claims, log, lambda line: print(line, flush=True))
        try:
            director.run()
            whole = True
        except KeyboardInterrupt:
            status = 130
        finally:
            left = [f"process {pid}" for pid in cluster.end()]
            lighthouse.shutdown()
            shutil.rmtree(claims)
    events = sorted(director.events, key=lambda event: event.time)
    left += [f"port {port}" for port in _left_listening(ports)]
    left += [f"file {claims}"] if claims.exists() else []
    promises = check(events, settings, whole=whole, left=left)
    tell(events, plan, settings, promises, output, whole=whole)
    return status or int(not all(promise.kept for promise in promises))


def _lighthouse(settings: Settings) -> LighthouseServer:
    return LighthouseServer(
        bind="[::]:0",
        min_replicas=settings.min_replicas,
        join_timeout_ms=int(1000 * settings.join),
        quorum_tick_ms=20,
        heartbeat_timeout_ms=int(1000 * settings.heartbeat),
    )


def _left_listening(before: set[int]) -> set[int]:
    """Ports that this process listens on and did not before; the Lighthouse closes its own a moment after shutdown."""
    limit = time.monotonic() + _CLOSING_SECONDS
    while (left := listening() - before) and time.monotonic() < limit:
        time.sleep(0.05)
    return left


def tell(
    events: list[Event], plan: Plan, settings: Settings, promises: list[Promise], output: Path, *, whole: bool
) -> None:
    """Write the report, and say the most important of it."""
    from .plot import draw as draw_picture

    found = figures(events, settings)
    (output / "chaos.json").write_text(summary(found, plan, settings, promises, whole=whole))
    (output / "chaos-report.md").write_text(page(found, plan, settings, promises, whole=whole))
    draw_picture(events, settings, promises, output / "chaos.png")
    heals, spread = found["heals"], found["seconds to recover"]
    print(
        f"{found['kills']} kills, {found['stops']} stops, {found['cuts']} cuts; {heals['complete']} heals, "
        f"{heals['resumed']} resumed; seconds to recover: median {spread['median']}, p99 {spread['p99']}"
    )
    for promise in promises:
        print(f"  {'kept  ' if promise.kept else 'BROKEN'}  {promise.text} (looked at {promise.checked} times)")
        for line in promise.broken[:5]:
            print(f"          {line}")
    print(f"report, picture, events and logs: {output}")
    if not all(promise.kept for promise in promises):
        print(f"again with: {replay(plan, settings)}")
