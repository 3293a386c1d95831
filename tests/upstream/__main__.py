"""``python -m tests.upstream``: torchft's installed tests, unmodified, over its transport and over ours.

The integration tests of LocalSGD and DiLoCo run over each; the Manager's tests, in which a transport receives from
itself, over all but a group, where nobody does.

Arguments are the names of the transports (all of them by default), and what follows ``--`` goes to pytest.
Lighthouses and Managers are real; replicas are threads of one process, as torchft has it. The CPU's cases run, over
Gloo. Takes some minutes, and ports from 19530 on.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

from tests.upstream.plugin import TRANSPORTS

_TESTS = "torchft.local_sgd_integ_test"
_NOT_OVER_GROUPS = "torchft.manager_test"
# Nothing of this project's settings: their warnings are torchft's own.
_OPTIONS = ("-c", os.devnull, "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-rfE", "--tb=short", "--timeout=180")


# In their ``upscale`` tests two replicas may have a quorum a millisecond before the third one asks, take their last
# step in it and leave; the third waits for another one until its time-out. Over torchft's own transport as well.
_AGAIN = ("--reruns", "2", "--only-rerun", "Timeout expired")


def run(transport: str, options: list[str]) -> int:
    """Run all tests over one transport; gives pytest's exit code."""
    print(f"=== {transport}", flush=True)
    files = map(_file_of, [_TESTS] if transport == "pg" else [_TESTS, _NOT_OVER_GROUPS])
    command = [sys.executable, "-m", "pytest", *_OPTIONS, *_AGAIN, "-p", "tests.upstream.plugin", *options, *files]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ, "FT_TRANSPORT_UPSTREAM": transport}
    return subprocess.run(command, env=environment, check=False).returncode


def _file_of(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


def main(arguments: list[str]) -> int:
    options = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    names = arguments[: len(arguments) - len(options) - ("--" in arguments)] or list(TRANSPORTS)
    if unknown := set(names) - set(TRANSPORTS):
        print(f"expected some of {', '.join(TRANSPORTS)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    return max(run(name, options) for name in names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
