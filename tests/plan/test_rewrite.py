"""What forward writes while a state lands, and after that, over a fake group in this process."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CPU, noise, snapshot

from ft_transport import LocalProtocolError, PeerFailure, PGTransport, Progress, TornStateError
from plan.test_torn import BETWEEN, SECOND, Group, Pair, large

STATE_BYTES = 100_000 * 4


def state(seed: int) -> dict[str, Any]:
    """Large tensors, which land in place, and small ones, which are staged."""
    return {**large(seed), "mean": noise(100, seed + 10), "count": torch.tensor(seed)}


def commit(pair: Pair) -> None:
    pair.destination.metadata()
    pair.destination.disallow_checkpoint()


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda tensor: tensor.add_(1),
    "data": lambda tensor: tensor.data.zero_(),
    "numpy": lambda tensor: tensor.numpy().fill(3),
    "a view": lambda tensor: tensor.view(-1)[:1].zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("options", [{}, {"shadow": True}, {"verify": False}], ids=["in place", "shadow", "no digests"])
def test_small_tensors_are_written_again(options: dict[str, Any], write: Callable[[torch.Tensor], object]) -> None:
    """However they were written to: BatchNorm's kernel is not counted either."""
    template = state(2)
    pair = Pair(template, **options)
    assert pair.heal(state(1)) == [None, None]
    write(template["mean"])
    write(template["count"])
    commit(pair)
    assert snapshot(template) == snapshot(state(1))
    write(template["mean"])
    after = snapshot(template)
    commit(pair)
    assert snapshot(template) == after, "once, and never in a later step"


def test_what_loading_writes_is_no_change() -> None:
    template = state(2)
    pair = Pair(template, verify=True)
    assert pair.heal(state(1)) == [None, None]
    for tensor in template.values():
        tensor.copy_(tensor)
    commit(pair)
    assert not pair.destination.torn
    assert snapshot(template) == snapshot(state(1))


@pytest.mark.parametrize("options", [{}, {"shadow": True}], ids=["in place", "shadow"])
def test_memory_that_load_exchanges_is_found_again(options: dict[str, Any]) -> None:
    template = state(2)
    pair = Pair(template, **options)
    assert pair.heal(state(1)) == [None, None]
    template["mean"].zero_()
    template["mean"].data = template["mean"].clone()
    commit(pair)
    assert snapshot(template) == snapshot(state(1))


def test_memory_of_another_size_is_not_written_to() -> None:
    template = state(2)
    pair = Pair(template)
    assert pair.heal(state(1)) == [None, None]
    template["mean"].data = torch.zeros(7)
    pair.destination.metadata()
    with pytest.raises(TornStateError, match="mean"):
        pair.destination.disallow_checkpoint()
    assert template["mean"].tolist() == [0.0] * 7


def test_a_step_before_the_vote_is_training() -> None:
    """An inner optimizer's: the state is the source's when it begins, and nothing of it is undone."""
    parameter = torch.nn.Parameter(torch.zeros(100))
    template = {"weight": parameter, "mean": torch.zeros(100)}
    pair = Pair(template)
    assert pair.heal({"weight": torch.ones(100), "mean": torch.ones(100)}) == [None, None]
    template["mean"].zero_()
    parameter.grad = torch.ones(100)
    seen = []
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    optimizer.register_step_post_hook(lambda *_: seen.append(template["mean"].clone()))
    optimizer.step()
    template["mean"].zero_()
    commit(pair)
    assert seen[0].eq(1).all()
    assert parameter.eq(0.5).all()
    assert template["mean"].eq(0).all()


def writer(template: dict[str, Any], name: str) -> Callable[[Progress], None]:
    def write(progress: Progress) -> None:
        template[name].add_(1)

    return write


def test_a_large_tensor_that_forward_writes_while_it_lands() -> None:
    """Over a group its bytes are gone. The next receive knows, and lands there beside the template."""
    template = state(2)
    pair = Pair(template, on_progress=writer(template, "layer 0"))
    _, error = pair.heal(state(1))
    assert isinstance(error, LocalProtocolError)
    assert error.torn
    assert "layer 0" in error.message
    assert "shadow=True" in error.message
    assert pair.heal(state(1)) == [None, None]
    assert not pair.destination.torn
    report = pair.destination.last_report
    assert report is not None
    assert report.nbytes_copied == STATE_BYTES
    template["layer 0"].add_(1)
    commit(pair)
    assert snapshot(template) == snapshot(state(1))


def test_a_large_tensor_that_forward_writes_afterwards() -> None:
    template = state(2)
    pair = Pair(template, verify=True)
    assert pair.heal(state(1)) == [None, None]
    template["layer 2"][7] += 1
    pair.destination.metadata()
    for _ in range(2):
        with pytest.raises(TornStateError, match=r"layer 2.*shadow=True"):
            pair.destination.disallow_checkpoint()
    assert pair.destination.torn
    assert pair.heal(state(1), step=8) == [None, None]
    commit(pair)
    assert not pair.destination.torn
    assert snapshot(template) == snapshot(state(1))


def test_shadow_has_a_copy_of_all() -> None:
    template = state(2)
    pair = Pair(template, shadow=True, on_progress=writer(template, "layer 0"))
    assert pair.heal(state(1)) == [None, None]
    template["layer 2"][7] += 1
    commit(pair)
    assert snapshot(template) == snapshot(state(1))


def test_more_small_tensors_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not kept counts as large."""
    monkeypatch.setattr("ft_transport._plan.rewrite.SMALL_BYTES", 256)
    template = state(2)
    pair = Pair(template, verify=True)
    assert pair.heal(state(1)) == [None, None]
    template["count"].add_(1)
    commit(pair)
    assert snapshot(template) == snapshot(state(1))
    assert pair.heal(state(1)) == [None, None]
    template["mean"].add_(1)
    pair.destination.metadata()
    with pytest.raises(TornStateError, match="mean"):
        pair.destination.disallow_checkpoint()


# ----------------------------------------------------------------------------- what the Manager says


def called_by_manager(call: Callable[[], Any], **attributes: Any) -> Any:
    """What a call gives that a Manager makes, as far as the transport looks at one."""
    module = types.ModuleType("torchft.manager")
    exec("class Manager:\n    def run(self, call):\n        return call()", module.__dict__)
    manager = module.Manager()
    vars(manager).update(attributes)
    return manager.run(call)


def heal_by_manager(pair: Pair, sent: object, **attributes: Any) -> list[BaseException | None]:
    recv = pair.destination.recv_checkpoint
    pair.destination.recv_checkpoint = lambda *args: called_by_manager(  # type: ignore[method-assign]
        lambda: recv(*args), **attributes
    )
    try:
        return pair.heal(sent)
    finally:
        pair.destination.recv_checkpoint = recv  # type: ignore[method-assign]


@pytest.mark.parametrize("options", [{}, {"shadow": True}, {"verify": True}], ids=["in place", "shadow", "digests"])
def test_what_follows_a_synchronous_quorum_is_training(options: dict[str, Any]) -> None:
    template = state(2)
    pair = Pair(template, **options)
    assert heal_by_manager(pair, state(1), _use_async_quorum=False) == [None, None]
    for tensor in template.values():
        tensor.add_(1)
    trained = snapshot(template)
    commit(pair)
    assert snapshot(template) == trained


def test_an_asynchronous_quorum() -> None:
    template = state(2)
    pair = Pair(template)
    assert heal_by_manager(pair, state(1), _use_async_quorum=True) == [None, None]
    template["mean"].add_(1)
    commit(pair)
    assert snapshot(template) == snapshot(state(1))


def test_a_manager_that_does_not_say() -> None:
    """It is found out before the first quorum, and not by a state that is wrong."""
    with pytest.raises(LocalProtocolError, match="_use_async_quorum"):
        called_by_manager(Pair(None).destination.metadata)


def test_somebody_asks_for_the_metadata_in_mid_step() -> None:
    """Only the Manager's question begins a quorum."""
    template = large(2)
    pair = Pair(template)
    called_by_manager(pair.destination.metadata, _use_async_quorum=True)
    recv = pair.destination.recv_checkpoint
    pair.destination.recv_checkpoint = lambda *args: called_by_manager(  # type: ignore[method-assign]
        lambda: recv(*args), _use_async_quorum=True
    )
    _, error = pair.heal(large(1), die_at=BETWEEN)
    assert isinstance(error, PeerFailure)
    pair.destination.metadata()
    pair.destination.disallow_checkpoint()  # torchft fails this step itself
    called_by_manager(pair.destination.metadata, _use_async_quorum=True)
    with pytest.raises(TornStateError):
        pair.destination.disallow_checkpoint()


def test_the_template_of_the_manager() -> None:
    pair = Pair(None)
    template = {"default": state(2)}
    pair.destination = PGTransport(Group(None, 1), 10 * SECOND, CPU, "manager")  # type: ignore[arg-type]
    sent = {"user": {"default": state(1)}, "torchft": {"step": 7}}
    found = heal_by_manager(
        pair, sent, _use_async_quorum=True, _user_state_dicts={"default": lambda: template["default"]}
    )
    assert found == [None, None]
    assert snapshot(template["default"]) == snapshot(state(1))
    _, error = pair.heal(sent)
    assert isinstance(error, LocalProtocolError)
    assert "state_dict='manager'" in error.message


def test_a_template_that_was_captured() -> None:
    calls = []
    template = state(2)

    def give() -> dict[str, Any]:
        calls.append(1)
        return template

    pair = Pair(template)
    pair.destination._state_dict = give
    pair.destination.capture_template()
    assert pair.heal(state(1)) == [None, None]
    assert len(calls) == 1
    assert snapshot(template) == snapshot(state(1))


# --------------------------------------------------------------------------- torn until it has arrived


def test_torn_until_what_was_torn_has_arrived() -> None:
    template = {"a": large(2), "ema": large(3)}
    pair = Pair(template)
    _, error = pair.heal({"a": large(1), "ema": large(4)}, die_at=BETWEEN)
    assert isinstance(error, PeerFailure)
    assert pair.heal({"a": large(1)}, step=8) == [None, None]
    assert pair.destination.torn, "the new source keeps no ema"
    pair.destination.metadata()
    with pytest.raises(TornStateError, match=r"lacks ema\.layer 0"):
        pair.destination.disallow_checkpoint()
    assert isinstance(pair.heal(large(1), back=True)[0], TornStateError)
    assert pair.heal({"ema": large(4)}, step=9) == [None, None]
    assert not pair.destination.torn
    commit(pair)
    assert isinstance(pair.heal({"a": large(1), "ema": large(4)}, die_at=BETWEEN)[1], PeerFailure)
    assert pair.heal({"a": large(1)}, step=8) == [None, None]
    pair.destination.mark_restored()
    commit(pair)
