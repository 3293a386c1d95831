"""How two ranks that know a secret find each other and prove it. No I/O.

Strategy: ``metadata()`` carries an *invitation*: the addresses worth trying, a port, and a secret that is new for each
process. The one that dials speaks first and shows at once that it knows the secret, so a stranger gets no answer, not
a byte. Then both prove that they know it now and not only once (each MAC covers a number that the other has just
drawn). This keeps strangers out; it does not hide what is said: for that there is TLS.

The handshakes are generators: they yield how many bytes they must have next, or the bytes to send.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

from ft_transport._lanes.protocol import HEADER_BYTES, Frame, Header, decode_body, decode_header
from ft_transport.errors import LocalProtocolError, RemoteProtocolError

__all__ = ["Handshake", "Interface", "Invitation", "Visit", "admit", "in_order", "knock"]

VERSION = 1
SECRET_BYTES = 32
_NONCE_BYTES = 32
_MAC_BYTES = 32
_KNOCK = b"FTLN-knock\x01"
# Bounds the first frame of a connection. HELLO holds an identity and a name.
_MAX_FIRST_BODY = 4096

# Of an invitation: whoever dials tries one after the other, a moment apart, and the text stays a few kilobytes long.
MAX_ADDRESSES = 64

# Yields bytes to send, or the number of bytes to receive, which it then gets.
Handshake = Generator["bytes | int", bytes, None]


class Invitation(NamedTuple):
    """What ``metadata()`` says.

    Attributes:
        addresses: IP addresses, the first worth trying first.
        port: The same for all.
        secret: Known to whom the metadata was given.
        tls: Whether the listener speaks TLS.
    """

    addresses: tuple[str, ...]
    port: int
    secret: bytes
    tls: bool

    def encode(self) -> str:
        """The metadata: a URL, which :meth:`decode` takes. It has the first :data:`MAX_ADDRESSES` addresses."""
        addresses = self.addresses[:MAX_ADDRESSES]
        hosts = ",".join(f"[{address}]" if ":" in address else address for address in addresses)
        return f"{'ft-lanes+tls' if self.tls else 'ft-lanes'}://{hosts}:{self.port}/{VERSION}/{self.secret.hex()}"

    @classmethod
    def decode(cls, metadata: str) -> Invitation:
        """Read a peer's metadata.

        Raises:
            RemoteProtocolError: It is another transport's, of another version, or damaged.
        """
        metadata = str(metadata)  # another transport's may be anything
        match = _URL.fullmatch(metadata)
        # The text holds the secret, which must not get into a log.
        if match is None:
            scheme = metadata.partition("://")[0][:20] if "://" in metadata else metadata[:20]
            raise RemoteProtocolError(f"expected the metadata of a LaneTransport, got {scheme!r}…")
        scheme, hosts, port, version, secret = match.groups()
        if int(version) != VERSION:
            raise RemoteProtocolError(f"expected version {VERSION} of the lanes, the source has {version}")
        try:
            addresses = tuple(str(ipaddress.ip_address(host.strip("[]"))) for host in hosts.split(","))
        except ValueError as exc:
            raise RemoteProtocolError(f"metadata with an address that is none: {exc}") from None
        if not 0 < int(port) < 1 << 16:
            raise RemoteProtocolError(f"metadata with port {port}")
        return cls(addresses, int(port), bytes.fromhex(secret), scheme.endswith("+tls"))


_URL = re.compile(r"(ft-lanes(?:\+tls)?)://([0-9a-fA-F.:,\[\]]{2,4000}):(\d{1,5})/(\d{1,4})/((?:[0-9a-f]{2}){16,64})")


# ----------------------------------------------------------------------------------------- handshake


def _mac(secret: bytes, label: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(secret, label + b"".join(nonces), hashlib.sha256)


def knock(secret: bytes) -> Handshake:
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


class Visit(NamedTuple):
    """The first frame of a peer that has proved to be one."""

    header: Header
    body: tuple[bytes, ...]


def admit(secret: bytes) -> Generator[bytes | int, bytes, Visit]:
    """The side that listens: handshake and first frame.

    Raises:
        RemoteProtocolError: A stranger. Nothing was sent to it unless it knew the secret once.
    """
    knocked = yield len(_KNOCK) + _NONCE_BYTES + _MAC_BYTES
    theirs, proof = knocked[len(_KNOCK) : -_MAC_BYTES], knocked[-_MAC_BYTES:]
    known = hmac.compare_digest(proof, _mac(secret, b"knock", theirs))
    if not knocked.startswith(_KNOCK) or not known:
        raise RemoteProtocolError("a stranger")
    mine = secrets.token_bytes(_NONCE_BYTES)
    yield mine + _mac(secret, b"answer", theirs, mine)
    if not hmac.compare_digest((yield _MAC_BYTES), _mac(secret, b"enter", theirs, mine)):
        raise RemoteProtocolError("a stranger that has heard somebody else knock")
    header = decode_header((yield HEADER_BYTES))
    if header.frame not in (Frame.HELLO, Frame.ATTACH) or header.nbytes > _MAX_FIRST_BODY:
        raise RemoteProtocolError(f"{header.frame.name} of {header.nbytes} bytes cannot come first")
    return Visit(header, decode_body(header, (yield header.nbytes)))


# ----------------------------------------------------------------------------------------- addresses


class Interface(NamedTuple):
    """One address of a network interface."""

    name: str
    address: str


def in_order(
    found: Sequence[Interface], hosts: Sequence[str], interface: str | None, environ: Mapping[str, str]
) -> tuple[str, ...]:
    """The addresses to put into an invitation, the one to try first in front.

    First what the user named (``hosts``, then ``interface``), then the interfaces of ``GLOO_SOCKET_IFNAME`` and
    ``NCCL_SOCKET_IFNAME``, then the others; loopback and link-local ones last, and the latter only if named.

    Raises:
        ValueError: There is no interface of that name.
        LocalProtocolError: There is no address that another process could use.
    """
    named = [entry.address for entry in found if entry.name == interface]
    if interface is not None and not named:
        raise ValueError(f"interface: expected one of {sorted({entry.name for entry in found})}, got {interface!r}")
    gloo = [name.strip() for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",")]
    for name in gloo:
        named += [entry.address for entry in found if entry.name == name]
    named += [entry.address for entry in found if _nccl_takes(environ.get("NCCL_SOCKET_IFNAME", ""), entry.name)]
    others = [entry.address for entry in found if not ipaddress.ip_address(entry.address).is_link_local]
    others.sort(key=lambda address: ipaddress.ip_address(address).is_loopback)
    addresses = tuple(dict.fromkeys([*hosts, *named, *others]))
    if not addresses:
        raise LocalProtocolError(
            "this process could not be reached by anybody: no network interface is up that has an address beyond its "
            f"own link ({', '.join(f'{entry.address} of {entry.name}' for entry in found) or 'none has any'}), and "
            "host= names none"
        )
    return addresses


def _nccl_takes(setting: str, name: str) -> bool:
    """Whether NCCL_SOCKET_IFNAME names an interface: prefixes, ``=`` exact names, ``^`` all but these."""
    if not setting:
        return False
    excludes = setting.startswith("^")
    setting = setting.removeprefix("^")
    exact = setting.startswith("=")
    names = [entry.strip() for entry in setting.removeprefix("=").split(",") if entry.strip()]
    hit = any(name == entry if exact else name.startswith(entry) for entry in names)
    return hit is not excludes
