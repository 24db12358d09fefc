"""The origin of a gRPC call, whose gateway is recognised by its proof, and the network of an address."""

from __future__ import annotations

import logging
from ipaddress import ip_network

import pytest

from pomelo.network.origin import (
    ADDRESS_KEY,
    PROOF_KEY,
    PROTOCOL_KEY,
    GatewayProof,
    Origin,
    caller_address,
    is_within,
    network,
    peer_address,
)

PEER = "ipv4:192.0.2.7:5000"
OURS = GatewayProof(b"k" * 32)
BEARER = "Bearer pml_test_x"


def gateway_metadata(
    protocol: str = "rest", address: str = "203.0.113.9", key: str = BEARER
) -> dict[str, str]:
    """Returns the metadata of a call that a gateway forwards."""
    return {**dict(OURS.metadata(protocol, address, key)), **({"authorization": key} if key else {})}


def test_the_metadata_of_a_proven_gateway_is_accepted() -> None:
    for protocol in ("rest", "grpc"):
        for address in ("203.0.113.9", "2001:db8::1", "fe80::1%eth0", ""):
            for key in (BEARER, ""):
                assert OURS.origin(gateway_metadata(protocol, address, key), PEER) == Origin(
                    True, True, protocol, address
                )


def test_a_caller_is_not_a_gateway() -> None:
    assert OURS.origin({"authorization": BEARER}, PEER) == Origin(False, False, "grpc", "192.0.2.7")
    alone = {PROOF_KEY: gateway_metadata()[PROOF_KEY], ADDRESS_KEY: "203.0.113.9"}
    assert OURS.origin(alone, PEER) == Origin(False, False, "grpc", "192.0.2.7")


@pytest.mark.parametrize(
    "change",
    [
        {PROOF_KEY: "0" * 64},
        {PROOF_KEY: ""},
        {PROOF_KEY: "é"},
        {ADDRESS_KEY: "198.51.100.1"},
        {PROTOCOL_KEY: "grpc"},
        {PROTOCOL_KEY: "rest\n203"},
        {"authorization": "Bearer another"},
    ],
)
def test_metadata_that_differs_from_its_proof_is_not_trusted(change: dict[str, str]) -> None:
    assert OURS.origin(gateway_metadata() | change, PEER) == Origin(True, False, "grpc", "192.0.2.7")


@pytest.mark.parametrize("missing", [PROOF_KEY, ADDRESS_KEY, "authorization"])
def test_metadata_with_a_missing_entry_is_not_trusted(missing: str) -> None:
    incomplete = {name: value for name, value in gateway_metadata().items() if name != missing}
    assert OURS.origin(incomplete, PEER) == Origin(True, False, "grpc", "192.0.2.7")


def test_a_proof_with_another_secret_is_refused_and_logged_without_the_key(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for server in (GatewayProof(b"x" * 32), GatewayProof()):
        caplog.clear()
        assert server.origin(gateway_metadata(), PEER) == Origin(True, False, "grpc", "192.0.2.7")
        (record,) = caplog.records
        assert (record.name, record.levelno) == ("pomelo.server", logging.WARNING)
        assert "POMELO_SECRET" in record.getMessage()
        assert "192.0.2.7" in record.getMessage()
        assert "pml_" not in record.getMessage()


def test_a_gateway_without_the_secret_claims_no_address_and_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metadata = GatewayProof().metadata("rest", "203.0.113.9", BEARER)
    assert metadata == [(PROTOCOL_KEY, "rest")]
    assert OURS.origin(dict(metadata), PEER) == Origin(True, False, "grpc", "192.0.2.7")
    assert not caplog.records


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.7:5000", "192.0.2.7"),
        ("ipv6:[2001:db8::1]:5000", "2001:db8::1"),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::1%eth0"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:5000", "::ffff:192.0.2.7"),
        ("unix:", ""),
        ("unix:/run/pomelo.sock", ""),
        ("", ""),
        ("unknown", ""),
    ],
)
def test_the_address_of_a_peer_is_read_as_grpc_writes_it(peer: str, address: str) -> None:
    assert peer_address(peer) == address


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::1", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
        ("unix", "unix"),
        ("x" * 65, "x" * 64),
    ],
)
def test_an_ipv4_address_and_the_first_half_of_an_ipv6_one_are_one_network(
    address: str, expected: str
) -> None:
    assert network(address) == expected


def test_an_address_is_within_any_of_several_networks() -> None:
    networks = [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")]
    assert is_within("10.1.2.3", networks)
    assert is_within("2001:db8::1", networks)
    assert is_within("::ffff:10.1.2.3", networks)
    assert not is_within("11.0.0.1", networks)
    assert not is_within("2001:db9::1", networks)
    assert not is_within("10.1.2.3", [])


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("192.0.2.7", "203.0.113.1", "192.0.2.7"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.1", "203.0.113.1"),
        ("10.0.0.1", "198.51.100.9, 203.0.113.1,10.0.0.2 , ::1", "203.0.113.1"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", "2001:db8::7", "2001:db8::7"),
        ("10.0.0.1", "203.0.113.1, unknown", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.1, 10.0.0.2:4711", "203.0.113.1"),
        ("10.0.0.1", "203.0.113.1:4711", "203.0.113.1"),
        ("10.0.0.1", "[2001:db8::7]:4711, 10.0.0.2", "2001:db8::7"),
        ("10.0.0.1", "[2001:db8::7]", "2001:db8::7"),
        ("10.0.0.1", "203.0.113.1, 10.0.0.2:port", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.1, []:80", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.1, [10.0.0.2", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.1, 2001:db8::7:47110", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.1," + "10.0.0.2," * 8 + "10.0.0.2", "10.0.0.2"),
        ("", "203.0.113.1", ""),
    ],
)
def test_the_caller_is_the_last_forwarded_address_that_is_no_proxy(
    peer: str, forwarded: str, expected: str
) -> None:
    proxies = [ip_network("10.0.0.0/8"), ip_network("::1")]
    assert caller_address(peer, forwarded, proxies) == expected


@pytest.mark.parametrize(("protocol", "expected"), [("rest", "rest"), ("grpc", "grpc"), ("other", "grpc")])
def test_any_protocol_of_a_proven_gateway_but_rest_counts_as_grpc(protocol: str, expected: str) -> None:
    origin = OURS.origin(gateway_metadata(protocol, "192.0.2.1"), PEER)
    assert (origin.proven, origin.protocol, origin.address) == (True, expected, "192.0.2.1")


def test_a_proof_of_a_previous_key_is_accepted() -> None:
    new = GatewayProof(b"n" * 32, [b"o" * 32, b"k" * 32])
    assert new.origin(gateway_metadata(), PEER).proven
    assert not OURS.origin(dict(new.metadata("rest", "", "")), PEER).proven
    assert not GatewayProof(b"n" * 32).origin(gateway_metadata(), PEER).proven
