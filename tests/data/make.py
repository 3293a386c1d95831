"""Write the golden files anew: ``python tests/data/make.py``. Only when the wire changes on purpose.

Files that are still as they were are left alone, and what changed is listed. Of an older version one is kept, to see
that it is refused by name: ``v1_manifest_small.bin``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import golden  # noqa: E402
import hostile  # noqa: E402


def main() -> None:
    """Write what differs."""
    warnings.simplefilter("ignore")
    with hostile.process_group() as mesh:
        for name, data in golden.frames(mesh).items():
            path = golden.DATA / name
            before = path.read_bytes() if path.exists() else None
            if before != data:
                path.write_bytes(data)
                print(f"{'new' if before is None else 'changed'}: {name}, {len(data)} bytes")


if __name__ == "__main__":
    main()
