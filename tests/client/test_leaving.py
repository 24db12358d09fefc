"""Cancelled calls, streams that are left, and clients that are closed end the task, which costs what was delivered."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pomelo.client import ClientClosed
from pomelo.testing import Answer, Gate
from tests.app import RunningApp, app_fixture
from tests.client.clients import KINDS, make_client, read
from tests.waiting import cancel

server = app_fixture()

KIND = pytest.mark.parametrize("kind", KINDS)


@KIND
async def test_a_stream_that_is_left_ends_at_the_vendor_and_costs_what_was_delivered(
    kind: str, server: RunningApp
) -> None:
    account = await server.account()
    gate = Gate()
    server.upstream.script(Answer("one two three four five six", at={3: gate}))
    client = make_client(kind, str(server.server.grpc), account.live)
    async with client.stream("gpt-4", "Hello") as stream:
        pieces = []
        async for piece in stream:
            pieces.append(piece)
            if len(pieces) == 3:
                break
    async with asyncio.timeout(10):
        await server.upstream.requests[-1].left.wait()
    await server.idle(account, live=True)
    record = await server.only_record(account)
    assert (record.complete, record.output_tokens) == (False, 3)
    await client.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_cancelled_call_ends_at_the_vendor_and_costs_nothing(
    server: RunningApp, stream: bool
) -> None:
    account = await server.account()
    gate = Gate()
    server.upstream.script(Answer("never seen", at={0: gate}))
    client = make_client("asyncio", str(server.server.grpc), account.live)
    if stream:
        call: Any = asyncio.ensure_future(read(client.stream("gpt-4", "Hello"), []))
    else:
        call = asyncio.ensure_future(client.text("gpt-4", "Hello"))
    await gate.reached.wait()
    await cancel(call)
    async with asyncio.timeout(10):
        await server.upstream.requests[-1].left.wait()
    await server.idle(account, live=True)
    assert await server.records(account) == []
    await client.close()


@KIND
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_closing_the_client_ends_its_calls(kind: str, stream: bool, server: RunningApp) -> None:
    account = await server.account()
    gate = Gate()
    server.upstream.script(Answer("one two three", at={2 if stream else 0: gate}))
    client = make_client(kind, str(server.server.grpc), account.live)
    if stream:
        call: Any = asyncio.ensure_future(read(client.stream("gpt-4", "Hello"), []))
    else:
        call = asyncio.ensure_future(client.text("gpt-4", "Hello"))
    await gate.reached.wait()
    await client.close()
    with pytest.raises(ClientClosed):
        await call
    async with asyncio.timeout(10):
        await server.upstream.requests[-1].left.wait()
    await server.idle(account, live=True)


@KIND
async def test_closing_the_client_ends_its_waits(kind: str, server: RunningApp) -> None:
    account = await server.account()
    client = make_client(kind, str(server.server.grpc), account.test)
    call = asyncio.ensure_future(client.text("gpt-4", "[[error:rate_limit_exceeded]]"))
    await server.idle(account)
    await asyncio.sleep(0.3)
    await client.close()
    with pytest.raises(ClientClosed):
        await call
