"""Streaming DiLoCo that outlives its replicas: each trains on its own, and they average one fragment after the other.

    export RUST_LOG=warn NUM_REPLICA_GROUPS=2 TORCHFT_LIGHTHOUSE=http://host:29510
    torchft_lighthouse --min_replicas 1 --heartbeat_timeout_ms 1000 --bind 0.0.0.0:29510
    REPLICA_GROUP_ID=0 python examples/train_diloco.py
    REPLICA_GROUP_ID=1 python examples/train_diloco.py

Kill one with ``kill -9`` and start it again: it heals from the other, in the middle of a fragment's round. ``torchrun
--nproc_per_node=1`` works in place of ``python``.

Between two syncs the replicas' weights differ, as they should. What they share are the fragments: the parameters at the
last sync (torchft's "originals") and the outer optimizers. At equal steps all replicas print the same digest of those.
A step is a sync here, of one fragment.
"""

import logging
import os
from datetime import timedelta

import torch
from charlm import Batches, CharLM, read_corpus
from torch.distributed import TCPStore, is_torchelastic_launched
from torchft import Manager, ProcessGroupGloo
from torchft.local_sgd import DiLoCo

import ft_transport

REPLICA = int(os.environ.get("REPLICA_GROUP_ID", "0"))
NUM_REPLICAS = int(os.environ.get("NUM_REPLICA_GROUPS", "2"))
NUM_STEPS = int(os.environ.get("NUM_STEPS", "1000"))
WIDTH = int(os.environ.get("WIDTH", "256"))
BATCH_SIZE, CONTEXT = 8, 64  # sequences, characters
SYNC_EVERY = 16  # inner steps until each of the fragments has been averaged once
SYNC_DELAY = 1  # inner steps that hide a fragment's averaging
TIMEOUT = timedelta(seconds=30)


def host_store() -> TCPStore | None:
    """Each replica has a store of its own. torchrun brings one; otherwise this process hosts it."""
    if is_torchelastic_launched():
        return None
    host, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "0"))
    store = TCPStore(host, port, is_master=True, wait_for_workers=False)
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(store.port), RANK="0", WORLD_SIZE="1")
    return store


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("ft_transport").setLevel(logging.INFO)  # one line for each transfer, and every 5 s
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    store = host_store()  # lives as long as the Manager

    model = CharLM(WIDTH, context=CONTEXT)
    layers = model.blocks.layers
    fragments = [
        torch.nn.ModuleList([model.characters, model.positions, *layers[:2]]),
        torch.nn.ModuleList([*layers[2:], model.blocks.norm, model.head]),
    ]
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    outer = [torch.optim.SGD(each.parameters(), lr=0.7, momentum=0.9, nesterov=True) for each in fragments]
    for each in outer:
        ft_transport.materialize(each)  # DiLoCo registers these itself; the inner one is materialized by bind
    batches = Batches(read_corpus(), REPLICA, NUM_REPLICAS)

    bound = ft_transport.bind(model=model, optimizers=inner)
    # All that is registered with the Manager is the template: DiLoCo adds its fragments to what bind gives.
    transport = ft_transport.LaneTransport(TIMEOUT / 2, torch.device("cpu"), state_dict="manager")
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT / 2),
        load_state_dict=bound.load_state_dict,
        state_dict=bound.state_dict,
        min_replica_size=1,
        use_async_quorum=False,  # DiLoCo asks for it
        timeout=TIMEOUT,
        replica_id=f"train_diloco_{REPLICA}",
        checkpoint_transport=transport,
    )

    synced = inner_step = 0
    with DiLoCo(manager, fragments, inner, outer, SYNC_EVERY, fragment_sync_delay=SYNC_DELAY):
        while manager.current_step() < NUM_STEPS:
            inner.zero_grad()
            loss = model(*batches.at(inner_step, BATCH_SIZE, CONTEXT))
            loss.backward()
            inner.step()  # within it, torchft begins and ends the syncs
            inner_step += 1
            if (step := manager.current_step()) > synced:
                found = transport.state_digest().by_path
                shared = {path: leaf for path, leaf in found.items() if path.startswith("StreamingDiLoCoFragment")}
                digest, alive = ft_transport.StateDigest.of(shared).whole[:12], manager.num_participants()
                print(f"step {step} loss {loss.item():.3f} replicas {alive} fragments {digest}", flush=True)
                synced = step
    manager.shutdown()
    del store


if __name__ == "__main__":
    main()
