"""What training loops hold: models, optimizers, schedulers, scalers, loaders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import noise
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import lr_scheduler

from corpus.case import Table

__all__ = ["CASES"]

CASES = Table("real")


def _filled(model: nn.Module, seed: int) -> nn.Module:
    """The model with numbers that another seed changes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.1)
    return model


def _mlp(seed: int) -> nn.Module:
    return _filled(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), seed)


def _train(model: nn.Module, optimizer: optim.Optimizer, inputs: torch.Tensor, steps: int = 2) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss.item()

    for _ in range(steps):
        optimizer.step(closure)


# ---------------------------------------------------------------------------------------- optimizers


_OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "Adam with a tensor as learning rate": lambda p: optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "AdamW": lambda p: optim.AdamW(p, amsgrad=True),
    "AdamW fused": lambda p: optim.AdamW(p, fused=True),
    "AdamW foreach": lambda p: optim.AdamW(p, foreach=True),
    "AdamW maximizing": lambda p: optim.AdamW(p, maximize=True),
    "Adafactor": lambda p: optim.Adafactor(p),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.01, max_iter=2, history_size=3, tolerance_grad=0, tolerance_change=0),
    "ASGD": lambda p: optim.ASGD(p),
    "Adadelta": lambda p: optim.Adadelta(p),
    "Adagrad": lambda p: optim.Adagrad(p),
    "Adamax": lambda p: optim.Adamax(p),
    "NAdam": lambda p: optim.NAdam(p),
    "RAdam": lambda p: optim.RAdam(p),
    "RMSprop": lambda p: optim.RMSprop(p, centered=True, momentum=0.9),
    "Rprop": lambda p: optim.Rprop(p),
}


def _optimized(make: Callable[[Any], optim.Optimizer], seed: int) -> Any:
    model = _mlp(seed)
    optimizer = make(model.parameters())
    _train(model, optimizer, noise((5, 6), 3, torch.int8).float())
    return {"model": model.state_dict(), "optim": optimizer.state_dict()}


for _name, _make in _OPTIMIZERS.items():
    CASES.add(_name, functools.partial(_optimized, _make))


@CASES.case()
def muon(seed: int) -> Any:
    if not hasattr(optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = _filled(nn.Linear(6, 4, bias=False), seed)
    optimizer = optim.Muon(model.parameters())
    _train(model, optimizer, noise((5, 6), 3, torch.int8).float())
    return {"model": model.state_dict(), "optim": optimizer.state_dict()}


@CASES.case()
def sparse_adam(seed: int) -> Any:
    model = _filled(nn.Embedding(10, 4, sparse=True), seed)
    optimizer = optim.SparseAdam(list(model.parameters()))
    _train(model, optimizer, torch.tensor([1, 5]))
    return {"model": model.state_dict(), "optim": optimizer.state_dict()}


@CASES.case()
def several_groups_of_parameters(seed: int) -> Any:
    model = _mlp(seed)
    weights, biases = ([p for p in model.parameters() if p.dim() == dim] for dim in (2, 1))
    optimizer = optim.AdamW(
        [{"params": weights, "name": "weights"}, {"params": biases, "weight_decay": 0.0, "lr": 0.5}]
    )
    _train(model, optimizer, noise((5, 6), 3, torch.int8).float())
    return optimizer.state_dict()


@CASES.case()
def optimizer_before_its_first_step(seed: int) -> Any:
    model = _mlp(seed)
    return {"model": model.state_dict(), "optim": optim.AdamW(model.parameters(), lr=seed).state_dict()}


# ---------------------------------------------------------------------------------------- schedulers


_SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, T_max=10)], milestones=[2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, swa_lr=0.05),
}


class Warmup:
    """A schedule with a state, as LambdaLR keeps it."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, step / self.steps)


_SCHEDULERS["LambdaLR of an object"] = lambda o: lr_scheduler.LambdaLR(o, Warmup(3))


def _scheduled(make: Callable[[Any], Any], seed: int) -> Any:
    optimizer = optim.SGD([nn.Parameter(noise(3, seed))], lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    for step in range(2 + seed):
        optimizer.step()
        arguments = (0.5 + step,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
        scheduler.step(*arguments)
    if callable(scheduler.state_dict().get("anneal_func")):
        pytest.skip("an older torch's SWALR has a function in its state, which pickles as a call of getattr")
    return {"scheduler": scheduler.state_dict(), "optim": optimizer.state_dict()}


for _name, _make in _SCHEDULERS.items():
    CASES.add(_name, functools.partial(_scheduled, _make))


@CASES.case()
def grad_scaler(seed: int) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (seed + 10))
    model = _mlp(seed)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(model(torch.ones(2, 6)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    return {"scaler": scaler.state_dict(), "n": seed}


# -------------------------------------------------------------------------------------------- models


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)),
    "LSTM": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "embedding bag": lambda: nn.EmbeddingBag(10, 4),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    "averaged model": lambda: optim.swa_utils.AveragedModel(nn.Linear(4, 3)),
    "bfloat16 channels last": lambda: nn.Conv2d(3, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last),
}


for _name, _model in _MODELS.items():
    CASES.add(_name, lambda seed, make=_model: _filled(make(), seed).state_dict())


class TiedLanguageModel(nn.Module):
    """A model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight


@CASES.case()
def tied_language_model(seed: int) -> Any:
    model = _filled(TiedLanguageModel(), seed)
    return {"state": model.state_dict(), "parameters": dict(model.named_parameters(remove_duplicate=False))}


@CASES.case()
def parameters_themselves(seed: int) -> Any:
    return dict(_mlp(seed).named_parameters())


@CASES.case()
def model_on_meta(seed: int) -> Any:
    with torch.device("meta"):
        model = nn.Linear(1000, 1000)
    return {"meta": model.state_dict(), "n": noise(1, seed)}


@CASES.case(allow=[nn.Linear, nn.Sequential, nn.ReLU, set])
def modules_as_values(seed: int) -> Any:
    model = _mlp(seed)
    return {"model": model, "state": model.state_dict()}


@CASES.case()
def quantized_model(seed: int) -> Any:
    weight = torch.quantize_per_channel(
        torch.rand((4, 6), generator=torch.Generator().manual_seed(seed)),
        torch.full((4,), 0.01),
        torch.zeros(4, dtype=torch.int64),
        0,
        torch.qint8,
    )
    return {"layer.weight": weight, "layer.bias": noise(4, seed), "layer.scale": torch.tensor(0.1 * seed)}


# --------------------------------------------------------------------------------------- distributed


@CASES.case()
def get_state_dict_of_torch(seed: int) -> Any:
    model = _mlp(seed)
    optimizer = optim.AdamW(model.parameters())
    _train(model, optimizer, torch.ones(2, 6))
    return get_state_dict(model, optimizer)


@CASES.case()
def get_state_dict_flattened(seed: int) -> Any:
    model = _mlp(seed)
    optimizer = optim.AdamW(model.parameters())
    _train(model, optimizer, torch.ones(2, 6))
    return get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))


def _fully_sharded(seed: int, **options: Any) -> tuple[nn.Module, optim.Optimizer]:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    on = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=on, **options)
    fully_shard(model, mesh=on, **options)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.to_local().copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed + i)))
    optimizer = optim.AdamW(model.parameters())
    _train(model, optimizer, torch.ones(2, 6))
    return model, optimizer


@CASES.case()
def fully_shard_by_get_state_dict(seed: int) -> Any:
    return get_state_dict(*_fully_sharded(seed))


@CASES.case()
def fully_shard_as_it_is(seed: int) -> Any:
    model, optimizer = _fully_sharded(seed)
    return {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": seed}


@CASES.case()
def fully_shard_of_mixed_precision(seed: int) -> Any:
    model, optimizer = _fully_sharded(seed, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return {"parameters": dict(model.named_parameters()), "optim": optimizer.state_dict()}


# ------------------------------------------------------------------------------------------- loaders


def _loader(seed: int, **options: Any) -> Any:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    generator = torch.Generator().manual_seed(seed)
    loader = loaders.StatefulDataLoader(list(range(40)), batch_size=4, generator=generator, **options)
    rest = iter(loader)
    for _ in range(2 + seed):
        next(rest)
    return {"loader": loader.state_dict(), "step": seed, "w": noise(3, seed)}


CASES.add("StatefulDataLoader", functools.partial(_loader))
CASES.add("StatefulDataLoader shuffled", functools.partial(_loader, shuffle=True))


@CASES.case()
def random_states_of_a_trainer(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return {
        "torch": generator.get_state(),
        "numpy": np.random.RandomState(seed).get_state(),
        "generator": np.random.default_rng(seed).bit_generator.state,
        "sampler": {"epoch": seed, "order": torch.randperm(20, generator=generator), "seen": 3},
    }


@CASES.case()
def everything_a_trainer_holds(seed: int) -> Any:
    model = _filled(TiedLanguageModel(), seed)
    decoder = _mlp(seed + 1)
    optimizer = optim.AdamW(decoder.parameters(), lr=0.1)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for _ in range(2):
        _train(decoder, optimizer, torch.ones(2, 6), steps=1)
        scheduler.step()
    return {
        "model": {"language": model.state_dict(), "decoder": decoder.state_dict()},
        "optim": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "random": torch.Generator().manual_seed(seed).get_state(),
        "progress": {"step": seed, "epoch": 1, "best": float("inf"), "names": ["a", "b"], "resume": None},
    }
