"""Taking turns: what keeps many requests, or a few large ones, from holding the event loop for long."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class Turnstile:
    """Lets at most `rate` requests begin in one turn of the event loop, in the order in which they came."""

    __slots__ = ("_counting", "_left", "_loop", "_rate", "_waiting")

    def __init__(self, rate: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._rate = self._left = rate
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._counting = False

    def enter(self) -> "asyncio.Future[None] | None":
        """None: go on at once; else what to wait for."""
        if not self._counting:
            self._counting = True
            self._loop.call_soon(self._turn)
        if self._left:
            self._left -= 1
            return None
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(turn)
        return turn

    def _turn(self) -> None:
        left = self._rate
        while left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                left -= 1
        self._left = left
        self._counting = left < self._rate
        if self._counting:
            self._loop.call_soon(self._turn)


class ParseQueue:
    """Lets one large body be parsed at a time: one of each account, then one of all.

    After each an account waits for its next one, so that it leaves most of the event loop to others: three times
    as long as the parsing took, and as long as its bytes take at `RATE`, for what else is done with them.
    """

    RATE = 32 * 1024 * 1024
    """Bytes a second."""

    def __init__(self) -> None:
        self._accounts: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()
        self._all = asyncio.Lock()

    @asynccontextmanager
    async def turn(self, account: Hashable, size: int) -> AsyncIterator[None]:
        """The turn of a body of `size` bytes. What runs inside must not wait for anything else."""
        lock = self._accounts.get(account)
        if lock is None:
            lock = self._accounts[account] = asyncio.Lock()
        loop = asyncio.get_running_loop()
        await lock.acquire()
        took = 0.0
        try:
            async with self._all:
                begin = loop.time()
                try:
                    yield
                finally:
                    took = loop.time() - begin
        finally:
            loop.call_later(max(3 * took, size / self.RATE), lock.release)
