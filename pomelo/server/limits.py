"""Limits of gRPC calls and their counters: for callers without a key, for accounts, and in total.

`pomelo.server.rpc` applies them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType

from pomelo.errors import PomeloError
from pomelo.in_flight import FairSemaphore
from pomelo.origin import GatewayProof
from pomelo.service import AccessService

_MIB = 1024 * 1024
_MOST_WAITING = 200
_TICK = 0.001
"""Seconds by which a timer of the event loop may be early."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What calls may cost. Sizes are in bytes, times in seconds.

    A caller without a key gets `unauthenticated_time` for a call; there are at most `unauthenticated` such
    calls at a time, and `unauthenticated_reads` of them may be receiving a message, which must arrive
    immediately or gives up its place to the next one. Health checks have a separate limit, `health_reads`.
    An account receives `reads` messages at a time, each within `read_time` of the call's beginning, and
    pieces of `uploads` uploads, each within `piece_time` of the previous one. `lookups` bounds concurrent
    key look-ups.
    """

    message: int = 9 * _MIB
    unauthenticated: int = 200
    unauthenticated_reads: int = 2
    unauthenticated_time: float = 9.0
    health_reads: int = 1
    lookups: int = 500
    forwarded: int = 1_000
    """Downloads by a signed link that gateways pass on: without a key, but with the gateway's own bounds."""
    reads: int = 8
    read_time: float = 60.0
    uploads: int = 6
    piece_time: float = 30.0

    @property
    def transport(self) -> int:
        """Bytes above which grpc itself refuses a message, compressed or not. Its refusal has no details, so
        this limit is above ours; a message between the two limits is received before it is refused."""
        return 2 * self.message


class Connections:
    """Receives reports of the calls on each connection; this class ignores them, a subclass may limit
    connections by them. `peer` is grpc's name for a caller's address."""

    def checking(self, peer: str) -> None:
        """The key of a call is about to be looked up. `checked` must follow."""

    def checked(self, peer: str) -> None:
        """The key of a call was looked up."""

    def authenticated(self, peer: str) -> None:
        """A call with a good key has come; once for each."""

    def received(self, peer: str, size: int) -> None:
        """A message of `size` bytes was read."""

    def reset(self, peer: str) -> None:
        """A call was cancelled before its message was read, or moments after it came."""

    def ended(self, peer: str) -> None:
        """A call with a good key has ended; once for each."""

    def trust(self, peer: str) -> None:
        """The peer is one of our gateways: the connection carries the calls of many callers."""


class Running:
    """Counts the calls whose handlers have not ended.

    grpc.aio's own stop returns before the handlers that it cancelled have cleaned up, so whoever stops a
    server waits here as well.
    """

    __slots__ = ("_idle", "count")

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.count -= 1
        if not self.count:
            self._idle.set()

    async def idle(self) -> None:
        """Returns when no handler runs."""
        while self.count:
            self._idle.clear()
            await self._idle.wait()


class Pool:
    """At most `limit` at a time; anything above that is refused."""

    __slots__ = ("_limit", "count")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.count = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """One place, until the block is left.

        Raises:
            PomeloError: overloaded.
        """
        if self.count >= self._limit:
            raise PomeloError("overloaded")
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


class NewestFirst:
    """At most `limit` at a time. While others wait, nobody keeps a place for more than `patience` seconds,
    and the newest is next. For work that is short for honest callers, so that slow ones can't block others.
    """

    __slots__ = ("_free", "_holders", "_patience", "_timer", "_waiting")

    def __init__(self, limit: int, patience: float = 0.2) -> None:
        self._free = limit
        self._patience = patience
        self._holders: dict[asyncio.Timeout, float] = {}
        """Since when each has its place."""
        self._waiting: list[asyncio.Future[bool]] = []
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """One place, until the block is left.

        Raises:
            PomeloError: overloaded; a newer one has the place.
        """
        if self._free:
            self._free -= 1
        elif not await self._wait():
            raise PomeloError("overloaded")
        scope = asyncio.timeout(None)
        self._holders[scope] = asyncio.get_running_loop().time()
        self._watch()
        try:
            async with scope:
                yield
        except TimeoutError:
            if scope.expired():
                raise PomeloError("overloaded") from None
            raise
        finally:
            if self._holders.pop(scope, None) is not None:
                self._give()

    async def _wait(self) -> bool:
        """Waits for a place; False when too many newer ones do."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        if len(self._waiting) > _MOST_WAITING:
            oldest = self._waiting.pop(0)
            if not oldest.done():
                oldest.set_result(False)
        self._watch()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):
                    self._waiting.remove(turn)
            elif turn.result():
                self._give()  # the place was given in the same moment
            raise

    def _give(self) -> None:
        """Gives a free place to the newest."""
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(True)
                return
        self._free += 1

    def _watch(self) -> None:
        """Sets a timer that ends the oldest holder in time while somebody waits."""
        if self._timer is None and self._waiting and self._holders:
            since = next(iter(self._holders.values()))
            self._timer = asyncio.get_running_loop().call_at(since + self._patience, self._end_oldest)

    def _end_oldest(self) -> None:
        self._timer = None
        if self._waiting and self._holders:
            oldest, since = next(iter(self._holders.items()))
            if since + self._patience <= asyncio.get_running_loop().time() + _TICK:
                del self._holders[oldest]
                with suppress(RuntimeError):  # it is ending anyway
                    oldest.reschedule(0)
                self._give()
        self._watch()


class ServerState:
    """What the calls of one gRPC server share."""

    def __init__(
        self,
        access: AccessService | None,
        limits: CallLimits,
        connections: Connections,
        proof: GatewayProof | None = None,
    ) -> None:
        self.access = access
        self.proof = proof or GatewayProof()
        self.limits = limits
        self.connections = connections
        self.running = Running()
        self.unauthenticated = Pool(limits.unauthenticated)
        self.unauthenticated_reads = NewestFirst(limits.unauthenticated_reads)
        self.health_reads = NewestFirst(limits.health_reads)
        self.forwarded = Pool(limits.forwarded)
        self.lookups = Pool(limits.lookups)
        self.reads = FairSemaphore(limits.reads)
        self.uploads = FairSemaphore(limits.uploads)
