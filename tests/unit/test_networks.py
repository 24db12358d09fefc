"""The network of an address, the networks that contain it, and the protocol of a proven gateway."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from pomelo.origin import GatewayProof, is_within, network


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
    assert not is_within("11.0.0.1", networks)
    assert not is_within("2001:db9::1", networks)
    assert not is_within("10.1.2.3", [])


@pytest.mark.parametrize(("protocol", "expected"), [("rest", "rest"), ("grpc", "grpc"), ("other", "grpc")])
def test_any_protocol_of_a_proven_gateway_but_rest_counts_as_grpc(protocol: str, expected: str) -> None:
    proof = GatewayProof(b"key")
    sent = dict(proof.metadata(protocol, "192.0.2.1", "Bearer key")) | {"authorization": "Bearer key"}
    origin = proof.origin(sent, "ipv4:127.0.0.1:5")
    assert (origin.proven, origin.protocol, origin.address) == (True, expected, "192.0.2.1")
