"""A warm standby for one replica: a second process that has imported and built all, and trains once the first is dead.

    REPLICA_GROUP_ID=0 python examples/standby.py examples/train_ddp.py
    REPLICA_GROUP_ID=1 python examples/standby.py -m torch.distributed.run --standalone --nproc_per_node=8 train.py

Runs Python with the rest of the command line, twice. Your script calls ``until_needed()`` when all is built, right before
it makes its Manager: it returns in the first process, and in the second one when the first has died, and then the next
standby is started. Ends as the training does: with its status, and on SIGTERM and SIGINT, which are passed on.
"""

import contextlib
import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading

GATE = "STANDBY_GATE"  # environment variable: where a process asks whether it may train
STANDBY_DELAY = float(os.environ.get("STANDBY_DELAY", "10"))  # seconds: a start takes CPU from whoever starts or heals
MAX_RESTARTS = int(os.environ.get("MAX_RESTARTS", "100"))


def until_needed() -> None:
    """Return when this process is to train: at once, unless it was started as a standby.

    From the first call on, the process ends when the one that started it does, or gives it up.
    """
    if GATE not in os.environ:
        return
    gate = socket.socket(socket.AF_UNIX)
    gate.connect(os.environ[GATE])
    print(f"process {os.getpid()} is ready", flush=True)

    def ends() -> bool:
        with contextlib.suppress(ConnectionResetError):
            return gate.recv(1) == b""
        return True

    if ends():
        os._exit(1)
    threading.Thread(target=lambda: ends() and os._exit(1), daemon=True).start()


class Attempt:
    """One run of the command, with all processes that it starts. They wait until ``let_go``."""

    def __init__(self, path: str, ended: "queue.SimpleQueue[Attempt | int]") -> None:
        self._gate = socket.socket(socket.AF_UNIX)
        self._gate.bind(path)
        self._gate.listen(1024)  # each rank's connection stays in here, and its end with it
        self._admitted: list[socket.socket] = []
        self.process = subprocess.Popen(
            [sys.executable, *sys.argv[1:]], env={**os.environ, GATE: path}, start_new_session=True
        )
        threading.Thread(target=lambda: (self.process.wait(), ended.put(self)), daemon=True).start()

    def let_go(self) -> None:
        print(f"standby.py: process {self.process.pid} trains", flush=True)
        threading.Thread(target=self._admit, daemon=True).start()

    def _admit(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._admitted.append(self._gate.accept()[0])
                self._admitted[-1].sendall(b"!")

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def end(self) -> None:
        """Leave nothing of it: its process group is killed, and a rank in a group of its own sees its gate closed."""
        self.send(signal.SIGKILL)
        for gate in [self._gate, *self._admitted]:
            with contextlib.suppress(OSError):
                gate.shutdown(socket.SHUT_RDWR)
        self.process.wait()


def main() -> int:
    events: queue.SimpleQueue[Attempt | int] = queue.SimpleQueue()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, _: events.put(signum))
    with tempfile.TemporaryDirectory() as folder:
        paths = (f"{folder}/{number}" for number in itertools.count())
        active, standby, stopping, restarts = Attempt(next(paths), events), None, False, 0
        active.let_go()
        while True:
            try:
                event = events.get(timeout=None if standby or stopping else STANDBY_DELAY)
            except queue.Empty:
                standby = Attempt(next(paths), events)
                continue
            if isinstance(event, int):
                stopping = True
                for attempt in filter(None, (active, standby)):
                    attempt.send(event)
                continue
            event.end()
            status = event.process.returncode
            if event is standby:
                standby = None  # another one after the delay
            elif status == 0 or stopping or restarts == MAX_RESTARTS:
                if standby:
                    standby.end()
                return status if status >= 0 else 128 - status
            else:
                print(f"standby.py: process {event.process.pid} ended with {status}", flush=True)
                restarts += 1
                active, standby = standby or Attempt(next(paths), events), None
                active.let_go()


if __name__ == "__main__":
    sys.exit(main())
