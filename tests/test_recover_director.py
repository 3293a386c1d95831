"""When the demo kills, starts and stops its replicas; the replicas are scripted."""

from __future__ import annotations

import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from recover import STANDBY_NOTICE, Director, parse_options
from recovery.cluster import Event
from recovery.story import Story


class ScriptedCluster:
    """Two replicas that hand in their next steps in batches, as a busy parent reads them."""

    def __init__(self) -> None:
        self.killed: list[int] = []
        self._time = 0.0
        self._step = 0
        self._incarnations = {0: 0, 1: 0}
        self._finish_at = sys.maxsize
        self._queue: deque[Event] = deque()
        self._dead: set[int] = set()
        self.num_standbys = 0
        self.handed_over: list[int] = []

    def now(self) -> float:
        return self._time

    def next_event(self, timeout: float) -> Event | None:
        if not self._queue and not self._dead:
            for _ in range(3):
                self._train_step()
        return self._queue.popleft() if self._queue else None

    def _train_step(self) -> None:
        if self._step == self._finish_at:
            return
        self._step += 1
        for replica in (0, 1):
            self._post(replica, "committed", step=self._step, loss=1.0, participants=2)
            if self._step == self._finish_at:
                self._post(replica, "finished", digest="", step=self._step, num_tensors=0, num_values=0, nbytes=0)

    def _post(self, replica: int, event: str, **fields: Any) -> None:
        self._time += 0.01
        self._queue.append(Event(self._time, replica, self._incarnations[replica], event, fields))

    def start(self, replica: int) -> None:
        if replica in self._dead:
            self._incarnations[replica] += 1
        self._post(replica, "started")
        if replica in self._dead:
            self._heal(replica)
        else:
            self._post(replica, "ready")

    def _heal(self, replica: int) -> None:
        self._dead.remove(replica)
        self._post(replica, "ready")
        self._post(replica, "receiving", step=self._step)
        self._post(replica, "received", nbytes=1, in_place_nbytes=1, seconds=0.1, report=None)
        self._post(replica, "healed", step=self._step + 1, same_addresses=True)

    def start_standby(self) -> None:
        assert len(self.handed_over) == self.num_standbys, "there is a standby already"
        for event in ("started", "interpreter", "imported", "waiting"):
            self._time += 0.01
            self._queue.append(Event(self._time, None, self.num_standbys, event))
        self.num_standbys += 1

    def hand_over(self, replica: int) -> None:
        self.handed_over.append(replica)
        assert len(self.handed_over) <= self.num_standbys, "there is no standby"
        self._incarnations[replica] += 1
        self._post(replica, "handed_over")
        self._heal(replica)

    def kill(self, replica: int) -> None:
        assert replica not in self._dead, "killed a replica that is dead already"
        self._dead.add(replica)
        self.killed.append(replica)
        self._post(replica, "killed")
        self._post(replica, "reaped")

    def tell(self, replica: int, do: str, **arguments: Any) -> None:
        if do == "finish_at":
            self._finish_at = max(arguments["step"], self._step + 1)

    def join(self) -> bool:
        return True

    def log_tail(self, replica: int) -> str:
        return ""


class NoView:
    def update(self, event: Event | None, now: float) -> None:
        pass


@pytest.mark.parametrize(
    "arguments",
    [
        "--replicas 1",
        "--kill-step 80",
        "--width 100",
        "--kills -1",
        "--heartbeat-timeout-ms 0",
        "--timeout -1",
        "--timeout nan",
        "--timeout inf",
    ],
)
def test_wrong_arguments_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_options(arguments.split())
    assert raised.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("kills", [0, 1, 3])
def test_each_kill_happens_once_however_late_the_events_are_read(kills: int) -> None:
    options = parse_options(["--replicas", "2", "--steps", "40", "--kill-step", "8", "--kills", str(kills)])
    cluster, story = ScriptedCluster(), Story(2, kills, in_place=True)
    director = Director(options, cluster, story, NoView())  # type: ignore[arg-type]
    director.run()
    assert cluster.killed == [1, 0, 1][:kills]
    assert len(story.recoveries) == kills
    assert all(recovery.healed is not None for recovery in story.recoveries)


@pytest.mark.parametrize(
    ("arguments", "handed_over"),
    [(["--standby", "--kills", "3"], [1, 0, 1]), (["--compare"], [0]), (["--compare", "--kills", "3"], [0, 1])],
)
def test_a_kill_waits_for_its_standby(arguments: list[str], handed_over: list[int]) -> None:
    options = parse_options(["--replicas", "2", "--steps", "40", "--kill-step", "8", *arguments])
    cluster, story = ScriptedCluster(), Story(2, options.kills, in_place=True)
    director = Director(options, cluster, story, NoView())  # type: ignore[arg-type]
    director.run()
    assert cluster.handed_over == handed_over
    assert cluster.num_standbys == len(handed_over)
    assert [recovery.replica for recovery in story.recoveries if recovery.standby] == handed_over
    waits = [(standby.waiting, standby.handed_over) for standby in story.standbys]
    assert all(handed - waiting > STANDBY_NOTICE for waiting, handed in waits)


def test_the_end_is_not_set_before_two_steps_tell_how_long_one_takes() -> None:
    options = parse_options(["--replicas", "2", "--steps", "2", "--kill-step", "1", "--kills", "0"])
    cluster, story = ScriptedCluster(), Story(2, 0, in_place=True)
    director = Director(options, cluster, story, NoView())  # type: ignore[arg-type]
    director.run()
    assert story.step < 200
