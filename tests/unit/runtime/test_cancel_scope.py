"""Scopes that cancel an asyncio task, at a time that may change or on demand: what they end, and what they leave
to others."""

from __future__ import annotations

import asyncio
import math
import weakref
from collections.abc import Callable

import pytest

from pomelo.runtime.process import CancelScope
from tests.lost_errors import lost_errors
from tests.unit.loop import iterations
from tests.waiting import cancel, current_task

now = asyncio.get_running_loop


async def run(scope: CancelScope, begin: Callable[[], None], then: BaseException | None = None) -> None:
    """Calls `begin` in the scope and waits there for ever; raises `then` in place of the cancellation."""
    with scope:
        begin()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if then is not None:
                raise then from None
            raise


async def end_of(scope: CancelScope, begin: Callable[[], None] = lambda: None) -> float:
    """Returns the time at which the scope has ended a body that waits for ever."""
    with pytest.raises(TimeoutError):
        await run(scope, begin)
    assert scope.expired
    return now().time()


async def test_a_body_ends_at_its_time_and_its_task_goes_on() -> None:
    start = now().time()
    assert 0.08 < await end_of(CancelScope(start + 0.1)) - start < 20
    assert not current_task().cancelling()
    await asyncio.sleep(0)


async def test_a_body_that_is_late_already_ends_when_it_waits() -> None:
    start = now().time()
    assert await end_of(CancelScope(start - 5)) - start < 20


@pytest.mark.parametrize("first", [math.inf, 0.02, 50.0])
async def test_the_last_time_counts_whether_it_is_earlier_or_later(first: float) -> None:
    start = now().time()
    scope = CancelScope(start + first)

    def move() -> None:
        for seconds in (40.0, 0.05, 30.0, 0.1):
            scope.reschedule(start + seconds)

    assert 0.08 < await end_of(scope, move) - start < 20


async def test_a_time_that_was_moved_away_ends_nothing() -> None:
    start = now().time()
    scope = CancelScope(start + 0.05)
    with scope:
        scope.reschedule(start + 60)
        await asyncio.sleep(0.1)
    assert not scope.expired


async def test_a_body_without_a_time_is_not_ended() -> None:
    scope = CancelScope(now().time() + 0.02)
    with lost_errors() as errors:
        with scope:
            scope.reschedule(math.inf)
            await asyncio.sleep(0.06)
        with CancelScope():
            await asyncio.sleep(0.01)
    assert (scope.expired, errors) == (False, [])


async def test_a_body_that_ended_is_not_cancelled_later() -> None:
    scope = CancelScope(now().time() + 0.8)
    with scope:
        scope.reschedule(now().time() + 0.4)
        await asyncio.sleep(0)
    scope.reschedule(-1)
    await asyncio.sleep(0.9)
    assert not scope.expired


async def test_an_error_of_the_body_is_raised_even_when_its_time_is_over() -> None:
    scope = CancelScope(now().time() + 0.01)
    with pytest.raises(KeyError):
        await run(scope, lambda: None, KeyError())
    assert scope.expired
    assert not current_task().cancelling(), "the cancellation was taken back"


async def test_a_body_that_ends_slowly_is_not_cancelled_again() -> None:
    async def end_slowly() -> None:
        with scope:
            try:
                await asyncio.sleep(60)
            finally:
                scope.reschedule(-1)
                await iterations(10)
                ended.append(True)

    scope = CancelScope(0)
    ended: list[bool] = []
    with pytest.raises(TimeoutError):
        await end_slowly()
    assert ended


@pytest.mark.parametrize("seconds", [-5, 60])
async def test_the_cancellation_of_the_task_is_no_timeout(seconds: float) -> None:
    def cancel() -> None:  # in the iteration in which a late scope ends its body
        now().call_soon(task.cancel)

    task = asyncio.create_task(run(CancelScope(now().time() + seconds), cancel))
    await asyncio.wait({task})
    assert task.cancelled()


# --- without a context manager


async def test_a_deadline_cancels_the_task_and_leaving_undoes_it() -> None:
    scope = CancelScope(now().time() + 0.001).start()
    with pytest.raises(asyncio.CancelledError) as raised:
        await asyncio.sleep(60)
    assert scope.expired
    assert scope.ended_by(raised.value)
    assert current_task().cancelling() == 0
    await asyncio.sleep(0)


async def test_a_past_deadline_cancels_at_the_next_wait() -> None:
    scope = CancelScope(now().time() - 1).start()
    with pytest.raises(asyncio.CancelledError) as raised:
        await asyncio.sleep(60)
    assert scope.ended_by(raised.value)


async def test_a_stopped_scope_never_cancels() -> None:
    scope = CancelScope(now().time() + 0.001).start()
    scope.stop()
    await asyncio.sleep(0.01)
    scope.expire()
    await asyncio.sleep(0)
    assert not scope.expired
    assert not scope.ended_by(None)


async def test_a_scope_expires_once() -> None:
    scope = CancelScope().start()
    scope.expire()
    scope.expire()
    assert current_task().cancelling() == 1
    with pytest.raises(asyncio.CancelledError) as raised:
        await asyncio.sleep(0)
    assert scope.ended_by(raised.value)


@pytest.mark.parametrize("inner_expires", [False, True])
async def test_only_the_scope_that_expired_has_ended_its_body(inner_expires: bool) -> None:
    outer, inner = CancelScope().start(), CancelScope().start()
    (inner if inner_expires else outer).expire()
    with pytest.raises(asyncio.CancelledError) as raised:
        await asyncio.sleep(0)
    assert inner.ended_by(raised.value) == inner_expires
    assert outer.ended_by(raised.value) == (not inner_expires)
    assert current_task().cancelling() == 0


async def test_a_cancellation_from_outside_is_not_the_scopes() -> None:
    ended: list[bool] = []

    async def body(*, expires: bool) -> None:
        scope = CancelScope().start()
        try:
            if expires:
                scope.expire()
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            ended.append(scope.ended_by(error))
            raise

    for expires in (False, True):
        task = asyncio.create_task(body(expires=expires))
        await asyncio.sleep(0)
        await cancel(task)
    assert ended == [False, False]


async def test_another_error_is_not_the_scopes_but_its_cancellation_is_undone() -> None:
    scope = CancelScope().start()
    scope.expire()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(0)
    assert not scope.ended_by(ValueError())
    assert current_task().cancelling() == 0


@pytest.mark.usefixtures("no_garbage_collection")
async def test_a_cancelled_task_is_freed_without_the_garbage_collector() -> None:
    task = asyncio.create_task(run(CancelScope(), lambda: None))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    freed = weakref.ref(task)
    del task
    await asyncio.sleep(0)
    assert freed() is None


async def test_a_task_that_was_cancelled_may_use_a_scope_while_it_ends() -> None:
    ended: list[type[BaseException]] = []

    async def end_slowly() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            try:
                await run(CancelScope(now().time() + 0.01), lambda: None)
            except BaseException as error:
                ended.append(type(error))

    task = asyncio.create_task(end_slowly())
    await asyncio.sleep(0)
    await cancel(task)
    assert ended == [TimeoutError]


async def test_a_cancellation_that_the_body_reports_as_its_own_timeout_is_the_scopes() -> None:
    scope = CancelScope().start()
    scope.expire()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(0)
    assert scope.ended_by(TimeoutError())
    assert current_task().cancelling() == 0
