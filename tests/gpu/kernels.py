"""Work for an accelerator that takes a known time; and what its allocator says."""

from __future__ import annotations

import torch

__all__ = ["busy", "current", "fill_later", "peak_of"]

IS_SIMULATED = torch._C._get_privateuse1_backend_name() == "sim"


def current() -> str:
    """The type of the accelerator."""
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found.type


def busy(index: int, seconds: float) -> None:
    """Let a device's current stream do nothing else for about so long."""
    if IS_SIMULATED:
        import simulator

        simulator.device.busy(index, seconds)
        return
    with torch.cuda.device(index):
        torch.cuda._sleep(int(seconds * 1.5e9))  # cycles, of some 1.5 GHz


def fill_later(tensor: torch.Tensor, value: float, seconds: float) -> None:
    """A kernel of the current stream that takes about so long, and then fills a tensor."""
    if IS_SIMULATED:
        import simulator

        simulator.device.fill(tensor, value, seconds)
        return
    busy(tensor.device.index, seconds)
    tensor.fill_(value)


class peak_of:  # noqa: N801
    """How many bytes more a device had at most while a block ran, than before it: ``with peak_of(0) as peak: …``."""

    def __init__(self, index: int) -> None:
        self._index = index
        self.nbytes = 0

    def _look(self) -> tuple[int, int]:
        """What is allocated, and what was at most."""
        if IS_SIMULATED:
            import simulator

            return simulator.device.allocated(self._index), simulator.device.peak(self._index)
        return torch.cuda.memory_allocated(self._index), torch.cuda.max_memory_allocated(self._index)

    def __enter__(self) -> peak_of:
        if IS_SIMULATED:
            import simulator

            simulator.device.reset_peak(self._index)
        else:
            torch.cuda.reset_peak_memory_stats(self._index)
        self._before, _ = self._look()
        return self

    def __exit__(self, *exc: object) -> None:
        self.nbytes = self._look()[1] - self._before
