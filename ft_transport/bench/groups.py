"""torchft's groups without a Manager, and which torchft that is: its release and its nightly differ in both."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["join", "torchft_version"]


def join(group: Any, address: str, rank: int, world_size: int) -> None:
    """Connect a group of torchft's with the other ranks', as a Manager does for each quorum.

    Args:
        group: A ``torchft.process_group.ProcessGroup``; with a torchft that takes them also a native group of torch's
            that can be reconfigured.
        address: Of a store, ``host:port/prefix``, with a prefix that was never used before.
        rank: This process's, of ``world_size``.
    """
    if hasattr(group, "configure"):
        group.configure(address, str(rank), rank, world_size)
        return
    # torchft's nightlies from 2026-10 on: groups have handles, which someone has to exchange.
    from torchft.process_group import reconfigure_with_store

    reconfigure_with_store(group, address, rank, world_size)


def torchft_version() -> str:
    """The version of the torchft that is installed, of whichever of its two distributions.

    Raises:
        PackageNotFoundError: It is of neither.
    """
    try:
        return version("torchft")
    except PackageNotFoundError:
        return version("torchft-nightly")
