"""Write the fuzzer's seeds: an honest frame of each kind, and of a manifest for each of many states.

    python tests/fuzz/make_corpus.py

Run it when the wire changes: ``tests/test_fuzz_corpus.py`` fails for seeds that are no longer accepted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import golden  # noqa: E402
import hostile  # noqa: E402
import states  # noqa: E402

from ft_transport._state.describe import describe  # noqa: E402
from ft_transport._wire.encode import encode_manifest  # noqa: E402
from ft_transport._wire.frames import Frame, ManifestHeader, encode_frame  # noqa: E402
from ft_transport._wire.layout import Limits  # noqa: E402

CORPUS = Path(__file__).resolve().parent / "corpus"
# A seed of many kilobytes is mutated in places that hardly matter.
MAX_SEED_BYTES = 4096


def frames() -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each seed."""
    headers = [
        ManifestHeader(7, Limits(), "xxh3"),
        ManifestHeader(None, Limits(64, 64, 0, 1, 1), ""),
        ManifestHeader(0, Limits(1 << 20, 4 << 20, 1 << 10, 8, 4), "sum", 3),
    ]
    with hostile.process_group() as mesh:
        made = {name: make(1) for name, make in states.STATES.items()}
        made |= {f"attacked_{name}": state for name, state in (hostile.STATES | hostile.distributed(mesh)).items()}
        for index, (name, state) in enumerate(made.items()):
            yield name, encode_manifest(describe(state)[0], headers[index % len(headers)])
    for kind in Frame:
        if kind is not Frame.MANIFEST:
            body = {Frame.DIGESTS: [1, 2], Frame.REFUSE: ["a", "b"], Frame.FAILED: ["\udcff"]}.get(kind, [])
            yield f"frame_{kind.name.lower()}", encode_frame(kind, body)
    for name, data in golden.lane_frames().items():
        yield f"lane_{name.lower()}", data


def main() -> None:
    """Write the seeds, and remove those of states that are no more."""
    warnings.simplefilter("ignore")
    CORPUS.mkdir(exist_ok=True)
    for old in CORPUS.glob("*.bin"):
        old.unlink()
    for name, data in frames():
        if len(data) <= MAX_SEED_BYTES:
            (CORPUS / f"{name}.bin").write_bytes(data)
    files = list(CORPUS.glob("*.bin"))
    print(f"wrote {len(files)} seeds, {sum(file.stat().st_size for file in files)} bytes, to {CORPUS}")


if __name__ == "__main__":
    main()
