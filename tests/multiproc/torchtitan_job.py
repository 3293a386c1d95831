"""A replica trained with torchtitan 0.3's parts, as far as they run on the CPU: started by test_torchtitan.py.

Its Manager, optimizers, schedulers and checkpointer are torchtitan's, put together and called as in its
``FaultTolerantTrainer``, which itself needs an accelerator, as do its models (they import triton). The first two
classes are what ``docs/torchtitan.md`` tells to write; ``--own`` leaves them out.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torchft
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.experiments.torchft.checkpoint import TorchFTCheckpointManager
from torchtitan.experiments.torchft.config import FaultTolerance
from torchtitan.experiments.torchft.manager import TorchFTManager
from torchtitan.experiments.torchft.optimizer import TorchFTOptimizersContainer

import ft_transport

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from charlm import Batches, CharLM, read_corpus


class LaneManager(TorchFTManager):
    """torchtitan's, with a transport of ours: there is no option for it."""

    @dataclass(kw_only=True, slots=True)
    class Config(FaultTolerance):
        pass

    def __init__(self, config: Config) -> None:
        device = torch.device("cpu")  # or torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        transport = ft_transport.LaneTransport(timedelta(seconds=30), device, state_dict="manager")
        with patch.object(torchft, "Manager", functools.partial(torchft.Manager, checkpoint_transport=transport)):
            super().__init__(config)


class BoundCheckpointManager(TorchFTCheckpointManager):
    """torchtitan's, but what replicas send each other is the state as it is, read without the modules' hooks."""

    @dataclass(kw_only=True, slots=True)
    class Config(TorchFTCheckpointManager.Config):
        pass

    def __init__(self, config: Config, *, states: dict[str, Any], ft_manager: TorchFTManager, **parts: Any) -> None:
        bound = ft_transport.bind(
            model=parts["model_parts"],
            optimizers=list(parts["optimizers"]),
            schedulers=parts["lr_schedulers"],
            extra=dict(states),
        )
        if ft_manager.enabled:
            ft_manager.manager.set_state_dict_fns = lambda load, save: None  # what torchtitan registers
            ft_manager.manager.register_state_dict_fn("job", bound.load_state_dict, bound.state_dict)
        super().__init__(config, states=states, ft_manager=ft_manager, **parts)


class Job:
    """What of ``FaultTolerantTrainer`` is needed here, in its order."""

    def __init__(self, own: bool) -> None:
        replica, rank, num_ranks = int(os.environ["REPLICA_GROUP_ID"]), dist.get_rank(), dist.get_world_size()
        settings: dict[str, Any] = {"enable": True, "replica_id": replica, "group_size": 2}
        self.ft_manager = (TorchFTManager.Config if own else LaneManager.Config)(**settings).build()
        self.model = CharLM(64)
        for block in self.model.blocks.layers:
            fully_shard(block)
        fully_shard(self.model)
        self.ft_manager.maybe_set_all_reduce_hook([self.model])
        groups = default_adamw(lr=1e-3).param_groups
        self.optimizers = TorchFTOptimizersContainer.Config(param_groups=groups, implementation="foreach").build(
            model_parts=[self.model], ft_manager=self.ft_manager
        )
        self.lr_schedulers = LRSchedulersContainer.Config(warmup_steps=1000).build(
            optimizers=self.optimizers, training_steps=100_000
        )
        self.step = 0
        self.checkpointer = (
            (TorchFTCheckpointManager if own else BoundCheckpointManager)
            .Config(enable=True, enable_ft_dataloader_checkpoints=False, folder="checkpoints")
            .build(
                dataloader=None,
                model_parts=[self.model],
                optimizers=self.optimizers,
                lr_schedulers=self.lr_schedulers,
                states={"train_state": self},
                sd_adapter=None,
                ft_manager=self.ft_manager,
            )
        )
        self.batches = Batches(read_corpus(), *reversed(self.ft_manager.get_dp_info(num_ranks, rank)))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def train_step(self) -> float:
        self.optimizers.zero_grad()
        loss = self.model(*self.batches.at(self.step, 8, 64))
        loss.backward()
        self.optimizers.step()
        self.lr_schedulers.step()
        return loss.item()

    def train(self) -> None:
        manager = self.ft_manager.manager
        while True:
            before = manager.current_step()
            self.step += 1
            loss = self.train_step()
            # Not where the step was not committed: torchtitan has gone on in its schedules then, all the same.
            if (step := manager.current_step()) % 10 == 0 and step > before:
                state = [self.model.state_dict(), [each.state_dict() for each in self.optimizers]]
                digest, alive = ft_transport.state_digest(state).whole[:12], manager.num_participants()
                rank = dist.get_rank()
                print(f"rank {rank} step {step} loss {loss:.3f} replicas {alive} state {digest}", flush=True)


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("ft_transport").setLevel(logging.INFO)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    Job(own="--own" in sys.argv).train()


if __name__ == "__main__":
    main()
