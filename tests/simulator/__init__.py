"""A simulated accelerator: torch's device "sim", of which there are two. ``device.cpp`` says what it is true to.

Importing it builds it, which takes a C++ compiler and a minute; it is built again when torch or the source is another.
"""

from __future__ import annotations

import fcntl
import sys
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

__all__ = ["device"]


class _Module(types.ModuleType):
    """What torch asks of a backend's Python module."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return torch.accelerator.current_device_index()

    def set_device(self, index: int) -> None:
        torch.accelerator.set_device_index(index)

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


def _built() -> types.ModuleType:
    versions = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
    folder = Path(__file__).parents[2] / "build" / f"simulator-{versions}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ours").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        # Torch's own lock is a file, which a build that was killed leaves behind: who comes later waits for ever.
        (folder / "lock").unlink(missing_ok=True)
        source = str(Path(__file__).with_name("device.cpp"))
        return load("ft_transport_sim", [source], extra_cflags=["-O1"], build_directory=str(folder))


device = _built()
torch.utils.rename_privateuse1_backend("sim")
torch._register_device_module("sim", _Module("sim"))
torch.utils.generate_methods_for_privateuse1_backend()
