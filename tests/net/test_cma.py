"""Memory of another process is read where it lies, and what cannot be read is an error, never a crash."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ft_transport._net import cma
from ft_transport._net.cma import TOKEN_BYTES, PeerMemory, ShownToken, new_token

# Another process: shows the token of its argument, and bytes that begin in a page of their own.
_OTHER = """
import sys
from ft_transport._net.cma import ShownToken
import ctypes, mmap
shown = ShownToken(bytes.fromhex(sys.argv[1]))
memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
memory.write(bytes(range(256)) * (3 * mmap.PAGESIZE // 256))
print(shown.pid, shown.address, ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""
NBYTES = 3 * mmap.PAGESIZE


class Other:
    """Another process, and where it has what."""

    def __init__(self) -> None:
        self.token = new_token()
        command = [sys.executable, "-c", _OTHER, self.token.hex()]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.pid, self.token_at, self.begin = map(int, self.process.stdout.readline().split())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def other() -> Iterator[Other]:
    made = Other()
    yield made
    made.end()


@pytest.fixture
def memory(other: Other) -> PeerMemory:
    try:
        return PeerMemory(other.pid, other.token_at, other.token)
    except PermissionError:
        pytest.skip("this system lets nobody read another process's memory")


@pytest.mark.parametrize(("offset", "nbytes"), [(0, NBYTES), (1, 1), (mmap.PAGESIZE - 3, 7), (5, mmap.PAGESIZE + 1)])
def test_bytes_are_read_from_wherever_they_are(memory: PeerMemory, other: Other, offset: int, nbytes: int) -> None:
    into = bytearray(nbytes + 2)
    memory.read_into(other.begin + offset, memoryview(into)[1:-1])
    expected = (bytes(range(256)) * (NBYTES // 256))[offset : offset + nbytes]
    assert into == b"\0" + expected + b"\0"


def test_a_token_that_is_not_there_is_no_peers(memory: PeerMemory, other: Other) -> None:
    """Somebody else's process: one is led there who believes an address alone."""
    with pytest.raises(OSError, match="is not the peer's"):
        PeerMemory(other.pid, other.begin, other.token)
    with pytest.raises(OSError, match="is not the peer's"):
        PeerMemory(other.pid, other.token_at, new_token())


@pytest.mark.parametrize("pid", [0, -1, 1 << 31, 1 << 32 | 1, (1 << 64) - 1])
def test_a_number_that_is_no_process_is_not_cut_to_another_one(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        PeerMemory(pid, 4096, new_token())


@pytest.mark.parametrize("address", [0, -1, 1, (1 << 64) - 1, (1 << 64) - TOKEN_BYTES, 1 << 70])
def test_an_address_that_is_none_is_an_error(memory: PeerMemory, other: Other, address: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
        PeerMemory(other.pid, address, other.token)


def test_memory_that_ends_before_all_is_read_is_an_error(memory: PeerMemory) -> None:
    """The kernel gives what came before the page that is missing; that is not all, and so not enough."""
    gone = ctypes.CDLL(None)
    gone.mmap.restype, gone.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
    # Of our own, so that a page can be taken out of the middle: a process may read itself as it reads others.
    begin = gone.mmap(
        None, NBYTES, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1 % 2**64, 0
    )
    assert gone.munmap(ctypes.c_void_p(begin + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE)) == 0
    token = new_token()
    shown = ShownToken(token)
    ours = PeerMemory(shown.pid, shown.address, token)
    into = bytearray(NBYTES)
    ours.read_into(begin, memoryview(into)[: mmap.PAGESIZE])
    with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
        ours.read_into(begin, memoryview(into))
    gone.munmap(ctypes.c_void_p(begin), ctypes.c_size_t(NBYTES))


def test_a_process_that_has_ended_is_an_error() -> None:
    brief = Other()
    try:
        memory = PeerMemory(brief.pid, brief.token_at, brief.token)
    except PermissionError:
        pytest.skip("this system lets nobody read another process's memory")
    finally:
        brief.end()
    with pytest.raises(ProcessLookupError):
        memory.read_into(brief.begin, memoryview(bytearray(1)))


def test_a_system_that_cannot_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cma, "_system_call", lambda: None)
    with pytest.raises(ProcessLookupError):
        PeerMemory(os.getpid(), 4096, new_token())


def test_a_fork_shows_its_own_number() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if ShownToken(b"t" * TOKEN_BYTES).pid == os.getpid() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
