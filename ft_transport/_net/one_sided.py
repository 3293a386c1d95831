"""Reading another process's memory by a one-sided transport of torch's: ``torch.distributed._transport`` (2.15).

Strategy: torch has one interface for whatever reads without the other side's help (RDMA, NVLink, shared memory), and
leaves everything else to who uses it: a read cannot be called back, one of a peer that is stopped never ends, and
closing may not end either. So an endpoint is made for a transfer and has a thread, in which all is done that the
backend does; whoever uses it waits for as long as it likes, and then leaves the thread to close the endpoint, whenever
that is possible. What is read lands in memory that is the endpoint's and is kept until it is closed: what is late lands
there.

torch's interface is private and new; this file is the only one that knows it. Backends may be registered here as well,
where torch has no place for them (``ft_transport.testing``).

Not here: who reads what (``_lanes.fabric``), and whether it is what was meant, which digests say.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from ft_transport._deadline import MAX_WAIT, Deadline
from ft_transport._process import memory_at
from ft_transport.errors import printable

__all__ = ["Endpoint", "Job", "available", "await_closed", "register", "unregister"]

logger = logging.getLogger("ft_transport")

T = TypeVar("T")

# Of one call of a backend's, in seconds. It bounds how soon a thread sees that it may close what stands still, no more.
_CLOSE_S = 1.0
# Until the next attempt to close what could not be: at first, and at most. Nobody waits for it but memory.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 10.0
# A backend that fails to close, other than by taking too long, is not asked more often than that.
_MAX_FAILURES = 3

_registered: dict[str, Callable[..., Any]] = {}


def register(name: str, factory: Callable[..., Any]) -> None:
    """Have a backend, in this process: ``factory()`` gives what ``torch.distributed._transport.Transport`` says."""
    _registered[name] = factory


def unregister(name: str) -> None:
    """The opposite of :func:`register`."""
    _registered.pop(name, None)


def available() -> tuple[str, ...]:
    """The backends that can be asked for by name. Whether one works here is seen when it is used."""
    theirs = _torchs()
    return tuple(sorted({*_registered, *(theirs.available_transports() if theirs is not None else ())}))


def _torchs() -> Any | None:
    try:
        return importlib.import_module("torch.distributed._transport")
    except ImportError:  # of a torch before 2.15
        return None


def _new_transport(backend: str) -> Any:
    if (factory := _registered.get(backend)) is not None:
        return factory()
    theirs = _torchs()
    if theirs is None:
        raise OSError(f"torch {torch.__version__} has no one-sided transports")
    transport = theirs.new_transport(backend)
    _let_reads_fail(transport)
    return transport


def _let_reads_fail(transport: Any) -> None:
    # That a peer is gone NIXL says by an exception, at once and for good; torch 2.15 expects a state, as NIXL documents
    # it, takes that for no answer and asks for ever, in close() too. By a state the read has failed: then close()
    # cancels what is left of it, unregisters the memory and lets go of the agent, without which nothing writes.
    agent = getattr(transport, "_agent", None)
    if agent is None or not hasattr(agent, "check_xfer_state"):
        return
    check, of = type(agent).check_xfer_state, weakref.ref(agent)  # no circle: once it is let go of, its thread ends

    def check_xfer_state(handle: Any) -> Any:
        try:
            return check(of(), handle)
        except Exception as exc:
            if type(exc).__name__ != "nixlRemoteDisconnectError":
                raise
            return f"ERR, {exc}"

    agent.check_xfer_state = check_xfer_state


class Job(Generic[T]):
    """Something that an endpoint does.

    Attributes:
        done: Set once it is done, or has failed.
    """

    def __init__(self, act: Callable[[], T]) -> None:
        self.done = threading.Event()
        self._act = act
        self._result: T | None = None
        self._error: OSError | None = None

    def run(self) -> None:
        """Do it. Never raises."""
        try:
            self._result = self._act()
        except Exception as exc:
            # Backends raise what they like: RuntimeError, ValueError, errors of their libraries. They may quote what
            # the peer has told them.
            self._error = OSError(printable(str(exc) if isinstance(exc, OSError) else f"{type(exc).__name__}: {exc}"))
            _forget_frames(exc)
        finally:
            self.done.set()

    def fail(self, error: OSError) -> None:
        """Say that it will not be done."""
        self._error = error
        self.done.set()

    def await_done(self, limit: timedelta) -> bool:
        """Wait until it is done, for so long at the most; gives whether it is."""
        return self.done.wait(limit.total_seconds())

    def result(self) -> T:
        """What came of it, once it is done; raises OSError if it failed."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class Endpoint:
    """One end of a connection between two processes' memory, from now until :meth:`close`. Any thread.

    Nothing here waits. What takes time is a :class:`Job`, and jobs are done one after the other.

    Args:
        backend: Its name.
        room: How many bytes can be read at once; 0 for an end that only shows its memory.

    Attributes:
        closed: Set once nothing is read from this process's memory by it any more, nor written.

    Raises:
        OSError: No thread is to be had.
    """

    def __init__(self, backend: str, room: int = 0) -> None:
        self.closed = threading.Event()
        self._backend = backend
        self._room = room
        self._jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._closing = False
        self._transport: Any = None
        self._landing: torch.Tensor | None = None
        self._landed: Any = None  # as the backend knows it
        self._shown: dict[tuple[int, int, torch.device], tuple[torch.Tensor, Any, bytes]] = {}
        self._finally: list[Callable[[], object]] = []
        _endpoints.add(self)
        try:
            threading.Thread(target=self._run, name="ft_transport-fabric", daemon=True).start()
        except RuntimeError as exc:  # no more threads to be had
            _endpoints.discard(self)
            raise OSError(str(exc)) from None

    def bind(self) -> Job[bytes]:
        """Make it; gives what the other end needs to know."""

        def bind() -> bytes:
            self._transport = _new_transport(self._backend)
            return bytes(self._transport.bind())

        return self._do(bind)

    def connect(self, peer: bytes) -> Job[None]:
        """Connect it to the other end, by what :meth:`bind` has given there."""
        return self._do(lambda: self._transport.connect(peer))

    def show(self, tensor: torch.Tensor) -> Job[bytes]:
        """Let the other end read a contiguous tensor; gives where it is.

        The same memory is registered once. It is kept, and must not be given back, until this end is closed.
        """

        def show() -> bytes:
            key = (tensor.data_ptr(), tensor.nbytes, tensor.device)
            if key not in self._shown:
                memory = self._transport.register_memory(tensor)
                # The tensor too, whatever a backend holds: at its address there must be nobody else's meanwhile.
                self._shown[key] = tensor, memory, bytes(memory.to_remote_buffer().serialize())
            return self._shown[key][-1]

        return self._do(show)

    def read(self, place: bytes, nbytes: int) -> Job[memoryview]:
        """Read what :meth:`show` has given at the other end; gives it, in memory of this end, until the next read."""

        def read() -> memoryview:
            if nbytes > self._room:
                raise OSError(f"{nbytes} bytes to read, at most {self._room} are expected")
            if self._landed is None:
                self._landing = torch.empty(self._room, dtype=torch.uint8)
                self._landed = self._transport.register_memory(self._landing)
            # The class that reads it is the one that writes it: torch names no other way.
            remote = type(self._landed.to_remote_buffer()).deserialize(place)
            work = self._transport.read(self._landed.to_mutable_view(0, nbytes), remote, async_op=True)
            Deadline(MAX_WAIT).poll(lambda: self._closing or work.is_completed())
            if not work.is_completed():
                raise OSError("it was closed while it read")
            work.wait()
            assert self._landing is not None
            return memory_at(self._landing.data_ptr(), nbytes)

        return self._do(read)

    def _do(self, act: Callable[[], T]) -> Job[T]:
        job = Job(act)
        self._jobs.put(job)
        # And not the other way round: it may be closed in between, and its thread look at no more jobs.
        if self._closing:
            job.fail(OSError("it is closed"))
        return job

    def when_closed(self, act: Callable[[], object]) -> None:
        """Have something called, in the endpoint's thread, once it is closed, or cannot be. Not after :meth:`close`."""
        self._finally.append(act)

    def close(self) -> None:
        """Begin to close it: the other end can read no more. See :attr:`closed`. May be called twice."""
        if self in _endpoints:  # not in a fork, where its thread is not
            self._closing = True
            self._jobs.put(None)

    def await_closed(self, limit: timedelta) -> bool:
        """Wait until it is closed, for so long at the most; gives whether it is."""
        return self.closed.wait(limit.total_seconds())

    # -------------------------------------------------------------------------------- its own thread

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._closing:
                job.fail(OSError("it is closed"))
            else:
                job.run()
        self._end()

    def _end(self) -> None:
        # As long as it takes: of a peer that is stopped until it goes on, or has ended. A transport that is let go of
        # before may write to memory that is somebody else's by then.
        pause, failures = _FIRST_PAUSE_S, 0
        while self._transport is not None:
            try:
                self._transport.close(timeout=_CLOSE_S)
                self._transport = None
            except TimeoutError:
                pass
            except Exception as exc:
                _forget_frames(exc)
                # One that says so of a read that has failed, and is closed all the same, does not say so again.
                failures += 1
                if failures == _MAX_FAILURES:
                    logger.warning("a one-sided transport (%s) cannot be closed, and is kept: %s", self._backend, exc)
                    _left.append(self)
                    self._let_go()  # when it is closed nobody will ever know, and is not to wait for
                    return
            if self._transport is not None:
                self.closed.wait(pause)
                if pause < _LONGEST_PAUSE_S <= 2 * pause:
                    logger.warning("a one-sided transport (%s) is not closed yet, and keeps its threads", self._backend)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        self._landing = self._landed = None
        self._shown.clear()
        self._let_go()
        _endpoints.discard(self)
        self.closed.set()

    def _let_go(self) -> None:
        for act in self._finally:
            act()
        self._finally.clear()


_endpoints: weakref.WeakSet[Endpoint] = weakref.WeakSet()
_left: list[Endpoint] = []


def _forget_frames(exc: Exception) -> None:
    # An error of torch's is kept by the read that has failed, out of the garbage collector's sight, and its frames keep
    # the read: with that, for good, NIXL's agent, which keeps a core busy and is what could still write.
    exc.__traceback__ = None


def await_closed(limit: timedelta) -> bool:
    """Wait until no endpoint of this process is closing any more, for so long at the most; gives whether it is so."""
    deadline = Deadline(limit)
    closing = [endpoint.closed for endpoint in list(_endpoints) if endpoint._closing]
    for closed in closing:
        closed.wait(deadline.remaining().total_seconds())
    return all(closed.is_set() for closed in closing)


def _leave_alone() -> None:
    # Of a fork: neither its thread nor the backend's are here, and what the backend does when it is taken down may be
    # felt by the parent, whose connections and registrations they are. So nobody takes it down, not even the end of the
    # child's interpreter.
    for endpoint in list(_endpoints):
        for kept in (endpoint, endpoint._transport):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    _endpoints.clear()


os.register_at_fork(after_in_child=_leave_alone)
