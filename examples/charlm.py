"""A character-level language model on text that every machine has: the Python standard library's sources.

Shared by the examples. Characters are bytes, so there are 256 of them and no tokenizer.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

__all__ = [
    "Batches",
    "CharLM",
    "flatten_gradients",
    "read_corpus",
    "state_digest",
]

NUM_CHARACTERS = 256
HEAD_WIDTH = 64


class CharLM(nn.Module):
    """A small GPT: embeddings, causal transformer blocks, one logit for each possible next byte.

    Args:
        width: Features of each position; a multiple of 64, the width of one attention head.
        num_layers: Transformer blocks.
        context: Longest sequence, in characters.
    """

    mask: torch.Tensor

    def __init__(self, width: int, num_layers: int = 4, context: int = 64) -> None:
        super().__init__()
        if width < HEAD_WIDTH or width % HEAD_WIDTH:
            raise ValueError(f"width: expected a multiple of {HEAD_WIDTH}, got {width}")
        block = nn.TransformerEncoderLayer(
            width, width // HEAD_WIDTH, 4 * width, 0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.characters = nn.Embedding(NUM_CHARACTERS, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.TransformerEncoder(block, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, NUM_CHARACTERS, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, characters: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats; both arguments are int64 of shape (batch, context)."""
        length = characters.shape[1]
        embedded = self.characters(characters) + self.positions.weight[:length]
        features = self.blocks(embedded, mask=self.mask[:length, :length], is_causal=True)
        return nn.functional.cross_entropy(self.head(features).flatten(0, 1), targets.flatten())


def _sources() -> Iterator[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    yield from sorted(folder.glob("*.py"))
    yield from sorted(folder.glob("*/*.py"))


def read_corpus(max_bytes: int = 4_000_000) -> torch.Tensor:
    """The standard library's sources, one after the other, as uint8; at most ``max_bytes``."""
    corpus = bytearray()
    for path in _sources():
        corpus += path.read_bytes()
        if len(corpus) >= max_bytes:
            break
    if not corpus:
        raise FileNotFoundError(f"no Python sources in {sysconfig.get_path('stdlib')}")
    return torch.frombuffer(corpus[:max_bytes], dtype=torch.uint8)


class Batches:
    """One replica's own share of the corpus, cut into random sequences.

    A step's batch depends on the seed, the replica and the step alone: a replica that was killed goes on
    with the batches that it would have had.
    """

    def __init__(self, corpus: torch.Tensor, replica: int, num_replicas: int, seed: int = 0) -> None:
        self._share = corpus.chunk(num_replicas)[replica]
        self._seed = seed * num_replicas + replica

    def at(self, step: int, batch_size: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Characters and, one further on, targets: int64 of shape (batch_size, context)."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        begins = torch.randint(len(self._share) - context, (batch_size, 1), generator=generator)
        sequences = self._share[begins + torch.arange(context + 1)].long()
        return sequences[:, :-1], sequences[:, 1:]


def flatten_gradients(model: nn.Module) -> torch.Tensor:
    """Make every gradient a view of one vector and return it: one allreduce then averages them all.

    The gradients have to stay: clear them with ``zero_grad(set_to_none=False)``.
    """
    parameters = list(model.parameters())
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters))
    views = flat.split([parameter.numel() for parameter in parameters])
    for parameter, view in zip(parameters, views, strict=True):
        parameter.grad = view.view_as(parameter)
    return flat


def state_digest(state_dict: object) -> str:
    """SHA-256 of every leaf with its path: bytes, dtype and shape of tensors, ``repr`` of all else."""
    leaves, _ = tree_flatten_with_path(state_dict)
    digest = hashlib.sha256()
    for path, leaf in sorted(((keystr(path), leaf) for path, leaf in leaves), key=lambda pair: pair[0]):
        digest.update(path.encode())
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
