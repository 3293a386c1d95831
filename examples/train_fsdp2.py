"""Sharded training (FSDP2) that outlives its replicas: several processes per replica, each heals from its like.

    export RUST_LOG=warn NUM_REPLICA_GROUPS=2 TORCHFT_LIGHTHOUSE=http://host:29510 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchft_lighthouse --min_replicas 1 --heartbeat_timeout_ms 1000 --bind 0.0.0.0:29510
    REPLICA_GROUP_ID=0 torchrun --standalone --nproc_per_node=2 --max-restarts=100 examples/train_fsdp2.py
    REPLICA_GROUP_ID=1 torchrun --standalone --nproc_per_node=2 --max-restarts=100 examples/train_fsdp2.py

Kill any of the four with ``kill -9``: torchrun starts its replica again, and each rank fetches its shards from the
same rank of the other replica. At equal steps, equal ranks print the same digest. (Without that last variable, a
torchrun that restarts hands its ranks the addresses of those that are gone.)

Within a replica, FSDP2 shards over torch's own group. Across replicas each rank averages the gradients of its shards
through its Manager once backward is over: one message, and you see all of it. ``train_hsdp.py`` does that within
backward, layer by layer, which hides the communication behind it.
"""

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from charlm import Batches, CharLM, read_corpus
from torch.distributed.fsdp import fully_shard
from torchft import Manager, Optimizer, ProcessGroupGloo

import ft_transport

REPLICA = int(os.environ.get("REPLICA_GROUP_ID", "0"))
NUM_REPLICAS = int(os.environ.get("NUM_REPLICA_GROUPS", "2"))
NUM_STEPS = int(os.environ.get("NUM_STEPS", "1000"))
WIDTH = int(os.environ.get("WIDTH", "256"))
BATCH_SIZE, CONTEXT = 8, 64  # sequences, characters
REPORT_INTERVAL = 10  # steps
TIMEOUT = timedelta(seconds=30)


def average(gradients: list[Any], manager: Manager) -> None:
    """Make this rank's shards of the gradients the mean over the replicas."""
    shards = [gradient.to_local() for gradient in gradients]
    flat = torch.cat([shard.flatten() for shard in shards])
    manager.allreduce(flat).wait()
    averaged = flat.split([shard.numel() for shard in shards])
    torch._foreach_copy_(shards, [new.view_as(shard) for new, shard in zip(averaged, shards, strict=True)])


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("ft_transport").setLevel(logging.INFO)  # one line for each transfer, and every 5 s
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()

    model = CharLM(WIDTH, context=CONTEXT)
    for block in model.blocks.layers:
        fully_shard(block)
    fully_shard(model)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = Batches(read_corpus(), REPLICA * num_ranks + rank, NUM_REPLICAS * num_ranks)

    # Not model.state_dict(): FSDP2 reshards in it, and torchft calls it in another thread while forward runs.
    bound = ft_transport.bind(model=model, optimizers=adam)
    transport = ft_transport.LaneTransport(TIMEOUT / 2, torch.device("cpu"), state_dict=bound.state_dict)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT / 2),
        load_state_dict=bound.load_state_dict,
        state_dict=bound.state_dict,
        min_replica_size=1,
        timeout=TIMEOUT,
        replica_id=f"train_fsdp2_{REPLICA}",
        checkpoint_transport=transport,
    )
    optimizer = Optimizer(manager, adam)

    while manager.current_step() < NUM_STEPS:
        optimizer.zero_grad()  # starts the quorum
        loss = model(*batches.at(manager.current_step(), BATCH_SIZE, CONTEXT))
        loss.backward()
        average([parameter.grad for parameter in model.parameters()], manager)
        optimizer.step()  # only if this step is to be committed
        step = manager.current_step()
        # Where one rank has healed and another has not, torchft may take both for healed: then all of them start again.
        steps = torch.tensor([-step, step])
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        if steps.sum():
            raise SystemExit(f"rank {rank} is at step {step}, another one is not")
        if step % REPORT_INTERVAL == 0:
            digest, alive = transport.state_digest().whole[:12], manager.num_participants()
            print(f"rank {rank} step {step} loss {loss.item():.3f} replicas {alive} state {digest}", flush=True)
    manager.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
