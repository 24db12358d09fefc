"""Limits of gRPC calls and their counters: for unauthenticated callers, for accounts, and in total."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any, NamedTuple

from pomelo.errors import PomeloError
from pomelo.network.origin import GatewayProof
from pomelo.runtime.in_flight import FairSemaphore, InFlight, InFlightLimits
from pomelo.server.connection_limits import ConnectionObserver
from pomelo.server.unread_streams import UnreadStreams
from pomelo.service import AccessService
from pomelo.telemetry.events import Observer

_MIB = 1024 * 1024
_MAX_WAITING = 200
_SLOW_TIME = 60.0
"""Seconds for which an owner is slow that has lost a slot."""
_MAX_SLOW = 10_000
"""Maximum number of slow owners that are remembered."""
_TIMER_ERROR = 0.001
"""Seconds by which a timer of the event loop may fire early."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What calls may cost. Sizes are in bytes, times in seconds.

    Calls without a key are limited to `unauthenticated` concurrent ones, half of them from one address, and
    each to `unauthenticated_time`. At most `unauthenticated_reads` of them receive a message at a time; one
    that does not arrive immediately loses its slot to the next, and its address is served last for a while.
    Health checks have a separate limit, `health_reads`.

    An account receives at most `reads` messages at a time, each within `read_time` of the start of its call,
    and chunks of at most `uploads` uploads, each within `chunk_time` of the previous chunk. `lookups` bounds
    concurrent key look-ups. A stream ends if its caller takes `unread_time` to read one message, and a second
    longer for each KiB of it.
    """

    message: int = 9 * _MIB
    metadata: int = 8 * 1024
    unauthenticated: int = 200
    unauthenticated_reads: int = 2
    unauthenticated_time: float = 9.0
    health_reads: int = 1
    lookups: int = 500
    forwarded: int = 1_000
    """Concurrent downloads by signed links that gateways forward, which limit them as well."""
    reads: int = 8
    read_time: float = 60.0
    uploads: int = 6
    chunk_time: float = 30.0
    # Java's window is 1 MiB, and half of it is 130 s of audio at 32 kbit/s.
    unread_time: float = 150.0

    @property
    def transport(self) -> int:
        """Bytes above which grpc itself refuses a message, compressed or not. Its refusal has no details, so
        this limit is higher than `message`; a message between the two is received and then refused."""
        return 2 * self.message

    @property
    def transport_metadata(self) -> int:
        """As `transport`, for the metadata of a call."""
        return 2 * self.metadata


class TimeoutReason(NamedTuple):
    """The error of a call whose time is over: its code and message (empty: the default of the code),
    and the limit in seconds that the message names."""

    code: str
    message: str = ""
    seconds: float | None = None

    def error(self) -> PomeloError:
        """Returns the error."""
        values = None if self.seconds is None else {"timeoutSeconds": f"{self.seconds:g}"}
        return PomeloError(self.code, self.message, values=values)


DEADLINE = TimeoutReason("deadline_exceeded")
TOO_MANY_MESSAGES = TimeoutReason(
    "overloaded", "The account sends more messages at a time than the server accepts. Retry later"
)


class Running:
    """Counts the calls whose handlers have not ended.

    grpc.aio's `stop` returns before the handlers that it cancelled have cleaned up; wait for `idle` as well.
    """

    __slots__ = ("_idle", "count")

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *error: object) -> None:
        self.count -= 1
        if not self.count:
            self._idle.set()

    async def idle(self) -> None:
        """Returns when no handler is running."""
        while self.count:
            self._idle.clear()
            await self._idle.wait()


class Pool:
    """A semaphore of `limit` slots, a context manager that refuses instead of waiting.

    Raises:
        PomeloError: overloaded; no slot is free.
    """

    __slots__ = ("_limit", "count")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.count = 0

    def __enter__(self) -> None:
        if self.count >= self._limit:
            raise PomeloError("overloaded")
        self.count += 1

    def __exit__(self, *error: object) -> None:
        self.count -= 1


class NewestFirst:
    """A semaphore of `limit` slots that serves the newest waiter first. While others wait, a slot is taken
    away after `patience` seconds. For work that is short for honest callers, so that slow ones can't block
    others: an owner that has lost a slot, or was cancelled with one, is served last for a while.
    """

    __slots__ = ("_free", "_holders", "_patience", "_slow", "_timer", "_waiting")

    def __init__(self, limit: int, patience: float = 0.2) -> None:
        self._free = limit
        self._patience = patience
        self._holders: dict[asyncio.Timeout, tuple[float, str]] = {}
        """Holder of a slot -> the time at which it took the slot, and its owner."""
        self._waiting: list[tuple[str, asyncio.Future[bool]]] = []
        self._slow: dict[str, float] = {}
        """Owner -> the time until which it is slow."""
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def slot(self, owner: str = "") -> AsyncIterator[None]:
        """Waits for a slot and takes it for the block. An empty owner is never slow.

        Raises:
            PomeloError: overloaded; the slot went to a newer waiter.
        """
        if self._free:
            self._free -= 1
        elif not await self._wait(owner):
            raise PomeloError("overloaded")
        scope = asyncio.timeout(None)
        self._holders[scope] = asyncio.get_running_loop().time(), owner
        self._set_timer()
        try:
            async with scope:
                yield
        except TimeoutError:
            if scope.expired():
                raise PomeloError("overloaded") from None
            raise
        except asyncio.CancelledError:
            self._mark_slow(owner)
            raise
        finally:
            if self._holders.pop(scope, None) is not None:
                self._pass_on()

    async def _wait(self, owner: str) -> bool:
        """Waits for a slot. Returns False when there are too many newer waiters."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((owner, waiter))
        if len(self._waiting) > _MAX_WAITING:
            _, oldest = self._waiting.pop(0)
            if not oldest.done():
                oldest.set_result(False)
        self._set_timer()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                with suppress(ValueError):
                    self._waiting.remove((owner, waiter))
            elif waiter.result():
                self._pass_on()  # the slot was granted in the same iteration
            raise

    def _pass_on(self) -> None:
        """Passes a free slot to the newest waiter that is not slow, if there is one."""
        while self._waiting:
            newest = range(len(self._waiting) - 1, -1, -1)
            index = next((each for each in newest if not self._is_slow(self._waiting[each][0])), -1)
            _, waiter = self._waiting.pop(index)
            if not waiter.done():
                waiter.set_result(True)
                return
        self._free += 1

    def _set_timer(self, least: float = 0.0) -> None:
        """Sets the timer that ends the oldest holder while others wait, in `least` seconds or later."""
        if self._timer is None and self._waiting and self._holders:
            since, _ = next(iter(self._holders.values()))
            loop = asyncio.get_running_loop()
            when = max(since + self._patience, loop.time() + least)
            self._timer = loop.call_at(when, self._expire_oldest, when)

    def _expire_oldest(self, due: float) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        if now - due > self._patience / 4:
            # The event loop was blocked, and may not have seen what has arrived meanwhile.
            self._set_timer(self._patience)
            return
        if self._waiting and self._holders:
            oldest, (since, owner) = next(iter(self._holders.items()))
            if since + self._patience <= now + _TIMER_ERROR:
                del self._holders[oldest]
                with suppress(RuntimeError):  # it has ended already
                    oldest.reschedule(0)
                self._mark_slow(owner)
                self._pass_on()
        self._set_timer()

    def _is_slow(self, owner: str) -> bool:
        return self._slow.get(owner, 0.0) > asyncio.get_running_loop().time()

    def _mark_slow(self, owner: str) -> None:
        if owner:
            self._slow.pop(owner, None)
            self._slow[owner] = asyncio.get_running_loop().time() + _SLOW_TIME
            if len(self._slow) > _MAX_SLOW:
                del self._slow[next(iter(self._slow))]


class ServerState:
    """The state that the calls of one gRPC server share. `no_key`, `slow_message`, `slow_chunk` and
    `slow_reader` are the errors of calls that exceed their times. `observers` get reports of calls."""

    def __init__(
        self,
        access: AccessService | None = None,
        limits: CallLimits | None = None,
        connections: ConnectionObserver | None = None,
        proof: GatewayProof | None = None,
        proxies: tuple[IPv4Network | IPv6Network, ...] = (),
        observers: Sequence[Observer] = (),
    ) -> None:
        limits = limits or CallLimits()
        self.access = access
        self.proof = proof or GatewayProof()
        self.proxies = proxies
        self.limits = limits
        self.observers = observers
        self.connections = connections or ConnectionObserver()
        self.no_key = _late("A call without a key ends after", limits.unauthenticated_time, "Send a key")
        self.slow_message = _late("The message did not arrive within", limits.read_time, "Send it faster")
        self.slow_chunk = _late("No message arrived for", limits.chunk_time, "Send without such pauses")
        self.slow_reader = _late("No message was read for", limits.unread_time, "Read without such pauses")
        self.streams: UnreadStreams[Any] = UnreadStreams()
        self.running = Running()
        half = (limits.unauthenticated + 1) // 2
        self.unauthenticated = InFlight(InFlightLimits(limits.unauthenticated, account_calls=half))
        self.unauthenticated_reads = NewestFirst(limits.unauthenticated_reads)
        self.health_reads = NewestFirst(limits.health_reads)
        # A gateway limits each address itself.
        self.forwarded = InFlight(InFlightLimits(limits.forwarded, account_calls=limits.forwarded))
        self.lookups = Pool(limits.lookups)
        self.reads = FairSemaphore(limits.reads)
        self.uploads = FairSemaphore(limits.uploads)


def _late(what: str, seconds: float, advice: str) -> TimeoutReason:
    return TimeoutReason("deadline_exceeded", f"{what} {seconds:g} seconds. {advice}", seconds)
