"""What errors say, and that they cross process boundaries whole."""

from __future__ import annotations

import copy
import pickle

import pytest

import ft_transport
from ft_transport import errors
from ft_transport.errors import (
    LocalProtocolError,
    PeerFailure,
    ProtocolError,
    RemoteProtocolError,
    TornStateError,
    TransferError,
    TransferTimeout,
)

ALL = [
    TransferError,
    TransferTimeout,
    PeerFailure,
    ProtocolError,
    LocalProtocolError,
    RemoteProtocolError,
    TornStateError,
]


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_field_survives_pickle(cls: type[TransferError], protocol: int) -> None:
    error = cls("text", phase="move", step=3, peer_rank=1, torn=True, nbytes_done=5, nbytes_total=9)
    for other in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(other) is cls
        assert vars(other) == vars(error)
        assert str(other) == str(error)
        assert other.args == error.args


def test_the_text_has_the_context() -> None:
    error = TransferError("lost", phase="move", step=0, peer_rank=0, torn=True, nbytes_done=5, nbytes_total=9)
    assert str(error) == "lost [phase move, step 0, peer rank 0, 5 of 9 bytes, this replica is torn]"
    assert str(TransferError("lost")) == "lost"


@pytest.mark.parametrize("cls", ALL)
def test_all_are_transfer_errors_and_exceptions(cls: type[TransferError]) -> None:
    assert issubclass(cls, TransferError)
    assert issubclass(cls, Exception)


def test_who_is_to_blame() -> None:
    assert issubclass(TransferTimeout, TimeoutError)
    assert issubclass(LocalProtocolError, ProtocolError)
    assert issubclass(RemoteProtocolError, ProtocolError)
    assert not issubclass(PeerFailure, ProtocolError)


def test_all_are_public() -> None:
    assert set(errors.__all__) == {cls.__name__ for cls in ALL}
    for name in errors.__all__:
        assert getattr(ft_transport, name) is getattr(errors, name)
