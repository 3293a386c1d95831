"""A state that changes while it is sent: what is found, what is not, and what it costs."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
from helpers import CPU, SMALL, Recorded, Wrapped, noise, num_posted, raw_bytes, storage_bytes, succeed, transfer
from torch._dynamo.utils import counters

from ft_transport import LocalProtocolError, PeerFailure, RemoteProtocolError, _versions
from ft_transport._channel import Pending
from ft_transport._control import FIRST_MESSAGE_TAG
from ft_transport._layout import Limits, lay_out
from ft_transport._manifest import describe
from ft_transport._source import Outbound
from ft_transport._transfer import Options
from ft_transport._versions import Versions
from ft_transport.report import TransferReport
from ft_transport.testing import memory_channels

LARGE = 100_000  # elements of four bytes, more than a small range


def versions(state: object) -> Versions:
    manifest, blocks = describe(state)
    return Versions(manifest, lay_out(manifest, Limits()), blocks)


def found(noted: Versions) -> str:
    with pytest.raises(LocalProtocolError) as info:
        noted.check()
    return info.value.message


# ------------------------------------------------------------------------------ what is found, and not


def in_place_by(optimizer: type[torch.optim.Optimizer], **options: Any) -> tuple[dict[str, Any], Any]:
    weight = torch.nn.Parameter(noise(LARGE, 1, torch.int32).float())
    weight.grad = torch.ones_like(weight)
    made = optimizer([weight], **{"lr": 0.1, **options})
    made.step()
    return {"model": {"weight": weight.detach()}, "optim": made.state_dict()}, made.step


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_that_steps_too_early(optimizer: type[torch.optim.Optimizer], options: dict[str, bool]) -> None:
    extra = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    state, step = in_place_by(optimizer, **options, **extra)
    noted = versions(state)
    noted.check()
    step()
    text = found(noted)
    assert "model.weight" in text
    assert "disallow_checkpoint()" in text


def test_an_optimizer_of_something_else_may_step() -> None:
    _, step = in_place_by(torch.optim.AdamW, fused=True)
    noted = versions({"other": noise(LARGE, 1)})
    step()
    noted.check()


def test_an_optimizer_that_writes_as_it_likes_is_seen_before_it_does() -> None:
    weight = torch.nn.Parameter(noise(200, 1))  # small ones, too: no forward steps an optimizer

    class Mine(torch.optim.Optimizer):
        def step(self) -> None:  # type: ignore[override]
            weight.data.zero_()

    optimizer = Mine([weight], {})
    noted = versions({"weight": weight.detach()})
    optimizer.step()
    assert "weight" in found(noted)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_parameter_group_of_an_optimizer_is_seen(place: int) -> None:
    weights = [torch.nn.Parameter(noise(200, i)) for i in range(3)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.1} for weight in weights], fused=True)
    noted = versions({"weight": weights[place].detach()})
    optimizer.step()
    assert "weight" in found(noted)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_optimizer_is_seen_and_not_compiled_again() -> None:
    state, step = in_place_by(torch.optim.AdamW, foreach=True)
    compiled = torch.compile(step, backend="eager")
    compiled()
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(2):
        noted = versions(state)
        compiled()
        assert "model.weight" in found(noted)
    assert counters["stats"]["unique_graphs"] == graphs


def test_nothing_is_watched_afterwards() -> None:
    state = {"weight": noise(LARGE, 1)}
    succeed(state)
    gc.collect()
    assert [known() for known in _versions._watching if known() is not None] == []


def change(what: str, tensor: torch.Tensor) -> None:
    if what == "add_":
        tensor.add_(1)
    elif what == "a view of it":
        tensor[3:5].zero_()
    elif what == "what it is a detached view of":
        assert tensor._base is None
        tensor.detach().fill_(2)
    elif what == "no_grad":
        with torch.no_grad():
            tensor.mul_(2)
    elif what == "inference mode":
        with torch.inference_mode():
            tensor.mul_(2)
    elif what == "set_":
        tensor.set_(torch.zeros_like(tensor))
    elif what == "data":
        tensor.data.zero_()
    elif what == "numpy":
        tensor.numpy()[:] = 0
    elif what == "storage":
        storage_bytes(tensor).zero_()
    else:
        raise AssertionError(what)


@pytest.mark.parametrize(
    "what", ["add_", "a view of it", "what it is a detached view of", "no_grad", "inference mode", "set_"]
)
def test_found(what: str) -> None:
    state = {"still": noise(LARGE, 1), "moving": noise(LARGE, 2)}
    noted = versions(state)
    change(what, state["moving"])
    text = found(noted)
    assert "moving" in text
    assert "still" not in text


@pytest.mark.parametrize("what", ["data", "numpy", "storage"])
def test_not_found(what: str) -> None:
    """As the docs say: past autograd's counter."""
    state = {"moving": noise(LARGE, 2)}
    noted = versions(state)
    change(what, state["moving"])
    noted.check()


def test_small_tensors_may_change() -> None:
    """BatchNorm's statistics, in a forward that goes on meanwhile."""
    state = {f"mean {i}": noise(1000, i) for i in range(20)} | {"weight": noise(LARGE, 2)}
    noted = versions(state)
    for i in range(20):
        state[f"mean {i}"].add_(1)
    noted.check()


def test_a_few_small_tensors_may_change_too() -> None:
    """Fewer than are worth packing."""
    state = {"mean": noise(1000, 1), "weight": noise(LARGE, 2)}
    noted = versions(state)
    state["mean"].add_(1)
    noted.check()


def test_parts_of_one_storage() -> None:
    flat = noise(3 * LARGE, 1)
    state = {"a": flat[:LARGE], "gaps": flat[LARGE : 3 * LARGE].view(2, LARGE).t()[: LARGE // 2], "tied": flat[:LARGE]}
    noted = versions(state)
    flat[5] = 1.0
    assert "a" in found(noted)
    assert "tied" in found(noted)


def test_kinds_of_leaf() -> None:
    parameter = torch.nn.Parameter(noise(LARGE, 1))
    with torch.inference_mode():
        inference = torch.zeros(LARGE)
    sparse = torch.sparse_coo_tensor(
        torch.arange(LARGE).unsqueeze(0), noise(LARGE, 3), (LARGE,), check_invariants=False
    )
    state = {"parameter": parameter, "inference": inference, "sparse": sparse, "array": torch.zeros(LARGE).numpy()}
    noted = versions(state)
    noted.check()
    with torch.no_grad():
        parameter.add_(1)
    assert "parameter" in found(noted)


def test_many_paths_are_counted() -> None:
    state = {f"layer {i}": noise(LARGE, i) for i in range(12)}
    noted = versions(state)
    for tensor in state.values():
        tensor.zero_()
    assert " and 4 more" in found(noted)


# --------------------------------------------------------------------------------- in a transfer


class Changing(Wrapped):
    """Changes the state at the source when so many messages have been posted."""

    def __init__(self, channel: Any, tensor: torch.Tensor, after: int) -> None:
        super().__init__(channel)
        self._tensor, self._after, self._messages = tensor, after, 0

    def send(self, tensor: torch.Tensor, tag: int) -> Pending:
        pending = super().send(tensor, tag)
        if tag >= FIRST_MESSAGE_TAG:
            self._messages += 1
            if self._messages == self._after:
                self._tensor.add_(1)
        return pending


@pytest.mark.parametrize("shadow", [False, True], ids=["in place", "shadow"])
@pytest.mark.parametrize("after", [1, 3, 6])
def test_both_sides_learn_it(after: int, shadow: bool) -> None:
    state = {f"layer {i}": noise(200, i) for i in range(6)}
    template = {name: noise(200, 9) for name in state}
    near, far = memory_channels()
    channels = Changing(near, state["layer 1"], after), far
    options = type(SMALL)(CPU, verify=False)  # no digest would find it
    ends = transfer(
        state, lambda: template, options=options, destination_options=type(SMALL)(CPU, shadow=shadow), channels=channels
    )
    assert isinstance(ends.source.error, LocalProtocolError)
    assert isinstance(ends.destination.error, PeerFailure)
    for side in (ends.source, ends.destination):
        assert "the state changed while it was sent: layer 1" in side.text
        assert side.peer.outcome == "failed"
        assert num_posted(side.channel) == 0
    assert ends.destination.report.torn is not shadow
    assert (raw_bytes(template["layer 0"]) == raw_bytes(noise(200, 9))) is shadow


def test_digests_find_what_was_changed_past_autograd_between_wire_and_digest() -> None:
    state = {f"layer {i}": noise(200, i) for i in range(6)}

    class Sly(Changing):
        def send(self, tensor: torch.Tensor, tag: int) -> Pending:
            pending = Wrapped.send(self, tensor, tag)
            if tag >= FIRST_MESSAGE_TAG:
                self._channel_changed = tensor.data.add_(1)
            return pending

    near, far = memory_channels()
    ends = transfer(state, options=SMALL, channels=(Sly(near, state["layer 1"], 1), far))
    assert isinstance(ends.destination.error, RemoteProtocolError)
    assert "changed at the source" in ends.destination.text


def test_sending_changes_no_count() -> None:
    state = {f"layer {i}": noise(300, i) for i in range(6)} | {"strided": noise((40, 40), 8).t()}
    before = {name: tensor._version for name, tensor in state.items()}
    near, far = memory_channels()
    succeed(state, options=SMALL, channels=(Recorded(near), far))
    assert {name: tensor._version for name, tensor in state.items()} == before


def test_cost() -> None:
    """A few per cent of describing the state; the bound is generous because the machine is busy."""
    state = {f"layer {i}": torch.zeros(1024) for i in range(20_000)}
    options = Options(CPU)
    manifest, blocks = describe(state)
    layout = lay_out(manifest, options.limits(1))
    spent = []
    for _ in range(5):
        start = time.process_time()
        Versions(manifest, layout, blocks).check()
        spent.append(time.process_time() - start)
    start = time.process_time()
    Outbound(state, 7, options, TransferReport("source", "test", 7))
    assert min(spent) < 0.25 * (time.process_time() - start)
