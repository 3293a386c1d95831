"""Which messages go straight to where they belong, and which through a bucket."""

from __future__ import annotations

from helpers import CPU, noise, raw_bytes

from ft_transport import TransferReport
from ft_transport._plan.buffers import Bucket, aligned
from ft_transport._plan.compare import compare
from ft_transport._plan.destination import DestinationPlan
from ft_transport._plan.source import place
from ft_transport._plan.template import match_template
from ft_transport._state.describe import describe
from ft_transport._wire.layout import lay_out
from plan.landing import LIMITS


def test_a_range_lands_directly_where_strides_agree() -> None:
    template = {"a": noise(100, 2), "b": noise((4, 5), 3)}
    report = TransferReport("destination", "test", 1)
    manifest, _ = describe({"a": noise(100, 1), "b": noise((5, 4), 4).t()})
    layout = lay_out(manifest, LIMITS)
    matched = match_template(manifest, template, report)
    landing = DestinationPlan(manifest, layout, matched, compare(manifest, matched, report)[0], CPU, report)
    assert landing.in_place
    direct = [landing.placement.direct(message) for message in range(len(layout.messages))]
    assert direct[0] is not None
    assert direct[0].data_ptr() == template["a"].data_ptr()
    assert direct[-1] is None, "other strides go through a bucket"


def test_a_range_of_several_messages_is_cut_where_they_begin() -> None:
    whole = noise(1_000, 1)
    manifest, tensors = describe({"a": whole[7:], "small": [noise(5, 2), noise(6, 3)]})
    layout = lay_out(manifest, LIMITS._replace(pack_below=64, pack_from=1))
    placement, bucket = place(manifest, layout, tensors, CPU), Bucket(CPU)
    bucket.reset(sum(map(aligned, layout.sizes)))
    assert [len(owners) for owners in layout.owners][-2:] == [1, 2]
    found = [placement.view(message, bucket).tobytes() for message in range(len(layout.sizes))]
    assert b"".join(found[:-1]) == raw_bytes(whole[7:])
    assert found[-1] == raw_bytes(noise(5, 2)) + raw_bytes(noise(6, 3))
    # Views into the state itself, and no copies.
    held = placement.held(1)
    assert held is not None
    assert held.view.tobytes() == found[1]
    whole.zero_()
    assert held.view.tobytes() == bytes(layout.sizes[1])
