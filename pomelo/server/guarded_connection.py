"""The state of one connection that the guard of the gRPC port watches."""

from __future__ import annotations

from pomelo.network.origin import network
from pomelo.server.accepted_sockets import AcceptedSocket
from pomelo.server.connection_limits import ConnectionLimits


class Calls:
    """What the server has reported about the calls of one connection."""

    __slots__ = ("checking", "messages", "open", "resets", "sending", "size", "total", "trusted")

    def __init__(self) -> None:
        self.checking = self.total = self.open = self.sending = self.messages = self.size = self.resets = 0
        self.trusted = False


class Connection:
    """One connection, as of the last scan.

    `since` is the time of its first scan, `used` that of its last call, `idle` the unexplained bytes received
    since then. `unexplained` and `resets` are the levels of two leaky buckets; `large` is whether it had too
    many bytes. At the time `read` its caller had last read something, `read_bytes` in all, or was not only
    left with responses to read.
    """

    __slots__ = (
        "address", "calls", "closed", "ended", "idle", "large", "quiet", "read", "read_bytes", "resets",
        "seen", "since", "socket", "trusted", "unexplained", "used",
    )  # fmt: skip

    def __init__(self, socket: AcceptedSocket, calls: Calls, now: float) -> None:
        self.socket = socket
        self.calls = calls
        self.address = network(socket.host)
        self.since = self.used = self.read = now
        self.read_bytes = 0
        self.trusted = self.closed = self.ended = self.large = self.quiet = False
        self.unexplained = self.resets = 0.0
        self.idle = 0
        self.seen = (0, 0, 0, 0, 0, 0)

    @property
    def exempt(self) -> bool:
        """Whether no limit but the total applies: it comes from a trusted network or a proven gateway."""
        return self.trusted or self.calls.trusted

    def is_unused(self) -> bool:
        """Returns whether no call runs on it, and none did when this was called before: the response to a
        call that has just ended may not be written yet."""
        calls, before = self.calls, self.quiet
        self.quiet = not (calls.open or calls.sending or calls.checking)
        return self.quiet and before

    def update(self, now: float, elapsed: float, limits: ConnectionLimits) -> None:
        """Updates it with the `elapsed` seconds since the last scan."""
        calls, socket = self.calls, self.socket
        seen = (calls.total, calls.messages, calls.size, calls.resets, socket.received, socket.sent)
        if seen != self.seen:
            started, messages, size, resets, received, sent = map(int.__sub__, seen, self.seen)
            self.seen = seen
            # Messages have framing and TLS overhead; the peer acknowledges sent data with window updates and
            # pings.
            accounted = size + size // 8 + messages * 256 + started * limits.call_bytes + sent // 8
            self.unexplained += received - accounted
            if started or calls.open:
                self.used = now
                self.idle = 0
            else:  # a call may have received messages and ended since the last scan
                self.idle += max(received - accounted, 0)
            self.resets += resets
        if not calls.sending or calls.open or socket.sent - self.read_bytes >= limits.unread_bytes:
            self.read, self.read_bytes = now, socket.sent
        if self.unexplained:
            self.unexplained = max(self.unexplained - elapsed * limits.unexplained_rate, 0.0)
        if self.resets:
            self.resets = max(self.resets - elapsed * limits.resets / limits.reset_window, 0.0)
