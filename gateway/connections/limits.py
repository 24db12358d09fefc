"""Limits and timeouts of connections, stricter without a valid key; and queues for starting requests.

This module counts slots and times; it never touches a socket. A connection is *trusted* while its requests
carry valid keys. An untrusted one is closed after a few seconds, and each address may have only a few slow
ones. Callers with valid keys may share an address with an attacker (a proxy, a carrier's NAT), and may
connect by the thousand, so the address alone is never a reason to refuse a connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from pomelo.network.origin import network

log = logging.getLogger("pomelo.calls")

_CHECK_INTERVAL = 0.25
"""Seconds between two checks of the untrusted connections."""

_MAX_CLOCK_STEP = 2 * _CHECK_INTERVAL
"""The most seconds that the clock advances between two readings: while the event loop is blocked, nothing
that clients send is read."""

MIN_READ_RATE = 1024
"""The minimum rate, in bytes a second, at which a client must read a response; measured over
`GatewayOptions.write_timeout`."""

PROXY_WRITE_TIMEOUT = 600.0
"""The period, in seconds, that takes the place of `GatewayOptions.write_timeout` on connections from trusted
proxies: they may read on only when their client has read megabytes."""

_NEW_SHARE = 16
"""Untrusted connections, up to this fraction of all, replace idle trusted ones. Many callers connect at the
same time, and would otherwise be refused by each other while one account keeps all connections idle."""

EndConnection = Callable[[bool], None]
"""Ends a connection. True: sends `overloaded` first, if a response can still be sent."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The maximum number of connections, and the lifetime of untrusted ones.

    `max_connections` are served; `reserve` more are accepted only to be refused with `overloaded`. An
    untrusted connection ends after `lifetime` seconds. Each address keeps its `per_address` youngest
    untrusted connections. Its older ones end if a request is still incomplete `grace` seconds after it
    began to arrive, or, once 7/8 of `max_connections` are in use, `grace` seconds after they became
    untrusted.
    """

    max_connections: int = 4096
    reserve: int = 64
    per_address: int = 64
    grace: float = 1.0
    lifetime: float = 8.0


@dataclass(slots=True, eq=False)
class Slot:
    """One connection's entry, from its accept to its end.

    The connection updates `busy`, `waiting` (the server has yet to process its request) and `idle_since`.
    `request_started` is when a still incomplete request began to arrive. `surplus` marks a connection that
    exceeds the limit: its requests are refused, except for health checks.
    """

    group: Hashable
    end: EndConnection
    owner: Hashable = None
    since: float = 0.0
    request_started: float | None = None
    idle_since: float = 0.0
    busy: bool = False
    waiting: bool = False
    surplus: bool = False
    open: bool = True


def _ignore_end(send_refusal: bool) -> None:
    """The end of a closed slot, which must not keep its connection in memory."""


class SlotGroups:
    """Slots by group, each group oldest first. Adding and removing a slot and finding the largest group are
    O(1)."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, dict[Slot, None]] = {}
        self._by_size: dict[int, dict[Hashable, None]] = {}
        self._largest = 0

    def add(self, slot: Slot) -> None:
        """Adds a slot as the youngest of its group."""
        group = self._groups.setdefault(slot.group, {})
        group[slot] = None
        size = len(group)
        self._move_size(slot.group, size - 1, size)
        self._largest = max(self._largest, size)

    def discard(self, slot: Slot) -> None:
        """Removes a slot. Idempotent."""
        group = self._groups.get(slot.group)
        if group is None or slot not in group:
            return
        del group[slot]
        size = len(group)
        self._move_size(slot.group, size + 1, size)
        if not size:
            del self._groups[slot.group]
        if self._largest not in self._by_size:
            self._largest -= 1

    def _move_size(self, name: Hashable, before: int, now: int) -> None:
        if before:
            same = self._by_size[before]
            del same[name]
            if not same:
                del self._by_size[before]
        if now:
            self._by_size.setdefault(now, {})[name] = None

    def size(self, name: Hashable) -> int:
        return len(self._groups.get(name, ()))

    def excess(self, name: Hashable, count: int) -> list[Slot]:
        """Returns all slots of a group except its `count` youngest, oldest first."""
        group = self._groups.get(name, {})
        return list(group)[: max(0, len(group) - count)]

    def oldest(self) -> Slot | None:
        """Returns the oldest slot of the largest group, None without slots."""
        if not self._largest:
            return None
        name = next(iter(self._by_size[self._largest]))
        return next(iter(self._groups[name]))


class Connections:
    """The connections of one server. Requires a running event loop."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.lingering = 0
        """Connections without a slot that only wait for their client to read the last response."""
        self._loop = asyncio.get_running_loop()
        self._trusted: dict[Slot, None] = {}
        self._untrusted: dict[Slot, None] = {}  # ordered by `since`
        self._addresses = SlotGroups()
        self._crowded: set[Hashable] = set()
        self._surplus: dict[Slot, None] = {}
        self._health_checks: set[Slot] = set()
        self._clock = 0.0  # does not advance while the event loop is blocked
        self._last_reading = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._trusted) + len(self._untrusted) - len(self._surplus)

    def open(self, address: str, end: EndConnection) -> Slot:
        """Adds a new connection, which may end others. The slot's `end` may be replaced while it is open."""
        slot = Slot(network(address), end)
        if len(self) >= self.limits.max_connections and not self.make_room():
            slot.surplus = True
            self._surplus[slot] = None
            log.warning("A connection was refused: all %d of REST are in use", self.limits.max_connections)
            if len(self._surplus) > self.limits.reserve:
                oldest = next(each for each in self._surplus if each not in self._health_checks)
                self._end(oldest, send_refusal=True)
        else:
            self._addresses.add(slot)
        self._add_untrusted(slot)
        return slot

    def close(self, slot: Slot) -> None:
        """Frees the slot of a connection that has ended. Idempotent."""
        slot.open = False
        slot.end = _ignore_end
        self._trusted.pop(slot, None)
        self._untrusted.pop(slot, None)
        self._surplus.pop(slot, None)
        self._health_checks.discard(slot)
        self._addresses.discard(slot)

    def protect_health_check(self, slot: Slot) -> None:
        """Keeps an untrusted connection that begins with a health check from being evicted. Anyone can begin
        like that: at most half of `reserve` connections are protected at a time, for their lifetime."""
        if len(self._health_checks) < self.limits.reserve // 2:
            self._health_checks.add(slot)
            self._addresses.discard(slot)

    def mark_request_started(self, slot: Slot) -> None:
        """Records that a request has begun to arrive on the connection and is incomplete."""
        if slot.request_started is None:
            slot.request_started = self._now()

    def trust(self, slot: Slot, owner: Hashable) -> None:
        """Marks the connection as trusted: a request carried a valid key of `owner`."""
        if slot.owner is None and slot.open:
            self._untrusted.pop(slot, None)
            self._health_checks.discard(slot)
            self._addresses.discard(slot)
            self._trusted[slot] = None
        slot.owner = owner

    def distrust(self, slot: Slot) -> None:
        """Marks the connection as untrusted. If it was trusted, its lifetime starts now."""
        if slot.owner is not None and slot.open:
            slot.owner = None
            self._trusted.pop(slot, None)
            self._addresses.add(slot)
            self._add_untrusted(slot)

    def make_room(self) -> bool:
        """Ends the oldest untrusted connection of the address that has the most of them. If few are
        untrusted, ends the trusted ones that have been idle the longest, of the owner that has the most
        idle ones. Returns False if all are busy."""
        oldest = self._addresses.oldest()
        if oldest is None or len(self._untrusted) <= self.limits.max_connections // _NEW_SHARE:
            if self._end_idle():
                return True
            if oldest is None:
                return False
        self._end(oldest, send_refusal=True)
        return True

    def _end_idle(self) -> bool:
        """Ends trusted connections that are idle; returns False if none is."""
        idle: dict[Hashable, list[Slot]] = {}
        for slot in self._trusted:
            if not slot.busy:
                idle.setdefault(slot.owner, []).append(slot)
        if not idle:
            return False
        owner = max(idle, key=lambda name: len(idle[name]))
        oldest_first = sorted(idle[owner], key=lambda slot: slot.idle_since)
        # Several at a time: a search through all of them for each new connection would be slow.
        for slot in oldest_first[: max(1, len(oldest_first) // 64)]:
            self._end(slot, send_refusal=False)
        return True

    def stop(self) -> None:
        """Stops the periodic check of untrusted connections."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _add_untrusted(self, slot: Slot) -> None:
        slot.since = self._now()
        self._untrusted[slot] = None
        if self._addresses.size(slot.group) > self.limits.per_address:
            self._crowded.add(slot.group)
        if self._timer is None:
            self._timer = self._loop.call_later(_CHECK_INTERVAL, self._check_untrusted)

    def _now(self) -> float:
        now = self._loop.time()
        self._clock += min(now - self._last_reading, _MAX_CLOCK_STEP)
        self._last_reading = now
        return self._clock

    def _check_untrusted(self) -> None:
        now = self._now()
        limits = self.limits
        full = len(self) >= limits.max_connections * 7 // 8
        for name in list(self._crowded):
            excess = self._addresses.excess(name, limits.per_address)
            if not excess:
                self._crowded.discard(name)
            for slot in excess:
                begin = slot.since if full else slot.request_started
                if begin is None or slot.waiting or slot not in self._untrusted:
                    continue
                if now - begin >= limits.grace:
                    self._end(slot, send_refusal=True)
        for slot in list(self._untrusted):
            if now - slot.since < limits.lifetime:
                break
            self._end(slot, send_refusal=slot.waiting)  # waiting: the delay is the server's
        self._timer = None
        if self._untrusted:
            self._timer = self._loop.call_later(_CHECK_INTERVAL, self._check_untrusted)

    def _end(self, slot: Slot, *, send_refusal: bool) -> None:
        end = slot.end
        self.close(slot)
        end(send_refusal)


class StartQueue:
    """Lets at most `rate` requests start in one iteration of the event loop, in the order of arrival.

    Requires a running event loop.
    """

    __slots__ = ("_active", "_left", "_loop", "_rate", "_waiting")

    def __init__(self, rate: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._rate = self._left = rate
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._active = False

    def enter(self) -> asyncio.Future[None] | None:
        """Returns None if the request may start immediately, else a future to await first."""
        if not self._active:
            self._active = True
            self._loop.call_soon(self._next_iteration)
        if self._left:
            self._left -= 1
            return None
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(turn)
        return turn

    def _next_iteration(self) -> None:
        left = self._rate
        while left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                left -= 1
        self._left = left
        self._active = left < self._rate
        if self._active:
            self._loop.call_soon(self._next_iteration)


class StartQueues:
    """One queue each for health checks, trusted and untrusted connections, so that none of them waits
    behind many of the others."""

    def __init__(self) -> None:
        self.health = StartQueue(8)
        self.trusted = StartQueue(16)
        self.untrusted = StartQueue(16)
