"""What must hold in a run, checked on its events. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from .events import Event, told
from .settings import Settings

__all__ = ["GRACE", "Promise", "call_times", "check", "frozen_times", "limits"]

# How much longer than its time-out a call of the transport may take: what the transport promises.
GRACE = 1.0
# What a process may hold more at its end than after its first minute. A leak in every heal, of which there are dozens
# in a life of minutes, would be more than that; what the group holds varies with its size.
SLACK = {"threads": 12, "descriptors": 32, "rss": 96 << 20}


@dataclass(frozen=True)
class Promise:
    """One promise, and what broke it.

    Attributes:
        name: For the report.
        text: What is promised.
        broken: One line for each time it did not hold.
        checked: How often it was looked at.
    """

    name: str
    text: str
    broken: list[str]
    checked: int

    @property
    def kept(self) -> bool:
        return not self.broken


def check(events: list[Event], settings: Settings, *, whole: bool, left: Iterable[str] = ()) -> list[Promise]:
    """All promises of a run.

    Args:
        events: All of it, in the order of time.
        settings: Of its job.
        whole: Whether it came to its own end; if not, nobody had the time to heal.
        left: What was found after the run and should have been gone.
    """
    left = list(left)
    promises = [_agreement(events), _heals(events), _buffers(events), _lost_steps(events)]
    if settings.transport == "lanes":
        # Over a group, a source that waits for a frozen destination loses its group, and the step with it.
        promises.append(_sources(events))
    promises += [_deadlines(events, settings), _no_hang(events), _ends(events), _leaks(events)]
    if whole:
        promises.append(_everyone_back(events, settings))
    promises.append(Promise("nothing left", "no process, port or file is left afterwards", left, 1))
    return promises


# ------------------------------------------------------------------------------------------- states


def _agreement(events: list[Event]) -> Promise:
    """Who commits a step in the same quorum holds the same state afterwards."""
    states: dict[tuple[int, int], dict[str, list[Event]]] = defaultdict(lambda: defaultdict(list))
    for event in told(events, "commit"):
        states[event["step"], event["quorum"]][event["digest"]].append(event)
    broken = []
    for (step, quorum), digests in sorted(states.items()):
        if len(digests) > 1:
            who = {digest: sorted(event.life for event in found) for digest, found in digests.items()}
            broken.append(f"step {step}, quorum {quorum}: {who}")
    text = "after every commit, all replicas that committed it hold the same state"
    return Promise("agreement", text, broken, len(states))


def _heals(events: list[Event]) -> Promise:
    """What was received is what the source held: it has neither committed nor healed since it was asked."""
    held: dict[tuple[int, int], str] = {}
    broken, checked = [], 0
    for event in events:
        if event.name == "joined":
            held[event.replica, 0] = event["digest"]
        elif event.name == "commit":
            held[event.replica, event["step"]] = event["digest"]
        elif event.name == "end" and event["call"] == "receive" and not event["error"]:
            checked += 1
            offered = held.get((event["source"], event["step"]))
            if event["digest"] != offered:
                who = f"replica {event.replica} from {event['source']}, step {event['step']}"
                broken.append(f"{event.time:.2f} s: {who}: {event['digest']}, source had {offered}")
            held[event.replica, event["step"]] = event["digest"]
    text = "a state that was received is, bit for bit, the one that its source held"
    return Promise("wrong states accepted", text, broken, checked)


def _buffers(events: list[Event]) -> Promise:
    """What forward writes is, in the step that commits a heal, what its source offered, whatever forward wrote since.

    A source whose step failed offers the same step again, with what its forward has written meanwhile: either counts.
    """
    offered: dict[tuple[int, int, int], set[str]] = defaultdict(set)
    healed: dict[tuple[int, int], Event] = {}
    broken, checked = [], 0
    for event in events:
        if event.name == "offered":
            offered[event.replica, event["step"], event["quorum"]].add(event["buffers"])
        elif event.name == "end" and event["call"] == "receive" and not event["error"]:
            healed[event.life] = event
        elif event.name in ("commit", "failed"):
            heal = healed.pop(event.life, None)
            if heal is None or event.name == "failed":
                continue
            checked += 1
            sent = offered[heal["source"], heal["step"], heal["quorum"]]
            if event["buffers"] not in sent:
                who = f"replica {event.replica} from {heal['source']}, step {heal['step']}"
                broken.append(f"{event.time:.2f} s: {who}: {event['buffers']}, source had sent {sorted(sent)}")
    text = "what forward writes while a state lands is, when the heal is committed, what the source sent"
    return Promise("wrong buffers committed", text, broken, checked)


# -------------------------------------------------------------------------------------------- steps


def _lost_steps(events: list[Event]) -> Promise:
    """A step that a majority of its quorum committed is not committed anew, while one of them lives."""
    by_step: dict[int, dict[str, list[Event]]] = defaultdict(lambda: defaultdict(list))
    for event in told(events, "commit"):
        by_step[event["step"]][event["digest"]].append(event)
    ends = {event.life: event.time for event in told(events, "gone")}
    frozen = frozen_times(events)
    broken = []
    for step, digests in by_step.items():
        groups = sorted(digests.values(), key=lambda found: found[0].time)
        for earlier, later in pairwise(groups):
            begin = later[0].time
            majority = 2 * len({e.replica for e in earlier}) > len(earlier[0]["members"])
            alive = [e for e in earlier if ends.get(e.life, begin + 1) > begin and not _within(frozen, e, begin)]
            if majority and alive and later[0]["quorum"] != earlier[0]["quorum"]:
                who = sorted(e.life for e in earlier)
                broken.append(f"step {step}: {who} had it, and {later[0].life} committed another at {begin:.2f} s")
    text = "no step that a healthy majority committed is lost"
    return Promise("no step lost", text, broken, len(by_step))


def _sources(events: list[Event]) -> Promise:
    failed = told(events, "failed")
    own = [event for event in failed if event["cause"] == "send"]
    broken = [f"{event.time:.2f} s: replica {event.replica}, step {event['step']}: {event['error']}" for event in own]
    text = "a transfer costs its source no step: steps lost to a transfer on the source's side"
    return Promise("steps lost by sources", text, broken, len(failed))


def _everyone_back(events: list[Event], settings: Settings) -> Promise:
    """Each replica trains together with all others at the end, and each that was started has healed or was struck."""
    apart = [event for event in told(events, "finishing") if not event["together"]]
    broken = [f"{event.time:.0f} s: not all replicas train together again" for event in apart]
    calm = next((event.time for event in events if event.name == "calm"), 0.0)
    for replica in range(settings.replicas):
        if not any(e.replica == replica and e.time > calm for e in told(events, "commit")):
            broken.append(f"replica {replica} has not committed a step since the last fault")
    struck = {event.life for event in told(events, "strike")}
    healed = {event.life for event in told(events, "commit")}
    # Whether it might end so is another promise.
    torn = {event.life for event in told(events, "ended") if event["reason"] == "torn"}
    for event in told(events, "started"):
        if event.life not in struck | healed | torn and event.time < calm:
            broken.append(f"replica {event.replica}, started at {event.time:.2f} s, neither committed nor was struck")
    last = {event.life: event.time for event in events if event.name in ("commit", "strike", "gone")}
    for event in told(events, "continued"):
        if last.get(event.life, 0.0) < event.time:
            broken.append(f"replica {event.replica}, woken at {event.time:.2f} s, neither committed nor was struck")
    text = "every replica that came back healed, or was struck again before"
    return Promise("everyone healed", text, broken, len(told(events, "started")))


# --------------------------------------------------------------------------------------------- time


def frozen_times(events: list[Event]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """When each incarnation was stopped, and until when."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        kind = event["fault"]["kind"] if event.name == "strike" else ""
        # A fault that finds it stopped already stops it anew once it goes on, and then there is no other strike.
        if kind.startswith("stop") or event.name == "stopped":
            found[event.life].append((event.time, float("inf")))
        elif event.name in ("continued", "gone"):
            # All of them: two faults may have stopped it at once, and one signal lets it go on.
            found[event.life] = [(begin, min(end, event.time)) for begin, end in found[event.life]]
    return dict(found)


def _within(frozen: dict[tuple[int, int], list[tuple[float, float]]], event: Event, time: float) -> bool:
    return any(begin <= time <= end for begin, end in frozen.get(event.life, []))


def limits(settings: Settings) -> dict[str, float]:
    """How long each call may take, without the grace."""
    return {"send": settings.transfer, "receive": settings.transfer, "disallow": settings.transfer}


def call_times(events: list[Event]) -> list[tuple[Event, float]]:
    """Every call of the transport that has ended, and how long it took while its process was not stopped."""
    frozen = frozen_times(events)
    found = []
    for event in told(events, "end"):
        begin, end = event.time - event["seconds"], event.time
        stopped = sum(max(0.0, min(end, b) - max(begin, a)) for a, b in frozen.get(event.life, []))
        found.append((event, event["seconds"] - stopped))
    return found


def _deadlines(events: list[Event], settings: Settings) -> Promise:
    allowed = limits(settings)
    timed = [(event, seconds) for event, seconds in call_times(events) if event["call"] in allowed]
    broken = [
        f"{event.time:.2f} s: replica {event.replica}, {event['call']}: {seconds:.2f} s of {allowed[event['call']]:g} s"
        for event, seconds in timed
        if seconds > allowed[event["call"]] + GRACE
    ]
    text = f"no call of the transport takes longer than its time-out plus {GRACE:g} s"
    return Promise("deadlines", text, broken, len(timed))


def _no_hang(events: list[Event]) -> Promise:
    hangs = told(events, "hangs")
    broken = [f"{e.time:.2f} s: replica {e.replica}, silent for {e['seconds']} s, in {e['calls']}" for e in hangs]
    return Promise("no hang", "no replica stands still", broken, len(told(events, "started")))


# --------------------------------------------------------------------------------------------- ends


def _ends(events: list[Event]) -> Promise:
    """A replica ends because it was killed, has finished, or was torn and alone."""
    reasons = {event.life: event for event in told(events, "ended")}
    hung = {event.life for event in told(events, "hangs")}
    killed = {e.life for e in told(events, "strike") if e["fault"]["kind"] in ("kill", "stop and kill")}
    configured = {event.life: event["error"] for event in told(events, "end") if event["call"] == "configure"}
    broken = []
    for event in told(events, "gone"):
        why = reasons.get(event.life)
        if why is not None and why["reason"] == "torn" and configured.get(event.life):
            broken.append(f"{event.time:.2f} s: replica {event.replica}, torn, in a quorum that could try no heal")
        if why is not None and why["reason"] in ("torn", "finished"):
            continue
        if event["status"] != -9 or event.life not in killed | hung:
            text = why["error"] if why is not None else "for no known reason"
            broken.append(f"{event.time:.2f} s: replica {event.replica}, status {event['status']}: {text}")
    text = "no replica ends by itself, but torn with nobody left to heal from"
    return Promise("no crash", text, broken, len(told(events, "gone")))


def _leaks(events: list[Event]) -> Promise:
    """What a process holds at its end, against what it held after its first minute."""
    lives: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in told(events, "health"):
        lives[event.life].append(event)
    settled = min(60.0, events[-1].time / 4) if events else 0.0
    broken, checked = [], 0
    for life, looks in lives.items():
        # Over lanes, one thread listens as long as the transport lives.
        ours = [name for name in looks[-1]["ours"] if name != "ft_transport-listener"]
        if ours:
            broken.append(f"replica {life[0]}, at {looks[-1].time:.0f} s: threads {ours} between two steps")
        after = [look for look in looks if look.time >= looks[0].time + settled]
        if len(after) > 1:
            checked += 1
            broken += [f"replica {life[0]}: {text}" for text in _grown(after[0], after[-1])]
    for event in told(events, "left"):
        if event["threads"]:
            broken.append(f"replica {event.replica}: threads {event['threads']} after shutdown")
    text = "threads, descriptors and memory of a replica do not grow from its first minute to its end"
    return Promise("no leak", text, broken, checked)


def _grown(first: Event, last: Event) -> list[str]:
    return [
        f"{what} {first[what]} at {first.time:.0f} s, {last[what]} at {last.time:.0f} s"
        for what, slack in SLACK.items()
        if last[what] > first[what] + slack
    ]
