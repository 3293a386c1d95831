"""Faults to try out: an in-memory channel, and channels, connections, fabrics and transports on which things go wrong.

``docs/testing.md`` shows how.
"""

from __future__ import annotations

from ft_transport.testing._channel import FaultyChannel
from ft_transport.testing._device import StandInAccelerator
from ft_transport.testing._fabric import FaultyFabric
from ft_transport.testing._faults import Faults
from ft_transport.testing._memory import MemoryChannel, memory_channels
from ft_transport.testing._proxy import FaultProxy, Tamper
from ft_transport.testing._transport import FaultyTransport

__all__ = [
    "FaultProxy",
    "Faults",
    "FaultyChannel",
    "FaultyFabric",
    "FaultyTransport",
    "MemoryChannel",
    "StandInAccelerator",
    "Tamper",
    "memory_channels",
]
