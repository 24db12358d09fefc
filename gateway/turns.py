"""Keeps many requests, or a few large ones, from blocking the event loop for long."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from typing import TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")


class Turnstile:
    """Lets at most `rate` requests start in an iteration of the event loop, oldest first."""

    __slots__ = ("_counting", "_left", "_loop", "_rate", "_waiting")

    def __init__(self, rate: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._rate = self._left = rate
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._counting = False

    def enter(self) -> asyncio.Future[None] | None:
        """Returns None if the request may start immediately, else a future to await first."""
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
    """Queues the parsing of large bodies: one body at a time per account, and one step at a time
    overall.

    After each body its account waits before the next one, so that most of the event loop's time is
    left to others. The wait is three times as long as the steps took, and at least as long as the
    bytes take at `RATE`, to allow for the other work that is done with them.
    """

    RATE = 32 * 1024 * 1024
    """Bytes a second."""

    def __init__(self) -> None:
        self._accounts: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()
        self._all = asyncio.Lock()

    @asynccontextmanager
    async def body(self, account: Hashable, size: int) -> AsyncIterator[ParseSteps]:
        """Holds the account's turn for one body of `size` bytes; yields the runner of its steps."""
        lock = self._accounts.get(account)
        if lock is None:
            lock = self._accounts[account] = asyncio.Lock()
        await lock.acquire()
        steps = ParseSteps(self._all)
        try:
            yield steps
        finally:
            asyncio.get_running_loop().call_later(max(3 * steps.took, size / self.RATE), lock.release)


class ParseSteps:
    """Runs the steps of one body, one at a time among all large bodies."""

    __slots__ = ("_all", "took")

    def __init__(self, everybody: asyncio.Lock) -> None:
        self._all = everybody
        self.took = 0.0

    async def run(self, step: Callable[[], T]) -> T:
        """Waits until no other step runs, then runs `step` and returns its result."""
        async with self._all:
            begin = time.monotonic()
            try:
                return step()
            finally:
                self.took += time.monotonic() - begin
