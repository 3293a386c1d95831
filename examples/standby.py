"""A warm standby for one replica: a second process that has everything ready, and trains once the first is dead.

    REPLICA_GROUP_ID=0 python examples/standby.py examples/train_ddp.py
    REPLICA_GROUP_ID=1 python examples/standby.py -m torch.distributed.run --standalone --nproc_per_node=8 train.py

Runs Python with these arguments, twice. The script calls ``until_needed()`` when all is built, right before it makes
its Manager: that returns in the first process, and in the second one once the first has died; then the next standby
is started. SIGTERM and SIGINT are passed on. Ends as the training does, with its status, and leaves no process.
"""

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading

GATE = "STANDBY_GATE"  # environment variable: the pipe that a process reads to learn whether it may train
STANDBY_DELAY = float(os.environ.get("STANDBY_DELAY", "10"))  # seconds: a start takes CPU from whoever starts or heals
MAX_RESTARTS = int(os.environ.get("MAX_RESTARTS", "100"))
MAX_RANKS = 1024  # bytes in the pipe, one for each


def until_needed() -> None:
    """Return when this process is to train: at once, unless it is a standby. It ends when who started it does."""
    if GATE not in os.environ:
        return
    gate = os.open(os.environ[GATE], os.O_RDONLY)  # not there: who started us is gone
    print(f"process {os.getpid()} is ready", flush=True)
    if not os.read(gate, 1):
        os._exit(1)
    hung_up = select.poll()
    hung_up.register(gate, 0)
    threading.Thread(target=lambda: (hung_up.poll(), os._exit(1)), daemon=True).start()


class Attempt:
    """One run of the command, with all processes that it starts. They wait until ``let_go``."""

    def __init__(self, events: "queue.SimpleQueue[Attempt | int]") -> None:
        # A rank opens it by name: what is between us and it, as torchrun, may close what it inherits.
        self._gate = os.pipe()
        environment = {**os.environ, GATE: f"/proc/{os.getpid()}/fd/{self._gate[0]}"}
        self.process = subprocess.Popen([sys.executable, *sys.argv[1:]], env=environment, start_new_session=True)
        threading.Thread(target=lambda: (self.process.wait(), events.put(self)), daemon=True).start()

    def let_go(self) -> None:
        print(f"standby.py: process {self.process.pid} trains", flush=True)
        os.write(self._gate[1], b"!" * MAX_RANKS)

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def end(self) -> int:
        """Kill what is left of its process group; ranks with a group of their own see the pipe's end. The status."""
        self.send(signal.SIGKILL)
        for end in self._gate:
            os.close(end)
        return self.process.wait()


def main() -> int:
    events: queue.SimpleQueue[Attempt | int] = queue.SimpleQueue()
    for handled in (signal.SIGTERM, signal.SIGINT):
        signal.signal(handled, lambda signum, _: events.put(signum))
    active, standby, restarts = Attempt(events), None, 0
    active.let_go()
    while True:
        try:
            event = events.get(timeout=None if standby or restarts >= MAX_RESTARTS else STANDBY_DELAY)
        except queue.Empty:
            standby = Attempt(events)
            continue
        if isinstance(event, int):
            restarts = MAX_RESTARTS  # none any more
            for attempt in filter(None, (active, standby)):
                attempt.send(event)
        elif event is standby:
            standby.end()
            standby = None  # another one after the delay
        else:
            status = active.end()
            print(f"standby.py: process {active.process.pid} ended with {status}", flush=True)
            if status == 0 or restarts >= MAX_RESTARTS:
                if standby:
                    standby.end()
                return status if status >= 0 else 128 - status
            active, standby, restarts = standby or Attempt(events), None, restarts + 1
            active.let_go()


if __name__ == "__main__":
    sys.exit(main())
