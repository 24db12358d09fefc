"""The guard of the gRPC port: bounds the cost of connections, and closes those that exceed the limits.

gRPC accepts connections and reads frames in its own threads. It has one limit, on the connections in total:
no share per address, no deadline for sending a key, and no protection from most floods of frames. So a task
beside the server scans the connections a few times a second and closes offenders. It proxies no data.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network

from pomelo.logs import format_trace
from pomelo.origin import is_within, network
from pomelo.server.limits import Connections
from pomelo.server.sockets import AcceptedSocket, AcceptedSockets

log = logging.getLogger("pomelo.server")

_KIB = 1024
_MIB = 1024 * 1024

_LEAST_PAUSE = 0.25
_MOST_PAUSE = 1.0
_SCAN_SHARE = 0.01
"""Seconds between two scans, and the share of a core that they may take while nothing is wrong."""
_URGENT_PAUSE = 0.05
"""Seconds between two scans where a quarter of a second lets too much happen."""
_WAKE_EVERY = 64
"""After how many resets on one connection the next scan comes early."""

_LOG_EVERY = 10.0
_REMEMBERED = 10_000
"""Addresses that are remembered for their floods."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What connections may do. Sizes are in bytes, times in seconds.

    A connection is authenticated once a call with a good key came over it. An address is an IPv4 address or
    the /64 network of an IPv6 one. `trusted` are networks of proxies, whose connections carry the calls of
    many callers: they only count as open ones.
    """

    connections: int = 1024
    """Open at a time. Above it unauthenticated ones are closed, then authenticated ones without a call."""
    hard_connections: int = 2048
    """Above it gRPC closes every new one itself: this many may be open between two scans."""
    per_address: int = 64
    """Unauthenticated ones of one address that are older than `grace`."""
    per_flooding_address: int = 8
    """The same for an address that had `floods` connections closed for flooding within `penalty`."""
    grace: float = 3.0
    """A key takes its time: a TLS handshake from far away, a server that has much to do."""
    key_timeout: float = 9.0
    """How long one may be unauthenticated. With the time between two scans it is gone within 10 s."""
    unauthenticated_bytes: int = 256 * _KIB
    """Received on an unauthenticated one, in two scans. Neither this nor `unauthenticated_resets` applies
    within `grace` while a key is being looked up."""
    unauthenticated_resets: int = 50
    resets: int = 200
    reset_window: float = 10.0
    """Calls that may be cancelled within `reset_window` before their message was read."""
    unexplained: int = 16 * _MIB
    unexplained_rate: int = _MIB
    """Received on an authenticated one beyond what its calls explain, as a burst and per second. Bodies of
    cancelled and refused calls are unexplained; so are frames that belong to no call."""
    call_bytes: int = 72 * _KIB
    """What explains a call besides its messages: headers, and a window of data that nobody read."""
    reading_bytes: int = 128 * _MIB
    """What messages that are still being received explain at most."""
    idle_bytes: int = 512 * _KIB
    """Received on an authenticated one since its last call ended: only frames that belong to no call."""
    floods: int = 3
    penalty: float = 60.0
    trusted: tuple[IPv4Network | IPv6Network, ...] = ()

    def within(self, descriptors: int) -> ConnectionLimits:
        """These limits where a process may have so many descriptors: gRPC gets a quarter at most."""
        connections = max(min(self.connections, descriptors // 8), 1)
        return replace(
            self, connections=connections, hard_connections=min(self.hard_connections, 2 * connections)
        )


class _Calls:
    """What the server reported about the calls of one peer."""

    __slots__ = ("checking", "messages", "open", "resets", "size", "total", "trusted")

    def __init__(self) -> None:
        self.checking = self.total = self.open = self.messages = self.size = self.resets = 0
        self.trusted = False


class _Connection:
    """One connection, as of the last scan.

    `since` is when it was first seen, `used` when it last had a call, `idle` the bytes received since then.
    `unexplained` and `resets` are the levels of two leaky buckets.
    """

    __slots__ = (
        "address",
        "calls",
        "closed",
        "idle",
        "large",
        "resets",
        "seen",
        "since",
        "socket",
        "trusted",
        "unexplained",
        "used",
    )

    def __init__(self, socket: AcceptedSocket, calls: _Calls, now: float) -> None:
        self.socket = socket
        self.calls = calls
        self.address = network(socket.host)
        self.since = self.used = now
        self.trusted = self.closed = self.large = False
        self.unexplained = self.resets = 0.0
        self.idle = 0
        self.seen = (0, 0, 0, 0, 0, 0)

    @property
    def exempt(self) -> bool:
        """Whether it is left alone: it comes from a trusted network, or it is one of our gateways'."""
        return self.trusted or self.calls.trusted

    def update(self, now: float, elapsed: float, limits: ConnectionLimits) -> None:
        """Updates it with what happened in the `elapsed` seconds since the last time."""
        calls, socket = self.calls, self.socket
        seen = (calls.total, calls.messages, calls.size, calls.resets, socket.received, socket.sent)
        if seen != self.seen:
            begun, messages, size, resets, received, sent = map(int.__sub__, seen, self.seen)
            self.seen = seen
            if begun or calls.open:
                self.used = now
                self.idle = 0
            else:
                self.idle += received
            # Around a message are frames and TLS; what is sent is answered with windows and pings.
            explained = size + size // 8 + messages * 256 + begun * limits.call_bytes + sent // 8
            self.unexplained += received - explained
            self.resets += resets
        if self.unexplained:
            self.unexplained = max(self.unexplained - elapsed * limits.unexplained_rate, 0.0)
        if self.resets:
            self.resets = max(self.resets - elapsed * limits.resets / limits.reset_window, 0.0)


class ConnectionGuard(Connections):
    """Watches the connections of a gRPC server that takes messages of up to `message_limit` bytes.

    The server reports what the calls of a `peer` do, which gRPC names by `context.peer()`; each of these
    methods costs one dictionary access. Before `watch` and after it they do nothing.
    """

    def __init__(self, limits: ConnectionLimits, message_limit: int) -> None:
        self.count = 0
        """Open connections, as of the last scan."""
        self.limits = limits
        self._message_limit = message_limit
        self._watching = False
        self._sockets: AcceptedSockets
        self._calls: dict[str, _Calls] = {}
        self._connections: dict[AcceptedSocket, _Connection] = {}
        self._floods: dict[str, tuple[int, float]] = {}
        """Address -> its connections that were closed for flooding, and when the first of them was."""
        self._scanned = 0.0
        self._clock = 0.0
        self._wake = asyncio.Event()
        self._closed: Counter[str] = Counter()
        self._closed_addresses: Counter[str] = Counter()
        self._logged = -_LOG_EVERY

    # --- what the server reports

    def checking(self, peer: str) -> None:
        """The key of a call is about to be looked up. `checked` must follow."""
        calls = self._calls.get(peer)
        if calls is None:
            if not self._watching:
                return
            calls = self._calls[peer] = _Calls()
        calls.checking += 1

    def checked(self, peer: str) -> None:
        """The key of a call was looked up."""
        calls = self._calls.get(peer)
        if calls is not None and calls.checking:
            calls.checking -= 1

    def authenticated(self, peer: str) -> None:
        """A call with a good key has begun. `ended` must follow."""
        calls = self._calls.get(peer)
        if calls is None:
            if not self._watching:
                return
            calls = self._calls[peer] = _Calls()
        calls.total += 1
        calls.open += 1

    def received(self, peer: str, size: int) -> None:
        """A message of `size` bytes was read."""
        calls = self._calls.get(peer)
        if calls is not None:
            calls.messages += 1
            calls.size += size

    def reset(self, peer: str) -> None:
        """A call was cancelled before its message was read, with a good key or without."""
        calls = self._calls.get(peer)
        if calls is None:
            if not self._watching:
                return
            calls = self._calls[peer] = _Calls()
        calls.resets += 1
        if not calls.resets % _WAKE_EVERY:
            self._wake.set()

    def ended(self, peer: str) -> None:
        """A call with a good key has ended."""
        calls = self._calls.get(peer)
        if calls is not None and calls.open:
            calls.open -= 1

    def trust(self, peer: str) -> None:
        """The peer is one of our gateways: its connection carries many callers' calls, and is left alone."""
        calls = self._calls.get(peer)
        if calls is not None:
            calls.trusted = True

    # --- the task

    @asynccontextmanager
    async def watch(self, ports: Collection[int]) -> AsyncIterator[None]:
        """Watches the connections that this process accepts on `ports`, until the body ends. Where the system
        does not show them, one line in the log says so."""
        if not ports:
            yield
            return
        try:
            self._sockets = AcceptedSockets(ports)
        except OSError as error:
            log.warning("gRPC connections are not guarded against floods and idle callers: %s", error)
            yield
            return
        self._watching = True
        self._scanned = time.monotonic()
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._watching = False
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            if self._closed:
                self._report()
            self._calls.clear()

    async def _run(self) -> None:
        while True:
            started = time.perf_counter()
            most = _MOST_PAUSE
            try:
                most = self.scan(time.monotonic())
            except OSError:
                pass  # no descriptor is free; one may be soon
            except Exception as fault:
                log.error("the guard of gRPC connections failed once\n%s", format_trace(fault))
            pause = min(max((time.perf_counter() - started) / _SCAN_SHARE, _LEAST_PAUSE), most)
            await asyncio.sleep(_URGENT_PAUSE)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause - _URGENT_PAUSE):
                    await self._wake.wait()
            self._wake.clear()

    def scan(self, now: float) -> float:
        """Looks at every connection, and closes offenders. Returns the seconds after which to look again: few
        when some were closed, fewer still when there were too many in all.

        Raises:
            OSError: no descriptor is free.
        """
        limits = self.limits
        elapsed, self._scanned = now - self._scanned, now
        # Connections do not age while the event loop is blocked, because it could not read their keys.
        self._clock = now = self._clock + min(elapsed, 2 * _MOST_PAUSE)
        before, connections = self._connections, {}
        new: defaultdict[str, list[_Connection]] = defaultdict(list)
        known: defaultdict[str, list[_Connection]] = defaultdict(list)
        count, closed = 0, False
        for socket in self._sockets.list():
            connection = before.get(socket)
            if connection is None:
                connection = _Connection(socket, self._calls.setdefault(socket.peer, _Calls()), now)
                connection.trusted = bool(limits.trusted) and is_within(socket.host, limits.trusted)
            connections[socket] = connection
            if connection.closed:
                continue
            connection.update(now, elapsed, limits)
            if reason := self._offence(connection, now):
                self._close(connection, reason)
                closed = True
                continue
            count += 1
            if connection.calls.total or connection.exempt:
                known[connection.address].append(connection)
            else:
                new[connection.address].append(connection)
        self._connections = connections
        self._calls = {socket.peer: connection.calls for socket, connection in connections.items()}
        victims = self._above_share(new, now)
        pause = _MOST_PAUSE
        if closed or victims or sum(map(len, new.values())) > limits.per_address:
            pause = _LEAST_PAUSE
        if (excess := count - len(victims) - limits.connections) > 0:
            victims |= self._above_total(new, known, victims, excess)
            pause = _URGENT_PAUSE
        for connection, reason in victims.items():
            self._close(connection, reason)
        self.count = count - len(victims)
        if self._closed and self._scanned - self._logged >= _LOG_EVERY:
            self._report()
        return pause

    def _offence(self, connection: _Connection, now: float) -> str:
        """Why a connection is closed regardless of other connections; empty if it isn't."""
        limits, calls, size = self.limits, connection.calls, connection.socket.received
        if connection.exempt:
            return ""
        if not calls.total:
            if now - connection.since > limits.key_timeout:
                return "without a key in time"
            flooding = self._is_flooding(connection.address, now)
            if calls.checking and now - connection.since <= limits.grace and not flooding:
                return ""  # the look-up of a key may be slow, and its caller did nothing wrong
            if size > limits.unauthenticated_bytes:
                if connection.large or flooding:
                    return self._flood(connection, now)
                connection.large = True
            if connection.resets > limits.unauthenticated_resets:
                return self._flood(connection, now)
            return ""
        allowed = limits.unexplained + min(calls.open * self._message_limit, limits.reading_bytes)
        if (
            connection.unexplained > allowed
            or connection.idle > limits.idle_bytes
            or connection.resets > limits.resets
        ):
            return self._flood(connection, now)
        return ""

    def _above_share(self, new: dict[str, list[_Connection]], now: float) -> dict[_Connection, str]:
        """The oldest unauthenticated connections of addresses that have too many."""
        limits = self.limits
        victims = {}
        for address, those in new.items():
            flooding = self._is_flooding(address, now)
            share = limits.per_flooding_address if flooding else limits.per_address
            if len(those) <= share:
                continue
            those.sort(key=lambda one: one.since)
            for connection in those[: len(those) - share]:
                if now - connection.since > limits.grace:
                    victims[connection] = "too many without a key from one address"
        return victims

    def _above_total(
        self,
        new: dict[str, list[_Connection]],
        known: dict[str, list[_Connection]],
        besides: Collection[_Connection],
        excess: int,
    ) -> dict[_Connection, str]:
        """Which connections to close so that there are `excess` fewer: those of addresses with the most,
        unauthenticated ones first, then those without a call; the oldest of each address first."""
        ranked = []
        for group, candidates in (
            (0, [[one for one in those if one not in besides] for those in new.values()]),
            (
                1,
                [[one for one in those if not one.calls.open and not one.exempt] for those in known.values()],
            ),
        ):
            for those in candidates:
                those.sort(key=lambda one: one.used)
                ranked += [(group, place - len(those), one) for place, one in enumerate(those)]
        ranked.sort(key=lambda entry: entry[:2])
        return {one: "too many in all" for _, _, one in ranked[:excess]}

    def _close(self, connection: _Connection, reason: str) -> None:
        if self._sockets.disconnect(connection.socket):
            self._closed[reason] += 1
            self._closed_addresses[connection.address] += 1
        connection.closed = True

    def _flood(self, connection: _Connection, now: float) -> str:
        """Remembers the address of a connection that floods."""
        count, since = self._floods.pop(connection.address, (0, now))
        if now - since > self.limits.penalty:
            count, since = 0, now
        self._floods[connection.address] = (count + 1, since)
        if len(self._floods) > _REMEMBERED:
            del self._floods[next(iter(self._floods))]
        return "flooding"

    def _is_flooding(self, address: str, now: float) -> bool:
        """Whether an address has flooded repeatedly, not long ago."""
        count, since = self._floods.get(address, (0, now))
        return count >= self.limits.floods and now - since <= self.limits.penalty

    def _report(self) -> None:
        """Logs one line about all connections that were closed since the last line."""
        (address, most), *_ = self._closed_addresses.most_common(1)
        log.warning(
            "%d gRPC connections were closed: %s. The most from one address, %d, from %s",
            self._closed.total(),
            ", ".join(f"{count} {reason}" for reason, count in self._closed.most_common()),
            most,
            address,
        )
        self._closed.clear()
        self._closed_addresses.clear()
        self._logged = self._scanned
