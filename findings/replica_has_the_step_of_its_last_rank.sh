#!/usr/bin/env bash
# One would guess: a replica of several ranks takes part in a quorum with one step, or is behind if any rank of it is.
#
# What happens: it takes part with the step of the rank that asked last. Manager sets a rank's step as soon as that rank
# has received a checkpoint. If another rank's receive has failed, the step is not committed, and in the next quorum the
# healed rank says 10 and the other one 0: where the healed one asks last, nobody heals. The other one trains on with the
# weights that it was started with, at its own step 1, 2, ..., and the replica commits.
#
# Why it matters: one rank's failed heal, of a job that is sharded (FSDP2) or has several ranks a replica, is a model that
# is half random from then on, and nothing says so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchft==0.2.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from torchft.coordination import LighthouseServer, ManagerClient, ManagerServer

LONG = timedelta(seconds=20)


class Replica:
    def __init__(self, name, lighthouse):
        self.server = ManagerServer(
            replica_id=name,
            lighthouse_addr=lighthouse,
            hostname="localhost",
            bind="[::]:0",
            store_addr="localhost:0",
            world_size=2,
            heartbeat_interval=timedelta(milliseconds=100),
            connect_timeout=LONG,
            quorum_retries=0,
        )
        self.ranks = [ManagerClient(self.server.address(), connect_timeout=LONG) for _ in range(2)]

    def ask(self, pool, rank, step):
        client = self.ranks[rank]
        return pool.submit(
            client._quorum,
            group_rank=rank,
            step=step,
            checkpoint_metadata="",
            shrink_only=False,
            timeout=LONG,
            init_sync=True,
            commit_failures=0,
        )


def heals(order):
    """Whether each rank of the second replica is told to heal; it asks in this order, as (rank, step)."""
    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=2, join_timeout_ms=10_000)
    healthy, halfway = (Replica(name, lighthouse.address()) for name in ("healthy", "halfway"))
    with ThreadPoolExecutor(4) as pool:
        for rank in range(2):
            healthy.ask(pool, rank, 10)
        asked = {}
        for rank, step in order:
            asked[rank] = halfway.ask(pool, rank, step)
            time.sleep(1.0)
        found = [asked[rank].result().heal for rank in range(2)]
    for replica in (healthy, halfway):
        replica.server.shutdown()
    lighthouse.shutdown()
    return found


unhealed_last, healed_last = heals([(0, 10), (1, 0)]), heals([(1, 0), (0, 10)])
print("rank 1 has not healed and asks last: told to heal:", unhealed_last)
print("rank 1 has not healed and asks first: told to heal:", healed_last)
assert unhealed_last == [True, True]
assert healed_last == [False, False]
EOF
"$folder/venv/bin/python" "$folder/finding.py"
echo "as described"
