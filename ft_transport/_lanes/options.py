"""What the caller may choose about a transfer over lanes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from ft_transport._group.fan_out import Options
from ft_transport._wire.layout import SMALL_BYTES, Limits

__all__ = ["CPU", "SMALL_BYTES", "LaneOptions", "settled_stream"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LaneOptions(Options):
    """As ``Options``; messages always live on the CPU.

    Attributes:
        fresh_device: Where fresh leaves live that were on an accelerator at the source.
        stall: How long a peer may be silent before it counts as gone.
        lanes: Connections that a destination opens for the state's bytes.
        chain: As a source, let destinations pass the state on to each other.
        skip_unchanged: As a destination, compare what the template holds before it is moved.
    """

    fresh_device: torch.device = CPU
    stall: timedelta = timedelta(seconds=5)
    lanes: int = 2
    chain: bool = True
    skip_unchanged: bool = False

    def limits(self, nbytes: int) -> Limits:
        """As ``Options.limits``.

        They grow with the state, up to a point: each costs some 100 us on either side, and what is under way when a
        lane breaks is a small part of the state. In a chain each destination waits for a whole message before it passes
        it on, so there they are smaller.
        """
        unit, most = (2 << 20, 2) if self.chain else (4 << 20, 4)
        return Limits(message_bytes=min(max(nbytes // (512 << 20), 1), most) * unit)

    @property
    def sample(self) -> int:
        """Every byte is read: a damaged message is moved again, so each must be known to be sound or not."""
        return -1


def settled_stream() -> Any:
    """The caller's stream, for other threads to copy in, once the accelerator has done all that it was told to.

    None without an accelerator.
    """
    if not torch.accelerator.is_available():
        return None
    torch.accelerator.synchronize()
    return torch.accelerator.current_stream()
