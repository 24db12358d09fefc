"""The length and the number of turns in one iteration of the event loop, on a clock that stands still."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from pomelo.turns import BUDGET, MAX_BUDGET, QUANTUM, Turns


class Clock:
    """A clock that a test sets, in seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


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


async def test_cheap_turns_are_granted_in_growing_numbers(clock: Clock) -> None:
    turns = Turns(clock=clock)
    rounds: Counter[int] = Counter()

    async def stream() -> None:
        await turns.next(fresh=False)
        rounds[turns.iteration] += 1

    await asyncio.gather(spend_budget(turns, clock), *[stream() for _ in range(44)])
    # At most twice as many as before, and one per MIN_COST.
    assert list(rounds.values()) == [2, 4, 8, 15, 15]


async def test_at_least_one_turn_is_granted_however_expensive_turns_are(clock: Clock) -> None:
    turns = Turns(clock=clock)
    rounds: Counter[int] = Counter()

    async def stream() -> None:
        await turns.next(fresh=False)
        rounds[turns.iteration] += 1
        clock.now += 10 * MAX_BUDGET

    async with asyncio.timeout(5):
        await asyncio.gather(spend_budget(turns, clock), *[stream() for _ in range(4)])
    assert list(rounds.values()) == [2, 1, 1]


async def test_a_turn_is_over_once_the_stream_has_yielded_even_with_time_left(clock: Clock) -> None:
    turns = Turns(clock=clock)
    turn = turns.stream()
    assert not turn.over(), "the first chunk never waits"
    await turn.next()
    assert not turn.over()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
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
    async with asyncio.timeout(5):
        await asyncio.gather(spending, first, last)
    assert cancelled.cancelled()
    assert len(set(rounds)) == 1
