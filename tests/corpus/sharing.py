"""Ties, and views of one storage."""

from __future__ import annotations

from typing import Any

import torch
from helpers import noise

from corpus.case import Table

__all__ = ["CASES"]

CASES = Table("sharing")


@CASES.case()
def one_tensor_twice(seed: int) -> Any:
    tensor = noise((3, 4), seed)
    return {"a": tensor, "b": tensor, "deep": {"c": [tensor, noise(1, seed + 1)]}}


@CASES.case()
def one_parameter_twice(seed: int) -> Any:
    weight = torch.nn.Parameter(noise((6, 3), seed))
    return {"embedding": weight, "head": weight}


@CASES.case()
def two_tensors_of_one_storage(seed: int) -> Any:
    weight = noise((6, 3), seed)
    return {"a": weight, "b": weight.detach(), "c": weight.view(18), "d": weight.t()}


@CASES.case()
def parameter_and_view(seed: int) -> Any:
    weight = torch.nn.Parameter(noise((6, 3), seed))
    return {"weight": weight, "transposed": weight.detach().t(), "again": torch.nn.Parameter(weight.detach())}


@CASES.case()
def a_hundred_ties(seed: int) -> Any:
    tensor = noise((100, 10), seed)
    return {f"layer {i}": tensor if i % 2 else tensor.view(-1) for i in range(100)}


@CASES.case()
def rows_of_one(seed: int) -> Any:
    return list(noise((16, 32), seed).unbind(0))


@CASES.case()
def rows_and_their_base(seed: int) -> Any:
    base = noise((16, 32), seed)
    return {"rows": list(base.unbind(0)), "base": base}


@CASES.case()
def columns_of_one(seed: int) -> Any:
    return list(noise((16, 8), seed).unbind(1))


@CASES.case()
def some_columns_of_one(seed: int) -> Any:
    base = noise((6, 8), seed)
    return {"a": base[:, :3], "b": base[:, :3], "c": base[:, 4:6]}


@CASES.case()
def far_columns_of_one(seed: int) -> Any:
    base = noise((200, 100), seed)
    return {"a": base[:, 3:5], "b": base[:, 60]}


@CASES.case()
def overlapping_columns(seed: int) -> Any:
    base = noise((200, 100), seed)
    return {"a": base[:, 3:9], "b": base[:, 7:12]}


@CASES.case()
def column_and_row(seed: int) -> Any:
    base = noise((200, 100), seed)
    return {"column": base[:, 40], "row": base[90]}


@CASES.case()
def far_rows_of_one(seed: int) -> Any:
    base = noise((5000, 33), seed, torch.int16)
    return {"first": base[3], "last": base[4100], "middle": base[1700:1720], "beside": base[1720]}


@CASES.case(torch_keeps=False)
def overlapping_rows(seed: int) -> Any:
    base = noise(64, seed)
    return {"whole": base, "front": base[:40], "back": base[20:], "integers": base.view(torch.int32)[8:16]}


@CASES.case()
def chain_of_overlaps(seed: int) -> Any:
    base = noise(100, seed, torch.uint8)
    return {f"{i}": base[i : i + 15] for i in range(0, 80, 10)}


@CASES.case()
def interleaved(seed: int) -> Any:
    base = noise(40, seed)
    return {"even": base[::2], "odd": base[1::2]}


@CASES.case()
def every_third_of_two(seed: int) -> Any:
    base = noise(3000, seed)
    return {"first": base[::3], "second": base[1::3]}


@CASES.case()
def quarters(seed: int) -> Any:
    base = noise((8, 8), seed)
    return [base[:4, :4], base[:4, 4:], base[4:, :4], base[4:, 4:]]


@CASES.case()
def diagonal_and_rest(seed: int) -> Any:
    base = noise((30, 30), seed)
    return {"diagonal": base.diagonal(), "row": base[7, :5]}


@CASES.case(torch_keeps=False)
def other_dtypes_of_one(seed: int) -> Any:
    base = noise(1024, seed, torch.uint8)
    return {"head": base[:8], "bytes": base[501:541], "floats": base[504:536].view(torch.float64), "tail": base[1003:]}


@CASES.case()
def flat_optimizer_buffer(seed: int) -> Any:
    flat = noise(3 * 5 + 7 + 4 * 4, seed)
    params = [flat[:15].view(3, 5), flat[15:22], flat[22:].view(4, 4)]
    return {"flat": flat, "params": [torch.nn.Parameter(param) for param in params]}


@CASES.case()
def pieces_of_a_flat_buffer(seed: int) -> Any:
    # The buffer itself is not in the state; the pieces lie one behind the other.
    flat = noise(38, seed)
    return {"a": flat[:15].view(3, 5), "b": flat[15:22], "c": flat[22:].view(4, 4)}


@CASES.case()
def padded_pieces(seed: int) -> Any:
    flat = noise(4096, seed)
    return {"a": flat[:15], "b": flat[128:150], "c": flat[4000:]}


@CASES.case(either=True)
def an_expanded_view_and_its_base(seed: int) -> Any:
    base = noise((1, 6), seed)
    return {"row": base.expand(4, 6), "base": base, "apart": noise(2, seed + 1)}


@CASES.case()
def ties_across_kinds_of_container(seed: int) -> Any:
    tensor = noise((4, 4), seed)
    return [tensor, {"deep": (tensor, [tensor[1:3]])}, (tensor.t(),)]


@CASES.case()
def one_container_twice(seed: int) -> Any:
    inner = {"weight": noise(3, seed), "n": seed}
    items = [noise(2, seed + 1), 1]
    return {"a": inner, "b": inner, "c": items, "d": [items, {"e": items}]}


@CASES.case()
def equal_but_not_the_same(seed: int) -> Any:
    return {"a": [noise(3, seed)], "b": [noise(3, seed)], "c": {}, "d": {}, "e": [], "f": []}


@CASES.case()
def empty_views_of_one(seed: int) -> Any:
    base = noise((4, 4), seed)
    return {"none": base[2:2], "base": base, "nothing": base[:, :0]}


@CASES.case()
def sixteen_views_of_a_large_storage(seed: int) -> Any:
    base = noise((1 << 7, 1 << 6), seed)
    return {"views": [base.view(-1), base, base.t(), *base.split(1 << 3)]}


@CASES.case(either=True)
def conjugate_and_original(seed: int) -> Any:
    values = noise(6, seed, torch.complex64)
    return {"values": values, "conj": values.conj()}
