"""Data-parallel training that outlives its replicas: one process per replica, on one machine or several.

    export RUST_LOG=warn NUM_REPLICA_GROUPS=2 TORCHFT_LIGHTHOUSE=http://host:29510
    torchft_lighthouse --min_replicas 1 --bind 0.0.0.0:29510        # on the host of that name
    REPLICA_GROUP_ID=0 python examples/train_ddp.py
    REPLICA_GROUP_ID=1 python examples/train_ddp.py

Kill one with ``kill -9`` and start it again: it heals from the other. ``torchrun --nproc_per_node=1`` works
in place of ``python``. At equal steps all replicas print the same digest of their weights and optimizer states.
"""

import logging
import os
from datetime import timedelta

import torch
from charlm import Batches, CharLM, flatten_gradients, read_corpus
from standby import until_needed
from torch.distributed import TCPStore, is_torchelastic_launched
from torchft import Manager, Optimizer, ProcessGroupGloo

import ft_transport

REPLICA = int(os.environ.get("REPLICA_GROUP_ID", "0"))
NUM_REPLICAS = int(os.environ.get("NUM_REPLICA_GROUPS", "2"))
NUM_STEPS = int(os.environ.get("NUM_STEPS", "1000"))
WIDTH = int(os.environ.get("WIDTH", "256"))
BATCH_SIZE, CONTEXT = 8, 64  # sequences, characters
REPORT_INTERVAL = 10  # steps
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
    model = CharLM(WIDTH, context=CONTEXT)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    bound = ft_transport.bind(model=model, optimizers=adam)
    gradients = flatten_gradients(model)
    batches = Batches(read_corpus(), REPLICA, NUM_REPLICAS)

    until_needed()  # nothing to wait for, unless standby.py has started this process as a standby
    store = host_store()  # lives as long as the Manager
    # The transport gets the function that the Manager gets, and less time than the Manager.
    pg = ProcessGroupGloo(timeout=TIMEOUT / 2)
    transport = ft_transport.PGTransport(pg, TIMEOUT / 2, torch.device("cpu"), state_dict=bound.state_dict)
    manager = Manager(
        pg=pg,
        load_state_dict=bound.load_state_dict,
        state_dict=bound.state_dict,
        min_replica_size=1,
        timeout=TIMEOUT,
        replica_id=f"train_ddp_{REPLICA}",
        checkpoint_transport=transport,
    )
    optimizer = Optimizer(manager, adam)

    while manager.current_step() < NUM_STEPS:
        optimizer.zero_grad(set_to_none=False)  # starts the quorum
        loss = model(*batches.at(manager.current_step(), BATCH_SIZE, CONTEXT))
        loss.backward()
        manager.allreduce(gradients).wait()
        optimizer.step()  # only if this step is to be committed
        step = manager.current_step()
        if step % REPORT_INTERVAL == 0:
            digest, alive = transport.state_digest().whole[:12], manager.num_participants()
            print(f"step {step} loss {loss.item():.3f} replicas {alive} state {digest}", flush=True)
    manager.shutdown()
    del store


if __name__ == "__main__":
    main()
