"""Scopes that cancel the asyncio task that made them: what they end, and what they leave to others."""

from __future__ import annotations

import asyncio

import pytest

from pomelo.process import CancelScope


def now() -> float:
    return asyncio.get_running_loop().time()


def current_task() -> asyncio.Task[object]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def test_a_deadline_cancels_the_task_and_leaving_undoes_it() -> None:
    scope = CancelScope(now() + 0.001)
    with pytest.raises(asyncio.CancelledError) as raised:
        await asyncio.sleep(10)
    assert scope.expired
    assert scope.ended_by(raised.value)
    assert current_task().cancelling() == 0
    await asyncio.sleep(0)


async def test_a_past_deadline_cancels_at_the_next_wait() -> None:
    scope = CancelScope(now() - 1)
    with pytest.raises(asyncio.CancelledError) as raised:
        await asyncio.sleep(10)
    assert scope.ended_by(raised.value)


async def test_a_stopped_scope_never_cancels() -> None:
    scope = CancelScope(now() + 0.001)
    scope.stop()
    await asyncio.sleep(0.01)
    scope.expire()
    await asyncio.sleep(0)
    assert not scope.expired
    assert not scope.ended_by(None)


async def test_a_scope_expires_once() -> None:
    scope = CancelScope()
    scope.expire()
    scope.expire()
    assert current_task().cancelling() == 1
    with pytest.raises(asyncio.CancelledError) as raised:
        await asyncio.sleep(0)
    assert scope.ended_by(raised.value)


@pytest.mark.parametrize("inner_expires", [False, True])
async def test_only_the_scope_that_expired_has_ended_its_body(inner_expires: bool) -> None:
    outer, inner = CancelScope(), CancelScope()
    (inner if inner_expires else outer).expire()
    with pytest.raises(asyncio.CancelledError) as raised:
        await asyncio.sleep(0)
    assert inner.ended_by(raised.value) == inner_expires
    assert outer.ended_by(raised.value) == (not inner_expires)
    assert current_task().cancelling() == 0


async def test_a_cancellation_from_outside_is_not_the_scopes() -> None:
    ended: list[bool] = []

    async def body(*, expires: bool) -> None:
        scope = CancelScope()
        try:
            if expires:
                scope.expire()
            await asyncio.sleep(10)
        except asyncio.CancelledError as error:
            ended.append(scope.ended_by(error))
            raise

    for expires in (False, True):
        task = asyncio.create_task(body(expires=expires))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended == [False, False]


async def test_another_error_is_not_the_scopes_but_its_cancellation_is_undone() -> None:
    scope = CancelScope()
    scope.expire()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.sleep(0)
    assert not scope.ended_by(ValueError())
    assert current_task().cancelling() == 0
