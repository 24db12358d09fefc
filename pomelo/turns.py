"""Turns of the event loop: limits the time of all streams in one iteration, however many there are.

A stream whose data have already arrived never yields to the event loop: its source has the next
piece, and its caller's connection accepts it. So before every piece each stream checks whether its
turn is over, and if so waits for the next turn; its first piece never waits. One `Turns` belongs to
one event loop.
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
BUDGET_MOST = 0.004
"""The most of them when all else takes as long: a busy loop must not starve the streams."""

QUANTUM = 0.00015
"""Seconds of a turn when several streams wait."""

COST_LEAST = 0.00002
"""The least that a turn costs, in seconds: waking its stream."""

T = TypeVar("T")


class Turns:
    """Grants turns; create it in the running event loop. `clock` is in seconds.

    While no stream waits, a stream continues immediately, within the budget of the iteration.
    Otherwise it waits, and each iteration grants as many turns as its budget affords, alternately
    from two queues: streams that yielded by themselves before their last turn was over, as paced
    ones do, and streams that used their turn up. Each queue is first come, first served. A turn is
    at least one piece.
    """

    __slots__ = (
        "_began", "_budget", "_clock", "_cost", "_ends", "_fresh", "_granted", "_last", "_length", "_loop",
        "_ticking", "_tired", "iteration",
    )  # fmt: skip

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.iteration = 0
        """The number of this iteration of the loop; it grows only while turns are used."""
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._fresh: deque[asyncio.Future[None]] = deque()
        self._tired: deque[asyncio.Future[None]] = deque()
        self._ticking = False
        """Whether `_tick` is scheduled for the next iteration, as it is whenever a stream waits."""
        self._last = 0.0
        """When it was called last."""
        self._ends = 0.0
        """When streams stop continuing immediately."""
        self._granted = 0
        """Turns granted in the current round."""
        self._budget = BUDGET
        """Seconds for all turns of the round."""
        self._length = QUANTUM
        """Seconds for each turn of the round."""
        self._began: float | None = None
        """When the first turn of the round began; None: none has."""
        self._cost = QUANTUM
        """Seconds that a turn took in the last round."""

    @property
    def waiting(self) -> int:
        """How many streams wait."""
        return sum(not future.done() for future in (*self._fresh, *self._tired))

    def stream(self) -> Turn:
        """A new stream's turns."""
        return Turn(self, self._clock)

    async def next(self, *, fresh: bool) -> float:
        """Waits for a turn, unless the budget allows one now; returns the time at which it ends.
        `fresh` is whether the stream has yielded by itself since its last turn."""
        now = self._clock()
        if not self._ticking:
            self._tick_soon()
            self._last = now
            self._ends = now + BUDGET
        if now < self._ends and not self._fresh and not self._tired:
            return self._ends
        future = self._loop.create_future()
        (self._fresh if fresh else self._tired).append(future)
        await future
        now = self._clock()
        if self._began is None:
            self._began = now
        return min(now + self._length, self._began + self._budget)

    def _tick_soon(self) -> None:
        self._ticking = True
        self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        """Grants the turns of the next iteration. The loop calls it directly after the turns of
        this one, so that their cost is known."""
        now = self._clock()
        spent = 0.0
        if self._began is not None:
            spent = now - self._began
            # One cheap round of streams that soon waited again must not grant many expensive turns.
            self._cost = max(spent / self._granted, self._cost / 2, COST_LEAST)
        all_else = now - self._last - spent
        self._last = now
        self._began = None
        self._granted = 0
        self._ticking = False
        self.iteration += 1
        fresh, tired = _clean(self._fresh), _clean(self._tired)
        if not fresh and not tired:
            return
        self._ends = now + BUDGET
        self._budget = min(max(BUDGET, all_else), BUDGET_MOST)
        self._length = BUDGET if len(fresh) + len(tired) == 1 else QUANTUM
        affordable = max(1, round(self._budget / self._cost))
        while (fresh or tired) and self._granted < affordable:
            first, second = (tired, fresh) if self._granted % 2 else (fresh, tired)
            (first or second).popleft().set_result(None)
            self._granted += 1
            _clean(fresh)
            _clean(tired)
        self._tick_soon()


def _clean(waiting: deque[asyncio.Future[None]]) -> deque[asyncio.Future[None]]:
    """Removes cancelled waiters from the head of the queue."""
    while waiting and waiting[0].done():
        waiting.popleft()
    return waiting


class Turn:
    """The turns of one stream, which does `if turn.over(): await turn.next()` with each piece in hand, before
    it passes it on."""

    __slots__ = ("_begun", "_clock", "_ends", "_iteration", "_turns")

    def __init__(self, turns: Turns, clock: Callable[[], float]) -> None:
        self._turns = turns
        self._clock = clock
        self._begun = False
        self._ends = 0.0
        self._iteration = 0

    def over(self) -> bool:
        """Whether its time is used up, or the stream yielded since it began; False for the first
        piece."""
        if self._begun:
            return self._iteration != self._turns.iteration or self._clock() >= self._ends
        self._begun = True
        self._iteration = self._turns.iteration
        return False

    async def next(self) -> None:
        """Returns when the next turn begins, often immediately."""
        turns = self._turns
        self._ends = await turns.next(fresh=self._iteration != turns.iteration)
        self._iteration = turns.iteration


async def in_turns(pieces: AsyncGenerator[T, None], turn: Turn) -> AsyncGenerator[T, None]:
    """Yields the pieces of a stream, and waits for turns between them; closing it closes the
    stream."""
    async with aclosing(pieces):
        async for piece in pieces:
            if turn.over():
                await turn.next()
            yield piece
