"""The training loop of one replica: torchft's Manager, its process group, and the chosen transport."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from datetime import timedelta

import torch
from charlm import Batches, CharLM, flatten_gradients, read_corpus, state_digest
from torch.distributed import TCPStore
from torch.utils._pytree import tree_leaves
from torchft import Manager, Optimizer, ProcessGroupGloo

from ft_transport import bind
from recovery.replica import Parent, Settings
from recovery.transports import MeasuredTransport, build_transport, tensor_addresses

__all__ = ["run"]

CONTEXT = 64  # characters
BATCH_SIZE = 4  # sequences
LEARNING_RATE = 1e-3
MAX_SEED = 2**31


class _Job:
    """All that a replica needs whichever one it is: a standby has it before it knows."""

    def __init__(self, settings: Settings) -> None:
        # Every process starts from weights of its own: equal states at the end can only have been sent.
        origin = settings.num_replicas if settings.replica is None else settings.replica
        torch.manual_seed((settings.seed * 1009 + origin * 101 + settings.incarnation) % MAX_SEED)
        self.corpus = read_corpus()
        self.model = CharLM(settings.width, context=CONTEXT)
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.bound = bind(model=self.model, optimizers=self.adam)
        self.gradients = flatten_gradients(self.model)

    def warm_up(self) -> None:
        """Do what is slow the first time: a forward and a backward, without a step, and the state's leaves."""
        nothing = torch.zeros(BATCH_SIZE, CONTEXT, dtype=torch.long)
        self.model(nothing, nothing).backward()
        self.adam.zero_grad(set_to_none=False)
        self.bound.state_dict()


class _Replica:
    """A job with a Manager: from here on, the others count on it."""

    def __init__(self, settings: Settings, parent: Parent, job: _Job) -> None:
        assert settings.replica is not None
        self.settings = settings
        self.parent = parent
        self.model, self.gradients, self.bound = job.model, job.gradients, job.bound
        self.batches = Batches(job.corpus, settings.replica, settings.num_replicas, settings.seed)
        self.transport, self.manager = self._build_manager()
        self.optimizer = Optimizer(self.manager, job.adam)
        self._addresses = tensor_addresses(self.bound.state_dict())

    def _build_manager(self) -> tuple[MeasuredTransport, Manager]:
        settings = self.settings
        timeout = timedelta(seconds=settings.timeout)
        # A heal that fails has to end before the others' allreduce times out: half the Manager's budget.
        pg = self._group = ProcessGroupGloo(timeout=timeout / 2)
        template = self.bound.state_dict if settings.in_place else None
        chosen = build_transport(settings.transport, pg, timeout / 2, template, self.parent)
        transport = MeasuredTransport(chosen, self.bound.state_dict, self.parent)
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        manager = Manager(
            pg=pg,
            load_state_dict=self.bound.load_state_dict,
            state_dict=self.bound.state_dict,
            min_replica_size=settings.min_replicas,
            timeout=timeout,
            quorum_timeout=timeout,
            connect_timeout=timeout,
            rank=0,
            world_size=1,
            store_addr="localhost",
            store_port=self._store.port,
            lighthouse_addr=settings.lighthouse,
            replica_id=f"replica_{settings.replica}",
            hostname="localhost",
            checkpoint_transport=transport,
        )
        return transport, manager

    def train(self) -> None:
        """Train until the step at which the parent wants all replicas to end."""
        while self.manager.current_step() < self.parent.finish_at:
            self._train_step()

    def _train_step(self) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=False)  # starts the quorum
        characters, targets = self.batches.at(self.manager.current_step(), BATCH_SIZE, CONTEXT)
        loss = self.model(characters, targets)
        loss.backward()
        # torchft's DistributedDataParallel raises out of backward() when a peer dies in a gloo allreduce.
        self.manager.allreduce(self.gradients).wait()
        participants = self.manager.num_participants()
        step = self.manager.current_step()
        # A replica that heals computes on weights that are just being replaced; torchft drops its gradient.
        trained = self.manager.is_participating()
        self.optimizer.step()
        if self.manager.current_step() == step:
            self.parent.emit("discarded", step=step, error=_first_line(self.manager.errored()))
            # Not left to the next quorum: a survivor that waits in the collective for this replica alone does not see
            # that another one has died, and the quorum waits for it to join, up to --join_timeout_ms.
            self._group.abort(errored=False)
            return
        self.parent.emit(
            "committed",
            step=step + 1,
            loss=loss.item() if trained else None,
            participants=participants,
            seconds=time.perf_counter() - start,
        )
        if self.transport.received:
            self._report_heal(step + 1)

    def _report_heal(self, step: int) -> None:
        before, self._addresses = self._addresses, tensor_addresses(self.bound.state_dict())
        self.transport.received = False
        self.parent.emit("healed", step=step, same_addresses=self._addresses == before)

    def report_final_state(self) -> None:
        """Send the digest of all weights, optimizer states and the step count."""
        state = {**self.bound.state_dict(), "step": self.manager.current_step()}
        leaves = tree_leaves(state)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.parent.emit(
            "finished",
            step=self.manager.current_step(),
            digest=state_digest(state),
            num_tensors=len(tensors),
            num_values=len(leaves) - len(tensors),
            nbytes=sum(tensor.nbytes for tensor in tensors),
        )


def _first_line(error: object) -> str:
    """An error's first line without gloo's place in its source, which comes first in brackets."""
    return re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0]) if error is not None else ""


def run(settings: Settings, parent: Parent) -> None:
    """Train as one replica, as a standby once it has become one, until the parent says that it is enough."""
    parent.emit("imported")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    torch.set_num_threads(1)
    job = _Job(settings)
    if settings.replica is None:
        job.warm_up()
        parent.emit("waiting")
        role = parent.wait_to_become()
        if role is None:
            return
        settings = dataclasses.replace(settings, replica=role[0], incarnation=role[1])
    replica = _Replica(settings, parent, job)
    parent.emit("ready", num_parameters=sum(parameter.numel() for parameter in replica.model.parameters()))
    parent.wait_for("go")
    replica.train()
    replica.report_final_state()
    # The Manager stays until all have finished: a replica that vanishes would disturb the others' last step.
    parent.wait_for("exit")
    replica.manager.shutdown(wait=False)
