"""The benchmark's parts: states, checks, statistics, table, picture, supervision. No processes, no groups."""

from __future__ import annotations

import io
import itertools
import queue
import threading
from collections import Counter
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchft.process_group
from rich.console import Console
from torch.distributed import HashStore

from ft_transport.bench import groups, run, subjects, worker
from ft_transport.bench.__main__ import main
from ft_transport.bench.bounds import measure
from ft_transport.bench.check import differences, distinct_nbytes, fingerprint, landed_in_place, storages, tensors
from ft_transport.bench.groups import join, torchft_version
from ft_transport.bench.plan import Case, Job, Options, Turn, turns
from ft_transport.bench.plot import draw
from ft_transport.bench.results import Row, Sample, Size, Status, compare, exit_status, summarise
from ft_transport.bench.run import Watch
from ft_transport.bench.states import STATES, State, build, fill_constant, fill_random
from ft_transport.bench.subjects import Connection, SubjectKind
from ft_transport.bench.table import (
    COLUMNS,
    WIDTH,
    cells,
    describe_bytes,
    describe_rate,
    describe_ratio,
    describe_seconds,
    render,
    render_bounds,
)

GPT2_PARAMETERS = 124_439_808


def filled(name: str, seed: int = 0, scale: float = 0.01) -> State:
    state = build(name, scale, step=7)
    fill_random(state, seed)
    return state


# ------------------------------------------------------------------------------------------ torchft


def test_groups_of_either_torchft_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        torchft.process_group, "reconfigure_with_store", lambda *arguments: calls.append(arguments), raising=False
    )
    released, nightly = SimpleNamespace(configure=lambda *arguments: calls.append(arguments)), object()
    join(released, "here:1/a", 1, 2)
    join(nightly, "here:1/b", 1, 2)
    assert calls == [("here:1/a", "1", 1, 2), (nightly, "here:1/b", 1, 2)]


@pytest.mark.parametrize("installed", ["torchft", "torchft-nightly"])
def test_the_version_of_either_torchft(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != installed:
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(groups, "version", version)
    assert torchft_version() == "1.2"


# ------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_storages", "nbytes"),
    [
        ("large", 8, 8, 8 * 128 * 2**20),
        ("gpt2-adam", 4 * 148 + 1, 4 * 148, 3 * 4 * GPT2_PARAMETERS + 4 * 148),
        ("small", 20_000, 20_000, 20_000 * 4096),
        ("tiny", 4_000, 4_000, 4_000 * 4),
        ("views", 16, 1, 134_217_728),
    ],
)
def test_sizes_of_the_states(name: str, num_tensors: int, num_storages: int, nbytes: int) -> None:
    state = build(name, 1.0, step=7)
    assert len(list(tensors(state))) == num_tensors
    assert len(storages(state)) == num_storages
    assert sum(storage.numel() for storage in storages(state)) == nbytes
    assert distinct_nbytes(state) == nbytes


def test_every_state_comes_in_the_managers_envelope() -> None:
    state = build("tiny", 0.01, step=7)
    assert list(state) == ["user", "torchft"]
    assert list(state["user"]) == ["default"]
    assert state["torchft"] == {"step": 7, "batches_committed": 14}


def test_the_head_of_gpt2_is_its_embedding() -> None:
    model = build("gpt2-adam", 0.01, step=7)["user"]["default"]["model"]
    assert model["lm_head.weight"] is model["transformer.wte.weight"]


@pytest.mark.parametrize("name", STATES)
def test_values_follow_from_the_seed(name: str) -> None:
    first = fingerprint(filled(name, seed=1))
    assert differences(first, fingerprint(filled(name, seed=1))) == []
    paths = {path for path, _ in tensors(filled(name))}
    assert set(differences(first, fingerprint(filled(name, seed=2)))) == paths


@pytest.mark.parametrize("name", STATES)
def test_a_template_differs_from_the_source_in_every_tensor_and_in_the_step(name: str) -> None:
    source, template = filled(name), build(name, 0.01, step=0)
    fill_constant(template)
    expected = {path for path, _ in tensors(source)} | {"['torchft']['step']", "['torchft']['batches_committed']"}
    assert set(differences(fingerprint(source), fingerprint(template))) == expected


def test_random_bits_fill_the_last_bytes_too() -> None:
    state = {"odd": torch.zeros(8 * 1000 + 7, dtype=torch.uint8)}
    fill_random(state, seed=0)
    assert state["odd"][-7:].any()


# ------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("where", [0, -1])
def test_one_flipped_bit_is_seen(name: str, where: int) -> None:
    state = filled(name)
    before = fingerprint(state)
    path, tensor = list(tensors(state))[where]
    tensor.untyped_storage()[tensor.storage_offset() * 4] ^= 1
    assert path in differences(before, fingerprint(state))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(2, dtype=torch.float32), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2), torch.nn.Parameter(torch.zeros(2))),
        (torch.zeros(0), torch.zeros(0, 1)),
        ([1, 2], (1, 2)),
        ({0: 1}, {"0": 1}),
        ({}, []),
        (1, 1.0),
        (1, True),
        (None, "None"),
        ([[1], []], [[], [1]]),
    ],
    ids=str,
)
def test_what_differs_is_seen(one: object, other: object) -> None:
    assert differences(fingerprint({"x": one}), fingerprint({"x": other}))


def test_equal_bits_are_equal_whatever_they_mean() -> None:
    nan = torch.tensor([float("nan")])
    strided = torch.arange(12.0).reshape(3, 4).t()
    assert differences(fingerprint([nan]), fingerprint([nan.clone()])) == []
    assert differences(fingerprint([strided]), fingerprint([strided.contiguous()])) == []
    payload = nan.clone()
    payload.view(torch.int32)[0] ^= 1
    assert payload.isnan().all()
    assert differences(fingerprint([nan]), fingerprint([payload])) == ["[0]"]


def test_leaves_that_one_side_lacks_are_named() -> None:
    assert differences(fingerprint({"a": 1}), fingerprint({"a": 1, "b": {}})) == ["", "['b']"]


def test_landed_in_place_counts_addresses() -> None:
    template = {"a": torch.zeros(2), "b": torch.zeros(2), "step": 0, "empty": torch.zeros(0)}
    assert landed_in_place(template, {**template, "step": 7}) == (2, 2)
    assert landed_in_place(template, {"a": template["a"], "b": torch.zeros(2)}) == (1, 2)
    assert landed_in_place(template, {"a": template["b"], "b": template["a"]}) == (0, 2)
    assert landed_in_place({}, template) == (0, 2)


def test_distinct_nbytes_counts_shared_bytes_once() -> None:
    whole = torch.zeros(100)
    assert distinct_nbytes([whole, whole[10:20], whole[50:60], whole]) == 400
    assert distinct_nbytes([whole[:10], whole[5:20], whole[50:60]]) == 120
    assert distinct_nbytes([whole[::10]]) == 91 * 4
    assert distinct_nbytes([torch.zeros(0), torch.zeros(()), 3]) == 4


# -------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("transports", ["a", "ab", "abc", "abcd", "abcde", "abcdef"])
def test_every_transport_follows_every_other_equally_often(transports: str) -> None:
    rounds = 2 * len(transports)
    order = turns(list(transports), rounds - 1)
    assert [turn.index for turn in order] == list(range(rounds * len(transports)))
    by_round = ["".join(turn.transport for turn in order if turn.round == r) for r in range(rounds)]
    assert all("".join(sorted(each)) == transports for each in by_round)
    assert Counter(each[0] for each in by_round) == dict.fromkeys(transports, 2)
    neighbours = Counter(pair for each in by_round for pair in itertools.pairwise(each))
    assert neighbours == dict.fromkeys(itertools.permutations(transports, 2), 2)


def test_no_transports_take_no_turns() -> None:
    assert turns([], rounds=3) == []


def make_job(transports: list[str], mode: str = "fresh", receivers: int = 1, rounds: int = 1) -> Job:
    return Job(3, Case("tiny", mode), transports, rounds, receivers, 0.01, 0, 5.0, one_machine=True)


def test_a_job_survives_json() -> None:
    job = make_job(["a", "b"])
    assert Job.from_json(job.to_json()) == job


def test_cases_are_every_state_in_every_mode() -> None:
    options = Options(["large", "tiny"], ["fresh", "in-place"], [], 1, 1, 1.0, 0, 60.0)
    assert [str(case) for case in options.cases] == ["large fresh", "large in-place", "tiny fresh", "tiny in-place"]


# ----------------------------------------------------------------------------------------- results


def make_row(
    transport: str, seconds: list[float], status: Status = "equal", mode: str = "fresh", note: str = ""
) -> Row:
    size = Size(2 * 10**9, 12, 12) if seconds else Size()
    return Row(Case("large", mode), transport, status, size, seconds=seconds, note=note)


def test_ratio_is_the_median_of_each_rounds_ratio() -> None:
    ours, reference = make_row("ours", [1.0, 2.0, 8.0]), make_row("ref", [2.0, 2.0, 80.0])
    compare([ours, reference], "ref", ["ours"])
    assert (ours.ratio, ours.reference) == (2.0, "ref")
    assert (reference.ratio, reference.reference) == (1.0, "ref")


def test_without_the_reference_the_fastest_peer_takes_its_place() -> None:
    rows = [make_row("ours", [1.0]), make_row("slow", [9.0]), make_row("quick", [3.0]), make_row("ref", [], "failed")]
    compare(rows, "ref", ["ours"])
    assert [row.reference for row in rows] == ["quick", "quick", "quick", ""]
    assert [row.ratio for row in rows[:3]] == pytest.approx([3.0, 1 / 3, 1.0])


def test_a_wrong_state_has_no_ratio_and_is_no_reference() -> None:
    rows = [make_row("ours", [1.0]), make_row("ref", [2.0], "WRONG")]
    compare(rows, "ref", ["ours"])
    assert [row.ratio for row in rows] == [None, None]


def test_summary_takes_the_slowest_receiver_and_leaves_the_warm_up_out() -> None:
    warm_up = [Sample(0, 0, 9.0, 1, 1), Sample(0, 1, 9.0, 1), Sample(0, 2, 9.0, 1)]
    first = [Sample(1, 0, 1.0, 10, 700), Sample(1, 1, 2.0, 20), Sample(1, 2, 3.0, 10)]
    second = [Sample(2, 0, 9.0, 12, 500), Sample(2, 1, 5.0, 30), Sample(2, 2, 4.0, 40)]
    row = summarise(Case("large", "fresh"), "x", Size(8 * 10**9, 8, 8), [warm_up, first, second])
    assert row.status == "equal"
    assert row.seconds == [3.0, 5.0]
    assert (row.median_seconds, row.gigabytes_per_second) == (4.0, 2.0)
    assert row.nbytes_wire == 500
    assert (row.nbytes_memory_source, row.nbytes_memory_receiver) == (11, 30)
    assert row.in_place_share is None


def test_what_the_system_does_not_tell_stays_unknown() -> None:
    row = summarise(Case("large", "fresh"), "x", Size(8, 1, 1), [[Sample(i, 0), Sample(i, 1, 1.0)] for i in range(2)])
    assert (row.nbytes_wire, row.nbytes_memory_source, row.nbytes_memory_receiver) == (None, None, None)


@pytest.mark.parametrize("turn", [0, 1])
def test_a_wrong_state_in_any_round_makes_the_row_wrong(turn: int) -> None:
    samples = [[Sample(i, 0), Sample(i, 1, 1.0, in_place=(3, 4))] for i in range(2)]
    samples[turn][1].wrong = ["['a']"]
    row = summarise(Case("large", "in-place"), "x", Size(8, 1, 1), samples)
    assert row.status == "WRONG"
    assert "['a']" in row.note
    assert row.in_place_share == 0.75
    assert exit_status([row, make_row("other", [], "failed")]) == 1


def test_exit_status() -> None:
    equal, unable = make_row("a", [1.0]), make_row("b", [], "unsupported")
    assert exit_status([equal, unable]) == 0
    assert exit_status([equal, unable, make_row("c", [], "failed")]) == 3


def test_a_sample_survives_json() -> None:
    sample = Sample(3, 1, 0.25, None, 17, (2, 3), ["['a']"], "")
    assert Sample.from_json(sample.to_json()) == sample


# ------------------------------------------------------------------------------------ table, picture


def rows_of_every_kind() -> list[Row]:
    ours = make_row("ft_transport", [0.5, 1.0, 0.25], mode="in-place")
    ours.nbytes_wire, ours.nbytes_memory_receiver, ours.in_place_share = 2_002_000_000, 4096, 1.0
    rows = [
        ours,
        make_row("torchft PGTransport", [1.0, 1.0, 1.0], mode="in-place"),
        make_row("torch _pg_transport", [1.0, 1.0, 1.0], "WRONG", "in-place", "not the source's at ['a']"),
        make_row("torchft HTTP", [], "unsupported", "in-place", "cannot receive in place"),
        make_row("torchft HTTP x8", [], "failed", "in-place", "rank 1: boom"),
    ]
    compare(rows, "torchft PGTransport", ["ft_transport"])
    return rows


def test_cells() -> None:
    cells_of = {row.transport: cells(row) for row in rows_of_every_kind()}
    assert all(len(of_row) == len(COLUMNS) for of_row in cells_of.values())
    assert cells_of["ft_transport"] == [
        "ft_transport",
        "500 ms",
        "250 ms … 1.00 s",
        "4.00 GB/s",
        "2.00x",
        "2.00 GB",
        "1.001",
        "4.10 kB",
        "100%",
        "equal",
    ]
    assert cells_of["torch _pg_transport"][4] == "-"
    assert cells_of["torch _pg_transport"][-1] == "WRONG"
    assert cells_of["torchft HTTP"][1:] == ["-"] * (len(COLUMNS) - 2) + ["unsupported"]


def test_the_table_fits_its_width_and_says_why() -> None:
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(render(rows_of_every_kind()))
    text = console.file.getvalue()
    assert "large · in-place   12 tensors, 2.00 GB, ratio to torchft PGTransport" in text
    assert "\nWRONG" not in text
    assert text.count("WRONG") == 1
    assert "torchft HTTP x8: rank 1: boom" in text
    assert "torchft HTTP: cannot receive in place" in text
    assert "\x1b" not in text
    assert [line.split()[-1] for line in text.splitlines()[2:7]] == [
        "equal",
        "equal",
        "WRONG",
        "unsupported",
        "failed",
    ]


def test_numbers_have_three_digits_and_a_unit() -> None:
    assert [describe_seconds(s) for s in (0.00123, 0.0456, 0.789, 1.5, 12.34, 948)] == [
        "1.23 ms",
        "45.6 ms",
        "789 ms",
        "1.50 s",
        "12.3 s",
        "948 s",
    ]
    assert [describe_bytes(n) for n in (0, 999, 16_000, 134_217_728, 1_493_278_288)] == [
        "0 B",
        "999 B",
        "16.0 kB",
        "134 MB",
        "1.49 GB",
    ]
    assert [describe_rate(r) for r in (4.408, 0.957, 0.0123, 0.0000251)] == [
        "4.41 GB/s",
        "957 MB/s",
        "12.3 MB/s",
        "25.1 kB/s",
    ]
    assert [describe_ratio(r) for r in (0.5, 1.046, 13.13, 245.2)] == ["0.50x", "1.05x", "13.1x", "245x"]


@pytest.mark.parametrize("rows", [rows_of_every_kind(), [make_row("a", [], "failed")]], ids=["all kinds", "failed"])
def test_the_picture_is_a_png(rows: list[Row], tmp_path: Path) -> None:
    draw(rows, tmp_path / "bench.png", "here")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "arguments",
    [
        "--states nothing",
        "--rounds 0",
        "--scale 0",
        "--scale 1.1",
        "--address nowhere",
        "--rank 2 --address localhost:1",
        "--rank 1",
        "--timeout 0",
        "--device warp",
    ],
)
def test_wrong_arguments_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments.split())
    assert raised.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err


def test_what_the_machine_can_do_is_measured_and_shown() -> None:
    bounds = measure(torch.device("cpu"), 0.01)
    assert list(bounds) == [
        "copy in memory",
        "digest (xxh3), one thread",
        "loopback, 1 connection",
        "loopback, 4 connections",
    ]
    assert all(rate > 1e6 for rate in bounds.values())
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(render_bounds({"loopback, 1 connection": 3.78e9, "to cuda, pinned memory": 52.7e9}))
    text = console.file.getvalue()
    assert "loopback, 1 connection" in text
    assert "3.78 GB/s" in text
    assert "52.7 GB/s" in text


# ------------------------------------------------------------------------------------- supervision


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(run, "GRACE_SECONDS", 0.0)
    return Watch(HashStore(), make_job(["a", "b"]), on_turn=lambda case, turn: None)


def put(watch: Watch, turn: int, rank: int, **fields: str) -> None:
    watch._store.set(f"sample/{turn}/{rank}", Sample(turn, rank, **fields).to_json())


def test_watch_follows_the_turns(watch: Watch) -> None:
    put(watch, 0, 0)
    watch.poll()
    assert (len(watch.samples), watch.over) == (0, False)
    for turn in range(4):
        put(watch, turn, 1)
        put(watch, turn, 0)
    watch.poll()
    assert watch.over
    assert not watch.failure
    assert [[(s.turn, s.rank) for s in of_turn] for of_turn in watch.samples] == [
        [(turn, 0), (turn, 1)] for turn in range(4)
    ]


def test_watch_blames_the_transport_whose_turn_it_is_for_an_error(watch: Watch) -> None:
    put(watch, 0, 0)
    put(watch, 0, 1)
    put(watch, 1, 0, error="RuntimeError: boom")
    put(watch, 1, 1, error="RuntimeError: boom")
    watch.poll()
    assert watch.over
    assert watch.turn == Turn(1, 0, "b")
    assert watch.failure == "rank 0, 1: RuntimeError: boom"


def test_watch_blames_the_transport_whose_turn_it_is_for_a_death(watch: Watch) -> None:
    watch._store.set("died/1", "killed")
    put(watch, 0, 0, error="connection closed")
    watch.poll()
    assert watch.turn == Turn(0, 0, "a")
    assert watch.failure == "rank 0: connection closed; rank 1: killed"


def test_a_death_after_the_last_turn_is_no_failure(watch: Watch) -> None:
    watch._store.set("died/1", "killed")
    for turn in range(4):
        put(watch, turn, 0)
        put(watch, turn, 1)
    watch.poll()
    assert watch.over
    assert not watch.failure


def test_watch_gives_up_on_a_turn_without_end(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "patience_seconds", -1.0)
    watch.poll()
    assert "hung" in watch.failure


# ------------------------------------------------------------------- a worker with a transport of ours


class Handing:
    """Hands the state over within this process, as ``change`` makes it."""

    def __init__(self, hand: queue.Queue[State], connection: Connection, change: str) -> None:
        self._hand = hand
        self._template = connection.template
        self._change = change
        self._received = False

    def metadata(self) -> str:
        return "here"

    def send(self, dst_ranks: list[int], state: State) -> None:
        for _ in dst_ranks:
            self._hand.put(state)

    def receive(self, metadata: str) -> object:
        assert metadata == "here"
        source = self._hand.get(timeout=5)
        if self._change == "only the first arrives":
            return self._receive_once(source)
        state = build("tiny", 0.01, step=source["torchft"]["step"])
        for mine, theirs in zip(storages(state), storages(source), strict=True):
            mine.copy_(theirs)
        if self._change == "one bit":
            storages(state)[3][0] ^= 1
        return state

    def _receive_once(self, source: State) -> object:
        assert self._template is not None
        template = self._template()
        for mine, theirs in zip(storages(template), storages(source), strict=True):
            if not self._received:
                mine.copy_(theirs)
        self._received = True
        return {**source, "user": template["user"]}

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def hand_over(monkeypatch: pytest.MonkeyPatch, change: str, mode: str = "fresh") -> list[list[Sample]]:
    """All turns of a source and a receiver, in two threads."""
    hand: queue.Queue[State] = queue.Queue()
    kind = SubjectKind(lambda connection: Handing(hand, connection, change))
    monkeypatch.setitem(subjects.SUBJECTS, "handing", kind)
    job, store = make_job(["handing"], mode), HashStore()
    seen: list[list[Sample]] = [[], []]

    def take_turns(rank: int) -> None:
        one = worker._Worker(job, rank, store, "nowhere")
        seen[rank] = [one.take(turn) for turn in job.turns]
        one.close()

    threads = [threading.Thread(target=take_turns, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return [list(of_turn) for of_turn in zip(*seen, strict=True)]


def test_a_worker_finds_nothing_wrong_with_a_whole_state(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = hand_over(monkeypatch, "")
    row = summarise(Case("tiny", "fresh"), "handing", Size(160, 40, 40), samples)
    assert row.status == "equal"
    assert len(row.seconds) == 1
    assert row.seconds[0] > 0


def test_a_worker_reports_one_wrong_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = hand_over(monkeypatch, "one bit")
    assert [sample.wrong for of_turn in samples for sample in of_turn if sample.rank] == [
        ["['user']['default']['scalar3']"]
    ] * 2
    row = summarise(Case("tiny", "fresh"), "handing", Size(160, 40, 40), samples)
    assert row.status == "WRONG"
    assert exit_status([row]) == 1


def test_a_state_left_over_from_the_previous_turn_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = hand_over(monkeypatch, "only the first arrives", "in-place")
    assert [len(of_turn[1].wrong) for of_turn in samples] == [0, 10]
    assert [of_turn[1].in_place for of_turn in samples] == [(40, 40), (40, 40)]


def test_a_worker_sees_what_landed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = hand_over(monkeypatch, "", "in-place")
    row = summarise(Case("tiny", "in-place"), "handing", Size(160, 40, 40), samples)
    assert (row.status, row.in_place_share) == ("equal", 0.0)


def test_what_a_transport_raises_is_in_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(connection: Connection) -> Handing:
        raise OSError("no interface")

    monkeypatch.setitem(subjects.SUBJECTS, "broken", SubjectKind(make))
    job = make_job(["broken"])
    sample = worker._Worker(job, 0, HashStore(), "nowhere").take(job.turns[0])
    assert sample.error == "OSError: no interface"


def test_every_subject_has_its_name_once() -> None:
    assert set(subjects.OURS) | {subjects.REFERENCE} <= set(subjects.SUBJECTS)
    assert max(Counter(name.replace(" ", "-") for name in subjects.SUBJECTS).values()) == 1
