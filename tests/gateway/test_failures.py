"""Failures of a scripted task service, as callers of the gateway see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any

import aiohttp
import pytest

from gateway.errors import rename_field, unrouted_headers
from pomelo.call import Call, Principal
from pomelo.errors import TABLE, ErrorRow, PomeloError
from pomelo.gen.v1.task_pb2 import TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.requests import HI, incomplete, raw_task, read_response

MINE = {"X-Request-Id": "mine-7"}


class WholeTasks:
    """A task service that awaits a function of the test and then returns a result."""

    def __init__(self, during: Callable[[Call], Awaitable[None]]) -> None:
        self._during = during

    async def run_task(self, spec: TaskSpec, options: TaskOptions, call: Call) -> TaskResult:
        await self._during(call)
        result = TaskResult(id="task_7")
        result.text.message.content.add(text="done")
        return result


@asynccontextmanager
async def response_to(
    gateway: GatewayApp, during: Callable[[Call], Awaitable[None]]
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Runs a task during which `during` is awaited; yields the response."""
    async with gateway.over(tasks=WholeTasks(during)) as other, other.post_task(HI, headers=MINE) as response:
        yield response


@pytest.mark.parametrize("code", sorted(TABLE))
async def test_an_error_says_when_to_retry_or_how_to_authenticate(gateway: GatewayApp, code: str) -> None:
    async def fail(call: Call) -> None:
        raise PomeloError(code, retry_after=7)

    async with response_to(gateway, fail) as response:
        assert response.status == TABLE[code].http
        assert response.headers.get("Retry-After") == ("7" if response.status in (409, 429, 503) else None)
        assert response.headers.get("WWW-Authenticate") == ("Bearer" if response.status == 401 else None)


@pytest.mark.parametrize("code", sorted(TABLE))
def test_an_error_that_no_route_sends_has_the_same_headers(code: str) -> None:
    headers = unrouted_headers(PomeloError(code, retry_after=7), {"X": "y"})
    assert headers.get("Retry-After") == (None if TABLE[code].retry_after is None else "7")
    assert headers.get("WWW-Authenticate") == ("Bearer" if TABLE[code].http == 401 else None)
    assert (headers["Content-Type"], list(headers)[-1]) == ("application/json", "X")


async def cancel_what_is_awaited(call: Call) -> None:
    waited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waited.cancel()
    await waited


async def cancel_the_request(call: Call) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def lose_a_connection(call: Call) -> None:
    raise ConnectionResetError


@pytest.mark.parametrize("during", [cancel_what_is_awaited, cancel_the_request, lose_a_connection])
async def test_a_cancellation_or_a_lost_connection_of_the_service_is_an_internal_error(
    gateway: GatewayApp, during: Callable[[Call], Awaitable[None]]
) -> None:
    async with asyncio.timeout(20), response_to(gateway, during) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (500, "internal_error")
        assert response.headers["X-Request-Id"] == "mine-7"


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


async def test_a_call_has_the_address_of_its_client(gateway: GatewayApp) -> None:
    addresses: list[str] = []

    async def run(call: Call) -> None:
        addresses.append(call.address)

    async with response_to(gateway, run) as response:
        assert response.status == 200
    assert addresses == ["127.0.0.1"]


async def test_a_proxy_may_report_the_address_of_a_caller_in_a_header_of_its_own(
    open_gateway: OpenApp,
) -> None:
    addresses: list[str] = []

    async def run(call: Call) -> Principal:
        addresses.append(call.address)
        raise PomeloError("invalid_api_key")

    forwarded = "X-Forwarded-For: 192.0.2.66", "X-Forwarded-For: 192.0.2.7"  # the first is the caller's own
    async with open_gateway(authenticate=run, trusted_proxies=(ip_network("127.0.0.0/8"),)) as gateway:
        assert await gateway.status_of(raw_task(HI, *forwarded)) == 401
    assert addresses == ["192.0.2.7"]


def test_an_error_names_its_field_as_the_caller_does() -> None:
    names = {"max_tokens": "max_completion_tokens"}
    more: Any = {"values": {"a": "1"}, "retry_after": 7, "repeatable": False}
    error = PomeloError(
        "invalid_parameter", "Invalid max_tokens: use xmax_tokens", field="max_tokens", **more
    )
    renamed = rename_field(error, lambda field: names[field])
    message = "Invalid max_completion_tokens: use xmax_tokens"
    expected = PomeloError(error.code, message, field="max_completion_tokens", **more)
    assert vars(renamed) == vars(expected)


def test_an_error_that_only_a_newer_server_has_names_its_field_as_the_caller_does() -> None:
    row = ErrorRow("newer_code", 400, "INVALID_ARGUMENT", "invalid_request_error", "Invalid max_tokens")
    renamed = rename_field(PomeloError(row, field="max_tokens"), lambda _: "max_completion_tokens")
    assert (renamed.row, renamed.message) == (row, "Invalid max_completion_tokens")


@pytest.mark.parametrize("field", [None, "", "seed"])
def test_an_error_whose_field_has_no_other_name_stays_as_it_is(field: str | None) -> None:
    error = PomeloError("invalid_body", "The body is not JSON", field=field)
    assert rename_field(error, lambda name: name) is error


async def test_a_wrong_header_is_reported_before_what_is_wrong_in_the_body(gateway: GatewayApp) -> None:
    for body in (b"{", b"[]", b'{"model":"gpt-0"}'):
        received = await gateway.exchange(raw_task(body, "X-Request-Timeout: soon"))
        assert b"Invalid X-Request-Timeout" in received


async def test_the_body_of_a_request_with_a_wrong_header_is_not_awaited(open_gateway: OpenApp) -> None:
    sent = incomplete("X-Request-Timeout: soon")
    async with (
        open_gateway(read_grace=60.0, read_timeout=60.0) as gateway,
        gateway.connect(sent) as (reader, _),
    ):
        status, _, body = await read_response(reader)
    assert (status, b"Invalid X-Request-Timeout" in body) == (400, True)


def test_a_renamed_error_keeps_all_but_the_name_of_its_field() -> None:
    error = PomeloError(
        "rate_limit_exceeded",
        "Invalid text: text must be text",
        field="text",
        retry_after=7,
        values={"limit": 3},
        repeatable=False,
    )
    renamed = rename_field(error, {"text": "input"}.get)  # type: ignore[arg-type]
    assert (renamed.code, renamed.field) == ("rate_limit_exceeded", "input")
    assert renamed.message == "Invalid input: text must be text"
    assert (renamed.retry_after, renamed.values, renamed.repeatable) == (7, error.values, False)
    assert rename_field(error, lambda field: field) is error
