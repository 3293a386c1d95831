#!/usr/bin/env bash
# One would guess: a TCPStore takes a value of any size that memory has room for, as a FileStore and a HashStore do,
# and whichever of its two backends serves it is a matter of speed.
#
# What happens: the default backend (libuv) takes 8 MiB, and closes the connection of whoever sets one byte more: "Connection
# reset by peer", with no word of a limit but in the server's own log. That client is dead from then on; small values
# do not go through either. The other backend (use_libuv=False) takes 32 MiB without a murmur.
#
# Why it matters: what is exchanged by way of the job's store (descriptions of a state of 100,000 tensors, digests, plans) grows
# with the model, and the day it is too large looks like a network that failed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/finding.py" <<'EOF'
from datetime import timedelta

import torch
import torch.distributed as dist

LIMIT = 8 << 20
print("torch", torch.__version__)


def tried(call):
    try:
        return call()
    except dist.DistNetworkError as exc:
        return str(exc).splitlines()[0]


found = {}
for use_libuv in (True, False):
    options = {"timeout": timedelta(seconds=20), "use_libuv": use_libuv}
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, **options)
    for size in (LIMIT, LIMIT + 1, 4 * LIMIT):
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False, **options)
        large = tried(lambda: client.set("large", b"x" * size))
        small = tried(lambda: client.set("small", b"x"))
        found[use_libuv, size] = (large, small)
        print(f"use_libuv={use_libuv}, {size} bytes: {large or 'set'}; one byte afterwards: {small or 'set'}")

assert found[True, LIMIT] == (None, None)
for size in (LIMIT + 1, 4 * LIMIT):
    large, small = found[True, size]
    assert large == "Connection reset by peer", large
    assert small, "the client lives on"
assert all(found[False, size] == (None, None) for size in (LIMIT, LIMIT + 1, 4 * LIMIT))
EOF

# The server's log, a page of C++ for each, is left out.
"$folder/venv/bin/python" "$folder/finding.py" 2>/dev/null
