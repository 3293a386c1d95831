"""Whether a state has changed while it was sent. No I/O.

Strategy: torch counts the in-place operations on each tensor, for autograd. Whoever has the count from before the
first byte was read and the same count after the last one knows that no operation has ended in between, without reading
a byte. Fused optimizers do not count, so optimizers are watched as well, through the hook that torch calls before any
optimizer steps. Not seen: what else writes past autograd (NumPy, ``.data``, raw pointers), and in-place operations on
ranges in which several views lie between each other.

Small ranges are left out: forward may change small buffers (BatchNorm), which both transports copy (see ``_source``).
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ft_transport._layout import Layout
from ft_transport._manifest import Blocks, Manifest
from ft_transport._tree import format_path
from ft_transport.errors import LocalProtocolError

__all__ = ["Versions"]

# Paths that an error names: an optimizer that stepped too early changes all of them.
_MAX_NAMED = 8


class Versions:
    """The counts of a described state's large tensors, as they are now; from now on, whether an optimizer steps.

    Args:
        manifest: Of the state.
        layout: Its messages.
        blocks: The memory of each byte range.
    """

    def __init__(self, manifest: Manifest, layout: Layout, blocks: Blocks) -> None:
        self._manifest = manifest
        self._layout = layout
        self._blocks = blocks
        self._stepped: set[tuple[int, int]] = set()
        limit = layout.stage_below
        self._keys = [(storage, begin) for storage, begin, end in layout.ranges if end - begin >= limit]
        self._tensors = [blocks[key].memory for key in self._keys]
        try:
            self._noted = self._count()
        except RuntimeError:  # an inference tensor has no count
            self._keys = [key for key in self._keys if not blocks[key].memory.is_inference()]
            self._tensors = [blocks[key].memory for key in self._keys]
            self._noted = self._count()
        _watch(self)

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step: note what it holds of the state."""
        places = {block.memory.data_ptr(): key for key, block in self._blocks.items()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                local = getattr(parameter, "_local_tensor", parameter)  # of a DTensor
                if type(local) in (torch.Tensor, torch.nn.Parameter) and local.data_ptr() in places:
                    self._stepped.add(places[local.data_ptr()])

    def _count(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]

    def check(self) -> None:
        """Call when all bytes have been read.

        Raises:
            LocalProtocolError: A tensor has changed; the text names the paths.
        """
        now = self._count()
        if now == self._noted and not self._stepped:
            return
        counts = zip(self._keys, self._noted, now, strict=True)
        paths = self._paths(self._stepped | {key for key, before, after in counts if before != after})
        more = f" and {len(paths) - _MAX_NAMED} more" if len(paths) > _MAX_NAMED else ""
        raise LocalProtocolError(
            f"the state changed while it was sent: {', '.join(paths[:_MAX_NAMED])}{more}; it must not, before "
            "disallow_checkpoint() has returned"
        )

    def _paths(self, changed: set[tuple[int, int]]) -> list[str]:
        range_of, manifest = self._layout.range_of, self._manifest
        ranges = {range_of(*key) for key in changed}
        return [
            format_path(manifest.paths[index])
            for index, leaf in enumerate(manifest.leaves)
            if any(view.storage >= 0 and range_of(view.storage, view.begin) in ranges for view in leaf.views)
        ]


# States that are being sent; dead ones are dropped with the next one. Replaced as a whole, because an optimizer may be
# going through them in another thread.
_watching: tuple[weakref.ref[Versions], ...] = ()
_adding = threading.Lock()


def _watch(versions: Versions) -> None:
    global _watching
    with _adding:
        _watching = (*(known for known in _watching if known() is not None), weakref.ref(versions))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return  # a compiled step counts
    for known in _watching:
        if (versions := known()) is not None:
            versions.note_step(optimizer)


# Here and not for each transfer: torch does not expect that hooks are added while another thread's optimizer steps.
register_optimizer_step_pre_hook(_before_step)
