"""How two ranks that know a secret prove it to each other. No I/O.

Strategy: the one that dials speaks first and shows at once that it knows the secret, so a stranger gets no answer, not
a byte. Then both prove that they know it now and not only once (each MAC covers a number that the other has just
drawn). This keeps strangers out; it does not hide what is said: for that there is TLS.

The handshakes are generators: they yield how many bytes they must have next, or the bytes to send.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Generator

from ft_transport.errors import RemoteProtocolError

__all__ = ["Handshake", "server_handshake", "client_handshake"]

_NONCE_BYTES = 32
_MAC_BYTES = 32
_KNOCK = b"FTLN-knock\x01"

# Yields bytes to send, or the number of bytes to receive, which it then gets.
Handshake = Generator["bytes | int", bytes, None]


# ----------------------------------------------------------------------------------------- handshake


# Each step has a label of its own, so that no answer of one side can be sent back to it as another step's.
def _mac(secret: bytes, label: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(secret, label + b"".join(nonces), hashlib.sha256)


def client_handshake(secret: bytes) -> Handshake:
    """The side that dials. When it is exhausted, both sides have proved that they know the secret.

    Raises:
        RemoteProtocolError: The listener does not know it.
    """
    mine = secrets.token_bytes(_NONCE_BYTES)
    yield _KNOCK + mine + _mac(secret, b"knock", mine)
    answer = yield _NONCE_BYTES + _MAC_BYTES
    theirs, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    if not hmac.compare_digest(proof, _mac(secret, b"answer", mine, theirs)):
        raise RemoteProtocolError("the listener does not know the secret of this metadata")
    yield _mac(secret, b"enter", mine, theirs)


def server_handshake(secret: bytes) -> Handshake:
    """The side that listens. When it is exhausted, both sides have proved that they know the secret.

    Raises:
        RemoteProtocolError: A stranger. Nothing was sent to it unless it knew the secret once.
    """
    knocked = yield len(_KNOCK) + _NONCE_BYTES + _MAC_BYTES
    theirs, proof = knocked[len(_KNOCK) : -_MAC_BYTES], knocked[-_MAC_BYTES:]
    # Taken before anything is compared, and in constant time: how long a refusal takes tells nothing of how much was
    # right.
    known = hmac.compare_digest(proof, _mac(secret, b"knock", theirs))
    if not knocked.startswith(_KNOCK) or not known:
        raise RemoteProtocolError("a stranger")
    mine = secrets.token_bytes(_NONCE_BYTES)
    # A knock that somebody has recorded gets this far, and no further: ``mine`` is new.
    yield mine + _mac(secret, b"answer", theirs, mine)
    if not hmac.compare_digest((yield _MAC_BYTES), _mac(secret, b"enter", theirs, mine)):
        raise RemoteProtocolError("a stranger that has heard somebody else knock")
