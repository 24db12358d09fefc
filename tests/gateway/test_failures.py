"""Failures of a scripted task service, as callers of the gateway see them."""

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
from tests.gateway.gateway_app import GatewayApp

HI = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}


class ScriptedTasks:
    """A task service that awaits a function of the test and then returns a result."""

    def __init__(self, during: Callable[[Call], Awaitable[None]]) -> None:
        self._during = during

    async def run_task(self, task: Task, call: Call) -> TaskResult:
        """Runs a task."""
        await self._during(call)
        result = TaskResult(id="task_7")
        result.text.content = "done"
        return result


@asynccontextmanager
async def response_to(
    gateway: GatewayApp, during: Callable[[Call], Awaitable[None]]
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Runs a task during which `during` is awaited; yields the response."""
    tasks: Any = ScriptedTasks(during)
    services = replace(gateway.services, tasks=tasks)
    async with (
        open_rest(services, None, "127.0.0.1", 0) as (host, port),
        gateway.http.post(f"http://{host}:{port}/api/v1/task", json=HI, headers=gateway.headers) as response,
    ):
        yield response


@pytest.mark.parametrize("code", sorted(TABLE))
async def test_retry_after_is_sent_with_retryable_errors(gateway: GatewayApp, code: str) -> None:
    async def fail(call: Call) -> None:
        raise PomeloError(code, retry_after=7)

    async with response_to(gateway, fail) as response:
        assert response.status == TABLE[code].http
        assert response.headers.get("Retry-After") == ("7" if response.status in (409, 429, 503) else None)


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
async def test_a_cancellation_by_the_service_is_an_internal_error(
    gateway: GatewayApp, during: Callable[[Call], Awaitable[None]]
) -> None:
    async with asyncio.timeout(5), response_to(gateway, during) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (500, "internal_error")
        assert response.headers["X-Request-Id"]


@pytest.mark.parametrize("error", [None, PomeloError("provider_failed"), ZeroDivisionError()])
async def test_callbacks_at_the_end_of_a_call_run_after_success_and_failure(
    gateway: GatewayApp, error: Exception | None
) -> None:
    done: list[str] = []

    async def run(call: Call) -> None:
        call.at_end.append(lambda: done.append(call.request_id))
        assert not done
        if error is not None:
            raise error

    async with response_to(gateway, run) as response:
        assert response.status == (200 if error is None else 502 if isinstance(error, PomeloError) else 500)
        assert done == [response.headers["X-Request-Id"]]
