"""How a job of the chaos run is set up. All replicas and the director share it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Everything that a run is made with, but for its schedule. Times in seconds.

    The order of the time-outs is what matters: a transfer ends before the collectives that wait for it, and the
    Lighthouse waits longer for a living replica than such a collective lasts, so that nobody is left behind with a
    step of its own.

    Attributes:
        transport: ``"lanes"`` or ``"pg"``.
        replicas: How many.
        min_replicas: How many that hold the newest state a step needs. Two: what a lone survivor would commit
            while the others are frozen, nobody else would have.
        async_quorum: As the Manager's.
        layers: Linear layers of 1024 by 1024; with AdamW's state each has 12.6 MB.
        transfer: The transport's time-out.
        stall: The lanes' ``stall_timeout``.
        group: Of the process group's collectives.
        manager: The Manager's time-out.
        quorum: How long a replica waits for others.
        join: How long the Lighthouse waits for a living replica.
        heartbeat: How long the Lighthouse takes a silent replica for alive.
        metric: Whether the state has a metric whose shape grows with each step.
        pace: Bytes per second and connection, so that there is time to strike.
    """

    transport: str = "lanes"
    replicas: int = 4
    min_replicas: int = 2
    async_quorum: bool = True
    layers: int = 3
    transfer: float = 2.0
    stall: float = 0.75
    group: float = 3.0
    manager: float = 5.0
    quorum: float = 60.0
    join: float = 20.0
    heartbeat: float = 1.0
    metric: bool = True
    pace: int = 50_000_000
