"""Where a gRPC call comes from: a caller itself, or a gateway that speaks for one.

A gateway sends in metadata which protocol its caller used, and from which address. Any gRPC caller can send
the same metadata, so the server believes it only with a proof: an HMAC under a key that is derived from the
root secret, which gateways and servers share and callers don't have.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import unquote

WIRE_KEY = "x-pomelo-wire"
"""Metadata in, from a gateway: the protocol that the caller used, which is what records name. With it
comes `x-request-timeout`, the seconds that the caller's deadline leaves."""

ADDRESS_KEY = "x-pomelo-address"
"""Metadata in, from a gateway: the IP address of the caller, empty if it has none."""

PROOF_KEY = "x-pomelo-proof"
"""Metadata in, from a gateway: the proof of the two values above, bound to the caller's key."""

log = logging.getLogger("pomelo.server")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a call comes from.

    `gateway` is whether the call claims to come from a gateway, `proven` whether its proof is
    valid. Only with a valid proof are `wire` and `address` the gateway's; else they are those of
    the connection.
    """

    gateway: bool
    proven: bool
    wire: str
    address: str


class GatewayProof:
    """Makes and checks the proofs of gateways. `key` is derived from the root secret; without one, nothing
    is proven."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key

    def metadata(self, wire: str, address: str, authorization: str) -> list[tuple[str, str]]:
        """What a gateway sends with a call; `authorization` is that of its metadata, empty if it has none."""
        if self._key is None:
            return [(WIRE_KEY, wire)]
        return [
            (WIRE_KEY, wire),
            (ADDRESS_KEY, address),
            (PROOF_KEY, _proof(self._key, wire, address, authorization)),
        ]

    def origin(self, metadata: Mapping[str, str], peer: str) -> Origin:
        """Where the call with this metadata comes from; `peer` is as gRPC writes it."""
        wire = metadata.get(WIRE_KEY)
        here = peer_address(peer)
        if wire is None:
            return Origin(False, False, "grpc", here)
        shown = metadata.get(PROOF_KEY)
        if shown is None:
            return Origin(True, False, "grpc", here)
        address = metadata.get(ADDRESS_KEY, "")
        if self._key is not None and hmac.compare_digest(
            shown.encode(), _proof(self._key, wire, address, metadata.get("authorization", "")).encode()
        ):
            return Origin(True, True, "rest" if wire == "rest" else "grpc", address)
        log.warning(
            "A gateway at %s is not recognised: it has another POMELO_SECRET than this server. "
            "Its calls count as gRPC calls from its own address",
            here or "a unix socket",
        )
        return Origin(True, False, "grpc", here)


def peer_address(peer: str) -> str:
    """The IP address in a gRPC peer, such as ipv4:127.0.0.1:5000; empty if there is none."""
    family, _, rest = peer.partition(":")
    if family == "ipv4":
        return rest.rpartition(":")[0]
    if family == "ipv6":
        return unquote(rest).rpartition(":")[0].strip("[]")
    return ""


def network(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 of an IPv6 one, which one host gets whole."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Network((int(parsed), 64), strict=False))


def is_within(address: str, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    """Whether an IP address belongs to one of the networks."""
    parsed = ip_address(address)
    return any(parsed in each for each in networks)


def _proof(key: bytes, wire: str, address: str, authorization: str) -> str:
    # Bound to the caller's key: a proof intercepted on a connection is useless with any other key.
    signed = "\n".join((wire, address, authorization))
    return hmac.digest(key, signed.encode(), "sha256").hex()
