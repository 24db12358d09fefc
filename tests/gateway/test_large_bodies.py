"""Large bodies: what a refused one counts, and how long its account waits for the next."""

from __future__ import annotations

import asyncio
import time

import pytest

from gateway.parsing.body import ParseQueue
from gateway.parsing.task import _yield_between
from pomelo.call import Call, Principal
from pomelo.errors import PomeloError
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.requests import (
    EXPECT,
    FORM,
    JSON,
    KEY,
    STT,
    code_of,
    incomplete,
    long,
    raw_task,
)
from tests.gateway.scripts import play

# --- what a refused one counts


async def free(call: Call) -> Principal:
    """Accepts every key, with a plan that has limits."""
    return Principal("default", "key", live=False, plan="free")


@pytest.mark.parametrize("path", ["/api/v1/task", "/v1/chat/completions"])
async def test_a_large_body_that_validation_refuses_counts_as_a_request(
    open_gateway: OpenApp, path: str
) -> None:
    async with open_gateway(authenticate=free) as gateway:
        left: list[int] = []
        for size in (10, 100_000, 10):
            body = long(size, temperature=9)
            async with gateway.http.post(gateway.url + path, headers=gateway.headers, json=body) as response:
                assert response.status == 400
                left.append(int(response.headers["X-RateLimit-Remaining"]))
        assert left == [20, 19, 19]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_large_task_that_its_provider_refuses_counts_once(
    open_gateway: OpenApp, stream: bool
) -> None:
    async with open_gateway(authenticate=free) as gateway:
        gateway.provider.script = play(PomeloError("content_policy_violation"))
        async with gateway.post_task(long(100_000, stream=stream)) as response:
            assert (response.status, response.headers["X-RateLimit-Remaining"]) == (400, "19")
        async with gateway.post_task({"model": "gpt-4", "x": 1}) as response:
            assert response.headers["X-RateLimit-Remaining"] == "19"


async def test_audio_of_white_space_takes_no_longer_to_refuse_than_other_audio(gateway: GatewayApp) -> None:
    async def cpu_seconds(audio: str) -> float:
        begin = time.process_time()
        assert await code_of(gateway.post_task({**STT, "audio": audio})) == (400, "invalid_parameter")
        return time.process_time() - begin

    size = 8_000_000
    white_space = min([await cpu_seconds(" " * size + "!") for _ in range(3)])
    letters = min([await cpu_seconds("A" * size + "!") for _ in range(3)])
    assert white_space < 2 * letters


async def test_other_work_runs_between_the_pieces_of_decoded_audio() -> None:
    loop, order = asyncio.get_running_loop(), []
    async for piece in _yield_between(b"1", iter((b"2", b"3"))):
        order.append(piece)
        loop.call_soon(order.append, b"other work")
    assert order == [b"1", b"2", b"other work", b"other work", b"3", b"other work"]


# --- the order in which large bodies are parsed


async def of_two_accounts(call: Call) -> Principal:
    """Accepts every key; those other than KEY are another account's."""
    account = "default" if call.api_key == KEY else "other"
    return Principal(account, "key", live=False, plan="unlimited")


@pytest.mark.parametrize("content_type", [JSON, FORM])
async def test_after_a_large_body_its_account_waits_before_the_next_one_if_others_have_calls_in_flight(
    open_gateway: OpenApp, content_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ParseQueue, "RATE", 80_000)  # slower than any machine reads and parses a body
    text = b"x" * 80_000
    body = b'{"model":"gpt-4","user":"%b"}' % text
    if content_type == FORM:
        body = b'--B\r\nContent-Disposition: form-data; name="user"\r\n\r\n%b\r\n--B--' % text
    other = incomplete(EXPECT, key="other")
    async with (
        open_gateway(authenticate=of_two_accounts) as gateway,
        gateway.connect(other) as (reader, _),
    ):
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"  # it is in flight
        begin = asyncio.get_running_loop().time()
        for _ in range(2):
            assert await gateway.status_of(raw_task(body, content_type=content_type)) == 400
        assert asyncio.get_running_loop().time() - begin > len(text) / ParseQueue.RATE


async def test_an_account_that_is_alone_does_not_wait_after_a_large_body(
    open_gateway: OpenApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ParseQueue, "RATE", 20)  # a pause of more than an hour
    async with open_gateway(authenticate=of_two_accounts) as gateway, asyncio.timeout(60):
        for _ in range(3):
            assert await code_of(gateway.post_task(long(80_000))) == (200, "")
