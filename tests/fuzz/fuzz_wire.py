"""Coverage-guided fuzzing of everything that reads bytes from a peer: ``make fuzz``.

    python tests/fuzz/fuzz_wire.py [--seconds 600] [options of libFuzzer]

The way is that of a receive: frame, manifest, layout, template, landing, rebuild; or that of a frame of lanes, for what
begins like one (``tests/hostile.py``). A refusal is the only exception that may come of it. Inputs that bring another
one, take more than ten seconds or more than 2 GiB are written to ``fuzz-output/found``; a name of such a file as the
last argument runs it alone. One that was a hole belongs, once it is closed, into ``tests/fuzz/found``, where
``tests/test_fuzz_corpus.py`` replays it ever after.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import atheris
import msgpack
import torch
import torchft  # noqa: F401  (before the instrumentation, which is for ours alone)

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent.parent / "fuzz-output"
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

with atheris.instrument_imports(include=["ft_transport"]):
    import hostile

    from ft_transport._lanes import protocol as lanes

HEADER_BYTES = 8
LANES = lanes.MAGIC
INTERESTING: list[Any] = [
    None, True, False, -1, 0, 1, 2, 63, 64, 65, 1 << 31, 1 << 32, 1 << 61, 1 << 62, (1 << 63) - 1, 1 << 63,
    (1 << 64) - 1, -(1 << 63), 0.5, "", "a", b"", b"\0\xff", [], [0], [0, 0, 0], [None], ["tensor", 0, None, []],
    ["()"], ["[]"], ["()", 0, 1], ["object", b""], ["range", 0, 1 << 62], ["int", b"\x01" * 9],
    ["class", "builtins.int"],
]  # fmt: skip


def places(data: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Where in the nested lists something is, below the root."""
    found = [path] if path else []
    if isinstance(data, list):
        for index, child in enumerate(data):
            found += places(child, (*path, index))
    return found


def at(data: Any, path: tuple[int, ...]) -> Any:
    for index in path:
        data = data[index]
    return data


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change bytes, or the msgpack value that they are: numbers, and parts put elsewhere, dropped or doubled."""
    chance = random.Random(seed)
    if chance.random() < 0.4:
        return bytes(atheris.Mutate(data, max_size))
    behind = lanes.HEADER_BYTES if data.startswith(LANES) else HEADER_BYTES
    try:
        body = msgpack.unpackb(data[behind:], strict_map_key=False, unicode_errors="surrogatepass")
        for _ in range(chance.randint(1, 3)):
            change(body, chance)
        packed = msgpack.packb(body, unicode_errors="surrogatepass")
    except Exception:
        return bytes(atheris.Mutate(data, max_size))
    return (data[:behind] + packed)[:max_size]


def change(body: Any, chance: random.Random) -> None:
    paths = places(body)
    *parent_path, index = chance.choice(paths)
    parent = at(body, tuple(parent_path))
    match chance.randint(0, 4):
        case 0:
            parent[index] = chance.choice(INTERESTING)
        case 1 if type(parent[index]) is int:
            parent[index] += chance.choice([-1, 1, 64, -64, parent[index], 1 << 32])
        case 1 if type(parent[index]) is bytes and parent[index]:  # a column
            column = bytearray(parent[index])
            column[chance.randrange(len(column))] = chance.choice([0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF])
            parent[index] = bytes(column)
        case 2:
            del parent[index]
        case 3:
            parent.insert(index, parent[index])
        case _:
            parent[index] = at(body, chance.choice(paths))


def run(data: bytes) -> None:
    """One input, for a receiver without a template and for one with."""
    if data.startswith(LANES):
        hostile.hear(data)
        return
    hostile.receive(data)
    hostile.receive(data, TEMPLATE)


TEMPLATE = {**hostile.STATES, "w": torch.zeros(2, 3), "user": {"default": {"w": torch.zeros(2, 3)}}}


def main() -> None:
    """Fuzz until the time is over, or something is found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600, help="how long (default: %(default)s)")
    args, rest = parser.parse_known_args()
    (OUTPUT / "found").mkdir(parents=True, exist_ok=True)
    (OUTPUT / "corpus").mkdir(exist_ok=True)
    warnings.simplefilter("ignore")
    torch.serialization.add_safe_globals(hostile.ALLOWED)
    options = [
        f"-max_total_time={args.seconds}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=8192",
        "-print_final_stats=1",
        f"-dict={HERE / 'tokens.dict'}",
        f"-artifact_prefix={OUTPUT / 'found'}/",
    ]
    is_file = any(Path(arg).is_file() for arg in rest)
    folders = [] if is_file else [str(OUTPUT / "corpus"), str(HERE / "corpus")]
    with hostile.process_group():
        atheris.Setup([sys.argv[0], *options, *rest, *folders], run, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
