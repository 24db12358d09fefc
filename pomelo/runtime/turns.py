"""Turns of the event loop: limits the time that all streams together use in one iteration of the loop.

A stream whose data have already arrived never yields to the event loop: its source has the next chunk, and
its caller's connection accepts it. So before every chunk a stream checks whether its turn is over, and if so
waits for the next turn. Its first chunk never waits. Each event loop has its own `Turns`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

BUDGET = 0.0003
"""Seconds of one iteration that all streams share."""
MAX_BUDGET = 0.004
"""Maximum budget when all other work takes as long: a busy loop must not starve the streams."""

QUANTUM = 0.00015
"""Seconds of a turn when several streams wait."""

MIN_COST = 0.00002
"""Minimum cost of a turn in seconds: waking its stream."""

T = TypeVar("T")


class Turns:
    """Grants turns; create it in the running event loop. `clock` is in seconds.

    While no stream waits, a stream continues immediately, within the budget of the iteration. Otherwise it
    waits, and each iteration grants as many turns as its budget allows, alternately from two queues: of
    streams that yielded before their last turn was over, as paced ones do, and of streams that used their
    turn up. Each queue is first come, first served. A turn is at least one chunk.
    """

    __slots__ = (
        "_budget",
        "_clock",
        "_cost",
        "_ends",
        "_exhausted",
        "_fresh",
        "_granted",
        "_last_tick",
        "_length",
        "_loop",
        "_round_started",
        "_ticking",
        "iteration",
    )  # fmt: skip

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.iteration = 0
        """The number of this iteration of the loop; it grows only while turns are used."""
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._fresh: deque[asyncio.Future[None]] = deque()
        self._exhausted: deque[asyncio.Future[None]] = deque()
        self._ticking = False
        """Whether `_tick` is scheduled for the next iteration, as it is whenever a stream waits."""
        self._last_tick = 0.0
        """The time of its last call."""
        self._ends = 0.0
        """The time until which streams continue immediately."""
        self._granted = 0
        """Turns granted in the current round."""
        self._budget = BUDGET
        """Seconds for all turns of the round."""
        self._length = QUANTUM
        """Seconds for each turn of the round."""
        self._round_started: float | None = None
        """The time at which the first turn of the round began, None before that."""
        self._cost = QUANTUM
        """Seconds that one turn took in the last round."""

    def stream(self) -> Turn:
        """Returns the turns of a new stream."""
        return Turn(self, self._clock)

    async def next(self, *, fresh: bool) -> float:
        """Waits for a turn, unless the budget allows one now. Returns the time at which the turn ends.
        `fresh` is whether the stream has yielded since its last turn."""
        now = self._clock()
        if not self._ticking:
            self._tick_soon()
            self._last_tick = now
            self._ends = now + BUDGET
        if now < self._ends and not self._fresh and not self._exhausted:
            return self._ends
        future = self._loop.create_future()
        (self._fresh if fresh else self._exhausted).append(future)
        await future
        now = self._clock()
        if self._round_started is None:
            self._round_started = now
        return min(now + self._length, self._round_started + self._budget)

    def _tick_soon(self) -> None:
        self._ticking = True
        self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        """Grants the turns of the next iteration. It runs directly after the turns of this one, so that their
        cost is known."""
        now = self._clock()
        spent = 0.0
        if self._round_started is not None:
            spent = now - self._round_started
            # After one round of cheap turns the next round may not grant many expensive ones.
            self._cost = max(spent / self._granted, self._cost / 2, MIN_COST)
        other_work = now - self._last_tick - spent
        self._last_tick = now
        self._round_started = None
        self._granted = 0
        self._ticking = False
        self.iteration += 1
        fresh, exhausted = self._fresh, self._exhausted
        if not fresh and not exhausted:
            return
        self._ends = now + BUDGET
        self._budget = min(max(BUDGET, other_work), MAX_BUDGET)
        self._length = BUDGET if len(fresh) + len(exhausted) == 1 else QUANTUM
        affordable = max(1, round(self._budget / self._cost))
        while (fresh or exhausted) and self._granted < affordable:
            first, second = (exhausted, fresh) if self._granted % 2 else (fresh, exhausted)
            turn = (first or second).popleft()
            if not turn.done():  # it is if its stream was cancelled
                turn.set_result(None)
                self._granted += 1
        self._tick_soon()


class Turn:
    """The turns of one stream. Before passing on a chunk, run `if turn.over(): await turn.next()`."""

    __slots__ = ("_clock", "_ends", "_iteration", "_started", "_turns")

    def __init__(self, turns: Turns, clock: Callable[[], float]) -> None:
        self._turns = turns
        self._clock = clock
        self._started = False
        self._ends = 0.0
        self._iteration = 0

    def over(self) -> bool:
        """Whether the time of the turn is used up or the stream has yielded since it began. False for the
        first chunk."""
        if self._started:
            return self._iteration != self._turns.iteration or self._clock() >= self._ends
        self._started = True
        self._iteration = self._turns.iteration
        return False

    async def next(self) -> None:
        """Waits until the next turn begins, often not at all."""
        turns = self._turns
        self._ends = await turns.next(fresh=self._iteration != turns.iteration)
        self._iteration = turns.iteration


async def in_turns(chunks: AsyncGenerator[T, None], turn: Turn) -> AsyncGenerator[T, None]:
    """Yields the chunks of a stream, and waits for turns between them. Closing it closes the stream."""
    async with aclosing(chunks):
        async for chunk in chunks:
            if turn.over():
                await turn.next()
            yield chunk
