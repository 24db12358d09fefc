"""What connections to the gRPC server may cost, and the interface that reports what their calls do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network

_KIB = 1024
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What connections may do. Sizes are in bytes, times in seconds.

    A connection is authenticated by its first call with a valid key. An address is an IPv4 address or the /64
    network of an IPv6 one. `trusted` are networks of proxies, whose connections carry the calls of many
    callers: only the limit of open connections applies to them.
    """

    connections: int = 1024
    """Open connections. Above it unauthenticated ones are closed, then authenticated ones without a call."""
    hard_connections: int = 2048
    """Open connections above which gRPC itself closes every new one; reached between two scans only."""
    per_address: int = 64
    """Unauthenticated connections of one address that are older than `grace`."""
    per_flooding_address: int = 8
    """The same for an address with `floods` connections that were closed for flooding within `penalty`."""
    grace: float = 3.0
    """Time for a TLS handshake over a slow network and for a busy server."""
    key_timeout: float = 9.0
    """How long a connection may be unauthenticated. Including the time between two scans it is below 10 s."""
    unauthenticated_bytes: int = 256 * _KIB
    """Received on an unauthenticated connection, in two scans. Neither this nor `unauthenticated_resets`
    applies within `grace` while a key is being looked up."""
    unauthenticated_resets: int = 50
    """Calls that were reset on an unauthenticated connection, and those whose responses are unread."""
    resets: int = 200
    reset_window: float = 10.0
    """Calls that may be reset within `reset_window`."""
    unexplained: int = 16 * _MIB
    unexplained_rate: int = _MIB
    """Received on an authenticated connection beyond what its calls account for, as a burst and per second,
    in two scans. Messages of cancelled and refused calls are unexplained, and so are frames that belong to no
    call."""
    call_bytes: int = 72 * _KIB
    """Accounted for per call besides its messages: headers, and a window of data that was not read."""
    reading_bytes: int = 128 * _MIB
    """Maximum accounted for by messages that are still being received."""
    idle_bytes: int = 512 * _KIB
    """Received on an authenticated connection since its last call ended, in two scans: frames that belong to
    no call."""
    unread_time: float = 60.0
    unread_bytes: int = 4 * _KIB
    """A caller whose calls have ended must read so many bytes of their responses within `unread_time`. Pings
    take less."""
    floods: int = 3
    penalty: float = 60.0
    trusted: tuple[IPv4Network | IPv6Network, ...] = ()

    def within(self, descriptors: int) -> ConnectionLimits:
        """Returns these limits, lowered so that gRPC uses at most a quarter of the process's
        `descriptors`."""
        connections = max(min(self.connections, descriptors // 8), 1)
        return replace(
            self, connections=connections, hard_connections=min(self.hard_connections, 2 * connections)
        )


class ConnectionObserver:
    """Receives reports about the calls of each connection, and ignores them. `peer` is grpc's name of the
    other end."""

    def checking(self, peer: str) -> None:
        """Reports that the key of a call is being looked up. `checked` must follow."""

    def checked(self, peer: str) -> None:
        """Reports that the key of a call was looked up."""

    def authenticated(self, peer: str) -> None:
        """Reports a call with a valid key, once. `ended` must follow."""

    def received(self, peer: str, size: int) -> None:
        """Reports that a message of `size` bytes was read."""

    def reset(self, peer: str) -> None:
        """Reports a call that was cancelled before its message was read or shortly after it began."""

    def ended(self, peer: str) -> None:
        """Reports that a call with a valid key has ended, once."""

    def sending(self, peer: str) -> None:
        """Reports that a call has ended except for the rest of its response, which its caller may read
        slowly. `sent` must follow."""

    def sent(self, peer: str) -> None:
        """Reports that the response was sent, or that the caller has left."""

    def trust(self, peer: str) -> None:
        """Reports that the peer is a proven gateway, whose connection carries the calls of many callers."""
