"""Why a template and a source's state differ in their paths, as people's states tell: for the log line of a transfer.

Strategy: a guess from names alone, said as one. First what wrappers put in front, then a name that is another one on
the other side, and what torch makes only in an optimizer's first step.

Not here: what the paths are (``_plan.template``, ``_plan.compare``), and the line (``_telemetry.report``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["NO_STATE_YET", "likely_cause", "naming_cause"]

# Parts of a path that a wrapper adds, and which one.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DistributedDataParallel or DataParallel",
    "_fsdp_wrapped_module": "FSDP",
}
NO_STATE_YET = "a fresh optimizer has no state before its first step: ft_transport.materialize(optimizer) makes it"
_NO_STATE_AT_SOURCE = "the source's optimizer has no state, as before its first step"
# Paths that are looked at for a wrapper, which shows in nearly all of them, and that a new name must explain, by more
# than half, so that it is more than a leaf that happens to be called alike.
_NUM_TRIED = 100


def likely_cause(unexpected: Sequence[str], missing: Sequence[str]) -> str:
    """Why paths are on one side only; empty if they do not tell.

    Args:
        unexpected: Those that the source has and the template lacks.
        missing: Those that the template has and the source lacks.
    """
    causes = [naming_cause(unexpected, missing)]
    # What most people meet first: torch makes an optimizer's state with its first step. State on both sides is of two
    # optimizers, or of one with two names.
    theirs, ours = map(_has_optimizer_state, (unexpected, missing))
    if theirs != ours:
        causes.append(NO_STATE_YET if theirs else _NO_STATE_AT_SOURCE)
    return "; ".join(filter(None, causes))


def naming_cause(unexpected: Sequence[str], missing: Sequence[str]) -> str:
    """As :func:`likely_cause`, where the same leaves have other names on the other side."""
    for name, wrapper in _WRAPPERS.items():
        # A name that only one side has in its paths: that side's model is wrapped, and the other one's is not.
        theirs, ours = (any(name in path.split(".") for path in paths[:_NUM_TRIED]) for paths in (unexpected, missing))
        if theirs != ours:
            return f"{name}. on one side alone comes of {wrapper}"
    return _renamed(unexpected, missing) if unexpected and missing else ""


def _renamed(unexpected: Sequence[str], missing: Sequence[str]) -> str:
    """What the source calls by another name than the template, judged by its first path and tried on the others."""
    # All of the template's paths, which are our own; of the source's a few, since a peer may send a million.
    first = unexpected[0].split(".")
    splits = (_split(first, path.split(".")) for path in missing)
    # The least that must be exchanged is what was renamed: of layers with equal names the one with the same number.
    found = min((split for split in splits if split), key=lambda split: len(split[1]) + len(split[2]), default=None)
    if found is None:
        return ""
    before, theirs, ours = found
    old, new = (".".join([*before, *middle, ""]) for middle in (theirs, ours))
    tried = [path for path in unexpected[:_NUM_TRIED] if path.startswith(old)]
    have = {*missing}
    if 2 * sum(new + path.removeprefix(old) in have for path in tried) <= len(tried):
        return ""
    if theirs and ours:
        return f"what the source calls {'.'.join(theirs)} seems to be {'.'.join(ours)} in the template"
    side = "source's" if theirs else "template's"
    return f"{'.'.join(theirs or ours)}. is in the {side} paths alone"


def _split(theirs: list[str], ours: list[str]) -> tuple[list[str], list[str], list[str]] | None:
    """How two paths begin, and what follows in each of them until both go on alike; None if they end otherwise."""
    shorter = min(len(theirs), len(ours))
    begin = next((i for i in range(shorter) if theirs[i] != ours[i]), shorter)
    alike = next((i for i in range(shorter - begin) if theirs[-1 - i] != ours[-1 - i]), shorter - begin)
    if not alike:
        return None
    return theirs[:begin], theirs[begin : len(theirs) - alike], ours[begin : len(ours) - alike]


def _has_optimizer_state(paths: Iterable[str]) -> bool:
    # state, a parameter's number or name, and what is kept of it, as torch's optimizers have it.
    return any("state" in path.split(".")[:-2] for path in paths)
