"""What the golden files in ``tests/data/`` hold, as content and as the bytes that today's encoder makes of it.

They are what peers of this version of the wire send. ``tests/test_golden.py`` compares; ``python tests/data/make.py``
writes them anew, which is right only when the wire changes on purpose, with a new version.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import hostile
import states
import torch
from torch.distributed.device_mesh import DeviceMesh

from ft_transport._lanes import protocol as lanes
from ft_transport._state.describe import describe
from ft_transport._wire.digest import digest_bytes
from ft_transport._wire.encode import encode_manifest
from ft_transport._wire.frames import VERSION, Frame, ManifestHeader, encode_frame
from ft_transport._wire.layout import Limits

DATA = Path(__file__).parent / "data"
HEADER = ManifestHeader(11, Limits(1 << 20, 4 << 20, 1 << 10, 8, 4), "xxh3")

# The body of every frame that is no manifest.
BODIES: dict[Frame, tuple[Any, ...]] = {
    Frame.READY: ((1 << 64) - 1,),
    Frame.REFUSE: ("w: expected float32 (2,), source has float32 (3,)", "gr\u00fc\u00dfe \U0001f30d", "\udcff"),
    Frame.DIGESTS: (0, 1, 127, 128, 1 << 32, (1 << 64) - 1),
    Frame.DONE: (),
    Frame.FAILED: ("",),
}


# One body of each frame of a lane, as both sides make them; a message is not made by ``encode``.
LANE_BODIES: dict[lanes.LaneFrame, Any] = {
    lanes.LaneFrame.HELLO: [b"i" * 16, "host pid 1"],
    lanes.LaneFrame.WAIT: None,
    lanes.LaneFrame.MANIFEST: b"any bytes",
    lanes.LaneFrame.READY: ["ft-lanes://…", b"r" * 16],
    lanes.LaneFrame.REFUSE: ["a.b: expected float32 (3,), source has float32 (4,)", "another"],
    lanes.LaneFrame.ROUTE: [None, b"s" * 16, b"s" * 16],
    lanes.LaneFrame.PROGRESS: None,
    lanes.LaneFrame.REROUTE: [b"s" * 16, "the connection broke", False],
    lanes.LaneFrame.DONE: None,
    lanes.LaneFrame.BYE: None,
    lanes.LaneFrame.FAILED: ["why"],
    lanes.LaneFrame.ATTACH: [b"s" * 16],
    lanes.LaneFrame.WANT: [3],
    lanes.LaneFrame.CHECK: [(1 << 64) - 1],
    lanes.LaneFrame.SAME: None,
    lanes.LaneFrame.LOCATE: ["cma", b"t" * 16],
    lanes.LaneFrame.LOCATION: [b"l" * 16],
    lanes.LaneFrame.DIRECT: None,
    lanes.LaneFrame.PLACE: [b"p" * 8, b"q" * 8],
}


def small() -> Any:
    """One of everything that the bytes of a manifest depend on, without a process group. Must never change."""
    base = torch.zeros(64)
    ordered: OrderedDict[str, Any] = OrderedDict(weight=torch.nn.Parameter(base[:12].view(3, 4)), tied=base[4:8])
    ordered._metadata = {"version": 2}  # type: ignore[attr-defined]
    return {
        "model": ordered,
        "gaps": base.view(8, 8)[2:4, :3],
        "empty": torch.empty(0, dtype=torch.int8),
        "scalar": torch.tensor(1, dtype=torch.bfloat16),
        7: [None, True, -1, 1 << 64, 0.5, "text", b"bytes", 1j, (1, 2), {3}, slice(1), range(2), torch.int8, ...],
    }


# The kinds of leaf and node beside plain ones.
KINDS = [
    "objects", "sparse", "nested", "jagged", "quantized", "numpy", "tensors in objects", "nodes", "shared",
    "attributes", "without bytes",
]  # fmt: skip
# A value of a class is pickled, and its bytes may differ from one torch or Python to the next: read, but not compared.
NOT_COMPARED = {"objects", "tensors in objects", "shared", "attributes"}
# What torch notes in the tensors inside of a jagged one is such a value, and an older one notes less.
if "_has_dynamo_dim_marking" not in vars(hostile.make_states()["jagged"]._max_seqlen_tensor):
    NOT_COMPARED.add("jagged")


# Those of the oldest torch that is supported; ``every_dtype`` would have more from one torch to the next.
DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "complex64", "complex128", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool",
]  # fmt: skip
STATES = ["containers", "tied", "overlapping_views", "rows_and_columns", "zero_dim", "empty", "expanded", "parameters"]
# Their bytes depend on the order of a set, or are a pickle.
WITHOUT = ("set", "frozenset", "counter", "config")


def manifests(mesh: DeviceMesh) -> dict[str, Any]:
    """The states whose manifests are golden, by name: together they hold everything that can be in one."""
    return {
        "small": small(),
        "everything": {
            **{name: states.STATES[name](1) for name in STATES},
            "dtypes": [torch.zeros(3, dtype=getattr(torch, name)) for name in DTYPES],
            "values": {name: value for name, value in states.VALUES.items() if name not in WITHOUT},
        },
        # Made anew: torch notes what it has found out about a jagged tensor in it, where it travels.
        **{name: state for name, state in hostile.make_states().items() if name in KINDS},
        **hostile.distributed(mesh),
    }


def encode(state: Any) -> bytes:
    """The MANIFEST frame of a state."""
    return encode_manifest(describe(state)[0], HEADER)


def lane_frames() -> dict[str, bytes]:
    """Every frame of a lane by name."""
    found = {frame.name: lanes.encode(frame, 3, 1 << 40, 17, body) for frame, body in LANE_BODIES.items()}
    header = lanes.encode_header(lanes.LaneHeader(lanes.LaneFrame.MESSAGE, 3, 1 << 40, 17, 5))
    return {**found, "MESSAGE": header + b"bytes" + lanes.TRAILER.pack(digest_bytes(b"bytes"))}


def lane_frames_file() -> Path:
    """The golden file of the lanes' frames: a name and the bytes in hexadecimal on each line."""
    return DATA / f"lanes_v{lanes.VERSION}_frames.txt"


def frames(mesh: DeviceMesh) -> dict[str, bytes]:
    """Every golden file by name."""
    found = {f"v{VERSION}_{kind.name.lower()}.bin": encode_frame(kind, body) for kind, body in BODIES.items()}
    lines = [f"{name} {data.hex()}\n" for name, data in lane_frames().items()]
    found[lane_frames_file().name] = "".join(lines).encode()
    for name, state in manifests(mesh).items():
        found[f"v{VERSION}_manifest_{name.replace(' ', '_')}.bin"] = encode(state)
    return found
