"""What goes on over lanes beside the thread that trains, with transfers that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from ft_transport import TornStateError
from ft_transport._plan.torn import TornGuard
from ft_transport._torchft.under_way import SHUT_DOWN, Receiving, Serving


class Transfer:
    """Stands for one that serves; notes what is asked of it."""

    def __init__(self, *, in_step: bool = False, fails: bool = False) -> None:
        self.calls: list[str] = []
        self._in_step, self._fails = in_step, fails

    def open(self, state_dict: object) -> None:
        self.calls.append("open")

    def refuse(self, reason: str) -> None:
        self.calls.append(f"refuse: {reason}")

    def within_step(self) -> bool:
        return self._in_step

    def drain(self) -> None:
        self.calls.append("drain")
        if self._fails:
            raise ArithmeticError("on purpose")

    def close(self) -> None:
        self.calls.append("close")


def serve(transfer: Any, guard: TornGuard | None = None, *, blocking: bool = False) -> Serving:
    serving = Serving()
    serving.serve(transfer, {}, guard or TornGuard(), blocking=blocking)
    return serving


def test_what_is_served_goes_on_until_the_end() -> None:
    transfer = Transfer()
    serving = serve(transfer)
    assert (transfer.calls, serving.transfer) == (["open"], transfer)
    serving.finish()
    assert (transfer.calls, serving.transfer) == (["open", "drain", "close"], None)
    serving.finish()
    assert transfer.calls == ["open", "drain", "close"]


@pytest.mark.parametrize(("in_step", "blocking"), [(True, False), (False, True)])
def test_who_may_write_when_the_call_has_returned_is_waited_for(in_step: bool, blocking: bool) -> None:
    transfer = Transfer(in_step=in_step)
    serving = serve(transfer, blocking=blocking)
    assert (transfer.calls, serving.transfer) == (["open", "drain", "close"], None)


def test_a_torn_replica_says_so_to_those_who_wait() -> None:
    guard, transfer = TornGuard(), Transfer()
    guard.lose(["norm.mean"])
    with pytest.raises(TornStateError):
        serve(transfer, guard)
    (said,) = transfer.calls
    assert said.startswith("refuse: ")
    assert "norm.mean" in said


def test_the_end_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    """The Manager's call that leads there is in no ``try``."""
    serve(Transfer(fails=True)).finish()
    assert "could not be ended as it should" in caplog.text


def test_who_receives_from_itself_goes_on_serving() -> None:
    transfer, relay = Transfer(), Transfer()
    serving = serve(transfer)
    serving.relay = relay  # type: ignore[assignment]
    serving.end(keep_source=True)
    assert (serving.transfer, serving.relay) == (transfer, None)
    assert (transfer.calls, relay.calls) == (["open"], ["close"])


class Receive:
    """Stands for one receive, which leaves something behind."""

    def __init__(self, leaves: object = None) -> None:
        self.kept = leaves
        self.earlier: list[object] = []
        self.cancelled: list[str] = []

    def run(self, template: object, earlier: object) -> str:
        self.earlier.append(earlier)
        return "state"

    def cancel(self, reason: str) -> None:
        self.cancelled.append(reason)


def test_what_one_receive_has_left_is_for_the_next_one_alone() -> None:
    receiving = Receiving()
    receives: list[Any] = [Receive("left"), Receive(), Receive()]
    assert [receiving.run(receive, None) for receive in receives] == ["state"] * 3
    assert [receive.earlier for receive in receives] == [[None], ["left"], [None]]


def test_a_receive_after_the_end_fails_at_once() -> None:
    receiving, receive = Receiving(), Receive()
    assert receiving.shut_down() is False, "nothing to wait for"
    receiving.run(receive, None)  # type: ignore[arg-type]
    assert receive.cancelled == [SHUT_DOWN]


def test_who_ends_it_out_of_its_own_receive_does_not_wait_for_it() -> None:
    receiving = Receiving()
    waits: list[bool] = []

    class Ends(Receive):
        def run(self, template: object, earlier: object) -> str:
            waits.append(receiving.shut_down())
            return super().run(template, earlier)

    receive = Ends()
    receiving.run(receive, None)  # type: ignore[arg-type]
    assert (waits, receive.cancelled) == ([False], [SHUT_DOWN])
