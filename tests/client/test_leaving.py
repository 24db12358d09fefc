"""Cancelled calls, streams that are left, and clients that are closed end the task, which costs what was delivered."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from pomelo.app import App
from pomelo.client import AsyncClient, Client, ClientClosed, IncompleteStream
from pomelo.client.connection import Attempts
from pomelo.client.stubs import Stubs
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest
from pomelo.gen.v1.model_service_pb2 import GetModelRequest
from pomelo.testing import Answer, Gate
from tests.app import Account, RunningApp, app_fixture
from tests.client.clients import KINDS, begin, make_client, read
from tests.conftest import Keys
from tests.waiting import cancel, until

server = app_fixture()


async def ended_at_the_vendor(server: RunningApp, account: Account) -> None:
    """Returns when the call of the vendor has ended, and then the task."""
    async with asyncio.timeout(20):
        await server.upstream.requests[-1].left.wait()
    await server.idle(account, live=True)


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
    await ended_at_the_vendor(server, account)
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
    call = begin(client, "Hello", stream=stream)
    await gate.reached.wait()
    await cancel(call)
    await ended_at_the_vendor(server, account)
    assert await server.records(account) == []
    await client.close()


async def test_a_stream_that_a_signal_interrupts_before_its_first_piece_ends_at_the_vendor(
    server: RunningApp,
) -> None:
    account = await server.account()
    gate = Gate()
    server.upstream.script(Answer("never seen", at={0: gate}))
    program = f"""
import signal
from pomelo.client import Client
signal.signal(signal.SIGUSR1, signal.default_int_handler)
try:
    with Client({str(server.server.grpc)!r}, key={account.live!r}).stream("gpt-4", "Hello"):
        pass
except KeyboardInterrupt as interrupt:
    error = interrupt  # keeps the frames of the call, as a debugger or a log does
input()
"""
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(20):
            await gate.reached.wait()
        running.send_signal(signal.SIGUSR1)
        await ended_at_the_vendor(server, account)
        assert running.returncode is None
    finally:
        running.kill()
        await running.wait()


@KIND
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_closing_the_client_ends_its_calls(kind: str, stream: bool, server: RunningApp) -> None:
    account = await server.account()
    gate = Gate()
    server.upstream.script(Answer("one two three", at={2 if stream else 0: gate}))
    client = make_client(kind, str(server.server.grpc), account.live)
    call = begin(client, "Hello", stream=stream)
    await gate.reached.wait()
    await client.close()
    with pytest.raises(ClientClosed):
        await call
    await ended_at_the_vendor(server, account)


@KIND
async def test_closing_the_client_ends_its_waits(kind: str, server: RunningApp) -> None:
    account = await server.account()
    client = make_client(kind, str(server.server.grpc), account.test)
    call = asyncio.ensure_future(client.text("gpt-4", "[[error:rate_limit_exceeded]]"))
    await server.idle(account)
    await asyncio.sleep(0.3)
    await client.close()
    async with asyncio.timeout(20):  # the server asked for a wait of a minute
        with pytest.raises(ClientClosed):
            await call


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_call_that_begins_while_another_thread_closes_the_client_is_no_error_of_grpc(stream: bool) -> None:
    client = Client("127.0.0.1:1", key="k")

    def close(stubs: Stubs) -> Any:
        client.close()
        return stubs.media.DownloadMedia if stream else stubs.models.GetModel

    call: Any = client._open if stream else client._unary
    request = DownloadMediaRequest() if stream else GetModelRequest()
    with pytest.raises(ClientClosed):
        call(close, request, Attempts(client._connection))


async def test_a_client_counts_as_closed_before_its_calls_end() -> None:
    blocking, with_asyncio = Client("127.0.0.1:1", key="k"), AsyncClient("127.0.0.1:1", key="k")
    with_asyncio._services()
    closed = []
    close, close_async = blocking._channel.close, with_asyncio._channel.close

    async def end_async() -> None:
        closed.append(with_asyncio._closed.is_set())
        await close_async()

    blocking._channel = SimpleNamespace(close=lambda: closed.append(blocking._closed.is_set()))
    with_asyncio._channel = SimpleNamespace(close=end_async)
    blocking.close()
    close()
    await with_asyncio.close()
    assert closed == [True, True]


async def test_a_stream_is_opened_once(client: Any) -> None:
    stream = client.stream("gpt-4", "[[words:3]] Hello")
    first = await read(stream, [])
    with pytest.raises(RuntimeError, match="opened once"):
        await read(stream, [])
    assert stream.result.text == first.text


async def test_a_stream_that_was_left_is_incomplete_and_one_that_was_read_is_over(client: Any) -> None:
    left = client.stream("gpt-4", "[[words:30]] Hello")
    async with left:
        async for _ in left:
            break
    with pytest.raises(IncompleteStream, match="left before its end"):
        _ = [piece async for piece in left]
    complete = client.stream("gpt-4", "[[words:3]] Hello")
    await read(complete, [])
    assert [piece async for piece in complete] == []


@KIND
async def test_a_reader_of_a_stream_that_another_has_left_is_not_cancelled(
    kind: str, server: RunningApp
) -> None:
    account = await server.account()
    gate = Gate()
    server.upstream.script(Answer("one two three", at={2: gate}))
    client = make_client(kind, str(server.server.grpc), account.live)
    async with client.stream("gpt-4", "Hello") as stream:
        pieces: list[str] = []

        async def read_all() -> None:
            async for piece in stream:
                pieces.append(piece)

        reader = asyncio.ensure_future(read_all())
        await until(lambda: len(pieces) == 2)
        await asyncio.sleep(0.1)  # so that it waits for the third
    with pytest.raises(IncompleteStream, match="left before its end"):
        await reader
    await server.idle(account, live=True)
    await client.close()


@pytest.mark.parametrize("events", [False, True], ids=["pieces", "events"])
async def test_a_stream_whose_read_was_cancelled_is_incomplete(events: bool, server: RunningApp) -> None:
    account = await server.account()
    gate = Gate()
    server.upstream.script(Answer("one two three", at={2: gate}))
    async with (
        AsyncClient(str(server.server.grpc), key=account.live) as client,
        client.stream("gpt-4", "Hello") as stream,
    ):
        pieces: AsyncIterator[Any] = stream.events() if events else stream

        got: list[Any] = []

        async def read_all() -> None:
            async for piece in pieces:
                got.append(piece)

        reading = asyncio.create_task(read_all())
        await until(lambda: len(got) >= 2)
        await cancel(reading)
        for _ in range(2):
            with pytest.raises(IncompleteStream, match="A cancelled read"):
                await asyncio.create_task(read_all())
    await ended_at_the_vendor(server, account)


async def test_an_asyncio_client_says_that_it_belongs_to_another_event_loop(app: App, keys: Keys) -> None:
    async with AsyncClient(str(app.grpc), key=keys.test) as client:
        assert (await client.account()).plan

        def elsewhere() -> None:
            asyncio.run(client.account())

        with pytest.raises(RuntimeError, match="belongs to the event loop of its first call"):
            await asyncio.to_thread(elsewhere)
        assert (await client.account()).plan
