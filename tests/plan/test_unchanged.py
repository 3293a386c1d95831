"""A state that changes while it is sent: what is found, what is not, and what it costs."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CPU, SMALL, Recorded, Wrapped, noise, num_posted, raw_bytes, storage_bytes, succeed, transfer
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ft_transport import LocalProtocolError, PeerFailure, RemoteProtocolError
from ft_transport._group.channel import Pending
from ft_transport._group.control import FIRST_MESSAGE_TAG
from ft_transport._options import Options
from ft_transport._plan import unchanged
from ft_transport._plan.source import SourcePlan, place
from ft_transport._plan.unchanged import ChangeDetector, Reading, watch_optimizers
from ft_transport._state.describe import describe
from ft_transport._telemetry.report import TransferReport
from ft_transport._wire.layout import Limits, lay_out
from ft_transport.testing import memory_channels

LARGE = 100_000  # elements of four bytes, more than a small range


@pytest.fixture(autouse=True)
def _watched() -> None:
    """As whoever makes a transport does, before anything steps."""
    watch_optimizers()


def versions(state: object) -> ChangeDetector:
    manifest, tensors = describe(state)
    layout = lay_out(manifest, Limits())
    return ChangeDetector(manifest, layout, place(manifest, layout, tensors, CPU).memory())


def found(noted: ChangeDetector) -> str:
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


def fused(*parameters: torch.Tensor, groups: int = 1) -> torch.optim.AdamW:
    """An optimizer that autograd does not count; of several groups, all but the last are of something else."""
    others = [{"params": [torch.nn.Parameter(torch.ones(3))]} for _ in range(groups - 1)]
    mine = [parameter.requires_grad_(parameter.is_leaf) for parameter in parameters]
    made = torch.optim.AdamW([*others, {"params": mine}], lr=0.1, fused=True)
    for parameter in mine:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    return made


def slice_of_a_flat_buffer() -> tuple[object, torch.optim.Optimizer]:
    flat = torch.zeros(3 * LARGE)
    return {"seen": flat}, fused(torch.nn.Parameter(flat[LARGE : 2 * LARGE]))


def flat_buffer_of_slices() -> tuple[object, torch.optim.Optimizer]:
    flat = torch.zeros(3 * LARGE)
    return {"seen": flat[LARGE : 2 * LARGE]}, fused(torch.nn.Parameter(flat))


def padded_view() -> tuple[object, torch.optim.Optimizer]:
    padded = torch.zeros(LARGE + 8)
    return {"seen": padded}, fused(torch.nn.Parameter(padded[8:]))


def strided_view() -> tuple[object, torch.optim.Optimizer]:
    padded = torch.zeros(100, LARGE // 50)
    return {"seen": padded[:, 8:].t()}, fused(torch.nn.Parameter(padded[:, 8:]))


def another_group() -> tuple[object, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.zeros(LARGE))
    return {"seen": weight.detach()}, fused(weight, groups=3)


def moments_alone() -> tuple[object, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.zeros(LARGE))
    made = fused(weight)
    return {"seen": made.state[weight]["exp_avg"][10:]}, made


def nested_state() -> tuple[object, torch.optim.Optimizer]:
    made = fused(torch.nn.Parameter(torch.zeros(3)))
    directions = [torch.zeros(LARGE)]
    made.state["history"] = {"directions": directions, "itself": made.state}
    return {"seen": directions[0]}, made


def shard() -> tuple[object, torch.optim.Optimizer]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        local = torch.zeros(LARGE)
        weight = torch.nn.Parameter(DTensor.from_local(local, DeviceMesh("cpu", [0]), run_check=False))
    finally:
        dist.destroy_process_group()
    return {"seen": local[1:]}, torch.optim.AdamW([weight], lr=0.1)


@pytest.mark.parametrize(
    "case",
    [
        slice_of_a_flat_buffer,
        flat_buffer_of_slices,
        padded_view,
        strided_view,
        another_group,
        moments_alone,
        nested_state,
        shard,
    ],
    ids=lambda case: case.__name__.replace("_", " "),
)
def test_what_an_optimizer_writes_is_known_by_its_addresses(
    case: Callable[[], tuple[object, torch.optim.Optimizer]],
) -> None:
    state, optimizer = case()
    noted = versions(state)
    unchanged._before_step(optimizer, (), {})
    unchanged._after_step(optimizer, (), {})
    assert "seen" in found(noted)


def test_a_neighbour_in_the_same_buffer_may_change() -> None:
    flat = torch.zeros(3 * LARGE)
    noted = versions({"before": flat[:LARGE], "behind": flat[2 * LARGE :]})
    fused(torch.nn.Parameter(flat[LARGE : 2 * LARGE])).step()
    noted.check()


def test_what_has_no_address_is_passed_over() -> None:
    optimizer = fused(torch.nn.Parameter(torch.zeros(LARGE)))
    optimizer.state["odd"] = [
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.zeros(0),
        FakeTensorMode().from_tensor(torch.zeros(3)),
    ]
    noted = versions({"other": torch.zeros(LARGE)})
    optimizer.step()
    noted.check()


def test_an_optimizer_of_something_else_may_step() -> None:
    _, step = in_place_by(torch.optim.AdamW, fused=True)
    noted = versions({"other": noise(LARGE, 1)})
    step()
    noted.check()


def test_an_optimizer_that_writes_as_it_likes_is_seen_before_it_does() -> None:
    weight = torch.nn.Parameter(noise(200, 1))  # small ones, too, where they were not copied: no forward does that

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
    assert [known() for known in unchanged._watching if known() is not None] == []


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


# ----------------------------------------------------------------------------- optimizers that wait


class Waited:
    """Stands for what reads a state: says how often it was waited for, and what the weight was then."""

    def __init__(self, weight: torch.Tensor, *, ends: bool = True) -> None:
        self.seen: list[float] = []
        self._weight, self._ends = weight, ends
        manifest, tensors = describe({"weight": weight.detach()})
        layout = lay_out(manifest, Limits())
        self.noted = ChangeDetector(manifest, layout, place(manifest, layout, tensors, CPU).memory(), self._await_end)

    def _await_end(self, reading: Reading) -> None:
        assert reading is self.noted
        self.seen.append(self._weight[0].item())
        if self._ends:
            reading.release()


def one_step(numel: int = LARGE) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.full((numel,), 5.0))
    weight.grad = torch.ones_like(weight)
    return weight, torch.optim.SGD([weight], lr=1.0)


@pytest.mark.parametrize("numel", [LARGE, 10], ids=["large", "small"])
def test_an_optimizer_waits_before_it_writes(numel: int) -> None:
    weight, optimizer = one_step(numel)
    waited = Waited(weight)
    optimizer.step()
    assert waited.seen == [5.0]
    assert weight[0] == 4.0
    optimizer.step()
    assert waited.seen == [5.0], "it is over"


def test_an_optimizer_that_has_waited_in_vain_is_a_change() -> None:
    weight, optimizer = one_step()
    waited = Waited(weight, ends=False)
    optimizer.step()
    assert waited.seen == [5.0]
    assert "weight" in found(waited.noted)


def test_what_was_copied_is_nobodys_concern() -> None:
    weight, optimizer = one_step()
    waited = Waited(weight)
    waited.noted.note_copied(range(1))
    optimizer.step()
    assert waited.seen == []
    small, optimizer = one_step(10)
    waited = Waited(small)
    waited.noted.note_copied(range(1))
    optimizer.step()
    assert waited.seen == []
    waited.noted.check()


def test_a_thread_does_not_wait_for_itself() -> None:
    weight, optimizer = one_step()
    waited = Waited(weight)
    with waited.noted.here():
        optimizer.step()
    assert waited.seen == []
    assert "weight" in found(waited.noted)


def test_ctrl_c_while_an_optimizer_waits() -> None:
    weight, optimizer = one_step()
    waited = Waited(weight)

    def interrupt(reading: Reading) -> None:
        raise KeyboardInterrupt

    waited.noted._await_end = interrupt
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert weight[0] == 5.0
    waited.noted.check()


def test_a_step_is_known_to_be_under_way() -> None:
    """So that a quorum that is asked for in one of its hooks is told from any other."""
    weight, optimizer = one_step()
    waited, other = Waited(weight), Waited(torch.full((LARGE,), 5.0))
    seen = []

    def look(*_: object) -> None:
        with pytest.raises(ZeroDivisionError):  # another one, within, which breaks off
            raising.step()
        again = versions({"weight": weight.detach()})
        seen.append((again.within_step(), other.noted.within_step(), waited.noted.within_step()))
        again.release()

    _, raising = one_step()
    raising.register_step_post_hook(lambda *_: 1 / 0)  # type: ignore[arg-type,return-value]
    optimizer.register_step_post_hook(look)
    for _ in range(2):
        optimizer.step()
    assert seen == [(True, False, False)] * 2, "what is over is read no more"
    assert not versions({"weight": weight.detach()}).within_step()


def test_steps_that_broke_off_are_forgotten() -> None:
    weight, optimizer = one_step()
    handle = optimizer.register_step_post_hook(lambda *_: 1 / 0)  # type: ignore[arg-type,return-value]
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    handle.remove()
    assert versions({"weight": weight.detach()}).within_step()  # nobody can tell: a step costs a wait at most
    optimizer.step()
    assert not versions({"weight": weight.detach()}).within_step()
    assert all(known() is not optimizer for _, known in unchanged._stepping)


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
                operation, link = pending.work, near._link
                # It has left only once the other side has posted its receive.
                with link.changed:
                    assert link.changed.wait_for(lambda: operation.done, 10)
                tensor.data.add_(1)
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
    manifest, tensors = describe(state)
    layout = lay_out(manifest, options.limits(1))
    memory = place(manifest, layout, tensors, CPU).memory()
    spent = []
    for _ in range(5):
        start = time.process_time()
        ChangeDetector(manifest, layout, memory).check()
        spent.append(time.process_time() - start)
    start = time.process_time()
    SourcePlan(state, 7, options, TransferReport("source", "test", 7))
    assert min(spent) < 0.25 * (time.process_time() - start)


def test_optimizers_are_watched_once_there_is_a_transport_and_not_before() -> None:
    code = """
import threading
from datetime import timedelta
import torch
from torch.optim import optimizer
import ft_transport, ft_transport.distributed, ft_transport.testing
ft_transport.PGTransport, ft_transport.LaneTransport
count = lambda: (len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks))
print(count())
make = lambda: ft_transport.PGTransport(None, timedelta(seconds=1), torch.device("cpu"))
threads = [threading.Thread(target=make) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.stderr) == ("(0, 0)\n(1, 1)\n", "")
