"""Turns of streams on the event loop, on clocks that only the tests advance."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from pomelo.runtime.turns import BUDGET, MAX_BUDGET, QUANTUM, Turns, in_turns
from tests.unit.clock import Clock
from tests.unit.loop import iterations

CHUNK = 0.00002
"""Default seconds of work per chunk."""


class Loop:
    """Records how long each stream's work took in each iteration of the running event loop.

    `busy` is how long other work takes in each iteration.
    """

    def __init__(self, busy: float) -> None:
        self.now = 0.0
        self.iteration = 0
        self.busy_time: Counter[int] = Counter()
        self.pieces: Counter[str] = Counter()
        """Number of chunks by stream."""
        self.order: list[str] = []
        self._busy = busy
        self._over = False

    def start(self) -> None:
        """Counts iterations from now on."""
        if not self._over:
            self.iteration += 1
            self.now += self._busy
            asyncio.get_running_loop().call_soon(self.start)

    def stop(self) -> None:
        self._over = True

    def work(self, name: str, seconds: float) -> None:
        """Records that a stream produced a chunk."""
        self.now += seconds
        self.busy_time[self.iteration] += round(seconds * 1e9)
        self.pieces[name] += 1
        self.order.append(name)

    def longest(self, but: int = 0) -> float:
        """Returns the maximum seconds of streams' work in one iteration, without the first `but` with
        work."""
        return max([busy for _, busy in sorted(self.busy_time.items())[but:]], default=0) / 1e9


@pytest.fixture
def clock() -> Clock:
    return Clock()


@asynccontextmanager
async def running(busy: float = 0.0) -> AsyncIterator[tuple[Loop, Turns]]:
    """Yields a recorded loop and its turns."""
    loop = Loop(busy)
    loop.start()
    try:
        yield loop, Turns(clock=lambda: loop.now)
    finally:
        loop.stop()


async def stream(
    loop: Loop,
    turns: Turns,
    name: str,
    chunks: int,
    chunk: float = CHUNK,
    between: Callable[[], Awaitable[object]] | None = None,
) -> None:
    """Runs a stream whose data is ready, unless it waits `between` two chunks."""
    turn = turns.stream()
    for number in range(chunks):
        if between is not None and number:
            await between()
        if turn.over():
            await turn.next()
        loop.work(name, chunk)


def waiting(turns: Turns) -> int:
    """Returns how many streams wait for a turn."""
    return sum(not future.done() for future in (*turns._fresh, *turns._exhausted))


@asynccontextmanager
async def endless(
    loop: Loop, turns: Turns, count: int, between: Callable[[], Awaitable[object]] | None = None
) -> AsyncIterator[None]:
    """Runs `count` streams that never end."""
    streams = [stream(loop, turns, str(n), 10**9, between=between) for n in range(count)]
    tasks = [asyncio.create_task(one) for one in streams]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("count", [2, 20, 500])
@pytest.mark.parametrize("chunk", [CHUNK, QUANTUM / 2, BUDGET])
async def test_all_streams_together_stay_within_the_budget_of_an_iteration(count: int, chunk: float) -> None:
    async with running() as (loop, turns):
        await asyncio.gather(*[stream(loop, turns, str(n), 20, chunk) for n in range(count)])
        # In the first iteration no stream waits for its first chunk; the next has a larger budget.
        assert loop.longest(but=2) <= BUDGET + 2 * chunk
        assert loop.iteration <= 4 + count * 20 * max(chunk, QUANTUM) / BUDGET * 2


async def test_endless_streams_get_equal_shares() -> None:
    async with running() as (loop, turns), endless(loop, turns, 50):
        await iterations(10)  # the first streams produced more chunks
        loop.pieces.clear()
        await iterations(500)
        minimum, maximum = min(loop.pieces.values()), max(loop.pieces.values())
        assert len(loop.pieces) == 50
        assert maximum - minimum <= 2 * QUANTUM / CHUNK


async def test_a_single_stream_pauses_only_once_per_budget() -> None:
    async with running() as (loop, turns):
        await stream(loop, turns, "alone", 10_000)
        assert loop.longest() <= BUDGET + 2 * CHUNK
        assert loop.iteration <= 2.5 * 10_000 * CHUNK / BUDGET


async def test_a_stream_that_waits_for_its_source_never_waits_for_a_turn() -> None:
    async with running() as (loop, turns):
        waits = 0

        async def source() -> None:
            nonlocal waits
            assert waiting(turns) == 0
            waits += 1
            await iterations(3)

        await stream(loop, turns, "paced", 200, between=source)
        assert (waits, loop.iteration) == (199, 1 + 3 * 199)


async def test_a_paced_stream_passes_those_that_use_up_their_turns() -> None:
    async with running() as (loop, turns), endless(loop, turns, 100):
        await iterations(100)
        began = loop.iteration
        await stream(loop, turns, "paced", 20, between=lambda: iterations(5))
        assert loop.iteration - began <= 20 * (5 + 5)


async def test_a_stream_that_uses_up_its_turns_is_not_starved_by_paced_ones() -> None:
    async with running() as (loop, turns), endless(loop, turns, 200, lambda: iterations(1)):
        await iterations(50)
        began = loop.iteration
        await stream(loop, turns, "hungry", 500)
        assert loop.iteration - began <= 4 * 500 * CHUNK / QUANTUM


async def test_streams_wait_first_come_first_served() -> None:
    async with running() as (loop, turns):
        await asyncio.gather(*[stream(loop, turns, str(n), 3, BUDGET) for n in range(10)])
        # The first stream continues while no other waits.
        others = [str(n) for n in range(1, 10)]
        assert loop.order == ["0", "0", *others, "0", *others, *others]


@pytest.mark.parametrize("busy", [BUDGET * 2, BUDGET * 4, MAX_BUDGET * 10])
async def test_streams_get_as_much_time_as_other_work_up_to_a_limit(busy: float) -> None:
    async with running(busy) as (loop, turns):
        await asyncio.gather(*[stream(loop, turns, str(n), 100) for n in range(100)])
        longest = loop.longest(but=2)
        assert longest <= min(busy, MAX_BUDGET) + BUDGET + 2 * CHUNK
        assert longest >= min(busy, MAX_BUDGET) / 2


async def test_a_stream_that_is_cancelled_while_it_waits_does_not_block_the_others() -> None:
    async with running() as (loop, turns):
        tasks = [asyncio.create_task(stream(loop, turns, str(n), 200, QUANTUM)) for n in range(20)]
        await iterations(3)
        assert waiting(turns) >= 15
        for task in tasks[::2]:
            task.cancel()
        await iterations(1)
        assert waiting(turns) <= 10
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends[::2]] == [asyncio.CancelledError] * 10
        assert [loop.pieces[str(n)] for n in range(1, 20, 2)] == [200] * 10


async def test_a_stream_that_is_cancelled_at_its_turn_does_not_lose_the_turn_of_another() -> None:
    async with running() as (loop, turns):
        leaving = [asyncio.create_task(stream(loop, turns, "left", 10**6, QUANTUM)) for _ in range(6)]
        staying = asyncio.create_task(stream(loop, turns, "stayed", 100, QUANTUM))
        await iterations(2)

        def leave() -> None:
            for task in leaving:
                task.cancel()

        # In any order of callbacks, one of these runs between a grant and its turn.
        for _ in range(3):
            asyncio.get_running_loop().call_soon(leave)
            await iterations(1)
        await asyncio.wait_for(staying, 20)
        assert loop.pieces["stayed"] == 100
        assert waiting(turns) == 0


async def test_the_loop_sleeps_without_streams() -> None:
    async with running() as (loop, turns):
        await stream(loop, turns, "alone", 100, QUANTUM)
        await iterations(2)
        last = turns.iteration
        await iterations(20)
        assert turns.iteration == last


async def test_in_turns_yields_the_same_chunks_and_closes_the_source() -> None:
    async with running() as (loop, turns):
        closed = []

        async def source() -> AsyncGenerator[int, None]:
            try:
                for number in range(100):
                    loop.work("source", QUANTUM)
                    yield number
            finally:
                closed.append(True)

        assert [chunk async for chunk in in_turns(source(), turns.stream())] == list(range(100))
        partial = in_turns(source(), turns.stream())
        assert await anext(partial) == 0
        await partial.aclose()
        assert closed == [True, True]
        assert loop.longest() <= 2 * BUDGET


async def test_the_first_chunk_does_not_wait() -> None:
    async with running() as (loop, turns), endless(loop, turns, 100):
        await iterations(20)
        turn, late = turns.stream(), turns.stream()
        assert not turn.over()
        assert turn.over()
        await iterations(20)
        assert not late.over()


async def test_a_stream_that_waits_alone_gets_the_whole_budget(clock: Clock) -> None:
    turns = Turns(clock=clock)
    assert await turns.next(fresh=True) == clock.now + BUDGET
    clock.now += BUDGET
    assert await turns.next(fresh=False) == clock.now + BUDGET


async def spend_budget(turns: Turns, clock: Clock) -> None:
    """Uses the budget of this iteration up, so that streams that start in it must wait."""
    await turns.next(fresh=True)
    clock.now += BUDGET


async def test_streams_that_wait_together_get_a_quantum_each_within_the_budget(clock: Clock) -> None:
    turns = Turns(clock=clock)
    lengths = []

    async def stream() -> None:
        lengths.append(await turns.next(fresh=False) - clock.now)
        clock.now += 0.8 * BUDGET

    await asyncio.gather(spend_budget(turns, clock), stream(), stream())
    # The second turn ends with the budget of the round.
    assert lengths == [pytest.approx(QUANTUM), pytest.approx(0.2 * BUDGET)]


@pytest.mark.parametrize(
    ("cost", "count", "rounds"),
    [
        # At most twice as many as before, and one per MIN_COST.
        (0.0, 44, [2, 4, 8, 15, 15]),
        # At least one.
        (10 * MAX_BUDGET, 4, [2, 1, 1]),
    ],
)
async def test_cheap_turns_are_granted_in_growing_numbers_and_expensive_ones_one_by_one(
    clock: Clock, cost: float, count: int, rounds: list[int]
) -> None:
    turns = Turns(clock=clock)
    granted: Counter[int] = Counter()

    async def stream() -> None:
        await turns.next(fresh=False)
        granted[turns.iteration] += 1
        clock.now += cost

    async with asyncio.timeout(20):
        await asyncio.gather(spend_budget(turns, clock), *[stream() for _ in range(count)])
    assert list(granted.values()) == rounds


@pytest.mark.parametrize("fresh", [False, True])
async def test_a_stream_does_not_pass_those_that_wait_although_time_is_left(
    clock: Clock, fresh: bool
) -> None:
    turns = Turns(clock=clock)
    order: list[int] = []

    async def stream(number: int, count: int = 1) -> None:
        for _ in range(count):
            await turns.next(fresh=fresh)
            order.append(number)

    async with asyncio.timeout(20):
        await asyncio.gather(spend_budget(turns, clock), stream(1, 2), *[stream(n) for n in (2, 3, 4)])
    assert order == [1, 2, 3, 4, 1]


async def test_a_turn_is_over_once_the_stream_has_yielded_even_with_time_left(clock: Clock) -> None:
    turns = Turns(clock=clock)
    turn = turns.stream()
    assert not turn.over(), "the first chunk never waits"
    await turn.next()
    assert not turn.over()
    await iterations(2)
    assert turn.over()


@pytest.mark.parametrize("fresh", [False, True])
async def test_a_cancelled_waiter_between_two_others_takes_no_turn(clock: Clock, fresh: bool) -> None:
    turns = Turns(clock=clock)
    rounds: list[int] = []

    async def stream() -> None:
        await turns.next(fresh=fresh)
        rounds.append(turns.iteration)

    spending = asyncio.create_task(spend_budget(turns, clock))
    first, cancelled, last = [asyncio.create_task(stream()) for _ in range(3)]
    asyncio.get_running_loop().call_soon(cancelled.cancel)
    async with asyncio.timeout(20):
        await asyncio.gather(spending, first, last)
    assert cancelled.cancelled()
    assert len(set(rounds)) == 1
