"""Where a process can be reached: the addresses of this machine, and the metadata that holds them.

Strategy: nobody knows which of its addresses others can reach, so metadata carries all that are worth trying, the
likeliest first: what the user has named, then what Gloo and NCCL have been told, then the rest.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import psutil

from ft_transport.errors import LocalProtocolError, RemoteProtocolError, refused_for_good

__all__ = ["Interface", "Endpoint", "rank_addresses", "interfaces", "resolve"]

VERSION = 5
# As many as SHA-256 gives: a longer key makes its HMAC no stronger (RFC 2104, 3).
SECRET_BYTES = 32

# Of one endpoint: whoever dials tries one after the other, a moment apart, and the text stays a few kilobytes long.
MAX_ADDRESSES = 64


class Endpoint(NamedTuple):
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
    def decode(cls, metadata: str) -> Endpoint:
        """Read a peer's metadata.

        Raises:
            RemoteProtocolError: It is another transport's, of another version, or damaged.
        """
        metadata = str(metadata)  # another transport's may be anything
        match = _URL.fullmatch(metadata)
        # The text holds the secret, which must not get into a log.
        if match is None:
            scheme = metadata.partition("://")[0][:20] if "://" in metadata else metadata[:20]
            raise refused_for_good(
                f"expected the metadata of a LaneTransport, got {scheme!r}…: all replicas need the same transport"
            )
        scheme, hosts, port, version, secret = match.groups()
        if int(version) != VERSION:
            raise refused_for_good(
                f"expected version {VERSION} of the lanes, the source has {version}: all replicas need the same release"
            )
        try:
            addresses = tuple(str(ipaddress.ip_address(host.strip("[]"))) for host in hosts.split(","))
        except ValueError as exc:
            raise RemoteProtocolError(f"metadata with an address that is none: {exc}") from None
        if not 0 < int(port) < 1 << 16:
            raise RemoteProtocolError(f"metadata with port {port}")
        return cls(addresses, int(port), bytes.fromhex(secret), scheme.endswith("+tls"))


# Finds the parts, each of bounded length; what they are worth is looked at one by one, so that an error can name it.
_URL = re.compile(r"(ft-lanes(?:\+tls)?)://([0-9a-fA-F.:,\[\]]{2,4000}):(\d{1,5})/(\d{1,4})/((?:[0-9a-f]{2}){16,64})")


class Interface(NamedTuple):
    """One address of a network interface."""

    name: str
    address: str


def rank_addresses(
    found: Sequence[Interface], hosts: Sequence[str], interface: str | None, environ: Mapping[str, str]
) -> tuple[str, ...]:
    """The addresses to put into metadata, the one to try first in front.

    First what the user named (``hosts``, then ``interface``), then the interfaces of ``GLOO_SOCKET_IFNAME`` and
    ``NCCL_SOCKET_IFNAME``, then the others; loopback and link-local ones last, and the latter only if named.

    Raises:
        ValueError: There is no interface of that name.
        LocalProtocolError: There is no address that another process could use.
    """
    named = [entry.address for entry in found if entry.name == interface]
    if interface is not None and not named:
        raise ValueError(f"interface: expected one of {sorted({entry.name for entry in found})}, got {interface!r}")
    # As torch reads it: several names, each the whole name. NCCL takes prefixes; see below.
    gloo = [name.strip() for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",")]
    for name in gloo:
        named += [entry.address for entry in found if entry.name == name]
    named += [entry.address for entry in found if _nccl_takes(environ.get("NCCL_SOCKET_IFNAME", ""), entry.name)]
    # A link-local address is on every link, and which one is meant is known to this machine alone.
    others = [entry.address for entry in found if not ipaddress.ip_address(entry.address).is_link_local]
    # To another machine loopback is itself. Tried last, it finds a replica on this one; a stranger there fails the
    # handshake.
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


def interfaces() -> list[Interface]:
    """The addresses of this machine's interfaces that are up: IPv4 ones first, each in the system's order.

    Raises:
        OSError: They cannot be listed.
    """
    # psutil, since ifaddr does not tell which are up. Up (IFF_UP) is what somebody has said of it; psutil's own isup is
    # IFF_RUNNING, that there is a link right now, which a bond's or a bridge's may lack for a moment.
    up = {name for name, found in psutil.net_if_stats().items() if "up" in found.flags.split(",")}
    found = psutil.net_if_addrs().items()
    return [
        Interface(name, _without_scope(entry.address))
        for family in (socket.AF_INET, socket.AF_INET6)
        for name, entries in found
        # An address with a label of its own ("eth0:1") is on an interface that goes by the name before the colon.
        if name.partition(":")[0] in up
        for entry in entries
        if entry.family is family
    ]


def _without_scope(address: str) -> str:
    """A scope ("fe80::1%eth0") names an interface of this machine, and means nothing to another one."""
    return address.partition("%")[0]


def resolve(host: str) -> list[str]:
    """The addresses of a host name, or the address itself.

    Raises:
        ValueError: There is none of that name.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise ValueError(f"host: {host!r} has no address: {exc}") from None
    return [str(ipaddress.ip_address(_without_scope(str(entry[4][0])))) for entry in found]
