"""What is waited for on an accelerator, for how long, and what is not; and what memory a heal takes there."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU
from two_ends import TIMEOUT, WAYS, ends

from ft_transport import TransferTimeout
from ft_transport._device import Streams
from ft_transport.errors import PeerFailure

from .kernels import busy, current, fill_later, peak_of

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")

MIB = 1 << 20
LAST = torch.accelerator.device_count() - 1  # not the current one, where there are two


def state(value: float, index: int | None) -> dict[str, Any]:
    """Large, small, and with gaps."""
    device = torch.device(current(), index) if index is not None else CPU
    return {
        "large": torch.full((3 * MIB,), value, device=device),
        "small": [torch.full((100,), value, device=device) for _ in range(20)],
        "strided": torch.full((512, 1024), value, device=device).t(),
    }


def tensors(found: dict[str, Any]) -> list[torch.Tensor]:
    return [found["large"], *found["small"], found["strided"]]


def holds(found: dict[str, Any], value: float) -> bool:
    return all(bool((tensor.cpu() == value).all()) for tensor in tensors(found))


@WAYS
def test_a_kernel_that_still_writes_to_the_state_is_waited_for(way: str) -> None:
    sent = state(0.0, LAST)
    torch.accelerator.synchronize(LAST)
    for tensor in tensors(sent):
        fill_later(tensor, 7.0, 0.02)
    with ends(way, state(3.0, None)) as found:
        assert holds(found.move(sent).result, 7.0)
        assert not found.errors


@WAYS
def test_a_kernel_that_still_writes_to_the_template_does_not_write_last(way: str) -> None:
    template = state(0.0, LAST)
    torch.accelerator.synchronize(LAST)
    for tensor in tensors(template):
        fill_later(tensor, 3.0, 0.02)
    with ends(way, template) as found:
        found.move(state(7.0, None))
        assert not found.errors
    assert holds(template, 7.0)


@WAYS
@pytest.mark.parametrize("side", ["source", "destination"])
def test_the_deadline_holds_behind_a_device_that_is_busy(way: str, side: str) -> None:
    sent, template = state(7.0, LAST if side == "source" else None), state(3.0, LAST if side == "destination" else None)
    torch.accelerator.synchronize(LAST)
    busy(LAST, 6.0)
    with ends(way, template) as found:
        found.move(sent, timedelta(seconds=1))
        assert isinstance(found.errors[side], (TransferTimeout, PeerFailure))
        assert all(seconds < 2.0 for seconds in found.seconds.values()), found.seconds
    torch.accelerator.synchronize(LAST)
    assert holds(template, 3.0), "nothing was written"


@WAYS
def test_copies_do_not_wait_for_the_step_that_training_is_in(way: str) -> None:
    sent, template = state(7.0, 0), state(3.0, LAST)
    torch.accelerator.synchronize(0)
    torch.accelerator.synchronize(LAST)
    with ends(way, template) as found:
        options = found.source._options
        busied = []

        def on_phase(report: object, phase: str) -> None:
            if phase == "move" and not busied:
                busied.append(phase)
                # In a thread of its own, whose stream is the default one.
                step = threading.Thread(target=busy, args=(0, 4.0))
                step.start()
                step.join()

        found.source._options = dataclasses.replace(options, on_phase=on_phase)
        begin = time.monotonic()
        found.move(sent, TIMEOUT)
        assert not found.errors
        assert busied
        assert time.monotonic() - begin < 3.0
    torch.accelerator.synchronize(0)
    assert holds(template, 7.0)


@WAYS
def test_a_heal_in_place_takes_no_memory_of_the_device(way: str) -> None:
    """But for what small tensors are packed in, one message at a time."""
    sent, template = state(7.0, None), state(3.0, 0)
    large = {"large": sent["large"]}, {"large": template["large"]}
    for (theirs, mine), most in ((large, 0), ((sent, template), 3 * MIB)):
        gc.collect()
        with ends(way, mine) as found, peak_of(0) as peak:
            found.move(theirs)
            assert not found.errors
        assert peak.nbytes <= most


def test_a_fresh_state_takes_its_own_memory() -> None:
    sent = {f"layer {i}": torch.full((3 * MIB,), 7.0, device=torch.device(current(), LAST)) for i in range(3)}
    with ends("lanes", device=torch.device(current(), 0)) as found:
        with peak_of(0) as peak:
            found.move(sent)
            assert not found.errors
        nbytes = sum(tensor.nbytes for tensor in sent.values())
        assert nbytes <= peak.nbytes <= nbytes + MIB


_ON_THE_CPU = """
import torch
from two_ends import ends
with ends("lanes", {"w": torch.zeros(1 << 20)}) as found:
    found.move({"w": torch.ones(1 << 20)})
    assert not found.errors
    assert found.result["w"].eq(1).all()
print("touched" if touched() else "not touched")
"""


def test_a_job_of_cpu_tensors_touches_no_device() -> None:
    if current() == "sim":
        touched = "import simulator; touched = simulator.device.opened"
    else:
        touched = "import torch; touched = torch.cuda.is_initialized"
    done = subprocess.run(
        [sys.executable, "-c", touched + _ON_THE_CPU], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.stdout.strip() == "not touched", done.stderr


@pytest.mark.parametrize("form", ["dense", "strided", "gaps"])
def test_memory_that_is_given_back_while_it_is_copied_to_is_not_somebody_elses_yet(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """The next tensor gets it at once, and a copy of ours that is under way would write to that."""
    whole = torch.full((1536, 2048), 3.0, device=torch.device(current(), LAST))
    template = {"dense": whole, "strided": whole.t(), "gaps": whole[:, :1024]}[form]
    sent = torch.full((1536, 2048), 7.0)[:, : template.shape[1]] if form != "strided" else torch.full((2048, 1536), 7.0)
    others: list[torch.Tensor] = []

    def give_back(progress: object) -> None:
        if not others:
            template.untyped_storage().resize_(0)
            others.append(torch.empty(3 * MIB, device=template.device))
            # Where nothing waits for it: on the stream that training is on.
            fill_later(others[0], 5.0, 0.0)

    use = Streams.use

    def behind(self: Streams, **options: Any) -> Any:
        if self.devices and not others:
            with use(self):
                busy(LAST, 0.5)
        return use(self, **options)

    monkeypatch.setattr(Streams, "use", behind)
    with ends("lanes", {"large": template}, on_progress=give_back) as found:
        found.move({"large": sent})
        assert "memory of the state was exchanged or given back" in str(found.errors["destination"])
    torch.accelerator.synchronize(LAST)
    assert all(bool((other.cpu() == 5.0).all()) for other in others)


@WAYS
def test_what_is_copied_in_the_end_does_not_wait_for_the_step_that_training_is_in(way: str) -> None:
    """Nor without a limit: what was received beside (``shadow``) is copied in a stream of the transfer's own, too."""
    template = state(3.0, LAST)
    torch.accelerator.synchronize(LAST)
    with ends(way, template, shadow=True) as found:
        options, busied = found.source._options, []

        def on_phase(report: object, phase: str) -> None:
            if phase == "move" and not busied:
                busied.append(phase)
                step = threading.Thread(target=busy, args=(LAST, 4.0))
                step.start()
                step.join()

        found.source._options = dataclasses.replace(options, on_phase=on_phase)
        begin = time.monotonic()
        found.move(state(7.0, None), TIMEOUT)
        assert not found.errors
        assert time.monotonic() - begin < 3.0
    torch.accelerator.synchronize(LAST)
    assert holds(template, 7.0)
