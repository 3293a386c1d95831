"""Sets a job up, has it directed, takes it down, and writes what it showed."""

from __future__ import annotations

import time
from pathlib import Path

from torchft.coordination import LighthouseServer

from .director import Director
from .processes import Cluster, warm_up
from .replica import Birth
from .schedule import Plan, draw
from .settings import Settings

__all__ = ["play"]


def play(plan: Plan, settings: Settings, output: Path) -> int:
    """One run; gives the exit status. However it ends, no process is left and the report is written."""
    warm_up()
    lighthouse = LighthouseServer(
        bind="[::]:0",
        min_replicas=settings.min_replicas,
        join_timeout_ms=int(1000 * settings.join),
        quorum_tick_ms=20,
        heartbeat_timeout_ms=int(1000 * settings.heartbeat),
    )
    address = f"http://localhost:{lighthouse.address().rpartition(':')[2]}"
    birth = Birth(settings, address, output / "claims", time.monotonic(), plan.seed, 0, 0)
    cluster = Cluster(birth)
    interrupted = False
    with (output / "events.jsonl").open("w") as log:
        director = Director(plan, draw(plan), settings, cluster, birth.folder, log, lambda line: print(line, flush=True))
        try:
            director.run()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            left = cluster.end()
            lighthouse.shutdown()
    print("interrupted" if interrupted else "ended", len(director.events), left)
    return 0
