"""Counts and limits calls in flight and the buffered bytes of their bodies, per owner and in total; and large
responses, until they are read.

An owner is an account, a key if the account is not known, or the address of a call without a key.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from pomelo.errors import PomeloError

MIB = 1024 * 1024

log = logging.getLogger("pomelo.calls")

LARGE_RESPONSE = 64 * 1024
"""Bytes above which a response counts as unread until its caller has read it."""


@dataclass(frozen=True, slots=True)
class InFlightLimits:
    """Limits of calls in flight, from their admission to their end, and of the buffered bytes of their
    bodies. `account_*` apply to one owner. With more than `account_unread` bytes of responses that it has
    yet to read, it can start no call, and its calls can buffer nothing more; nor, while all owners together
    have more than `unread`, with more than an equal share of it."""

    calls: int = 2_000
    account_calls: int = 1_000
    bytes: int = 512 * MIB
    account_bytes: int = 128 * MIB
    unread: int = 512 * MIB
    account_unread: int = 256 * MIB


@dataclass(slots=True, eq=False)
class _Usage:
    """The calls, buffered bytes and unread responses of one owner."""

    calls: int = 0
    bytes: int = 0
    unread: int = 0


class InFlight:
    """Counts calls and buffered bytes, per owner and in total. Every operation is O(1)."""

    def __init__(self, limits: InFlightLimits | None = None) -> None:
        self.limits = limits or InFlightLimits()
        self.calls = 0
        self.bytes = 0
        self.unread = 0
        self._readers = 0
        """Owners with unread responses."""
        self._owners: dict[str, _Usage] = {}

    def enter(self, owner: str, concurrent: int | None = None) -> Ticket:
        """Counts one more call of `owner` until the returned ticket is closed. `concurrent` is the
        concurrency limit of its plan (None: no limit); four times as many calls, at least 64, may be in
        flight.

        Raises:
            PomeloError: concurrency_limit_exceeded (the limit of the plan), overloaded.
        """
        limits = self.limits
        used = self._owners.get(owner)
        if used is not None:
            if concurrent is not None:
                most = min(limits.account_calls, max(64, 4 * concurrent))
                if used.calls >= most:
                    raise PomeloError(
                        "concurrency_limit_exceeded", values={"quota": "calls_in_flight", "limit": most}
                    )
            if used.calls >= limits.account_calls:
                log.warning("A call was refused: one caller has %d calls in flight", used.calls)
                raise PomeloError("overloaded")
            if used.unread:
                self._check_unread(used)
        if self.calls >= limits.calls:
            log.warning("A call was refused: %d calls are in flight", self.calls)
            raise PomeloError("overloaded")
        if used is None:
            used = self._owners[owner] = _Usage()
        used.calls += 1
        self.calls += 1
        return Ticket(self, owner, used)

    def hold(self, owner: str, size: int) -> Callable[[], None]:
        """Counts `size` bytes of a response to `owner` as unread until the returned function is called,
        once."""
        used = self._owners.setdefault(owner, _Usage())
        self._readers += not used.unread
        used.unread += size
        self.unread += size

        def release() -> None:
            used.unread -= size
            self.unread -= size
            self._readers -= not used.unread
            self._forget_idle(owner, used)

        return release

    def _check_unread(self, used: _Usage) -> None:
        """Refuses an owner that has too many unread bytes.

        Raises:
            PomeloError: overloaded.
        """
        limits = self.limits
        above_share = self.unread > limits.unread and used.unread * self._readers > limits.unread
        if above_share or used.unread > limits.account_unread:
            log.warning("A call was refused: its caller has %d bytes of responses to read", used.unread)
            raise PomeloError("overloaded")

    def _forget_idle(self, owner: str, used: _Usage) -> None:
        if not used.calls and not used.unread:
            del self._owners[owner]


class Ticket:
    """One call in flight. `size` is the number of its buffered bytes."""

    __slots__ = ("_in_flight", "_open", "_owner", "_used", "size")

    def __init__(self, in_flight: InFlight, owner: str, used: _Usage) -> None:
        self._in_flight = in_flight
        self._owner = owner
        self._used = used
        self._open = True
        self.size = 0

    def reserve(self, size: int) -> None:
        """Counts `size` more bytes as buffered until the ticket is closed.

        Raises:
            PomeloError: overloaded; nothing was counted.
        """
        in_flight, used = self._in_flight, self._used
        limits = in_flight.limits
        if used.unread:
            in_flight._check_unread(used)
        if used.bytes + size > limits.account_bytes or in_flight.bytes + size > limits.bytes:
            log.warning(
                "A call was refused: bodies of %d bytes are buffered, %d of them of its caller",
                *(in_flight.bytes, used.bytes),
            )
            raise PomeloError("overloaded")
        self.size += size
        used.bytes += size
        in_flight.bytes += size

    def hold(self, size: int) -> Callable[[], None]:
        """Counts a response of `size` bytes as unread, as `InFlight.hold` does."""
        return self._in_flight.hold(self._owner, size)

    def is_alone(self) -> bool:
        """Returns whether no call of another owner is in flight."""
        return self._in_flight.calls == self._used.calls

    def close(self) -> None:
        """Ends the call. Idempotent."""
        if self._open:
            self._open = False
            in_flight, used, size = self._in_flight, self._used, self.size
            in_flight.calls -= 1
            in_flight.bytes -= size
            used.calls -= 1
            used.bytes -= size
            in_flight._forget_idle(self._owner, used)


@dataclass(slots=True, eq=False)
class _Slots:
    """The slots that one owner has taken, and its waiters."""

    count: int = 0
    waiters: deque[asyncio.Future[None]] = field(default_factory=deque)


class FairSemaphore:
    """A semaphore with `limit` slots per owner, first come, first served."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._owners: dict[str, _Slots] = {}

    def take(self, owner: str) -> bool:
        """Takes a slot of `owner` if one is free, and returns whether it did."""
        slots = self._owners.get(owner)
        if slots is None:
            slots = self._owners[owner] = _Slots()
        if slots.count >= self.limit:
            return False
        slots.count += 1
        return True

    async def acquire(self, owner: str) -> None:
        """Waits for a slot of `owner`. Cancelling leaves the queue."""
        if self.take(owner):
            return
        slots = self._owners[owner]
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        slots.waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                with suppress(ValueError):  # `release` may have removed it
                    slots.waiters.remove(waiter)
            else:
                self.release(owner)  # the slot was granted in the same iteration
            raise

    def release(self, owner: str) -> None:
        """Passes a slot to the next waiter."""
        slots = self._owners[owner]
        while slots.waiters:
            waiter = slots.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        slots.count -= 1
        if not slots.count:
            del self._owners[owner]
