"""Counts and limits calls in flight and the buffered bytes of their bodies, of each owner and in total.

An owner is an account, or a key where the account is not known. Transport-free; one `InFlight` a process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from pomelo.errors import PomeloError

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class InFlightLimits:
    """Limits of calls in flight, from their admission to their end, and of buffered bytes of bodies and
    messages. `account_*` bound one owner."""

    calls: int = 2_000
    account_calls: int = 1_000
    bytes: int = 512 * MIB
    account_bytes: int = 128 * MIB


class _Usage:
    """The calls and buffered bytes of one owner."""

    __slots__ = ("bytes", "calls")

    def __init__(self) -> None:
        self.calls = 0
        self.bytes = 0


class InFlight:
    """Counts calls and buffered bytes, of each owner and of all together. O(1), and bounded by what runs."""

    def __init__(self, limits: InFlightLimits | None = None) -> None:
        self.limits = limits or InFlightLimits()
        self.calls = 0
        self.bytes = 0
        self._owners: dict[str, _Usage] = {}

    def enter(self, owner: str, concurrent: int | None = None) -> Ticket:
        """Counts one more call of `owner` until its ticket is closed. `concurrent` is how many tasks its plan
        allows at a time (None: no limit): a few times as many calls may be in flight.

        Raises:
            PomeloError: concurrency_limit_exceeded (a plan that has such a limit), overloaded.
        """
        limits = self.limits
        used = self._owners.get(owner)
        if used is not None:
            share = limits.account_calls
            if concurrent is not None and used.calls >= min(share, max(64, 4 * concurrent)):
                raise PomeloError("concurrency_limit_exceeded")
            if used.calls >= share:
                raise PomeloError("overloaded")
        if self.calls >= limits.calls:
            raise PomeloError("overloaded")
        if used is None:
            used = self._owners[owner] = _Usage()
        used.calls += 1
        self.calls += 1
        return Ticket(self, owner, used)

    def _leave(self, owner: str, used: _Usage, size: int) -> None:
        self.calls -= 1
        self.bytes -= size
        used.calls -= 1
        used.bytes -= size
        if not used.calls:
            del self._owners[owner]


class Ticket:
    """One call in flight. `size` is the bytes of it that are buffered."""

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
        if used.bytes + size > limits.account_bytes or in_flight.bytes + size > limits.bytes:
            raise PomeloError("overloaded")
        self.size += size
        used.bytes += size
        in_flight.bytes += size

    def close(self) -> None:
        """The call has ended. Idempotent."""
        if self._open:
            self._open = False
            self._in_flight._leave(self._owner, self._used, self.size)


class _Queue:
    """The turns in use by one owner, and the queue for the next ones."""

    __slots__ = ("count", "waiting")

    def __init__(self) -> None:
        self.count = 0
        self.waiting: deque[asyncio.Future[None]] = deque()


class FairSemaphore:
    """At most `limit` at a time of each owner, in the order in which they came."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._owners: dict[str, _Queue] = {}

    def full(self, owner: str) -> bool:
        """Whether `enter` would have to wait."""
        queue = self._owners.get(owner)
        return queue is not None and queue.count >= self.limit

    async def enter(self, owner: str) -> None:
        """Waits for a turn of `owner`, which `leave` ends. Cancelling gives up the place in the queue."""
        queue = self._owners.get(owner)
        if queue is None:
            queue = self._owners[owner] = _Queue()
        if queue.count < self.limit:
            queue.count += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):  # `leave` may have passed over it
                    queue.waiting.remove(turn)
            else:
                self.leave(owner)  # the turn was given in the same moment
            raise

    def leave(self, owner: str) -> None:
        """Ends a turn and gives it to the next in the queue."""
        queue = self._owners[owner]
        while queue.waiting:
            turn = queue.waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        queue.count -= 1
        if not queue.count:
            del self._owners[owner]
