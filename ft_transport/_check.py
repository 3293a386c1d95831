"""Whether a state can heal a replica, found out before one has to be healed.

Strategy: what a heal does, but for the bytes. By the same functions, so that what is said here is what happens there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ft_transport._plan.expected import Template
from ft_transport._plan.template import fit
from ft_transport._process import no_collection, undisturbed
from ft_transport._state.describe import describe_flat
from ft_transport._telemetry.report import Copies, TransferReport, counted, first_of, shortened
from ft_transport._wire.decode import decode_manifest
from ft_transport._wire.encode import encode_manifest
from ft_transport._wire.frames import ManifestHeader, decode_frame
from ft_transport._wire.layout import Limits, lay_out

__all__ = ["StateCheck", "check_state_dict"]


@dataclass(frozen=True)
class StateCheck:
    """What a heal with a state would be like. Its text says all of it in a line.

    Attributes:
        num_leaves: Tensors and plain values.
        nbytes: Distinct bytes that the tensors refer to: what crosses.
        not_in_place: For each leaf that would not be received into the memory that it has: path and reason. It arrives
            in new memory, from where ``load_state_dict`` takes it.
    """

    num_leaves: int
    nbytes: int
    not_in_place: Mapping[str, str]

    def __str__(self) -> str:
        landing = first_of(self.not_in_place, "not received in place") or "all received in place"
        return shortened(f"{counted(self.num_leaves)}, {self.nbytes / 1e6:.1f} MB, {landing}")


def check_state_dict(state_dict: Callable[[], object]) -> StateCheck:
    """Find out whether a state can heal a replica, before one has to be healed.

    Does what a heal does, but for the bytes: the state is described, written, read as a receiver reads it, with the
    classes that this process allows, and compared with itself as the template. Takes a few microseconds for each leaf,
    and for objects that are pickled as long as that. Call it when the job starts, or in a test of it::

        print(ft_transport.check_state_dict(bound.state_dict))

    Args:
        state_dict: The function that the Manager and the transport get. It is called twice: what is another tensor each
            time is a copy, and nothing can be received into that.

    Returns:
        How large the state is, and what of it would not be received in place.

    Raises:
        LocalProtocolError: Leaves cannot travel; every such path is named. Or ``state_dict`` has raised.
        RemoteProtocolError: A receiver would refuse it: an object is of a class that this process does not allow; the
            text says how to.
        TypeError: It is no function.

    Threading: as ``state_dict``.
    """
    if not callable(state_dict):
        raise TypeError(f"state_dict: expected the function that gives it, got {type(state_dict).__name__}")
    with no_collection(), undisturbed():
        copies = Copies()
        template = Template(state_dict, copies)
        manifest, _ = describe_flat(template.flat)
        frame = encode_manifest(manifest, ManifestHeader(0, Limits(), ""))
        manifest, header = decode_manifest(decode_frame(frame)[1])
        report = TransferReport("destination", "check", None)
        fit(manifest, template, report, copies=copies)
        return StateCheck(len(manifest.leaves), lay_out(manifest, header.limits).nbytes, report.not_in_place)
