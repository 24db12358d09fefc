"""Guards the gRPC port: closes connections that exceed the connection limits.

gRPC accepts connections and reads frames in its own threads. Its only limit is the total number of
connections: it has no limit per address, no deadline for sending a key, and no protection from most floods of
frames. So a task beside the server scans the connections a few times a second and closes offenders. It
proxies no data.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress

from pomelo.network.origin import is_within
from pomelo.runtime.logs import format_trace
from pomelo.runtime.process import in_background
from pomelo.server.accepted_sockets import AcceptedSocket, AcceptedSockets
from pomelo.server.connection_limits import ConnectionLimits, ConnectionObserver
from pomelo.server.guarded_connection import Calls, Connection

log = logging.getLogger("pomelo.server")

_MIN_PAUSE = 0.25
_MAX_PAUSE = 1.0
_SCAN_SHARE = 0.01
"""Seconds between two scans, and the share of a CPU core that scans may use while no connection is closed."""
_URGENT_PAUSE = 0.05
"""Seconds between two scans while there are too many connections."""
_WAKE_EVERY = 64
"""Resets on one connection after which the next scan starts early."""

_NEW_SHARE = 16
"""Unauthenticated connections that are new, up to this fraction of all, replace those without a call."""

_HANG_UP_TIME = 1.0
"""Seconds that clients have to read the last responses before the server stops."""
_HANG_UP_PAUSE = 0.01
"""Seconds between two scans meanwhile."""

_LOG_EVERY = 10.0
_MAX_FLOODING = 10_000
"""Maximum number of addresses that are remembered for flooding."""


class ConnectionGuard(ConnectionObserver):
    """Guards the connections of a gRPC server that accepts messages of up to `message_limit` bytes.

    Each report costs one dictionary access. Before `watch` and after it, reports have no effect.
    """

    def __init__(self, limits: ConnectionLimits, message_limit: int) -> None:
        self.count = 0
        """Open connections, as of the last scan."""
        self.limits = limits
        self._message_limit = message_limit
        self._watching = False
        self._draining = False
        self._sockets: AcceptedSockets
        self._calls: dict[str, Calls] = {}
        self._connections: dict[AcceptedSocket, Connection] = {}
        self._floods: dict[str, tuple[int, float]] = {}
        """Address -> the number of its connections that were closed for flooding, and the time of the
        first."""
        self._scanned = 0.0
        self._clock = 0.0
        self._wake = asyncio.Event()
        self._closed: Counter[str] = Counter()
        self._closed_addresses: Counter[str] = Counter()
        self._logged = -_LOG_EVERY

    # --- reports of the server

    def checking(self, peer: str) -> None:
        self._calls_of(peer).checking += 1

    def checked(self, peer: str) -> None:
        calls = self._calls.get(peer)
        if calls is not None and calls.checking:
            calls.checking -= 1

    def authenticated(self, peer: str) -> None:
        calls = self._calls_of(peer)
        calls.total += 1
        calls.open += 1

    def received(self, peer: str, size: int) -> None:
        calls = self._calls.get(peer)
        if calls is not None:
            calls.messages += 1
            calls.size += size

    def reset(self, peer: str) -> None:
        calls = self._calls_of(peer)
        calls.resets += 1
        if not calls.resets % _WAKE_EVERY:
            self._wake.set()

    def ended(self, peer: str) -> None:
        calls = self._calls.get(peer)
        if calls is not None and calls.open:
            calls.open -= 1

    def sending(self, peer: str) -> None:
        self._calls_of(peer).sending += 1

    def sent(self, peer: str) -> None:
        calls = self._calls.get(peer)
        if calls is not None and calls.sending:
            calls.sending -= 1

    def trust(self, peer: str) -> None:
        calls = self._calls.get(peer)
        if calls is not None:
            calls.trusted = True

    def _calls_of(self, peer: str) -> Calls:
        """Returns the counters of a peer, new ones if it has none yet; they are kept while it is watched."""
        calls = self._calls.get(peer)
        if calls is None:
            calls = Calls()
            if self._watching:
                self._calls[peer] = calls
        return calls

    # --- scans

    @asynccontextmanager
    async def watch(self, port: int) -> AsyncIterator[None]:
        """Guards the connections that this process accepts on `port` (0: on none) while the body runs. Logs a
        warning if the operating system does not list them."""
        if not port:
            yield
            return
        try:
            self._sockets = AcceptedSockets(port)
        except OSError as error:
            log.warning("gRPC connections are not guarded against floods and idle callers: %s", error)
            yield
            return
        self._watching = True
        self._scanned = time.monotonic()
        try:
            async with in_background(self._run()):
                yield
        finally:
            self._watching = False
            if self._closed:
                self._report()
            self._calls.clear()

    def drain(self) -> None:
        """From now on, ends connections without a running call, so that their clients connect to another
        server. Calls that still arrive are refused in any case."""
        self._draining = True
        self._wake.set()

    async def hang_up(self) -> None:
        """Drains, and waits until the clients have read their responses and closed their connections, at most
        `_HANG_UP_TIME`. Calls that are on their way fail with UNAVAILABLE: clients may retry them."""
        if not self._watching:
            return
        self._draining = True
        waited_for: set[AcceptedSocket] | None = None
        with suppress(TimeoutError):
            async with asyncio.timeout(_HANG_UP_TIME):
                while waited_for is None or not waited_for.isdisjoint(self._connections):
                    with suppress(OSError):  # no descriptor is free
                        self.scan(time.monotonic())
                        waited_for = set(self._connections) if waited_for is None else waited_for
                    await asyncio.sleep(_HANG_UP_PAUSE)
        with suppress(OSError):
            # grpc cancels calls that arrive after this, and no retry policy repeats these.
            for socket in self._sockets.list():
                calls = self._calls.get(socket.peer)
                if calls is None or not calls.sending:
                    self._sockets.end(socket)

    async def _run(self) -> None:
        while True:
            started = time.perf_counter()
            max_pause = _MAX_PAUSE
            try:
                max_pause = self.scan(time.monotonic())
            except OSError:
                pass  # no descriptor is free; retry at the next scan
            except Exception as fault:
                log.error("the guard of gRPC connections failed once\n%s", format_trace(fault))
            pause = min(max((time.perf_counter() - started) / _SCAN_SHARE, _MIN_PAUSE), max_pause)
            await asyncio.sleep(_URGENT_PAUSE)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause - _URGENT_PAUSE):
                    await self._wake.wait()
            self._wake.clear()

    def scan(self, now: float) -> float:
        """Checks every connection and closes offenders. Returns the seconds until the next scan: fewer when
        connections were closed or had received too many bytes, and fewest when there were too many in total.

        Raises:
            OSError: no descriptor is free.
        """
        limits = self.limits
        elapsed, self._scanned = now - self._scanned, now
        # Connections do not age while the event loop is blocked, because it can't read their keys.
        self._clock = now = self._clock + min(elapsed, 2 * _MAX_PAUSE)
        before, connections = self._connections, {}
        new: defaultdict[str, list[Connection]] = defaultdict(list)
        authenticated: defaultdict[str, list[Connection]] = defaultdict(list)
        count, suspected = 0, False
        for socket in self._sockets.list():
            connection = before.get(socket)
            if connection is None:
                connection = Connection(socket, self._calls.setdefault(socket.peer, Calls()), now)
                connection.trusted = bool(limits.trusted) and is_within(socket.host, limits.trusted)
            connections[socket] = connection
            if connection.closed:
                continue
            connection.update(now, elapsed, limits)
            if self._draining and not connection.ended and connection.is_unused():
                self._sockets.end(socket)
                connection.ended = True
            if reason := self._offence(connection, now):
                self._close(connection, reason)
                suspected = True
                continue
            suspected |= connection.large
            count += 1
            if connection.calls.total or connection.exempt:
                authenticated[connection.address].append(connection)
            else:
                new[connection.address].append(connection)
        self._connections = connections
        self._calls = {socket.peer: connection.calls for socket, connection in connections.items()}
        victims = self._above_share(new, now)
        pause = _MIN_PAUSE if self._draining else _MAX_PAUSE
        if suspected or victims or sum(map(len, new.values())) > limits.per_address:
            pause = _MIN_PAUSE
        if (excess := count - len(victims) - limits.connections) > 0:
            victims |= self._above_total(new, authenticated, victims, excess, now)
            pause = _URGENT_PAUSE
        for connection, reason in victims.items():
            self._close(connection, reason)
        self.count = count - len(victims)
        if self._closed and self._scanned - self._logged >= _LOG_EVERY:
            self._report()
        return pause

    def _offence(self, connection: Connection, now: float) -> str:
        """Returns why a connection is closed regardless of other connections; empty if it stays open."""
        limits, calls, size = self.limits, connection.calls, connection.socket.received
        if connection.exempt:
            return ""
        if now - connection.read > limits.unread_time:
            return "with responses that were not read"
        if not calls.total:
            if now - connection.since > limits.key_timeout:
                return "without a key in time"
            flooding = self._is_flooding(connection.address, now)
            if calls.checking and now - connection.since <= limits.grace and not flooding:
                return ""  # a slow look-up of the key is not the caller's fault
            if size > limits.unauthenticated_bytes:
                if connection.large or flooding:
                    return self._flood(connection, now)
                connection.large = True
            if max(connection.resets, calls.sending) > limits.unauthenticated_resets:
                return self._flood(connection, now)
            return ""
        allowed = limits.unexplained + min(calls.open * self._message_limit, limits.reading_bytes)
        # gRPC receives bytes of calls before a busy event loop sees these calls: the next scan knows them.
        before = connection.large
        connection.large = connection.unexplained > allowed or connection.idle > limits.idle_bytes
        if (before and connection.large) or connection.resets > limits.resets:
            return self._flood(connection, now)
        return ""

    def _above_share(self, new: dict[str, list[Connection]], now: float) -> dict[Connection, str]:
        """Returns the oldest unauthenticated connections of addresses that have too many."""
        limits = self.limits
        victims = {}
        for address, group in new.items():
            flooding = self._is_flooding(address, now)
            share = limits.per_flooding_address if flooding else limits.per_address
            if len(group) <= share:
                continue
            group.sort(key=lambda connection: connection.since)
            for connection in group[: len(group) - share]:
                if now - connection.since > limits.grace:
                    victims[connection] = "too many without a key from one address"
        return victims

    def _above_total(
        self,
        new: dict[str, list[Connection]],
        authenticated: dict[str, list[Connection]],
        excluded: Collection[Connection],
        excess: int,
        now: float,
    ) -> dict[Connection, str]:
        """Returns `excess` connections to close: unauthenticated ones first, then those without a call;
        within these groups those of the addresses with the most, the oldest of each address first. If few
        unauthenticated ones are within their `grace`, those come last: they are callers who connect."""
        others = [[each for each in group if each not in excluded] for group in new.values()]
        young = {each for group in others for each in group if now - each.since <= self.limits.grace}
        if len(young) > self.limits.connections // _NEW_SHARE:
            young.clear()
        unused = [
            [each for each in group if not each.calls.open and not each.exempt]
            for group in authenticated.values()
        ]
        ranked = []
        for priority, candidates in ((0, others), (1, unused)):
            for group in candidates:
                group.sort(key=lambda connection: connection.used)
                ranked += [
                    (2 if connection in young else priority, index - len(group), connection)
                    for index, connection in enumerate(group)
                ]
        ranked.sort(key=lambda entry: entry[:2])
        return {connection: "too many in all" for _, _, connection in ranked[:excess]}

    def _close(self, connection: Connection, reason: str) -> None:
        if self._sockets.disconnect(connection.socket):
            self._closed[reason] += 1
            self._closed_addresses[connection.address] += 1
        connection.closed = True

    def _flood(self, connection: Connection, now: float) -> str:
        """Records the address of a flooding connection. Returns the reason to close it."""
        count, since = self._floods.pop(connection.address, (0, now))
        if now - since > self.limits.penalty:
            count, since = 0, now
        self._floods[connection.address] = (count + 1, since)
        if len(self._floods) > _MAX_FLOODING:
            del self._floods[next(iter(self._floods))]
        return "flooding"

    def _is_flooding(self, address: str, now: float) -> bool:
        """Whether an address has flooded repeatedly within the penalty time."""
        count, since = self._floods.get(address, (0, now))
        return count >= self.limits.floods and now - since <= self.limits.penalty

    def _report(self) -> None:
        """Logs one line about all connections that were closed since the previous line."""
        (address, count), *_ = self._closed_addresses.most_common(1)
        log.warning(
            "%d gRPC connections were closed: %s. The most from one address, %d, from %s",
            self._closed.total(),
            ", ".join(f"{number} {reason}" for reason, number in self._closed.most_common()),
            count,
            address,
        )
        self._closed.clear()
        self._closed_addresses.clear()
        self._logged = self._scanned
