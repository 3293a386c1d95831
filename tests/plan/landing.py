"""A state moved into a template message by message, in this thread."""

from __future__ import annotations

from typing import Any

from helpers import CPU

from ft_transport import TransferReport
from ft_transport._plan.buffers import Bucket
from ft_transport._plan.compare import compare
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.source import place
from ft_transport._plan.template import match_template
from ft_transport._state.describe import describe
from ft_transport._wire.layout import Limits, lay_out

LIMITS = Limits(message_bytes=256, flight_bytes=256, pack_below=64, pack_from=3, window=2)


def land(
    state: object, template: object = None, limits: Limits = LIMITS
) -> tuple[Any, TransferReport, DestinationPlan]:
    """Move a state into a template message by message, in this thread."""
    report = TransferReport("destination", "test", 1)
    manifest, tensors = describe(state)
    layout = lay_out(manifest, limits)
    matched = match_template(manifest, template, report) if template is not None else {}
    targets, disagreements = compare(manifest, matched, report)
    assert disagreements == []
    landing = DestinationPlan(manifest, layout, matched, targets, CPU, report)
    source = place(manifest, layout, tensors, CPU)
    for message in range(len(layout.messages)):
        bucket = Bucket(CPU)
        bucket.reset(source.staged_bytes(range(message, message + 1)))
        data = source.bytes_of(message, bucket)
        assert data.numel() == layout.sizes[message]
        target = landing.placement.direct(message)
        if target is None:
            landing.placement.scatter(message, data.clone())
        else:
            assert target.numel() == layout.sizes[message]
            target.copy_(data)
    return landing.rebuild(), report, landing


def disagreements(state: object, template: object) -> list[str]:
    report = TransferReport("destination", "test", 1)
    manifest, _ = describe(state)
    return compare(manifest, match_template(manifest, template, report), report)[1]
