"""What the caller may choose about a transfer, and what that means on the wire: sizes of messages, and digests.

Strategy: choices are made at the source, and travel in the manifest; a destination takes them as they are. So a peer of
another size, with other cores or another mind, needs no options that match.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeAlias

import torch

from ft_transport._telemetry.events import EventCallback
from ft_transport._telemetry.report import Copies, OnMismatch, PhaseCallback, ProgressCallback
from ft_transport._wire.digest import NUM_SAMPLES
from ft_transport._wire.layout import Limits

__all__ = ["CPU", "NUM_BUCKETS", "Fabric", "LaneOptions", "Options"]

CPU = torch.device("cpu")

# Any other name is of a one-sided transport of torch's.
Fabric: TypeAlias = Literal["auto", "tcp", "cma"] | str

# Buckets on each side for each peer of a group. While one moves, the other is filled or emptied.
NUM_BUCKETS = 2

# Where the operations of a pair run in the order in which they are posted, both sides must post them alike: with no
# more flights than buckets, neither ever has to wait for a bucket out of turn.
_IN_ORDER_LIMITS = Limits(window=NUM_BUCKETS)

# Gloo keeps a core busy on each side. With fewer cores than this the digests would take from it.
_CORES_TO_SPARE = 4


@dataclass(frozen=True)
class Options:
    """What the caller may choose about a transfer.

    Attributes:
        device: Where messages live that the channel moves.
        verify: Whether the source sends digests of its messages: True of every byte, False none, None of every byte
            where there are cores to spare for it, else of a sample of large messages.
        strict: Whether missing and unexpected keys are an error.
        on_progress: Called after each flight, from the thread that serves the peer.
        shadow: As a destination, receive beside the template, and copy into it once everything agrees.
        on_event: Called with the event of each transfer that is over.
        on_mismatch: As a destination, what becomes of a leaf that does not fit the template's.
        copies: What is known of the callback that gives the template; None: that it gives no copies.
        shared: Whether the group moves all that it is given into shared memory.
        fresh_device: Where fresh leaves live that were on an accelerator at the source; None for ``device``.
        on_phase: Called as each phase begins, with the report that it is of; for ``ft_transport.testing``.
        in_order: As of ``_group.channel.Channel``: of the group that messages move over.
    """

    device: torch.device
    verify: bool | None = None
    strict: bool = False
    on_progress: ProgressCallback | None = None
    shadow: bool = False
    on_event: EventCallback | None = None
    on_mismatch: OnMismatch = "fresh"
    copies: Copies | None = None
    shared: bool = False
    fresh_device: torch.device | None = None
    on_phase: PhaseCallback | None = None
    in_order: bool = False

    def limits(self, nbytes: int) -> Limits:
        """How this side cuts the messages of a state of ``nbytes`` when it is the source."""
        return _IN_ORDER_LIMITS if self.in_order else Limits()

    @property
    def digest(self) -> str:
        """Which digest this side sends when it is the source, empty for none."""
        # Whether to compare is the source's choice: it alone knows whether it has cores to spare for reading every byte
        # once more, and its choice travels in the manifest.
        if self.verify is False:
            return ""
        # XXH3 reads main memory at 30 GB/s with the GIL released. On an accelerator the bytes would have to come here
        # first, so there it is a sum, which an operation of torch can take where they are.
        return "xxh3" if self.device.type == "cpu" else "sum"

    @property
    def sample(self) -> int:
        """Which block of large messages the digests read, another one for each transfer; -1 for all."""
        # Affinity and not cpu_count(): a container or a launcher may have given this process two of the machine's
        # cores.
        spare = self.digest != "xxh3" or len(os.sched_getaffinity(0)) >= _CORES_TO_SPARE
        return -1 if self.verify or spare else random.randrange(NUM_SAMPLES)


@dataclass(frozen=True)
class LaneOptions(Options):
    """As ``Options``; messages always live on the CPU.

    Attributes:
        stall: How long a peer may be silent before it counts as gone.
        lanes: Connections that a destination opens for the state's bytes; "auto": as ``_lanes.growth`` finds.
        chain: As a source, let destinations pass the state on to each other.
        skip_unchanged: As a destination, compare what the template holds before it is moved.
        fabric: By what messages move: "cma" is memory that is read within a machine, "auto" the same where it works;
            any other name but "tcp" is of a one-sided transport of torch's.
    """

    fresh_device: torch.device | None = CPU
    stall: timedelta = timedelta(seconds=5)
    lanes: int | Literal["auto"] = "auto"
    chain: bool = True
    skip_unchanged: bool = False
    fabric: Fabric = "auto"

    @property
    def reads_by(self) -> str:
        """By which fabric (``_lanes.fabric``) others' memory may be read, and this one's by them; empty for none."""
        return {"tcp": "", "auto": "cma"}.get(self.fabric, self.fabric)

    def limits(self, nbytes: int) -> Limits:
        """As ``Options.limits``.

        They grow with the state, up to a point: each costs some 100 us on either side, and what is under way when a
        lane breaks is a small part of the state. In a chain each destination waits for a whole message before it passes
        it on, so there they are smaller.
        """
        # In bytes. Three messages, what a lane asks for over a connection, are below a twentieth of 256 MiB or more.
        unit, most, growth = (2 << 20, 2, 512 << 20) if self.chain else (4 << 20, 4, 256 << 20)
        return Limits(message_bytes=min(max(nbytes // growth, 1), most) * unit)

    @property
    def sample(self) -> int:
        """Every byte is read: a damaged message is moved again, so each must be known to be sound or not."""
        return -1
