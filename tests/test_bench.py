"""The benchmark's parts: states, checks, statistics, table, picture, supervision. No processes, no groups."""

from __future__ import annotations

import io
import itertools
import queue
import threading
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchft.process_group
from rich.console import Console
from torch.distributed import HashStore, Store, TCPStore

from ft_transport._lanes.growth import LaneCount
from ft_transport.bench import groups, limits, plot, run, store, subjects, worker
from ft_transport.bench.__main__ import main
from ft_transport.bench.check import differences, distinct_nbytes, fingerprint, landed_in_place, storages, tensors
from ft_transport.bench.groups import join, torchft_version
from ft_transport.bench.growth import Growth, Point, fit, growths, points
from ft_transport.bench.limits import LIMITS, THREADS, limits_of
from ft_transport.bench.measure import free_nbytes
from ft_transport.bench.plan import Case, Job, Options, Turn, turns
from ft_transport.bench.plot import draw
from ft_transport.bench.results import Row, Sample, Size, Status, compare, exit_status, summarise
from ft_transport.bench.run import Watch
from ft_transport.bench.states import STATES, State, build, fill_constant, fill_random, parse_size
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
    render_growth,
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
        ("100x10MB", 100, 100, 10_000_000),
        ("1000x4kB", 1000, 1000, 4_000),
        ("30000x1MB", 30_000, 30_000, 30_000 * 4 * 8),
    ],
)
def test_sizes_of_the_states(name: str, num_tensors: int, num_storages: int, nbytes: int) -> None:
    state = build(name, 1.0, step=7)
    assert len(list(tensors(state))) == num_tensors
    assert len(storages(state)) == num_storages
    assert sum(storage.numel() for storage in storages(state)) == nbytes
    assert distinct_nbytes(state) == nbytes


@pytest.mark.parametrize("name", ["", "tiniest", "0x1MB", "10x1", "10x1TB", "10x1MB,", "x1MB", "-1x1MB"])
def test_what_is_no_number_and_size_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="as 1000x10MB"):
        parse_size(name)


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


def make_job(transports: list[str], mode: str = "fresh", state: str = "tiny", cold: bool = False) -> Job:
    return Job(3, Case(state, mode), transports, 1, 1, 0.01, 0, 5.0, one_machine=True, cold=cold)


def test_a_job_survives_json() -> None:
    job = make_job(["a", "b"])
    assert Job.from_json(job.to_json()) == job


def test_cases_are_every_state_in_every_mode() -> None:
    options = Options(["large", "tiny"], ["fresh", "in-place"], [], 1, 1, 1.0, 0, 60.0)
    assert [str(case) for case in options.cases] == ["large fresh", "large in-place", "tiny fresh", "tiny in-place"]


# ------------------------------------------------------------------------------------------- store


@pytest.mark.parametrize("text", ["", "short", "[ö]" * (3 << 20)])
def test_a_text_of_any_length_goes_through_the_store(text: str) -> None:
    """Digests of 100,000 leaves are more than it takes in one value."""
    patience = timedelta(seconds=60)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
    store.set_text(server, "key", text)
    assert store.get_text(TCPStore("127.0.0.1", server.port, is_master=False, timeout=patience), "key") == text


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


def test_a_share_is_of_the_first_limit_that_there_is_and_of_memmove() -> None:
    rows = [
        make_row("memmove", [1.0, 1.0, 1.0], "limit"),
        make_row("raw read", [], "unsupported"),
        make_row("raw TCP", [2.0, 4.0, 30.0], "limit"),
        make_row("lanes", [4.0, 5.0, 40.0]),
        make_row("other", [20.0, 20.0, 20.0]),
    ]
    compare(rows, "ref", ["lanes"], {"lanes": ("raw read", "raw TCP"), "other": ("memmove", "raw TCP")})
    lanes, other, tcp = rows[3], rows[4], rows[2]
    assert (lanes.limit, lanes.of_limit, lanes.of_memmove) == ("raw TCP", 0.75, 0.2)
    assert (other.limit, other.of_limit, other.of_memmove) == ("memmove", 0.05, 0.05)
    assert (tcp.limit, tcp.of_limit, tcp.of_memmove) == ("", None, 0.25)
    # A limit is faster than any transport, and no transport.
    assert (lanes.reference, lanes.ratio) == ("other", 4.0)


def test_a_limit_whose_bytes_were_wrong_is_none() -> None:
    rows = [make_row("raw TCP", [1.0], "WRONG"), make_row("lanes", [2.0])]
    compare(rows, "ref", ["lanes"], {"lanes": ("raw TCP",)})
    assert (rows[1].limit, rows[1].of_limit) == ("", None)


def test_summary_takes_the_slowest_receiver_and_leaves_the_warm_up_out() -> None:
    warm_up = [Sample(0, 0, 9.0, 9.0, 1, 1), Sample(0, 1, 9.0, 9.0, 1), Sample(0, 2, 9.0, 9.0, 1)]
    first = [Sample(1, 0, 1.0, 3.0, 10, 700), Sample(1, 1, 2.0, 5.0, 20), Sample(1, 2, 3.0, 4.0, 10)]
    second = [Sample(2, 0, 9.0, 4.0, 12, 500), Sample(2, 1, 5.0, 6.0, 30), Sample(2, 2, 4.0, 7.0, 40)]
    size = Size(8 * 10**9, 8, 8)
    row = summarise(Case("large", "in-place"), "x", size, [warm_up, first, second])
    assert row.status == "equal"
    assert row.seconds == [3.0, 5.0]
    assert (row.median_seconds, row.gigabytes_per_second) == (4.0, 2.0)
    assert row.nbytes_wire == 500
    assert (row.cpu_seconds_source, row.cpu_seconds_receiver) == (3.5, 6.0)
    assert (row.nbytes_memory_source, row.nbytes_memory_receiver) == (11, 30)
    cold = summarise(Case("large", "in-place"), "x", size, [warm_up, first, second], warm_up=0, is_limit=True)
    assert (cold.status, cold.seconds) == ("limit", [9.0, 3.0, 5.0])


@pytest.mark.parametrize(("taken", "beside"), [(170, 70), (90, 0)])
def test_memory_is_beside_the_state_that_was_received_afresh(taken: int, beside: int) -> None:
    samples = [[Sample(i, 0, nbytes_memory=5), Sample(i, 1, 1.0, nbytes_memory=taken)] for i in range(2)]
    row = summarise(Case("large", "fresh"), "x", Size(100, 1, 1), samples)
    assert (row.nbytes_memory_source, row.nbytes_memory_receiver) == (5, beside)
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
    sample = Sample(3, 1, 0.25, 0.5, None, 17, (2, 3), ["['a']"], "")
    assert Sample.from_json(sample.to_json()) == sample


# ------------------------------------------------------------------------------------ table, picture


def rows_of_every_kind() -> list[Row]:
    ours = make_row("lanes", [0.5, 1.0, 0.25], mode="in-place")
    ours.nbytes_wire, ours.in_place_share = 2_002_000_000, 0.5
    ours.cpu_seconds_source, ours.cpu_seconds_receiver = 0.25, 1.5
    ours.nbytes_memory_source, ours.nbytes_memory_receiver = 400_000, 20_971_520
    rows = [
        make_row("memmove", [0.1, 0.1, 0.1], "limit", mode="in-place"),
        make_row("raw TCP", [0.2, 0.2, 0.2], "limit", mode="in-place"),
        ours,
        make_row("torchft PGTransport", [1.0, 1.0, 1.0], mode="in-place"),
        make_row("torch _pg_transport", [1.0, 1.0, 1.0], "WRONG", "in-place", "not the source's at ['a']"),
        make_row("torchft HTTP", [], "unsupported", "in-place", "cannot receive in place"),
        make_row("torchft HTTP x8", [], "failed", "in-place", "rank 1: boom"),
    ]
    compare(rows, "torchft PGTransport", ["lanes"], {"lanes": ("raw TCP",)})
    return rows


def test_cells() -> None:
    cells_of = {row.transport: cells(row) for row in rows_of_every_kind()}
    assert all(len(of_row) == len(COLUMNS) for of_row in cells_of.values())
    assert cells_of["lanes"] == [
        "lanes",
        "500 (250…1000)",
        "4.00",
        "2.00",
        "40%",
        "20%",
        "0.12+0.75",
        "0.40+21.0 MB",
        "1.00",
        "equal",
    ]
    assert cells_of["raw TCP"][3:6] == ["5.00", "-", "50%"]
    assert cells_of["torch _pg_transport"][3:6] == ["-", "-", "-"]
    assert cells_of["torch _pg_transport"][-1] == "WRONG"
    assert cells_of["torchft HTTP"][1:] == ["-"] * (len(COLUMNS) - 2) + ["no"]


def printed(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(renderable)
    text = console.file.getvalue()
    assert "\x1b" not in text
    return str(text)


def test_the_table_fits_its_width_and_says_why() -> None:
    assert WIDTH <= 100
    text = printed(render(rows_of_every_kind()))
    assert "large · in-place   12 tensors, 2.00 GB, ratio to torchft PGTransport\n" in text
    assert "torchft HTTP x8: rank 1: boom" in text
    assert "torchft HTTP: cannot receive in place" in text
    assert "lanes: 50% of the tensors landed at the template's addresses" in text
    rows = [line.split() for line in text.splitlines()[3:10]]
    assert [row[-1] for row in rows] == ["limit", "limit", "equal", "equal", "WRONG", "no", "failed"]
    # No cell is cut off, and none runs over into two lines.
    assert rows[2][:3] == ["lanes", "500", "(250…1000)"]
    assert "large · in-place · cold " in printed(render(rows_of_every_kind(), cold=True))


def test_every_name_has_room_in_the_table_beside_the_widest_numbers() -> None:
    for name in [*LIMITS, *subjects.SUBJECTS]:
        row = make_row(name, [12.34, 98.76], mode="in-place")
        row.cpu_seconds_source = row.cpu_seconds_receiver = 24.6
        row.nbytes_memory_source, row.nbytes_memory_receiver, row.nbytes_wire = 10**9, 1640 * 10**6, 32 * 10**9
        row.ratio, row.of_limit, row.of_memmove = 245.2, 1.04, 2.08
        assert f"{name} " in printed(render([row])).splitlines()[3]
        assert " ".join(printed(render([row])).splitlines()[3].removeprefix(name).split()) == (
            "55.6 s (12.3…98.8) 0.04 245 104% 208% 12.3+12.3 1.00+1.64 GB 16.0 equal"
        )


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


def test_of_the_limits_the_picture_has_those_of_some_transport() -> None:
    shown = [row.transport for row in plot.shown(rows_of_every_kind())]
    assert shown == [row.transport for row in rows_of_every_kind() if row.transport != "memmove"]


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
        "--timeout nan",
        "--timeout inf",
        "--scale nan",
        "--address localhost:99999",
        "--states 10x0MB",
        "--device warp",
        "--states 0x1MB",
        "--cold 0",
        "--growth 10x10MB",
        "--growth 100x1MB",
        "--growth large",
    ],
)
def test_wrong_arguments_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments.split())
    assert raised.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- growth


def growth_of(costs: tuple[float, float, float], states: list[str], noise: float = 1.0) -> list[Point]:
    """What points take where fixed ms, microseconds for each leaf and seconds for each GB just add up."""
    found = []
    for state in states:
        num_leaves, nbytes = parse_size(state)
        seconds = costs[0] * 1e-3 + costs[1] * 1e-6 * num_leaves + costs[2] * 1e-9 * nbytes
        found.append(Point(state, num_leaves, nbytes, (seconds, 2 * seconds, 3 * seconds)))
    state, num_leaves, nbytes, (seconds, *rest) = vars(found[-1]).values()
    found[-1] = Point(state, num_leaves, nbytes, (seconds * noise, *rest))
    return found


def test_a_growth_goes_from_small_to_large_in_each_way_and_in_both() -> None:
    states, left_out = points((1000, 250 * 10**6), 2, None)
    assert states == [
        *["10x1MB", "10x10MB", "10x100MB", "10x250MB"],
        *["100x1MB", "1000x1MB"],
        *["100x100MB", "1000x250MB"],
    ]
    assert left_out == []
    assert points((100, 10**7), 2, None)[0] == ["10x1MB", "10x10MB", "100x1MB", "100x10MB"]
    assert {"10x8GB", "100000x8GB", "100000x1MB"} <= set(points((100_000, 8 * 10**9), 2, None)[0])


def test_what_memory_has_no_room_for_is_left_out_and_named() -> None:
    # A source and a destination, with a quarter of the state beside it each.
    states, left_out = points((100, 10**9), 2, 2_400_000_000)
    assert left_out == ["10x1GB", "100x1GB"]
    assert states == ["10x1MB", "10x10MB", "10x100MB", "100x1MB"]
    assert points((100, 10**9), 2, 2_500_000_000)[1] == []
    assert free_nbytes() > 1 << 20


def test_costs_that_add_up_are_found() -> None:
    of = growth_of((2.0, 8.0, 0.125), points((100_000, 8 * 10**9), 2, None)[0])
    for number in range(3):
        found = fit(of, number)
        assert found is not None
        assert found.costs == pytest.approx([cost * (number + 1) for cost in (2.0, 8.0, 0.125)])
        assert found.off == pytest.approx([0.0] * len(of), abs=1e-9)


def test_what_does_not_fit_is_said() -> None:
    of = growth_of((2.0, 8.0, 0.125), points((100_000, 8 * 10**9), 2, None)[0], noise=2.0)
    found = fit(of, 0)
    assert found is not None
    assert found.off[-1] < -0.3
    assert max(abs(off) for off in found.off[:-1]) < 0.3


def test_three_costs_are_not_fitted_to_three_points() -> None:
    assert fit(growth_of((1.0, 1.0, 1.0), ["10x1MB", "10x10MB", "100x1MB"]), 0) is None


def grown_rows(transport: str, mode: str, costs: tuple[float, float, float]) -> list[Row]:
    rows = []
    for point in growth_of(costs, points((1000, 10**9), 2, None)[0]):
        row = Row(Case(point.state, mode), transport, "equal", Size(point.nbytes, point.num_leaves, point.num_leaves))
        # The median of the rounds counts.
        row.seconds = [0.0, point.costs[0], 99.0]
        row.cpu_seconds_source, row.cpu_seconds_receiver = point.costs[1:]
        rows.append(row)
    return rows


def test_a_growth_is_of_each_transport_in_each_mode() -> None:
    rows = grown_rows("lanes", "in-place", (2.0, 8.0, 0.125)) + grown_rows("lanes", "fresh", (3.0, 9.0, 0.25))
    rows += [*grown_rows("group", "in-place", (4.0, 9.0, 0.5)), make_row("torchft HTTP", [], "failed")]
    found = growths(rows)
    assert [(each.mode, each.transport) for each in found] == [
        ("fresh", "lanes"),
        ("in-place", "lanes"),
        ("in-place", "group"),
    ]
    assert [each.fits[0].costs[1] for each in found] == pytest.approx([9.0, 8.0, 9.0])


def test_a_growth_is_shown_with_what_it_is_off_by() -> None:
    text = printed(render_growth(growths(grown_rows("lanes", "in-place", (2.0, 8.0, 0.126)))))
    lines = {line[:16].strip(): line[16:].split() for line in text.splitlines()}
    assert "growth · in-place · lanes" in text
    assert lines["10x1GB"] == ["128", "ms", "+0%", "256", "ms", "+0%", "384", "ms", "+0%"]
    assert lines["fixed"] == ["2.00", "ms", "4.00", "ms", "6.00", "ms"]
    assert lines["each leaf"] == ["8.00", "µs", "16.0", "µs", "24.0", "µs"]
    assert lines["each byte"] == ["0.13", "s/GB", "0.25", "s/GB", "0.38", "s/GB"]
    assert lines["median, most"] == ["0%,", "0%"] * 3
    assert "7.94 GB/s" in text
    few = Growth("lanes", "fresh", growth_of((1.0, 1.0, 1.0), ["10x1MB"]), [None] * 3)
    assert "too few" in printed(render_growth([few]))


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


def run_cold(monkeypatch: pytest.MonkeyPatch, fails: str = "") -> tuple[list[Row], list[Job], list[float]]:
    """A cold run of two rounds by three transports, one of which may fail; what was asked for, and waited for."""
    jobs: list[Job] = []
    waits: list[float] = []

    def attempt(site: object, job: Job, on_turn: object) -> object:
        jobs.append(job)
        sample = [[Sample(0, 0), Sample(0, 1, float(len(jobs)))]]
        failure = "boom" if fails in job.transports else ""
        return SimpleNamespace(failure=failure, samples=sample, size=lambda: Size(8, 1, 1))

    monkeypatch.setattr(run, "_run_attempt", attempt)
    monkeypatch.setattr(run, "time", SimpleNamespace(sleep=waits.append))
    names = ["lanes", "group", "torchft PGTransport"]
    options = Options(["tiny"], ["fresh"], names, 2, 1, 1.0, 0, 60.0, cold=7.0, limits=False)
    count, rows = run._run_case(SimpleNamespace(others=[]), options, options.cases[0], 5, lambda case, turn: None)
    assert [job.attempt for job in jobs] == list(range(5, count))
    return rows, jobs, waits


def test_a_cold_turn_is_of_new_processes_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, jobs, waits = run_cold(monkeypatch)
    assert [len(job.turns) for job in jobs] == [1] * 6
    assert all(job.cold for job in jobs)
    # The rounds' orders are balanced, as those of a warm run.
    order = turns(["lanes", "group", "torchft PGTransport"], 1)
    assert [job.transports[0] for job in jobs] == [turn.transport for turn in order]
    assert waits == [7.0] * 6
    # Every turn counts, the first one too.
    expected = {
        name: [i + 1.0 for i, turn in enumerate(order) if turn.transport == name] for name in ["lanes", "group"]
    }
    assert {row.transport: row.seconds for row in rows if row.transport in expected} == expected
    assert all(row.ratio is not None for row in rows)


def test_a_transport_that_fails_cold_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, jobs, _ = run_cold(monkeypatch, fails="group")
    assert {row.transport: (row.status, len(row.seconds)) for row in rows} == {
        "lanes": ("equal", 2),
        "group": ("failed", 0),
        "torchft PGTransport": ("equal", 2),
    }
    assert [job.transports for job in jobs].count(["group"]) == 1


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


def take_turns(job: Job, stores: Sequence[Store], address: str = "nowhere") -> list[list[Sample]]:
    """All turns of a source and a receiver, in two threads."""
    seen: list[list[Sample]] = [[], []]

    def as_rank(rank: int) -> None:
        one = worker._Worker(job, rank, stores[rank], address)
        seen[rank] = [one.take(turn) for turn in job.turns]
        one.close()

    threads = [threading.Thread(target=as_rank, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return [list(of_turn) for of_turn in zip(*seen, strict=True)]


def hand_over(
    monkeypatch: pytest.MonkeyPatch, change: str, mode: str = "fresh", cold: bool = False
) -> list[list[Sample]]:
    hand: queue.Queue[State] = queue.Queue()
    kind = SubjectKind(lambda connection: Handing(hand, connection, change))
    monkeypatch.setitem(subjects.SUBJECTS, "handing", kind)
    return take_turns(make_job(["handing"], mode, cold=cold), [HashStore()] * 2)


def test_a_worker_finds_nothing_wrong_with_a_whole_state(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = hand_over(monkeypatch, "")
    row = summarise(Case("tiny", "fresh"), "handing", Size(160, 40, 40), samples)
    assert row.status == "equal"
    assert len(row.seconds) == 1
    assert row.seconds[0] > 0
    assert row.cpu_seconds_source > 0
    assert row.cpu_seconds_receiver > 0


@pytest.mark.parametrize(("cold", "mode", "touched"), [(False, "fresh", 2), (True, "fresh", 0), (False, "in-place", 0)])
def test_only_a_warm_receiver_of_fresh_memory_has_it_ready(
    monkeypatch: pytest.MonkeyPatch, cold: bool, mode: str, touched: int
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(worker, "touch_free_memory", sizes.append)
    hand_over(monkeypatch, "", mode, cold)
    assert sizes == [200] * touched  # for 40 tensors of 4 bytes, and what a transport takes beside them


def test_cpu_is_counted_until_the_last_rank_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that leaves the work to its threads."""
    clock = itertools.count()
    barriers: list[str] = []
    monkeypatch.setattr(worker, "barrier", lambda store, name, world_size: barriers.append(name))
    monkeypatch.setattr(worker.time, "process_time", lambda: next(clock) + 100.0 * len(barriers))
    hand: queue.Queue[State] = queue.Queue()
    kind = SubjectKind(lambda connection: Handing(hand, connection, ""))
    monkeypatch.setitem(subjects.SUBJECTS, "handing", kind)
    job = make_job(["handing"])
    sample = worker._Worker(job, 0, HashStore(), "nowhere").take(job.turns[0])
    assert barriers == ["begin/0", "end/0"]
    assert sample.cpu_seconds == 101.0


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


# -------------------------------------------------------------------------------------------- limits

OF_ONE_MACHINE = ["memmove", "raw process_vm_readv", "raw TCP", "raw Gloo"]


def take_limits(names: list[str], mode: str) -> list[Row]:
    job = make_job(names, mode, "views")
    patience = timedelta(seconds=60)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
    # One for each: while a store waits, nobody else can use it.
    stores = [server, TCPStore("127.0.0.1", server.port, is_master=False, timeout=patience)]
    samples = take_turns(job, stores, f"127.0.0.1:{server.port}/limits")
    assert [sample.error for of_turn in samples for sample in of_turn] == [""] * 4 * len(names)
    of = {
        name: [seen for turn, seen in zip(job.turns, samples, strict=True) if turn.transport == name] for name in names
    }
    return [summarise(job.case, name, Size(1_342_208, 16, 1), of[name], is_limit=True) for name in names]


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize("mode", ["fresh", "in-place"])
def test_limits_move_the_bytes_of_the_state(mode: str) -> None:
    rows = take_limits(OF_ONE_MACHINE, mode)
    assert [row.status for row in rows] == ["limit"] * 4
    assert all(row.seconds[0] > 0 for row in rows)
    assert [row.in_place_share for row in rows[1:]] == [None if mode == "fresh" else 1.0] * 3


@pytest.mark.parametrize("mode", ["fresh", "in-place"])
def test_a_limit_that_leaves_bytes_out_is_wrong(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    def nothing(self: object, target: torch.Tensor, metadata: str) -> None:
        target[: len(target) // 2] = 0

    monkeypatch.setattr(limits._PeersMemory, "_fill", nothing)
    (row,) = take_limits(["raw process_vm_readv"], mode)
    assert (row.status, exit_status([row])) == ("WRONG", 1)


def test_memmove_writes_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_BLOCK_BYTES", 7)
    target = torch.zeros(101, dtype=torch.uint8)
    make = LIMITS["memmove"].make
    connection = Connection(HashStore(), "", 1, 2, timedelta(seconds=5), 101, lambda: {"bytes": target})
    assert make(connection).receive("")["bytes"] is target
    assert target.sum() == 101


def test_limits_are_those_of_the_transports() -> None:
    assert limits_of(["lanes", "torchft PGTransport"], one_machine=True, device="cpu") == OF_ONE_MACHINE
    assert limits_of(["group"], one_machine=True, device="cpu") == ["memmove", "raw Gloo"]
    assert limits_of(["lanes"], one_machine=False, device="cpu") == ["memmove", "raw TCP"]
    assert limits_of(["torchft HTTP"], one_machine=True, device="cuda")[1:3] == ["pinned to device", "device to pinned"]


def test_limits_have_as_many_threads_as_lanes_within_a_machine() -> None:
    assert LaneCount("auto", 0.0, is_local=True, lane_bytes=1 << 20).number == THREADS


def test_a_limit_that_cannot_be_had_here_is_no_failure() -> None:
    row = run._failed(Case("tiny", "fresh"), "raw process_vm_readv", "not permitted")
    assert (row.status, row.note, exit_status([row])) == ("unsupported", "not permitted", 0)
    assert run._failed(Case("tiny", "fresh"), "lanes", "boom").status == "failed"


def test_every_subject_has_its_name_once() -> None:
    assert all(set(kind.limits) <= set(LIMITS) for kind in subjects.SUBJECTS.values())
    assert not set(LIMITS) & set(subjects.SUBJECTS)
    assert set(subjects.OURS) | {subjects.REFERENCE} <= set(subjects.SUBJECTS)
    assert max(Counter(name.replace(" ", "-") for name in subjects.SUBJECTS).values()) == 1
