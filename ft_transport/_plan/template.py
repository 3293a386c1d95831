"""How what the source sends fits the tensors that the receiver has: the *template*.

Strategy: first find the callback's tree inside what the source sends, then compare leaf by leaf (``_plan.compare``).
Disagreements are collected, all of them; the caller's choice says what becomes of each: the source's leaf is new, and
the template's left alone, or all is refused. A template leaf that cannot be written without harm is left alone and
named in the report.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ft_transport._plan.compare import Compared, Targets, compare_all
from ft_transport._plan.expected import Template
from ft_transport._state.kinds.base import Surroundings
from ft_transport._state.kinds.distributed import meshes_of
from ft_transport._state.manifest import Manifest
from ft_transport._state.tree import Node, Path, flatten, format_path, paths_of
from ft_transport._telemetry.causes import likely_cause, naming_cause
from ft_transport._telemetry.report import Copies, OnMismatch, TransferReport, counted, shortened
from ft_transport.errors import printable, refused_for_good

__all__ = ["Fit", "fit", "match_template"]

logger = logging.getLogger("ft_transport")


# Bounds the registered keys of torchft's envelope that are tried as the place of the callback's tree.
# A job registers a handful: one for each model part and each optimizer. The bound is against a peer who sends a million
# to have each tried.
MAX_KEYS = 100


class Fit(NamedTuple):
    """How the template takes what the source sends.

    Attributes:
        matched: See :func:`match_template`; without the leaves that are new.
        targets: The template's tensors that can take their bytes.
        here: The meshes of those template leaves that take none.
    """

    matched: dict[int, object]
    targets: Targets
    here: Surroundings


def fit(
    manifest: Manifest,
    template: Template | None,
    report: TransferReport,
    *,
    strict: bool = False,
    on_mismatch: OnMismatch = "refuse",
    copies: Copies | None = None,
) -> Fit:
    """Find the template in what the source sends, and decide what becomes of each leaf. Nothing is written.

    Args:
        manifest: What the source sends.
        template: What the callback gives.
        report: Filled with what does not land in place, and why.
        strict: Refuse what disagrees, is missing or is left over.
        on_mismatch: What becomes of a leaf that disagrees.
        copies: What is known of the callback. None: it gives no copies.

    Raises:
        RemoteProtocolError: The template cannot take it; every path is listed.
        TypeError: ``on_mismatch`` has returned neither of its words.
    """
    # No template: all is fresh, and there is nothing to disagree with.
    if template is None:
        report.without_template = True
        return Fit({}, Targets.none(), Surroundings())
    known = template.plain(manifest)
    matched, plain = (match_template(manifest, template.tree, report), None) if known is None else known
    compared = compare_all(manifest, matched, report, plain)
    # Refused here is refused before a byte moves, so that the template is what it was, and the replica not torn.
    refused = _refused(manifest, matched, compared, "refuse" if strict else on_mismatch, report)
    # The older word, and it means more.
    if strict:
        unexpected, missing = report.unexpected_keys, report.missing_keys
        refused += [f"{path}: unexpected key, expected in the template, source has it" for path in unexpected]
        refused += [f"{path}: missing key, expected from the source, template has it" for path in missing]
        refused += filter(None, [likely_cause(unexpected, missing)])
    if refused:
        raise refused_for_good("; ".join(refused))
    # Both at once is what a renamed module looks like. One of them alone is a model that has grown, or a source that
    # keeps an EMA.
    if report.unexpected_keys and report.missing_keys:
        logger.warning("the template and the source's state differ in their leaves: %s", shortened(report.gaps()))
    _warn(manifest, compared, report)
    targets, new = compared.targets, set(compared.disagreements)
    if copies is not None and targets:
        new |= _drop_copies(manifest, template, targets, copies, report)
    here = Surroundings(meshes=meshes_of([matched.pop(index) for index in new]))
    return Fit(matched, targets, here)


def _refused(
    manifest: Manifest, matched: dict[int, object], compared: Compared, on_mismatch: OnMismatch, report: TransferReport
) -> list[str]:
    """What must be refused, a line for each path; notes in the report all that disagrees."""
    refused = []
    # If not one tensor fits, the template is of another model, or the callback gives a tree of another shape: then all
    # that lands beside would be a model that nobody has asked for.
    fits = any(manifest.leaves[i].views for i in matched if i not in compared.disagreements)
    for index, reason in compared.disagreements.items():
        path = format_path(manifest.paths[index])
        reason = report.mismatched[path] = printable(reason)
        if (_choice(on_mismatch, path, reason) if fits else "refuse") == "refuse":
            refused.append(f"{path}: {reason}")
    return refused


def _choice(on_mismatch: OnMismatch, path: str, reason: str) -> str:
    if callable(on_mismatch):
        expected, _, got = reason.removeprefix("expected ").partition(", source has ")
        choice: object = on_mismatch(path, expected, got)
    else:
        choice = on_mismatch
    if choice not in ("fresh", "refuse"):
        raise TypeError(f"on_mismatch: expected 'fresh' or 'refuse' for {path}, got {choice!r}")
    return str(choice)


def _warn(manifest: Manifest, compared: Compared, report: TransferReport) -> None:
    if compared.disagreements:
        lines = [
            f"{path}: {reason}" + (" (load_state_dict casts it without a word)" if index in compared.casts else "")
            for index, (path, reason) in zip(compared.disagreements, report.mismatched.items(), strict=True)
        ]
        logger.warning(
            "%s not fit the template's and %s new; what the template has is left alone, and load_state_dict judges: %s",
            "1 leaf does" if len(lines) == 1 else f"{len(lines)} leaves do",
            "is" if len(lines) == 1 else "are",
            shortened("; ".join(lines)),
        )


# ------------------------------------------------------------------------------------------- copies

_A_COPY = "the state_dict callback gives a copy, another one each time: what lands in it is nobody's"


def _drop_copies(
    manifest: Manifest,
    template: Template,
    targets: Targets,
    copies: Copies,
    report: TransferReport,
) -> set[int]:
    """Give up template tensors that the callback makes anew each time it is called: nobody keeps them.

    Called twice in a row, while the first one's tensors live: so one that lies elsewhere the second time is a copy, but
    for what another thread moves just then. Only once for each transport: a callback may cost much.
    """
    # Asked once in a transport's life. A callback that gathers FULL_STATE_DICT takes seconds, and a collective.
    if copies.paths is None:
        copies.paths = _find_copies(manifest, template, targets)
        if copies.paths:
            logger.warning(
                "the state_dict callback gives copies of %s, the first is %s: they are received beside, and "
                "reach the model through load_state_dict alone",
                counted(len(copies.paths)),
                shortened(min(copies.paths)),
            )
    if not copies.paths:
        return set()
    owners = manifest.leaves.owners
    dropped = {
        index for index in {owners[number] for number in targets} if format_path(manifest.paths[index]) in copies.paths
    }
    targets.drop({number for number in targets if owners[number] in dropped})
    for index in dropped:
        report.not_in_place[format_path(manifest.paths[index])] = _A_COPY
    return dropped


def _find_copies(manifest: Manifest, template: Template, targets: Targets) -> frozenset[str]:
    unused = TransferReport("destination", "", None)
    try:
        second = compare_all(manifest, match_template(manifest, template.again, unused), unused).targets
    except Exception:  # it has given a template once, and that one will do
        return frozenset()
    return frozenset(
        format_path(manifest.paths[manifest.leaves.owners[number]])
        for number, mine in zip(targets, targets.blocks.memory, strict=True)
        if number in second and second[number].address != mine.data_ptr()
    )


# --------------------------------------------------------------------------------------------- match


def match_template(manifest: Manifest, template: object, report: TransferReport) -> dict[int, object]:
    """Find the callback's tree inside what the source sent: at its root or inside torchft's envelope.

    The Manager wraps what it sends: ``{"user": {key: tree}, "torchft": {…}}``. The callback's tree may be the
    whole state, all of ``"user"``, or the tree of one key.

    Returns:
        The template's leaf for each manifest leaf that has one. A None has none for a tensor: a slot that is still
        empty, as an optimizer's before its first step.

    Raises:
        RemoteProtocolError: The source has tensors and none is where the callback's tree would have it, or
            there are two places that fit equally well.
    """
    nodes, leaves, _ = flatten(template)
    # Equal trees need no paths, and paths of 100,000 leaves are most of what finding a place costs.
    if _fits_as_a_whole(manifest.nodes, nodes):
        return {
            index: mine for index, mine in enumerate(leaves) if mine is not None or not manifest.leaves[index].views
        }
    paths = paths_of(nodes)
    index_of = _places(manifest.paths, set(paths))
    scored = [(_score(manifest, index_of, prefix, paths, leaves), prefix) for prefix in _prefixes(manifest.paths)]
    # By how many tensors have a place at all, then by how many agree in shape: a model in two variants is found by its
    # names first. A tie is refused, never guessed: the wrong half of a state would land without a word.
    best, prefix = max(scored, key=lambda entry: entry[0])
    if any(leaf.views for leaf in manifest.leaves):
        if best == (0, 0):
            raise refused_for_good(
                f"the state_dict callback matches nothing in what the source sends: the callback has "
                f"{_some(paths)}, the source sends {_some(manifest.paths)}{_cause(manifest.paths, paths)}"
            )
        rivals = [format_path(other)[:200] for score, other in scored if score == best]
        if len(rivals) > 1:
            raise refused_for_good(
                f"the state_dict callback fits at {' and '.join(rivals)} alike; return a dict by registered key"
            )
    matched = {}
    for path, leaf in zip(paths, leaves, strict=True):
        index = index_of.get(prefix + path)
        if index is None:
            # The template has it, and the source has not. torch calls that a missing key.
            report.missing_keys.append(format_path(prefix + path))
        elif leaf is not None or not manifest.leaves[index].views:
            matched[index] = leaf
    return matched


def _fits_as_a_whole(nodes: list[Node], template: list[Node]) -> bool:
    """Whether the template's tree is the source's, or the only one in the envelope: then no path is needed."""
    starts = [0]
    # torchft's Manager wraps what it sends: {"user": {key: tree}, "torchft": {...}}, in this order; the key is
    # "default" where none was given.
    if "user" in nodes[0].keys[:1] and "torchft" in nodes[0].keys:
        starts += [1, 2] if nodes[1].num_children == 1 else []
    try:
        return sum(nodes[start : start + len(template)] == template for start in starts) == 1
    except Exception:  # contexts of registered nodes need not be comparable
        return False


def _places(paths: Sequence[Path], wanted: set[Path]) -> dict[Path, int]:
    """The index of each of the source's paths that the template may have.

    Not of all: a source can choose paths that a dict needs very long to tell apart.
    """
    return {
        path: index
        for index, path in enumerate(paths)
        if path in wanted or (path[:1] == ("user",) and (path[1:] in wanted or path[2:] in wanted))
    }


def _prefixes(paths: Sequence[Path]) -> Iterator[Path]:
    yield ()
    if {path[0] for path in paths if path} >= {"user", "torchft"}:
        yield ("user",)
        keys = dict.fromkeys(path[:2] for path in paths if len(path) >= 2 and path[0] == "user")
        yield from itertools.islice(keys, MAX_KEYS)


def _score(
    manifest: Manifest,
    index_of: dict[Path, int],
    prefix: Path,
    paths: Sequence[Path],
    leaves: Sequence[object],
) -> tuple[int, int]:
    """How many tensors of the template have a place under ``prefix``, and how many of these agree in shape."""
    places = agreeing = 0
    for path, leaf in zip(paths, leaves, strict=True):
        index = index_of.get(prefix + path)
        if index is not None and isinstance(leaf, torch.Tensor):
            views = manifest.leaves[index].views
            places += bool(views)
            agreeing += len(views) == 1 and views[0].geometry.shape == _shape_of(leaf)
    return places, agreeing


def _shape_of(leaf: torch.Tensor) -> tuple[int, ...] | None:
    """The shape of the template's leaf; None for one that has none, as a nested tensor of the old layout."""
    try:
        return leaf.shape
    except Exception:  # or whatever a subclass raises
        return None


def _cause(theirs: Sequence[Path], mine: Sequence[Path]) -> str:
    """Why not one path is on both sides, if their names tell."""
    # The callback's tree lies below a registered key.
    there = [format_path(path[2:] if path[:1] == ("user",) else path) for path in theirs[:_MAX_NAMED]]
    cause = naming_cause(there, [format_path(path) for path in mine[:_MAX_NAMED]])
    return f": {cause}" if cause else ""


# Paths that a cause is looked for in: made into text for it, and a peer may send a million.
_MAX_NAMED = 1_000


def _some(paths: Sequence[Path]) -> str:
    names = [format_path(path)[:200] for path in paths[:3]]
    return ", ".join(names) + (f", … ({len(paths)} leaves)" if len(paths) > 3 else "") if names else "no leaves"
