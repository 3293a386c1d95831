"""What a fabric is asked: where a message is, and to read it from there. What it cannot take it says."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from ft_transport._deadline import Deadline
from ft_transport._lanes import fabric as _fabric
from ft_transport._lanes.fabric import CMA, Reader, Shown, new_reader, new_shown
from ft_transport._net.one_sided import Job, await_closed
from ft_transport._plan.blocks import Block, Held, held
from ft_transport._plan.lent import Readers
from ft_transport._process import memory_at
from ft_transport.errors import LocalProtocolError
from ft_transport.testing import FaultyFabric

NBYTES = 1 << 20


@pytest.fixture(params=[CMA, "faulty"])
def both(request: pytest.FixtureRequest, fabric: FaultyFabric) -> Iterator[tuple[Reader, Shown]]:
    yield from pair(request.param)


@pytest.fixture
def one_sided(fabric: FaultyFabric) -> Iterator[tuple[Reader, Shown]]:
    yield from pair("faulty")


def pair(name: str) -> Iterator[tuple[Reader, Shown]]:
    reader, shown = new_reader(name, NBYTES), new_shown(name)
    reader.reach(shown.answer(reader.hello(wait), wait), wait)
    yield reader, shown
    reader.close()
    shown.close()


def wait(job: Job[Any]) -> None:
    assert job.done.wait(10)


def memory(seed: int = 1) -> tuple[torch.Tensor, Held]:
    tensor = torch.randn(NBYTES // 4, generator=torch.Generator().manual_seed(seed))
    (block,) = held([Block(tensor)])
    return tensor, Held(block, 0, NBYTES)


def test_what_one_side_shows_the_other_reads_piece_by_piece(both: tuple[Reader, Shown]) -> None:
    reader, shown = both
    (theirs, from_), (ours, into) = memory(1), memory(2)
    place = shown.place(from_.view, from_, wait)
    assert place is not None
    read = reader.read_from(place, NBYTES, into, wait)
    read(into.view[:1000])
    assert torch.equal(ours[:250], theirs[:250])
    assert not torch.equal(ours[250:], theirs[250:])
    read(into.view[1000:])
    assert torch.equal(ours, theirs)


# Where nothing is, and where the end of memory is passed. A process has no memory in its first page.
LIES = {
    CMA: [b"", b"nowhere", *(struct.pack("<Q", address) for address in (0, 4096, (1 << 64) - 1, (1 << 64) - NBYTES))],
    "faulty": [
        b"",
        b"nowhere",
        *(
            json.dumps(lie).encode()
            for lie in ([], {}, ["a", "b"], [4096, 1], [0, NBYTES], [-4096, NBYTES], [4096, NBYTES], [1 << 64, NBYTES])
        ),
    ],
}


@pytest.mark.parametrize(("name", "lie"), [(name, lie) for name, lies in LIES.items() for lie in lies])
def test_a_supplier_that_lies_about_a_place_harms_nobody(fabric: FaultyFabric, name: str, lie: bytes) -> None:
    ours, into = memory(2)
    for reader, _ in pair(name):
        with pytest.raises(OSError, match=r"not a place|Bad address|Error"):
            reader.read_from(lie, NBYTES, into, wait)(into.view)
    assert torch.equal(ours, memory(2)[0])


def test_an_answer_that_is_none_reaches_nobody(fabric: FaultyFabric) -> None:
    for name in (CMA, "faulty"):
        reader = new_reader(name, NBYTES)
        reader.hello(wait)
        with pytest.raises(OSError, match=r"not a place|JSONDecodeError"):
            reader.reach(b"nonsense", wait)
        reader.close()


def test_only_what_is_a_leafs_own_is_registered(one_sided: tuple[Reader, Shown], fabric: FaultyFabric) -> None:
    """A copy of small tensors, or a bucket, is memory of ours: another message's tomorrow."""
    _, shown = one_sided
    assert shown.place(memoryview(bytearray(NBYTES)), None, wait) is None
    assert fabric.num_registered == 0


def test_memory_that_was_exchanged_is_not_shown(one_sided: tuple[Reader, Shown], fabric: FaultyFabric) -> None:
    """Nor is what was registered of it before: the same message is not the same memory."""
    _, shown = one_sided
    tensor, from_ = memory()
    assert shown.place(from_.view, from_, wait) == shown.place(from_.view, from_, wait)
    assert fabric.num_registered == 1
    tensor.data = tensor.clone()
    with pytest.raises(LocalProtocolError, match="exchanged or given back"):
        shown.place(from_.view, from_, wait)


def test_memory_that_is_given_back_is_not_shown_and_its_owner_not_held_up(one_sided: tuple[Reader, Shown]) -> None:
    _, shown = one_sided
    tensor, from_ = memory()
    storage = tensor.untyped_storage()
    storage.resize_(0)
    with pytest.raises(LocalProtocolError, match="exchanged or given back"):
        shown.place(from_.view, from_, wait)
    storage.resize_(NBYTES)  # returns


def test_memory_that_is_given_back_while_it_is_looked_at_is_not_shown(
    one_sided: tuple[Reader, Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the look whether it is there, and before who gives it back would wait for us."""
    _, shown = one_sided
    tensor, from_ = memory()
    storage, readers_of = tensor.untyped_storage(), _fabric.readers_of

    def late(of: torch.UntypedStorage) -> Readers:
        storage.resize_(0)
        return readers_of(of)

    monkeypatch.setattr(_fabric, "readers_of", late)
    with pytest.raises(LocalProtocolError, match="exchanged or given back"):
        shown.place(from_.view, from_, wait)
    giving = threading.Thread(target=storage.resize_, args=(NBYTES,), daemon=True)
    giving.start()
    giving.join(10)
    assert not giving.is_alive(), "it is held up for good by who has not shown it"


def test_who_gives_back_what_is_shown_waits_until_nobody_can_read_it(one_sided: tuple[Reader, Shown]) -> None:
    _, shown = one_sided
    tensor, from_ = memory()
    shown.place(from_.view, from_, wait)
    shown.place(from_.view, from_, wait)
    giving = threading.Thread(target=tensor.untyped_storage().resize_, args=(0,))
    giving.start()
    giving.join(0.2)
    assert giving.is_alive()
    shown.close()
    giving.join(10)
    assert not giving.is_alive()


def test_what_lands_late_lands_nowhere_that_anybody_sees(one_sided: tuple[Reader, Shown], fabric: FaultyFabric) -> None:
    reader, shown = one_sided
    _, from_ = memory(1)
    ours, into = memory(2)
    fabric.forget_at(0)

    def give_up(job: Job[Any]) -> None:
        assert Deadline(timedelta(seconds=10)).poll(lambda: fabric.num_late == 1)
        raise TimeoutError

    place = shown.place(from_.view, from_, wait)
    assert place is not None
    with pytest.raises(TimeoutError):
        reader.read_from(place, NBYTES, into, give_up)
    reader.close()
    assert await_closed(timedelta(seconds=10))
    assert fabric.land() == 1
    assert torch.equal(ours, memory(2)[0])


def test_a_destination_that_gives_memory_back_meanwhile_is_told(one_sided: tuple[Reader, Shown]) -> None:
    """Not by the end of its process: here nobody but us copies."""
    reader, shown = one_sided
    _, from_ = memory(1)
    ours, into = memory(2)
    place = shown.place(from_.view, from_, wait)
    assert place is not None
    read = reader.read_from(place, NBYTES, into, wait)
    view = into.view
    ours.untyped_storage().resize_(0)
    with pytest.raises(LocalProtocolError, match="exchanged or given back"):
        read(view)


def test_a_place_that_fits_no_frame_is_sent(one_sided: tuple[Reader, Shown], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fabric, "_MAX_PLACE_BYTES", 3)
    _, from_ = memory()
    assert one_sided[1].place(from_.view, from_, wait) is None


def test_an_end_that_does_not_close_is_not_waited_for_without_end(
    fabric: FaultyFabric, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_fabric, "_CLOSING", timedelta(milliseconds=1))
    shown, go_on = new_shown("faulty"), threading.Event()
    begun = threading.Event()
    shown._endpoint._do(lambda: (begun.set(), go_on.wait()))  # type: ignore[attr-defined]
    assert begun.wait(10)
    shown.close()
    shown.await_closed()
    assert "faulty is still closing" in caplog.text
    go_on.set()


def test_bytes_of_ours_need_no_owner(both: tuple[Reader, Shown]) -> None:
    """A fresh leaf, or a bucket."""
    reader, shown = both
    theirs, from_ = memory(1)
    place = shown.place(from_.view, from_, wait)
    assert place is not None
    ours = torch.zeros(NBYTES // 4)
    reader.read_from(place, NBYTES, None, wait)(memory_at(ours.data_ptr(), NBYTES))
    assert torch.equal(ours, theirs)
