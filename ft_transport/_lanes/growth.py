"""How many lanes there are, where the caller leaves that to us. No I/O.

Strategy: a connection carries at most a window for each round trip, so over a long way it takes many, and from the
beginning: by the time that a trial had told, a small state would be here. Over a short way nobody knows what it takes
(cores, queues of the card, switches), so it is tried: twice as many, as long as that pays. Within a machine two lanes
copy as fast as memory does.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Literal

from ft_transport._deadline import Deadline

__all__ = ["MOST_LANES", "LaneCount"]

# One lane more costs a thread on each side.
MOST_LANES = 16
_FEWEST = 2
# What a connection has under way, and a link that is worth filling. Linux lets a window grow to some 3 MiB by default
# (half of tcp_rmem's 6 MiB), in good time; nobody knows the link: 10 Gbit/s.
_WINDOW_BYTES = 2 << 20
_LINK_BYTES_PER_S = 1.25e9
# For the buckets of all lanes: two of 64 MiB, as a group has.
_ROOM_BYTES = 128 << 20
# How long a number is tried, once its lanes have had half of that to begin.
_TRIAL = timedelta(seconds=0.5)
# Less is what two looks at the same lanes differ by.
_PAYS = 1.2


class LaneCount:
    """How many lanes a receive has with one supplier.

    Args:
        chosen: The caller's number, or "auto".
        round_trip: Seconds that a packet to the supplier and its answer take; 0.0: not known.
        is_local: Whether it is on this machine.
        lane_bytes: What a lane takes of either side's memory, at the most.

    Attributes:
        number: So many there are to be now.
    """

    def __init__(
        self, chosen: int | Literal["auto"], round_trip: float, *, is_local: bool, lane_bytes: int = 0
    ) -> None:
        self._may_grow = chosen == "auto" and not is_local
        self._most = min(max(_ROOM_BYTES // max(lane_bytes, 1), _FEWEST), MOST_LANES)
        if chosen != "auto":
            self.number = chosen
        elif is_local:
            self.number = _FEWEST
        else:
            wanted = math.ceil(round_trip * _LINK_BYTES_PER_S / _WINDOW_BYTES)
            self.number = min(max(wanted, _FEWEST), self._most)
        self._before = 0.0  # bytes a second, with half as many
        self._began = 0
        self._beginning = True
        self._trial = Deadline(_TRIAL / 2)

    def look(self, nbytes: int) -> bool:
        """Decide anew; gives whether there are to be more. Call it often.

        Args:
            nbytes: What has come in so far, on all lanes.
        """
        if not self._may_grow or self.number >= self._most or not self._trial.expired():
            return False
        if self._beginning:
            self._beginning, self._began, self._trial = False, nbytes, Deadline(_TRIAL)
            return False
        rate = (nbytes - self._began) / self._trial.elapsed()
        self._may_grow = rate > _PAYS * self._before
        if not self._may_grow:
            return False
        self.number, self._before = min(2 * self.number, self._most), rate
        self._beginning, self._trial = True, Deadline(_TRIAL / 2)
        return True
