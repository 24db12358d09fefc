"""The origin of a gRPC call: a caller itself, or a gateway that forwards the call of one.

A gateway sends its caller's protocol and address in metadata. Any gRPC caller can send the same metadata, so
the server accepts it only with a proof: an HMAC with a key derived from the root secret, which gateways and
servers share and callers don't have.
"""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple
from urllib.parse import unquote

PROTOCOL_KEY = "x-pomelo-wire"
"""Request metadata from a gateway: the caller's protocol, for the usage record. `x-request-timeout` comes
with it: the seconds until the caller's deadline."""

ADDRESS_KEY = "x-pomelo-address"
"""Request metadata from a gateway: the IP address of the caller, empty if it has none."""

PROOF_KEY = "x-pomelo-proof"
"""Request metadata from a gateway: the proof of the two values above, bound to the caller's key."""

FORWARDED_KEY = "x-forwarded-for"
"""Request metadata from a proxy: the addresses of the caller and of the proxies before this one."""

_MAX_PROXIES = 8
"""The maximum number of addresses that are read in X-Forwarded-For."""

_WITH_PORT = re.compile(r"\[([^\[\]]*)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}")
"""An address as some proxies forward it, such as Azure's: with a port, or an IPv6 address in brackets."""

log = logging.getLogger("pomelo.server")


class Origin(NamedTuple):
    """The origin of a call.

    `gateway` is whether the call claims to come from a gateway, `proven` whether its proof is valid. With a
    valid proof `protocol` and `address` are the gateway's values; otherwise they are those of the connection.
    """

    gateway: bool
    proven: bool
    protocol: str
    address: str


class GatewayProof:
    """Creates and checks the proofs of gateways. `key` is derived from the root secret; without it no proof
    is created or accepted. Proofs by `previous` keys are accepted too."""

    __slots__ = ("_key", "_previous")

    def __init__(self, key: bytes | None = None, previous: Sequence[bytes] = ()) -> None:
        self._key = key
        self._previous = previous

    @property
    def known(self) -> bool:
        """Whether it can create proofs."""
        return self._key is not None

    def metadata(self, protocol: str, address: str, authorization: str) -> list[tuple[str, str]]:
        """Returns a gateway's metadata of a call; `authorization` is the header of the same call, empty if
        absent."""
        if self._key is None:
            return [(PROTOCOL_KEY, protocol)]
        return [
            (PROTOCOL_KEY, protocol),
            (ADDRESS_KEY, address),
            (PROOF_KEY, _proof(self._key, protocol, address, authorization)),
        ]

    def origin(self, metadata: Mapping[str, str], peer: str) -> Origin:
        """Returns the origin of the call with this metadata; `peer` is gRPC's name of the other end."""
        protocol = metadata.get(PROTOCOL_KEY)
        peer_ip = peer_address(peer)
        if protocol is None:
            return Origin(False, False, "grpc", peer_ip)
        proof = metadata.get(PROOF_KEY)
        if proof is None:
            return Origin(True, False, "grpc", peer_ip)
        address = metadata.get(ADDRESS_KEY, "")
        authorization = metadata.get("authorization", "")
        if self._key is not None and any(
            hmac.compare_digest(proof.encode(), _proof(key, protocol, address, authorization).encode())
            for key in (self._key, *self._previous)
        ):
            return Origin(True, True, "rest" if protocol == "rest" else "grpc", address)
        log.warning(
            "A gateway at %s is not recognised: it has another POMELO_SECRET than this server. "
            "Its calls count as gRPC calls from its own address",
            peer_ip or "a unix socket",
        )
        return Origin(True, False, "grpc", peer_ip)


def peer_address(peer: str) -> str:
    """Returns the IP address of a gRPC peer such as ipv4:127.0.0.1:5000; empty if it has none."""
    family, _, rest = peer.partition(":")
    if family == "ipv4":
        return rest.rpartition(":")[0]
    if family == "ipv6":
        return unquote(rest).rpartition(":")[0].strip("[]")
    return ""


def network(address: str) -> str:
    """Returns the network that is limited as one address: an IPv4 address, or the /64 network of an IPv6 one,
    which one host usually controls."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address[:64]
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Network((int(parsed), 64), strict=False))


def caller_address(peer: str, forwarded: str, proxies: Iterable[IPv4Network | IPv6Network]) -> str:
    """Returns the IP address of a caller: `peer`, or, if that is one of the operator's `proxies`, the last
    address in `forwarded` that is not a proxy's.

    `forwarded` is the value of X-Forwarded-For. Each proxy appends the address from which it got the request,
    some with its port. What is before those may be anything.
    """
    caller = ""
    for address in (peer, *reversed(forwarded.rsplit(",", _MAX_PROXIES))):
        address = address.strip()
        if (match := _WITH_PORT.fullmatch(address)) is not None:
            address = match[1] or match[2] or ""
        try:
            is_proxy = is_within(address, proxies)
        except ValueError:
            break
        caller = address
        if not is_proxy:
            break
    return caller


def is_within(address: str, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    """Whether an IP address is in one of the networks; as an IPv4 address, if it is one written as IPv6."""
    parsed = ip_address(address)
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return any(parsed in each for each in networks)


def _proof(key: bytes, protocol: str, address: str, authorization: str) -> str:
    # Bound to the caller's key: an intercepted proof is useless with any other key.
    signed = "\n".join((protocol, address, authorization))
    return hmac.digest(key, signed.encode(), "sha256").hex()
