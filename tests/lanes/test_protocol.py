"""The table of the lanes' protocol, the frames, and what ``docs/protocol.md`` says of both."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from golden import DATA, lane_frames, lane_frames_file
from golden import LANE_BODIES as EXAMPLES
from hypothesis import given
from hypothesis import strategies as st

from ft_transport._lanes.protocol import (
    BODIES,
    HEADER_BYTES,
    MAGIC,
    MAX_BODY_BYTES,
    MAX_LONG_BODY_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_RUN,
    TABLE,
    TRAILER,
    VERSION,
    LaneFrame,
    LaneHeader,
    LaneProtocol,
    Role,
    State,
    decode_body,
    decode_header,
    encode,
    encode_header,
    max_body_bytes,
)
from ft_transport._net import endpoint
from ft_transport._wire.digest import digest_bytes
from ft_transport.errors import LocalProtocolError, RemoteProtocolError

SOURCE, DESTINATION = Role.SOURCE, Role.DESTINATION
PROTOCOL = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"

# -------------------------------------------------------------------------------------------- frames


def read(data: bytes) -> tuple[LaneHeader, Any]:
    header = decode_header(data[:HEADER_BYTES])
    return header, decode_body(header, data[HEADER_BYTES:])


def as_tuple(body: Any) -> Any:
    return tuple(body) if isinstance(body, list) else body


@pytest.mark.parametrize("frame", EXAMPLES, ids=lambda frame: frame.name)
def test_round_trip(frame: LaneFrame) -> None:
    header, body = read(encode(frame, 3, 1 << 40, 17, EXAMPLES[frame]))
    assert (header.frame, header.attempt, header.step, header.number) == (frame, 3, 1 << 40, 17)
    assert body == as_tuple(EXAMPLES[frame])


def test_frames_are_written_and_read_as_they_were() -> None:
    """Golden bytes: if this fails, the wire of the lanes has changed, which needs a new version of it."""
    lines = dict(line.split() for line in lane_frames_file().read_text().splitlines())
    assert lines == {name: data.hex() for name, data in lane_frames().items()}
    for frame, expected in EXAMPLES.items():
        header, body = read(bytes.fromhex(lines[frame.name]))
        assert (header.frame, header.attempt, header.step, header.number) == (frame, 3, 1 << 40, 17)
        assert body == as_tuple(expected)
    data = bytes.fromhex(lines["MESSAGE"])
    header, payload = decode_header(data[:HEADER_BYTES]), data[HEADER_BYTES:-8]
    assert (header.frame, header.number, header.nbytes, payload) == (LaneFrame.MESSAGE, 17, 5, b"bytes")
    assert TRAILER.unpack(data[-8:]) == (digest_bytes(payload),)


EARLIER = {
    version: [line.split() for line in (DATA / f"lanes_v{version}_frames.txt").read_text().splitlines()]
    for version in range(1, VERSION)
}
EARLIER_FRAMES = [(version, name, data) for version, frames in EARLIER.items() for name, data in frames]


@pytest.mark.parametrize(
    ("version", "data"),
    [(version, data) for version, _, data in EARLIER_FRAMES],
    ids=[f"{version} {name}" for version, name, _ in EARLIER_FRAMES],
)
def test_earlier_versions_are_refused_by_name(version: int, data: str) -> None:
    """Whatever they say: a frame of the same name may mean something else there."""
    with pytest.raises(RemoteProtocolError, match=f"expected version {VERSION} of the lanes' wire, got {version}"):
        decode_header(bytes.fromhex(data)[:HEADER_BYTES])


def test_the_metadata_and_the_frames_have_one_version() -> None:
    """Who reads the metadata of another version says so by name, before anybody waits for anything."""
    assert endpoint.VERSION == VERSION


@pytest.mark.parametrize(("name", "data"), lane_frames().items(), ids=list(lane_frames()))
@pytest.mark.parametrize("version", EARLIER)
def test_earlier_versions_refuse_this_one_by_name(version: int, name: str, data: bytes) -> None:
    """They read a header's magic and version before anything else, from where these are in their own frames."""
    _, old = EARLIER[version][0]
    offset = len(MAGIC)
    assert (bytes.fromhex(old)[:offset], bytes.fromhex(old)[offset]) == (MAGIC, version)
    assert (data[:offset], data[offset]) == (MAGIC, VERSION)
    assert HEADER_BYTES == 52, "as many bytes as they wait for before they look"


def test_every_frame_has_an_example_and_a_body() -> None:
    assert set(EXAMPLES) | {LaneFrame.MESSAGE} == set(LaneFrame)
    assert set(BODIES) | {LaneFrame.MANIFEST, LaneFrame.MESSAGE} == set(LaneFrame)


@pytest.mark.parametrize("frame", EXAMPLES, ids=lambda frame: frame.name)
def test_any_flipped_bit_is_found(frame: LaneFrame) -> None:
    data = encode(frame, 1, 7, 2, EXAMPLES[frame])
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RemoteProtocolError):
            read(bytes(damaged))


@pytest.mark.parametrize("frame", EXAMPLES, ids=lambda frame: frame.name)
def test_trailing_and_missing_bytes_are_found(frame: LaneFrame) -> None:
    data = encode(frame, 1, 7, 2, EXAMPLES[frame])
    with pytest.raises(RemoteProtocolError):
        read(data + b"\0")
    if len(data) > HEADER_BYTES:
        with pytest.raises(RemoteProtocolError):
            read(data[:-1])


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_garbage_is_no_header(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_header(data)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (LaneHeader(LaneFrame.READY, 1, 1, nbytes=1 << 21), "READY of 2097152 bytes, at most 65536"),
        (LaneHeader(LaneFrame.MANIFEST, 1, 1, nbytes=(256 << 20) + 1), "MANIFEST of"),
        (LaneHeader(LaneFrame.REFUSE, 1, 1, nbytes=(1 << 20) + 1), "REFUSE of 1048577 bytes, at most 1048576"),
        (LaneHeader(LaneFrame.FAILED, 1, 1, nbytes=256 << 20), "FAILED of"),
        (LaneHeader(LaneFrame.CHECK, 1, 1, nbytes=(64 << 10) + 1), "CHECK of"),
        (LaneHeader(99, 1, 1), "unknown frame 99"),  # type: ignore[arg-type]
    ],
)
def test_headers_out_of_bounds(header: LaneHeader, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        decode_header(encode_header(header))


@pytest.mark.parametrize(
    ("frame", "body"),
    [
        (LaneFrame.HELLO, ["i", "n"]),
        (LaneFrame.HELLO, [b"i"]),
        (LaneFrame.READY, ["m", b"", b""]),
        (LaneFrame.READY, ["m", 3]),
        (LaneFrame.ROUTE, [b"", b""]),
        (LaneFrame.FAILED, "why"),
        (LaneFrame.FAILED, [b"why"]),
        (LaneFrame.CHECK, [True]),
        (LaneFrame.CHECK, {"a": 1}),
        (LaneFrame.WANT, []),
        (LaneFrame.WANT, [1, 1]),
        (LaneFrame.PLACE, [b"p", "q"]),
    ],
)
def test_bodies_of_other_types_are_refused(frame: LaneFrame, body: Any) -> None:
    with pytest.raises(RemoteProtocolError, match=frame.name):
        read(encode(frame, 1, 1, 0, body))


@pytest.mark.parametrize("depth", [2, 500, 1010, 2000])
@pytest.mark.parametrize("frame", [frame for frame, body in BODIES.items() if body], ids=lambda frame: frame.name)
def test_bodies_that_nest_are_refused(frame: LaneFrame, depth: int) -> None:
    """Whatever it takes to read one, or to say what it is."""
    body = b"\x91" * depth + b"\xc0"
    data = encode_header(LaneHeader(frame, 1, 1, 0, len(body), digest_bytes(body))) + body
    with pytest.raises(RemoteProtocolError, match=frame.name):
        read(data)


@pytest.mark.parametrize("reasons", [["é" * (1 << 20)], ["short", "x" * (3 << 20)], ["path"] * 1000, []])
@pytest.mark.parametrize("frame", [LaneFrame.REFUSE, LaneFrame.FAILED], ids=lambda frame: frame.name)
def test_reasons_that_are_too_long_are_cut(frame: LaneFrame, reasons: list[str]) -> None:
    _, body = read(encode(frame, 1, 1, 0, reasons))
    assert len(body) == len(reasons)
    for reason, got in zip(reasons, body, strict=True):
        assert got == reason or re.fullmatch(f"{reason[:1]}+… and \\d+ bytes more", got)


def test_a_reason_that_is_no_text_for_others_is_given_all_the_same() -> None:
    (reason,) = read(encode(LaneFrame.FAILED, 1, 1, 0, ["path.\udc80"]))[1]
    assert reason == "path.\\udc80"
    _, text, _ = read(encode(LaneFrame.REROUTE, 1, 1, 0, [b"i", "x" * (1 << 20), False]))[1]
    assert len(text) <= MAX_BODY_BYTES // 4


# --------------------------------------------------------------------------------------------- table


def path_to(goal: State) -> list[tuple[Role, LaneFrame]]:
    """Frames that lead from OPEN to a state, the fewest."""
    paths: dict[State, list[tuple[Role, LaneFrame]]] = {State.OPEN: []}
    while goal not in paths:
        for state, path in list(paths.items()):
            for sent, following in TABLE[state].items():
                paths.setdefault(following, [*path, sent])
    return paths[goal]


def deliver(ends: dict[Role, LaneProtocol], sender: Role, frame: LaneFrame, number: int = 0, num: int = 1) -> None:
    ends[sender].sent(frame, number, num)
    receiver, header = ends[DESTINATION if sender is SOURCE else SOURCE], LaneHeader(frame, 1, 7, number)
    receiver.received(header)
    if frame is not LaneFrame.MESSAGE:
        receiver.received_body(header, (num,) if frame is LaneFrame.WANT else (b"p",) * num)


def both_in(state: State) -> dict[Role, LaneProtocol]:
    ends = {role: LaneProtocol(role, 1, 7) for role in Role}
    for sender, frame in path_to(state):
        deliver(ends, sender, frame)
    assert {end.state for end in ends.values()} == {state}
    return ends


@pytest.mark.parametrize(("state", "sender", "frame"), list(itertools.product(State, Role, LaneFrame)))
def test_the_table_decides(state: State, sender: Role, frame: LaneFrame) -> None:
    ends = both_in(state)
    answers = frame in (LaneFrame.MESSAGE, LaneFrame.PLACE, LaneFrame.SAME)
    following = TABLE[state].get((sender, frame))
    if following is not None and not answers:
        deliver(ends, sender, frame)
        assert {end.state for end in ends.values()} == {following}
        return
    with pytest.raises(LocalProtocolError, match=frame.name):
        ends[sender].sent(frame)
    receiver = DESTINATION if sender is SOURCE else SOURCE
    with pytest.raises(RemoteProtocolError, match=frame.name):
        ends[receiver].received(LaneHeader(frame, 1, 7))
    assert {end.state for end in ends.values()} == {state}


def test_every_state_can_be_reached_and_left() -> None:
    assert set(TABLE) == set(State)
    for state in State:
        path_to(state)
        leads_on = any(following is not state for following in TABLE[state].values())
        assert leads_on or state in (State.CLOSED, State.DIRECT)


def test_frames_that_cross_are_allowed_on_both_sides() -> None:
    """One side may send before it has read what the other has sent: whatever moves on must bear what still comes."""
    late = {
        State.ROUTING: [(DESTINATION, LaneFrame.PROGRESS), (SOURCE, LaneFrame.WAIT)],
        State.MOVING: [(DESTINATION, LaneFrame.PROGRESS), (SOURCE, LaneFrame.WAIT)],
        State.DONE: [(SOURCE, LaneFrame.WAIT), (SOURCE, LaneFrame.FAILED)],
    }
    for state, crossing in late.items():
        assert set(crossing) <= set(TABLE[state])


def test_answers_come_in_the_order_of_the_questions() -> None:
    ends = both_in(State.LANE)
    for number, frame in enumerate((LaneFrame.WANT, LaneFrame.CHECK, LaneFrame.WANT)):
        deliver(ends, DESTINATION, frame, number)
    deliver(ends, SOURCE, LaneFrame.WAIT)
    deliver(ends, SOURCE, LaneFrame.MESSAGE, 0)
    with pytest.raises(RemoteProtocolError, match="MESSAGE 2 is out of order"):
        ends[DESTINATION].received(LaneHeader(LaneFrame.MESSAGE, 1, 7, 2))
    deliver(ends, SOURCE, LaneFrame.SAME, 1)
    with pytest.raises(RemoteProtocolError, match="SAME 2"):  # it was not offered
        ends[DESTINATION].received(LaneHeader(LaneFrame.SAME, 1, 7, 2))
    deliver(ends, SOURCE, LaneFrame.MESSAGE, 2)
    with pytest.raises(RemoteProtocolError, match="MESSAGE 2"):
        ends[DESTINATION].received(LaneHeader(LaneFrame.MESSAGE, 1, 7, 2))


def test_a_place_is_an_answer_as_any_other() -> None:
    ends = both_in(State.DIRECT)
    for number, frame in enumerate((LaneFrame.WANT, LaneFrame.CHECK, LaneFrame.WANT)):
        deliver(ends, DESTINATION, frame, number)
    with pytest.raises(RemoteProtocolError, match="PLACE 1"):
        ends[DESTINATION].received(LaneHeader(LaneFrame.PLACE, 1, 7, 1))
    for number, frame in enumerate((LaneFrame.PLACE, LaneFrame.PLACE, LaneFrame.MESSAGE)):
        deliver(ends, SOURCE, frame, number)
    assert not ends[SOURCE].asked
    assert not ends[DESTINATION].asked


def test_several_are_asked_for_and_told_at_once() -> None:
    ends = both_in(State.DIRECT)
    deliver(ends, DESTINATION, LaneFrame.WANT, 5, MAX_RUN)
    deliver(ends, SOURCE, LaneFrame.PLACE, 5, 3)
    deliver(ends, SOURCE, LaneFrame.MESSAGE, 8)
    for end in ends.values():
        assert list(end.asked) == list(range(9, 5 + MAX_RUN))
    deliver(ends, SOURCE, LaneFrame.PLACE, 9, MAX_RUN - 4)
    assert not ends[SOURCE].asked
    assert not ends[DESTINATION].asked


@pytest.mark.parametrize("num", [-1, 0, MAX_RUN + 1, 1 << 63])
def test_nobody_is_asked_for_none_or_for_any_number(num: int) -> None:
    ends = both_in(State.LANE)
    with pytest.raises(LocalProtocolError, match="WANT 5"):
        ends[DESTINATION].sent(LaneFrame.WANT, 5, num)
    header = LaneHeader(LaneFrame.WANT, 1, 7, 5)
    ends[SOURCE].received(header)
    with pytest.raises(RemoteProtocolError, match=f"WANT 5 is of {num} messages"):
        ends[SOURCE].received_body(header, (num,))


def test_no_more_are_told_than_were_asked_for() -> None:
    ends = both_in(State.DIRECT)
    deliver(ends, DESTINATION, LaneFrame.WANT, 5, 2)
    deliver(ends, DESTINATION, LaneFrame.WANT, 8)
    with pytest.raises(LocalProtocolError, match="PLACE 5"):
        ends[SOURCE].sent(LaneFrame.PLACE, 5, 3)
    header = LaneHeader(LaneFrame.PLACE, 1, 7, 5)
    ends[DESTINATION].received(header)
    with pytest.raises(RemoteProtocolError, match="PLACE 5 is of 3 messages"):
        ends[DESTINATION].received_body(header, (b"p",) * 3)
    assert list(ends[DESTINATION].asked) == [5, 6, 8], "all of it is still owed"


@pytest.mark.parametrize(("attempt", "step"), [(2, 7), (1, 8)])
def test_frames_of_another_attempt_or_step_are_refused(attempt: int, step: int) -> None:
    source = LaneProtocol(SOURCE, 1, 7)
    with pytest.raises(RemoteProtocolError, match="expected a frame of step 7, attempt 1"):
        source.received(LaneHeader(LaneFrame.HELLO, attempt, step))


# ----------------------------------------------------------------------------------------- documents


def rows(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading of the protocol's page."""
    text = PROTOCOL.read_text()
    section = re.split(r"^#+ ", text[text.index(f"\n## {heading}\n") + 4 :], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_documented_frames_are_these() -> None:
    assert [(int(number), name) for number, name, *_ in rows("Frames of lanes")] == [
        (frame.value, frame.name) for frame in LaneFrame
    ]


def test_the_documented_table_is_this_one() -> None:
    documented = {
        (state.strip("`"), sender, name.strip(), following.strip("`"))
        for state, sender, names, following in rows("States of lanes")
        for name in names.split(",")
    }
    assert documented == {
        (state.value, sender.value, frame.name, following.value)
        for state, entries in TABLE.items()
        for (sender, frame), following in entries.items()
    }


def test_the_documented_limits_are_these() -> None:
    documented = {name: int(nbytes.replace(",", "")) for name, nbytes in rows("Limits of lanes")[: len(LaneFrame)]}
    limits = {frame.name: max_body_bytes(frame) for frame in LaneFrame if frame is not LaneFrame.MESSAGE}
    assert documented.pop("others") == MAX_BODY_BYTES
    assert documented == {name: nbytes for name, nbytes in limits.items() if nbytes != MAX_BODY_BYTES}
    assert set(documented.values()) == {MAX_LONG_BODY_BYTES, MAX_MANIFEST_BYTES}
