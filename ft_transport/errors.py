"""What can go wrong in a transfer, and whose fault it is.

Every error here is a :class:`TransferError`: the state did not arrive. A subclass exists only where a
caller would act differently. All of them survive ``pickle`` with every field, since they cross process
boundaries.
"""

from __future__ import annotations

from typing import Any, TypeVar

__all__ = [
    "LocalProtocolError",
    "PeerFailure",
    "ProtocolError",
    "RemoteProtocolError",
    "TornStateError",
    "TransferError",
    "TransferTimeout",
]


# torchft catches ``Exception`` around its calls and reports it as the step's error, so none of these is a
# BaseException.
class TransferError(Exception):
    """The state did not arrive.

    Args:
        message: What happened, with expected and got.
        phase: Where it happened: ``"describe"``, ``"agree"``, ``"move"``, ``"verify"`` or ``"rebuild"``.
        step: Step of the transfer, None where the API has no steps.
        peer_rank: The other side, None where no single peer is meant.
        torn: Whether the template of the replica that raises it holds a mix of two states.
        nbytes_done: Payload bytes that had been moved.
        nbytes_total: Payload bytes of the whole state, 0 while it is not known.
    """

    # What a report says of the peer, where the class alone does not tell: see :func:`ended`.
    _outcome = ""
    # Whether the next transfer would end so, too: see :func:`refused_for_good`.
    _for_good = False

    def __init__(
        self,
        message: str,
        *,
        phase: str = "",
        step: int | None = None,
        peer_rank: int | None = None,
        torn: bool = False,
        nbytes_done: int = 0,
        nbytes_total: int = 0,
    ) -> None:
        # Here, once, rather than wherever a text of a peer's gets into a message: a terminal's escape sequences end up
        # in logs, and in terminals.
        message = printable(message)  # it may quote a peer
        # The text alone is what BaseException keeps: all fields are in __dict__, from where pickle and copy take them.
        super().__init__(message)
        self.message = message
        self.phase = phase
        self.step = step
        self.peer_rank = peer_rank
        self.torn = torn
        self.nbytes_done = nbytes_done
        self.nbytes_total = nbytes_total

    def __str__(self) -> str:
        where = [
            f"phase {self.phase}" if self.phase else "",
            f"step {self.step}" if self.step is not None else "",
            f"peer rank {self.peer_rank}" if self.peer_rank is not None else "",
            f"{self.nbytes_done} of {self.nbytes_total} bytes" if self.nbytes_total else "",
            "this replica is torn" if self.torn else "",
        ]
        # Part of the text, because the text is what torchft logs of what a transport raises.
        context = ", ".join(part for part in where if part)
        return f"{self.message} [{context}]" if context else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own reduce would drop the keyword-only fields.
        return (_rebuild, (type(self), dict(self.__dict__)))


def _rebuild(cls: type[TransferError], fields: dict[str, Any]) -> TransferError:
    error = cls.__new__(cls)
    # OSError, a base of TransferTimeout, does not take them from __new__.
    # Not by calling the class: a subclass of the user's may want other arguments.
    error.args = (fields["message"],)
    error.__dict__.update(fields)
    return error


E = TypeVar("E", bound=TransferError)


def ended(error: E, outcome: str) -> E:
    """The error, which knows now how the transfer with the peer has ended.

    A peer that gave up and one that is gone are the same to a caller, who takes another one: both are a
    :class:`PeerFailure`. To whoever reads the report they are not, and no class is needed to tell them apart.

    Args:
        error: To be raised.
        outcome: As in ``PeerReport``.
    """
    # An attribute of the instance, so it crosses process boundaries with the others.
    error._outcome = outcome
    return error


class TransferTimeout(TransferError, TimeoutError):
    """The call's deadline passed before the transfer was complete. The text says "timed out".

    A process group must be configured anew then, as torchft does for the next quorum.
    """


class PeerFailure(TransferError):
    """The peer died, the channel to it broke, or it gave up and said why."""


class ProtocolError(TransferError):
    """One side broke the protocol. Not raised itself: see the two subclasses."""


class LocalProtocolError(ProtocolError):
    """This side asked for what cannot be: a leaf that cannot travel, a rank outside the group, a second transfer.

    The call is to be mended; the next quorum changes nothing.
    """


class RemoteProtocolError(ProtocolError):
    """The peer sent what this version does not accept, or refuses: magic, version, step, manifest, digest, template.

    The peer, or one side's template, is to be mended.
    """


def refused_for_good(message: str) -> RemoteProtocolError:
    """What a destination raises that will refuse the next one as well: nothing that it comes of changes by itself."""
    error = ended(RemoteProtocolError(message), "refused")
    error._for_good = True
    return error


class TornStateError(TransferError):
    """This replica holds a mix of two states, and was about to serve it, or to step its optimizer.

    It is to be restarted, from a durable checkpoint or empty: see ``docs/faults.md``.
    """


def printable(text: str) -> str:
    """The text in one line, with escapes in the place of what a terminal or a log would take for more than text: line
    breaks, control characters, those that change the direction of writing, and halves of surrogate pairs.

    All that a peer may have chosen comes through here on its way into an error, a report or a log.
    """
    # Almost always: nothing is built then.
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def reason_of(exc: BaseException) -> str:
    """Why, in the words of one of these errors, or with the class of any other."""
    return exc.message if isinstance(exc, TransferError) else f"{type(exc).__name__}: {exc}"
