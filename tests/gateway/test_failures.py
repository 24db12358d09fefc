"""Failures of a service that is played by the test, as callers of the gateway see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from gateway.app import open_rest
from pomelo.call import Call
from pomelo.errors import TABLE, PomeloError
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from tests.gateway.door import Door

HI = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}


class Played:
    """A task service that does as the test says, and then has a result."""

    def __init__(self, during: Callable[[Call], Awaitable[None]]) -> None:
        self._during = during

    async def run_task(self, task: Task, call: Call) -> TaskResult:
        """Runs a task."""
        await self._during(call)
        made = TaskResult(id="task_7")
        made.text.content = "done"
        return made


@asynccontextmanager
async def asked(
    door: Door, during: Callable[[Call], Awaitable[None]]
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer to a task that does as `during` says."""
    tasks: Any = Played(during)
    services = replace(door.services, tasks=tasks)
    async with (
        open_rest(services, None, "127.0.0.1", 0) as (host, port),
        door.http.post(f"http://{host}:{port}/api/v1/task", json=HI, headers=door.headers) as answer,
    ):
        yield answer


@pytest.mark.parametrize("code", sorted(TABLE))
async def test_a_wait_is_proposed_where_a_retry_may_help(door: Door, code: str) -> None:
    async def fail(call: Call) -> None:
        raise PomeloError(code, retry_after=7)

    async with asked(door, fail) as answer:
        assert answer.status == TABLE[code].http
        assert answer.headers.get("Retry-After") == ("7" if answer.status in (409, 429, 503) else None)


async def cancel_what_is_awaited(call: Call) -> None:
    """Waits for something that is cancelled."""
    waited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waited.cancel()
    await waited


async def cancel_the_request(call: Call) -> None:
    """Cancels the request's own task."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


@pytest.mark.parametrize("during", [cancel_what_is_awaited, cancel_the_request])
async def test_a_cancellation_from_within_is_an_internal_error_while_the_caller_waits(
    door: Door, during: Callable[[Call], Awaitable[None]]
) -> None:
    async with asyncio.timeout(5), asked(door, during) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (500, "internal_error")
        assert answer.headers["X-Request-Id"]


@pytest.mark.parametrize("error", [None, PomeloError("provider_failed"), ZeroDivisionError()])
async def test_what_is_due_at_the_end_of_a_call_is_done_however_it_ends(
    door: Door, error: Exception | None
) -> None:
    done: list[str] = []

    async def run(call: Call) -> None:
        call.at_end.append(lambda: done.append(call.request_id))
        assert not done
        if error is not None:
            raise error

    async with asked(door, run) as answer:
        assert answer.status == (200 if error is None else 502 if isinstance(error, PomeloError) else 500)
        assert done == [answer.headers["X-Request-Id"]]
