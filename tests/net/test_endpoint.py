"""Metadata, the addresses of a machine, and their order."""

from __future__ import annotations

import re
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ft_transport._net.endpoint import MAX_ADDRESSES, Endpoint, Interface, interfaces, rank_addresses, resolve
from ft_transport.errors import LocalProtocolError, RemoteProtocolError

SECRET = bytes(range(32))

# ------------------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize("tls", [False, True])
def test_metadata_round_trip(tls: bool) -> None:
    endpoint = Endpoint(("10.0.0.1", "fd00::2", "127.0.0.1", "::1"), 4711, SECRET, tls)
    assert Endpoint.decode(endpoint.encode()) == endpoint


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "<n/a>",
        "http://host:1234/checkpoint/",
        "ft-lanes://:1/5/" + "00" * 32,
        "ft-lanes://10.0.0.1:1/5/" + "00" * 8,
        "ft-lanes://10.0.0.1:0/5/" + "00" * 32,
        "ft-lanes://10.0.0.1:70000/5/" + "00" * 32,
        "ft-lanes://10.0.0.999:1/5/" + "00" * 32,
        "ft-lanes://10.0.0.1:1/5/" + "00" * 32 + "\n",
        None,
        b"ft-lanes://10.0.0.1:1/5/" + b"00" * 32,
    ],
)
def test_other_metadata_is_refused(metadata: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="metadata"):
        Endpoint.decode(metadata)


def test_another_version_is_refused_by_name() -> None:
    for version in (1, 2, 3, 4, 6):
        with pytest.raises(RemoteProtocolError, match=f"expected version 5 of the lanes, the source has {version}"):
            Endpoint.decode(f"ft-lanes://10.0.0.1:1/{version}/" + "00" * 32)


@pytest.mark.parametrize("tls", [False, True])
def test_version_1_refuses_this_one_by_name(tls: bool) -> None:
    """By its own rule, which finds the version before it looks at what else may have changed."""
    version_1 = re.compile(
        r"(ft-lanes(?:\+tls)?)://([0-9a-fA-F.:,\[\]]{2,4000}):(\d{1,5})/(\d{1,4})/((?:[0-9a-f]{2}){16,64})"
    )
    found = version_1.fullmatch(Endpoint(("10.0.0.1", "fd00::2"), 4711, SECRET, tls).encode())
    assert found is not None, "it would be called another transport's"
    assert found[4] == "5"


def test_the_secret_is_in_no_message() -> None:
    metadata = Endpoint(("10.0.0.1",), 4711, SECRET, False).encode()
    for wrong in (metadata.replace("ft-lanes", "other"), metadata.replace("/5/", "/1/"), metadata + "x"):
        with pytest.raises(RemoteProtocolError) as info:
            Endpoint.decode(wrong)
        assert SECRET.hex()[:8] not in str(info.value)


# ----------------------------------------------------------------------------------------- addresses

FOUND = [
    Interface("lo", "127.0.0.1"),
    Interface("eth0", "10.0.0.1"),
    Interface("eth1", "10.1.0.1"),
    Interface("ib0", "10.2.0.1"),
    Interface("lo", "::1"),
    Interface("eth0", "fd00::1"),
    Interface("eth1", "fe80::1"),
]
OTHERS = ("10.0.0.1", "10.1.0.1", "10.2.0.1", "fd00::1", "127.0.0.1", "::1")


@pytest.mark.parametrize(
    ("hosts", "interface", "environ", "first"),
    [
        ([], None, {}, ()),
        (["192.168.0.1"], None, {}, ("192.168.0.1",)),
        ([], "eth1", {}, ("10.1.0.1", "fe80::1")),
        ([], None, {"GLOO_SOCKET_IFNAME": "eth1"}, ("10.1.0.1", "fe80::1")),
        ([], None, {"GLOO_SOCKET_IFNAME": "nothing, ib0"}, ("10.2.0.1",)),
        ([], None, {"NCCL_SOCKET_IFNAME": "eth"}, ("10.0.0.1", "10.1.0.1", "fd00::1", "fe80::1")),
        ([], None, {"NCCL_SOCKET_IFNAME": "=ib0"}, ("10.2.0.1",)),
        ([], None, {"NCCL_SOCKET_IFNAME": "=ib"}, ()),
        ([], None, {"NCCL_SOCKET_IFNAME": "^eth,lo"}, ("10.2.0.1",)),
        (["h"], "ib0", {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "eth0"},
         ("h", "10.2.0.1", "127.0.0.1", "::1", "10.0.0.1", "fd00::1")),
    ],
)  # fmt: skip
def test_addresses_in_order(
    hosts: list[str], interface: str | None, environ: dict[str, str], first: tuple[str, ...]
) -> None:
    expected = (*first, *(address for address in OTHERS if address not in first))
    assert rank_addresses(FOUND, hosts, interface, environ) == expected


def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"interface: expected one of \['eth0', 'eth1', 'ib0', 'lo'\], got 'eth9'"):
        rank_addresses(FOUND, [], "eth9", {})


MANY_IPV4 = [Interface(f"veth{i}", f"100.100.1{i // 100:02}.1{i % 100:02}") for i in range(300)]
MANY_IPV6 = [Interface(f"veth{i}", f"2001:db8:1111:2222:3333:4444:5555:{0x1000 + i:x}") for i in range(300)]


@pytest.mark.parametrize("found", [MANY_IPV4, MANY_IPV6[:150], [*MANY_IPV4, *MANY_IPV6]], ids=["IPv4", "IPv6", "both"])
def test_the_metadata_of_a_host_with_many_addresses_can_be_read(found: list[Interface]) -> None:
    addresses = rank_addresses(found, ["192.168.0.1"], "veth149", {"GLOO_SOCKET_IFNAME": "veth77"})
    endpoint = Endpoint(addresses, 4711, SECRET, True)
    known = Endpoint.decode(endpoint.encode())
    named = ("192.168.0.1", *(entry.address for name in ("veth149", "veth77") for entry in found if entry.name == name))
    assert known == endpoint._replace(addresses=addresses[:MAX_ADDRESSES])
    assert known.addresses[: len(named)] == named
    assert len(known.addresses) == MAX_ADDRESSES


@pytest.mark.parametrize("found", [[], [Interface("eth0", "fe80::1"), Interface("eth1", "169.254.3.4")]])
def test_a_host_that_nobody_could_reach(found: list[Interface]) -> None:
    with pytest.raises(LocalProtocolError, match="could not be reached by anybody: no network interface is up"):
        rank_addresses(found, [], None, {})
    assert rank_addresses(found, ["10.0.0.1"], None, {}) == ("10.0.0.1",)


def test_loopback_alone_is_an_address() -> None:
    assert rank_addresses([Interface("lo", "127.0.0.1")], [], None, {}) == ("127.0.0.1",)


# ---------------------------------------------------------------------------------------- of a machine


def test_interfaces_that_are_up_and_their_addresses_without_scopes(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(family: int, address: str) -> Any:
        return SimpleNamespace(family=socket.AddressFamily(family), address=address)

    four, six, link = socket.AF_INET, socket.AF_INET6, socket.AF_PACKET
    found = {
        "lo": [entry(four, "127.0.0.1"), entry(six, "::1"), entry(link, "00:00:00:00:00:00")],
        "eth0": [entry(four, "10.0.0.1"), entry(six, "fd00::1"), entry(six, "fe80::1%eth0")],
        "eth0:1": [entry(four, "10.0.0.2")],
        "down0": [entry(four, "10.9.0.1")],
        "bond0": [entry(four, "10.1.0.1")],
        "gone0": [entry(four, "10.8.0.1")],
    }
    flags = {
        "lo": "up,loopback,running",
        "eth0": "up,broadcast,running",
        "down0": "broadcast,multicast",
        "bond0": "up,broadcast",
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(
        psutil, "net_if_stats", lambda: {name: SimpleNamespace(flags=each) for name, each in flags.items()}
    )
    assert interfaces() == [
        Interface("lo", "127.0.0.1"),
        Interface("eth0", "10.0.0.1"),
        Interface("eth0:1", "10.0.0.2"),
        Interface("bond0", "10.1.0.1"),
        Interface("lo", "::1"),
        Interface("eth0", "fd00::1"),
        Interface("eth0", "fe80::1"),
    ]


def test_the_interfaces_of_this_machine() -> None:
    found = interfaces()
    assert Interface("lo", "127.0.0.1") in found
    assert not any("%" in entry.address for entry in found)


def test_a_host_is_a_name_or_an_address() -> None:
    assert resolve("127.0.0.1") == ["127.0.0.1"]
    assert resolve("fe80::1%lo") == ["fe80::1"]
    with pytest.raises(ValueError, match=r"host: 'no\.such\.host\.invalid' has no address"):
        resolve("no.such.host.invalid")
