"""Bytes of tensors of any strides: copied, read in pieces, and never where the memory has gone."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import sys
import threading
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import noise, raw_bytes, succeed
from states import DTYPES

from ft_transport._options import Options
from ft_transport._plan import blocks as blocks_module
from ft_transport._plan.blocks import Block, Blocks, Held, Places, copy_blocks, copy_elements, held, indexed, storage_as
from ft_transport._state.describe import describe
from ft_transport.errors import LocalProtocolError

STRIDED = {
    "contiguous": lambda: noise((3, 4, 5), 1),
    "permuted": lambda: noise((3, 4, 5), 1).permute(2, 0, 1),
    "gaps": lambda: noise((6, 8, 10), 1)[::2, 1:5, ::2],
    "one dimension": lambda: noise(30, 1)[::3],
    "no dimension": lambda: noise(5, 1)[3],
    "size one": lambda: noise((4, 1, 3), 1).transpose(0, 1),
}


@pytest.mark.parametrize("name", STRIDED)
def test_elements_from_any_place_there_and_back(name: str) -> None:
    strided = STRIDED[name]()
    flat = strided.reshape(-1).clone()
    for begin in range(flat.numel()):
        for count in {0, 1, 2, 7, 19, flat.numel() - begin}:
            if begin + count > flat.numel() or (count == 0 and strided.dim() == 0):
                continue
            got = torch.zeros(count)
            copy_elements(strided, begin, got, to_flat=True)
            assert raw_bytes(got) == raw_bytes(flat[begin : begin + count])
            target = torch.zeros_like(strided).as_strided(strided.shape, torch.zeros(strided.shape).stride())
            copy_elements(target, begin, flat[begin : begin + count], to_flat=False)
            expected = torch.zeros_like(flat)
            expected[begin : begin + count] = flat[begin : begin + count]
            assert raw_bytes(target.reshape(-1)) == raw_bytes(expected)


def test_scattering_leaves_the_gaps_alone() -> None:
    base = noise(40, 1)
    before = raw_bytes(base[1::2])
    copy_elements(base[::2], 3, noise(10, 2), to_flat=False)
    assert raw_bytes(base[1::2]) == before
    assert raw_bytes(base[::2][3:13]) == raw_bytes(noise(10, 2))


def copy_all(blocks: list[Block], staged: torch.Tensor, *, gather: bool) -> None:
    """Copy equally large blocks, which fill the message."""
    sizes = [staged.numel() // len(blocks)] * len(blocks)
    copy_blocks(Blocks.of(blocks), range(len(blocks)), sizes, staged, gather=gather)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 8, 16])
def test_blocks_of_every_dtype_at_every_alignment(name: str, offset: int) -> None:
    dtype = DTYPES[name]
    dense, gaps = noise(8, 1, dtype), noise((4, 4), 2, dtype)[:, :2]
    nbytes = 8 * dtype.itemsize
    staged = torch.zeros(2 * nbytes + offset, dtype=torch.uint8)[offset:]
    copy_all([Block(dense), Block(gaps, dense=False)], staged, gather=True)
    assert raw_bytes(staged) == raw_bytes(dense) + raw_bytes(gaps)
    other = [noise(8, 3, dtype), noise((4, 4), 4, dtype)[:, :2]]
    copy_all([Block(other[0]), Block(other[1], dense=False)], staged, gather=False)
    assert [raw_bytes(tensor) for tensor in other] == [raw_bytes(dense), raw_bytes(gaps)]


def test_parts_of_blocks() -> None:
    dense, gaps = noise((4, 8), 1).t(), noise((8, 8), 2)[:, ::2]
    staged = torch.zeros(40, dtype=torch.uint8)
    for block in (Block(dense), *held([Block(dense)])):
        blocks = Blocks.of([Block(noise(3, 3)), Block(gaps, dense=False), block])
        copy_blocks(blocks, [2, 1], [8, 32], staged.zero_(), gather=True, begins=[5, 12])
        assert raw_bytes(staged) == raw_bytes(dense.t())[5:13] + raw_bytes(gaps)[12:44]


def no_pipe() -> tuple[int, int]:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def short_pipe() -> tuple[int, int]:
    """As a user gets it who has many: it holds a page."""
    pipe = os.pipe()
    fcntl.fcntl(pipe[0], fcntl.F_SETPIPE_SZ, mmap.PAGESIZE)
    return pipe


def calls_give(count: int) -> Callable[[pytest.MonkeyPatch], object]:
    """What gives the same as a system call that has copied so much, and copies nothing."""
    return lambda patch: [patch.setattr(blocks_module, name, lambda *_: count) for name in ("_readv", "_writev")]


# What very small tensors are copied by.
SYSTEMS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "as it is": lambda patch: None,
    "no pipe": lambda patch: patch.setattr(blocks_module, "os", SimpleNamespace(pipe=no_pipe)),
    "a short pipe": lambda patch: patch.setattr(
        blocks_module,
        "os",
        SimpleNamespace(**{**vars(os), "pipe": short_pipe}),
    ),
    "a call that fails": calls_give(-1),
    "a call that stops": calls_give(1),
}
MANY = blocks_module._AT_ONCE


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("length", [5, 60, 100])
@pytest.mark.parametrize("number", [1, MANY, 2 * MANY + 3])
def test_many_small_tensors_cross_whatever_the_system_has(
    monkeypatch: pytest.MonkeyPatch, system: str, length: int, number: int
) -> None:
    SYSTEMS[system](monkeypatch)
    tensors = [noise(index % length + 1, index) for index in range(number)]
    sizes = [tensor.nbytes for tensor in tensors]
    # All but the first bytes of the last one.
    begins, sizes[-1] = [0] * (number - 1) + [2], sizes[-1] - 2
    whole = b"".join(map(raw_bytes, tensors[:-1])) + raw_bytes(tensors[-1])[2:]
    staged = torch.zeros(sum(sizes), dtype=torch.uint8)
    copy_blocks(Blocks.of(held([*map(Block, tensors)])), range(number), sizes, staged, gather=True, begins=begins)
    assert raw_bytes(staged) == whole
    others = [torch.zeros_like(tensor) for tensor in tensors]
    copy_blocks(Blocks.of(held([*map(Block, others)])), range(number), sizes, staged, gather=False, begins=begins)
    assert b"".join(map(raw_bytes, others)) == whole[: sum(sizes[:-1])] + bytes(2) + whole[sum(sizes[:-1]) :]


def test_what_is_larger_than_a_pipe_goes_another_way() -> None:
    sizes = [blocks_module._PIPE_BYTES + 8, *[4] * (2 * MANY * MANY)]
    assert sum(sizes) < blocks_module._TINY_BYTES * len(sizes)
    tensors = [torch.full((size,), index % 251, dtype=torch.uint8) for index, size in enumerate(sizes)]
    staged = torch.zeros(sum(sizes), dtype=torch.uint8)
    copy_blocks(Blocks.of([*map(Block, tensors)]), range(len(sizes)), sizes, staged, gather=True)
    assert raw_bytes(staged) == b"".join(map(raw_bytes, tensors))


def test_nobody_else_runs_while_tiny_ones_are_copied() -> None:
    """As ``ctypes.PyDLL`` has it: the interpreter's lock is kept."""
    kept = type(ctypes.PyDLL(None).memmove)._flags_  # type: ignore[attr-defined]
    assert kept != type(ctypes.CDLL(None).memmove)._flags_  # type: ignore[attr-defined]
    for call in (blocks_module._readv, blocks_module._writev, blocks_module._memmove):
        assert type(call)._flags_ == kept  # type: ignore[attr-defined]


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("gather", [True, False])
def test_memory_that_is_taken_away_before_any_step_is_neither_read_nor_written(
    monkeypatch: pytest.MonkeyPatch, tiny: bool, gather: bool
) -> None:
    """Each step of Python is one before which another thread may get its turn."""
    monkeypatch.setattr(blocks_module, "_AT_ONCE", 4 if tiny else MANY)

    def taken_before(step: int) -> bool:
        tensors = [torch.full((16,), index + 1, dtype=torch.uint8) for index in range(4)]
        blocks, old = Blocks.of(held([*map(Block, tensors)])), tensors[2].data
        staged, before, steps = torch.full((64,), 77, dtype=torch.uint8), old.clone(), itertools.count()

        def take() -> None:
            nonlocal before
            tensors[2].data = torch.zeros(16, dtype=torch.uint8)
            if gather:
                old.fill_(255)
            before = old.clone()

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code.co_filename != blocks_module.__file__:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and next(steps) == step:
                take()
            return trace

        tracing = sys.gettrace()
        sys.settrace(trace)
        try:
            copy_blocks(blocks, range(4), [16] * 4, staged, gather=gather)
        except LocalProtocolError:
            pass
        finally:
            sys.settrace(tracing)
        assert 255 not in staged.tolist()
        assert next(steps) <= step or torch.equal(old, before)
        return next(steps) > step

    assert sum(itertools.takewhile(bool, map(taken_before, itertools.count()))) > 100


def test_blocks_are_columns_and_read_as_rows() -> None:
    loose, gaps = Block(noise(4, 1)), Block(noise((4, 4), 2)[:, :2], dense=False)
    first, strided, last = held([Block(noise(5, 3)), gaps, Block(noise(6, 4))])
    found = Blocks.of([first, loose, strided])
    assert list(found) == [first, loose, strided]
    assert (sorted(found.others), found.on_host, len(found)) == ([1, 2], True, 3)
    found.extend([last])
    assert list(found.part([3, 1, 2])) == [last, loose, strided]
    assert list(found.part(range(2, 4))) == [strided, last]
    found.put([2, 0], [last, gaps])
    assert list(found) == [gaps, loose, last, last]
    assert sorted(found.others) == [0, 1]
    first.memory.data = noise(5, 5)
    found.put([0], [first])
    again = found.held_again()
    assert all(block.here for block in again)
    assert again.others == {}
    # Who reads them meanwhile goes on with what was: none of it is put right under it.
    assert list(found) == [first, loose, last, last]
    assert not first.here


def test_blocks_on_a_device_are_not_all_on_the_host() -> None:
    away = Block(torch.empty(3, device="meta"))
    assert not Blocks.of([Block(noise(3, 1)), away]).on_host
    found = Blocks.of([Block(noise(3, 1))])
    found.put([0], [away])
    assert not found.on_host
    assert not found.part([0]).on_host


def test_the_bytes_of_a_dense_block_share_its_memory() -> None:
    base = noise(20, 1)
    part = Block(base[4:10].view(2, 3).t()).bytes(4, 12)
    part.zero_()
    assert raw_bytes(base[5:7]) == bytes(8)
    assert bytes(4) not in (raw_bytes(base[4]), raw_bytes(base[7]))


def test_a_storage_as_another_dtype() -> None:
    base = noise(9, 1)
    whole = storage_as(base[3:5], torch.uint8)
    assert raw_bytes(whole) == raw_bytes(base)
    assert whole.data_ptr() == base.data_ptr()
    assert storage_as(base, torch.int64).numel() == 4
    assert storage_as(torch.nn.Parameter(base), torch.uint8).numel() == 36
    with pytest.raises(TypeError, match="plain tensor"):
        storage_as(torch.ones(2).as_subclass(type("Sub", (torch.Tensor,), {})), torch.uint8)


MOVES: dict[str, Callable[[torch.Tensor], object]] = {
    "exchanged": lambda tensor: setattr(tensor, "data", torch.zeros_like(tensor)),
    "set": lambda tensor: tensor.set_(torch.zeros(3)),  # type: ignore[call-overload]
    "given back": lambda tensor: tensor.untyped_storage().resize_(0),
    "smaller": lambda tensor: tensor.untyped_storage().resize_(40),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_memory_that_was_taken_away_is_neither_read_nor_written(move: Callable[[torch.Tensor], object]) -> None:
    kept, moved = noise(300_000, 1), noise(300_000, 2)
    blocks, (manifest, _) = held([Block(kept), Block(moved)]), describe({"kept": kept, "moved": moved})
    places = Places.of(Blocks.of(blocks), manifest, lambda: [0, 1])
    nbytes = moved.numel() * 4
    before, staged = raw_bytes(kept), torch.full((2 * nbytes,), 7, dtype=torch.uint8)
    view = Held(blocks[1], 0, nbytes).view
    places.check()
    move(moved)
    with pytest.raises(LocalProtocolError, match="exchanged or given back while the state was moved: moved;"):
        places.check()
    read: list[memoryview] = []
    for act in (
        Held(blocks[1], 0, nbytes).check,
        lambda: Held(blocks[1], 0, nbytes).reads(read.append)(view),
        lambda: copy_all(blocks, staged, gather=True),
        lambda: copy_all(blocks, staged, gather=False),
    ):
        with pytest.raises(LocalProtocolError, match="exchanged or given back"):
            act()
    assert read == []
    assert raw_bytes(staged) == bytes([7]) * (2 * nbytes)
    assert raw_bytes(kept) == before


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_memory_that_is_taken_away_between_two_reads_is_not_read_again(move: Callable[[torch.Tensor], object]) -> None:
    tensor = noise(300_000, 1)
    (block,) = held([Block(tensor)])
    pieces: list[bytes] = []
    part = Held(block, 5, 200_003)
    read = part.reads(lambda piece: pieces.append(bytes(piece)))
    read(part.view)
    move(tensor)
    if move in (MOVES["given back"], MOVES["smaller"]):
        with pytest.raises(LocalProtocolError, match="exchanged or given back"):
            read(part.view)
    else:
        read(part.view)  # the old memory is kept; whoever reads looks once more at the end
        assert pieces[0] == pieces.pop()
        with pytest.raises(LocalProtocolError, match="exchanged or given back"):
            part.check()
    assert len(pieces) == 1
    assert len(pieces[0]) == 199_998


@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "scattered"])
@pytest.mark.parametrize("form", ["strided", "gaps"])
def test_memory_is_not_taken_away_between_two_steps_of_a_copy(
    monkeypatch: pytest.MonkeyPatch, form: str, gather: bool
) -> None:
    """Torch looks at its bounds in one step and copies in another; whoever takes it comes in between."""
    whole = noise(64 * 64, 1).view(64, 64)
    if form == "strided":
        block = Block(whole.t(), dense=False)
    else:
        block = indexed(whole, 0, whole.nbytes, torch.arange(0, 64 * 64, 2), 4)
    nbytes = (block.memory if block.places is None else block.places).numel() * 4
    (block,) = held([block])
    staged, taken = torch.full((nbytes,), 7, dtype=torch.uint8), threading.Event()
    thread = threading.Thread(target=lambda: (whole.untyped_storage().resize_(0), taken.set()))

    def first(name: str) -> Callable[..., None]:
        copy = getattr(blocks_module, name)

        def then(*args: Any, **kwargs: Any) -> None:
            if not thread.ident:
                thread.start()
                assert not taken.wait(0.05)
            copy(*args, **kwargs)

        return then

    for name in ("_copy", "_copy_indexed"):
        monkeypatch.setattr(blocks_module, name, first(name))
    copy_all([block], staged, gather=gather)
    assert thread.ident
    thread.join(10)
    assert taken.is_set()
    with pytest.raises(LocalProtocolError, match="exchanged or given back"):
        copy_all([block], staged, gather=gather)


QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}


OF_A_BYTE = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and dtype.itemsize == 1}


@pytest.mark.parametrize("dtype", sorted(OF_A_BYTE - QUANTIZED, key=str), ids=str)
def test_every_dtype_of_a_byte_is_copied_bit_for_bit(dtype: torch.dtype) -> None:
    """Through shadow memory, and where one source tensor is two of the template's."""
    whole = torch.arange(256, dtype=torch.uint8).view(dtype)
    for source, options in (
        ({"w": whole}, Options(torch.device("cpu"), shadow=True)),
        ({"w": whole, "x": whole.view(16, 16)}, None),
    ):
        mine = {name: torch.zeros(tensor.shape, dtype=torch.uint8).view(dtype) for name, tensor in source.items()}
        ends = succeed(source, lambda mine=mine: mine, destination_options=options)
        for name, tensor in source.items():
            assert ends.destination.result[name] is mine[name]
            assert raw_bytes(mine[name]) == raw_bytes(tensor)
