"""Which connections may stay: a cap on all of them, and little for those that have not carried a good key.

Bytes and sockets are for `listener` and `connection`; here are only places and times. A connection is
*trusted* while its requests carry good keys. An untrusted one lives a few seconds, and each address has few
of them that are slow. Callers with good keys may share an address with an attacker (a proxy, a carrier's
NAT), and may come by the thousand, so no connection is refused at its accept for its address.
"""

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from pomelo.origin import network

_TICK = 0.25
"""Seconds between two looks at the untrusted connections."""

_STALL = 2 * _TICK
"""Seconds by which an age may grow at once: while the event loop stood still no client was heard."""

End = Callable[[bool], None]
"""Ends a connection; True: after telling that the server is overloaded, where that can still be told."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """`most` connections in all, and `reserve` beyond them that are only told so. An untrusted one ends after
    `life` seconds. Of those of one address `address` stay; others end when a request has begun to arrive and
    is not whole `grace` seconds later, or, once 7/8 of all places are taken, `grace` seconds after they came.
    """

    most: int = 4096
    reserve: int = 64
    address: int = 64
    grace: float = 1.0
    life: float = 8.0


class Slot:
    """One connection's place, from its accept to its end.

    `busy`, `waiting` (for us to look at its request) and `idle_since` are kept by the connection; `heard` is
    when a request began to arrive that is not whole. `surplus` tells that it came when there was no room: it
    gets a refusal and nothing else.
    """

    __slots__ = (
        "busy",
        "end",
        "group",
        "heard",
        "idle_since",
        "open",
        "owner",
        "since",
        "surplus",
        "waiting",
    )

    def __init__(self, group: Hashable, end: End) -> None:
        self.group = group
        self.end = end
        self.owner: Hashable = None
        self.since = 0.0
        self.heard: float | None = None
        self.idle_since = 0.0
        self.busy = False
        self.waiting = False
        self.surplus = False
        self.open = True


class Groups:
    """Slots by group, each group in the order in which they came; knows the largest group. O(1)."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, dict[Slot, None]] = {}
        self._by_size: dict[int, dict[Hashable, None]] = {}
        self._most = 0

    def add(self, slot: Slot) -> None:
        """Adds a slot as the youngest of its group."""
        group = self._groups.setdefault(slot.group, {})
        group[slot] = None
        size = len(group)
        self._resized(slot.group, size - 1, size)
        self._most = max(self._most, size)

    def discard(self, slot: Slot) -> None:
        """Removes a slot, if it is there."""
        group = self._groups.get(slot.group)
        if group is None or slot not in group:
            return
        del group[slot]
        size = len(group)
        self._resized(slot.group, size + 1, size)
        if not size:
            del self._groups[slot.group]
        if self._most not in self._by_size:
            self._most -= 1

    def _resized(self, name: Hashable, before: int, now: int) -> None:
        if before:
            same = self._by_size[before]
            del same[name]
            if not same:
                del self._by_size[before]
        if now:
            self._by_size.setdefault(now, {})[name] = None

    def size(self, name: Hashable) -> int:
        """How many a group has."""
        return len(self._groups.get(name, ()))

    def excess(self, name: Hashable, most: int) -> list[Slot]:
        """The oldest of a group beyond its youngest `most`, in the order in which they came."""
        group = self._groups.get(name, {})
        return list(group)[: max(0, len(group) - most)]

    def oldest(self) -> Slot | None:
        """The oldest of the largest group."""
        if not self._most:
            return None
        name = next(iter(self._by_size[self._most]))
        return next(iter(self._groups[name]))


class Connections:
    """The connections of one server. To be made in the running event loop."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.lingering = 0
        """Connections beside the slots that only wait for their client to take the last answer."""
        self._loop = asyncio.get_running_loop()
        self._trusted: dict[Slot, None] = {}
        self._untrusted: dict[Slot, None] = {}  # by `since`
        self._addresses = Groups()
        self._crowded: set[Hashable] = set()
        self._surplus: dict[Slot, None] = {}
        self._clock = 0.0  # stands still with the event loop
        self._seen = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._trusted) + len(self._untrusted) - len(self._surplus)

    def open(self, address: str, end: End) -> Slot:
        """A place for a new connection, which may end others; `end` may be replaced while it is open."""
        slot = Slot(network(address), end)
        if len(self) >= self.limits.most and not self.make_room():
            slot.surplus = True
            self._surplus[slot] = None
            if len(self._surplus) > self.limits.reserve:
                self._end(next(iter(self._surplus)), told=True)
        else:
            self._addresses.add(slot)
        self._add_untrusted(slot)
        return slot

    def close(self, slot: Slot) -> None:
        """The connection has ended. Idempotent."""
        if not slot.open:
            return
        slot.open = False
        self._trusted.pop(slot, None)
        self._untrusted.pop(slot, None)
        self._surplus.pop(slot, None)
        self._addresses.discard(slot)

    def hears(self, slot: Slot) -> None:
        """A request has begun to arrive on the connection, and is not whole."""
        if slot.heard is None:
            slot.heard = self._now()

    def trust(self, slot: Slot, owner: Hashable) -> None:
        """A request on the connection carried a good key of `owner`."""
        if slot.owner is None and slot.open:
            self._untrusted.pop(slot, None)
            self._addresses.discard(slot)
            self._trusted[slot] = None
        slot.owner = owner

    def distrust(self, slot: Slot) -> None:
        """A request on the connection carried no good key; its untrusted life begins anew, if it has not."""
        if slot.owner is not None and slot.open:
            slot.owner = None
            self._trusted.pop(slot, None)
            self._addresses.add(slot)
            self._add_untrusted(slot)

    def make_room(self) -> bool:
        """Ends the oldest untrusted connection of the address that has most of them; without any, the trusted
        ones that have been idle for longest, of the owner that has most of those. False: all are busy."""
        oldest = self._addresses.oldest()
        if oldest is not None:
            self._end(oldest, told=True)
            return True
        idle: dict[Hashable, list[Slot]] = {}
        for slot in self._trusted:
            if not slot.busy:
                idle.setdefault(slot.owner, []).append(slot)
        if not idle:
            return False
        owner = max(idle, key=lambda name: len(idle[name]))
        most = sorted(idle[owner], key=lambda slot: slot.idle_since)
        # A few at a time: looking through all of them for each new connection would take long.
        for slot in most[: max(1, len(most) // 64)]:
            self._end(slot, told=False)
        return True

    def stop(self) -> None:
        """Looks no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _add_untrusted(self, slot: Slot) -> None:
        slot.since = self._now()
        self._untrusted[slot] = None
        if self._addresses.size(slot.group) > self.limits.address:
            self._crowded.add(slot.group)
        if self._timer is None:
            self._timer = self._loop.call_later(_TICK, self._look)

    def _now(self) -> float:
        now = self._loop.time()
        self._clock += min(now - self._seen, _STALL)
        self._seen = now
        return self._clock

    def _look(self) -> None:
        now = self._now()
        limits = self.limits
        full = len(self) >= limits.most * 7 // 8
        for name in list(self._crowded):
            excess = self._addresses.excess(name, limits.address)
            if not excess:
                self._crowded.discard(name)
            for slot in excess:
                begin = slot.since if full else slot.heard
                if begin is None or slot.waiting or slot not in self._untrusted:
                    continue
                if now - begin >= limits.grace:
                    self._end(slot, told=True)
        for slot in list(self._untrusted):
            if now - slot.since < limits.life:
                break
            self._end(slot, told=slot.waiting)  # the store that knows its key is slow, or we are
        self._timer = self._loop.call_later(_TICK, self._look) if self._untrusted else None

    def _end(self, slot: Slot, *, told: bool) -> None:
        self.close(slot)
        slot.end(told)
