"""Metadata, the handshake without a socket, and the order of addresses."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_transport._lanes.protocol import Frame, Visit, encode, first_frame
from ft_transport._net.endpoint import MAX_ADDRESSES, Interface, Invitation, in_order
from ft_transport._net.handshake import admit, knock
from ft_transport.errors import LocalProtocolError, RemoteProtocolError

SECRET = bytes(range(32))
HELLO = encode(Frame.HELLO, 1, 7, 0, [b"i" * 16, "name"])


# ------------------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize("tls", [False, True])
def test_metadata_round_trip(tls: bool) -> None:
    invitation = Invitation(("10.0.0.1", "fd00::2", "127.0.0.1", "::1"), 4711, SECRET, tls)
    assert Invitation.decode(invitation.encode()) == invitation


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "<n/a>",
        "http://host:1234/checkpoint/",
        "ft-lanes://:1/2/" + "00" * 32,
        "ft-lanes://10.0.0.1:1/2/" + "00" * 8,
        "ft-lanes://10.0.0.1:0/2/" + "00" * 32,
        "ft-lanes://10.0.0.1:70000/2/" + "00" * 32,
        "ft-lanes://10.0.0.999:1/2/" + "00" * 32,
        "ft-lanes://10.0.0.1:1/2/" + "00" * 32 + "\n",
        None,
        b"ft-lanes://10.0.0.1:1/2/" + b"00" * 32,
    ],
)
def test_other_metadata_is_refused(metadata: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="metadata"):
        Invitation.decode(metadata)


def test_another_version_is_refused_by_name() -> None:
    for version in (1, 3):
        with pytest.raises(RemoteProtocolError, match=f"expected version 2 of the lanes, the source has {version}"):
            Invitation.decode(f"ft-lanes://10.0.0.1:1/{version}/" + "00" * 32)


@pytest.mark.parametrize("tls", [False, True])
def test_version_1_refuses_this_one_by_name(tls: bool) -> None:
    """By its own rule, which finds the version before it looks at what else may have changed."""
    version_1 = re.compile(
        r"(ft-lanes(?:\+tls)?)://([0-9a-fA-F.:,\[\]]{2,4000}):(\d{1,5})/(\d{1,4})/((?:[0-9a-f]{2}){16,64})"
    )
    found = version_1.fullmatch(Invitation(("10.0.0.1", "fd00::2"), 4711, SECRET, tls).encode())
    assert found is not None, "it would be called another transport's"
    assert found[4] == "2"


def test_the_secret_is_in_no_message() -> None:
    metadata = Invitation(("10.0.0.1",), 4711, SECRET, False).encode()
    for wrong in (metadata.replace("ft-lanes", "other"), metadata.replace("/2/", "/1/"), metadata + "x"):
        with pytest.raises(RemoteProtocolError) as info:
            Invitation.decode(wrong)
        assert SECRET.hex()[:8] not in str(info.value)


# ----------------------------------------------------------------------------------------- handshake


class Side:
    """One side of a handshake, fed with bytes in pieces of any size."""

    def __init__(self, handshake: Generator[Any, bytes, Any]) -> None:
        self.sent = b""
        self.result: Any = None
        self.over = False
        self._handshake = handshake
        self._needed = 0
        self._incoming = b""
        self._go_on(None)

    def _go_on(self, data: bytes | None) -> None:
        try:
            step = self._handshake.send(data)  # type: ignore[arg-type]
            while isinstance(step, bytes):
                self.sent += step
                step = self._handshake.send(b"")
            self._needed = step
        except StopIteration as stop:
            self.over, self.result = True, stop.value

    def feed(self, data: bytes) -> int:
        """Take what the handshake wants of the data; gives how much that was."""
        taken = 0
        while not self.over and taken + self._needed - len(self._incoming) <= len(data):
            end = taken + self._needed - len(self._incoming)
            whole, self._incoming = self._incoming + data[taken:end], b""
            taken = end
            self._go_on(whole)
        if not self.over:
            self._incoming += data[taken:]
            taken = len(data)
        return taken

    def take(self) -> bytes:
        sent, self.sent = self.sent, b""
        return sent


def listening_side(secret: bytes) -> Generator[Any, bytes, Visit]:
    """As the listener runs it."""
    yield from admit(secret)
    return (yield from first_frame())


def meet(dialling: bytes, listening: bytes, piece: int) -> tuple[Side, Side]:
    """Run both sides against each other, so many bytes at a time."""
    caller, listener = Side(knock(dialling)), Side(listening_side(listening))
    for _ in range(3):
        for sender, receiver in ((caller, listener), (listener, caller)):
            data = sender.take()
            for begin in range(0, len(data), piece):
                receiver.feed(data[begin : begin + piece])
    return caller, listener


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_handshake(piece: int) -> None:
    caller, listener = meet(SECRET, SECRET, piece)
    assert caller.over
    assert not listener.over
    for begin in range(0, len(HELLO), piece):
        listener.feed(HELLO[begin : begin + piece])
    assert isinstance(listener.result, Visit)
    assert listener.result.body == (b"i" * 16, "name")
    assert listener.result.header.step == 7


def test_what_follows_the_handshake_is_left_alone() -> None:
    caller, listener = meet(SECRET, SECRET, 1000)
    assert listener.feed(HELLO + b"the next frame") == len(HELLO)
    assert caller.over


def test_a_stranger_gets_no_byte() -> None:
    for wrong in (b"\0" * 75, knock_bytes(SECRET)[:-1] + b"\0", b"GET / HTTP/1.1\r\n" * 10, knock_bytes(b"x" * 32)):
        listener = Side(listening_side(SECRET))
        with pytest.raises(RemoteProtocolError, match="a stranger"):
            listener.feed(wrong)
        assert listener.sent == b""


def knock_bytes(secret: bytes) -> bytes:
    return Side(knock(secret)).take()


def test_a_recorded_knock_does_not_enter() -> None:
    caller, first = Side(knock(SECRET)), Side(listening_side(SECRET))
    recorded = caller.take()
    first.feed(recorded)
    caller.feed(first.take())
    entering = caller.take()
    second = Side(listening_side(SECRET))
    second.feed(recorded)
    with pytest.raises(RemoteProtocolError, match="heard somebody else knock"):
        second.feed(entering)


def test_a_listener_without_the_secret_is_found() -> None:
    caller = Side(knock(SECRET))
    with pytest.raises(RemoteProtocolError, match="does not know the secret"):
        caller.feed(b"\0" * 64)


@given(st.integers(0, 8 * 75 - 1))
def test_any_flipped_bit_makes_a_stranger(bit: int) -> None:
    knocked = bytearray(knock_bytes(SECRET))
    knocked[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteProtocolError):
        Side(listening_side(SECRET)).feed(bytes(knocked))


@pytest.mark.parametrize(
    "first", [encode(Frame.DONE, 1, 7), encode(Frame.HELLO, 1, 7, 0, [b"i" * 16, "n" * 5000])], ids=["DONE", "long"]
)
def test_only_small_first_frames_are_read(first: bytes) -> None:
    _, listener = meet(SECRET, SECRET, 1000)
    with pytest.raises(RemoteProtocolError, match="cannot come first"):
        listener.feed(first)


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
    assert in_order(FOUND, hosts, interface, environ) == expected


def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"interface: expected one of \['eth0', 'eth1', 'ib0', 'lo'\], got 'eth9'"):
        in_order(FOUND, [], "eth9", {})


MANY_IPV4 = [Interface(f"veth{i}", f"100.100.1{i // 100:02}.1{i % 100:02}") for i in range(300)]
MANY_IPV6 = [Interface(f"veth{i}", f"2001:db8:1111:2222:3333:4444:5555:{0x1000 + i:x}") for i in range(300)]


@pytest.mark.parametrize("found", [MANY_IPV4, MANY_IPV6[:150], [*MANY_IPV4, *MANY_IPV6]], ids=["IPv4", "IPv6", "both"])
def test_the_metadata_of_a_host_with_many_addresses_can_be_read(found: list[Interface]) -> None:
    addresses = in_order(found, ["192.168.0.1"], "veth149", {"GLOO_SOCKET_IFNAME": "veth77"})
    invitation = Invitation(addresses, 4711, SECRET, True)
    known = Invitation.decode(invitation.encode())
    named = ("192.168.0.1", *(entry.address for name in ("veth149", "veth77") for entry in found if entry.name == name))
    assert known == invitation._replace(addresses=addresses[:MAX_ADDRESSES])
    assert known.addresses[: len(named)] == named
    assert len(known.addresses) == MAX_ADDRESSES


@pytest.mark.parametrize("found", [[], [Interface("eth0", "fe80::1"), Interface("eth1", "169.254.3.4")]])
def test_a_host_that_nobody_could_reach(found: list[Interface]) -> None:
    with pytest.raises(LocalProtocolError, match="could not be reached by anybody: no network interface is up"):
        in_order(found, [], None, {})
    assert in_order(found, ["10.0.0.1"], None, {}) == ("10.0.0.1",)


def test_loopback_alone_is_an_address() -> None:
    assert in_order([Interface("lo", "127.0.0.1")], [], None, {}) == ("127.0.0.1",)
