"""gRPC streams whose callers stop reading: they end early, cost what was delivered, and hold nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from pomelo.gen.v1.task_service_pb2 import StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.server.remote.channel import open_channel
from tests.app import RunningApp, app_fixture
from tests.calls import bearer, failure
from tests.integration.server_under_test import PROOF, ServerUnderTest, open_server_under_test
from tests.tasks import text_task

LONG = text_task("[[words:40000]]")
"""A task whose output no window takes."""


app = app_fixture()


@asynccontextmanager
async def stream(server: ServerUnderTest, *metadata: tuple[str, str]) -> AsyncIterator[Any]:
    """Starts a long task and receives 256 KiB of it, until they are read; yields the call, with an event of it."""
    async with open_channel(server.server.address) as channel:
        call = TaskServiceStub(channel).StreamTask(StreamTaskRequest(spec=LONG), metadata=metadata)
        await call.read()
        yield call


async def read(call: Any) -> None:
    """Reads a stream to its end."""
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_stream_that_is_not_read_ends_and_costs_what_was_delivered(app: RunningApp) -> None:
    account = await app.account()
    async with (
        open_server_under_test(app.server, unread_time=0.8) as server,
        stream(server, *bearer(account.test)) as call,
    ):
        await app.idle(account)
        error = await failure(read(call))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.details() == "No message was read for 0.8 seconds. Read without such pauses"
    record = await app.only_record(account, live=False)
    assert (record.complete, record.code) == (False, "cancelled")
    assert 0 < record.output_tokens < 40_000


async def test_streams_of_gateways_and_trusted_proxies_wait_for_their_callers(app: RunningApp) -> None:
    account, other = await app.account(), await app.account()
    proof = PROOF.metadata("rest", "192.0.2.1", f"Bearer {account.test}")
    async with (
        open_server_under_test(app.server, unread_time=0.8) as server,
        open_server_under_test(app.server, unread_time=0.1) as behind_gateway,
        open_server_under_test(app.server, unread_time=0.1, proxies=["127.0.0.1"]) as behind_proxy,
        stream(behind_gateway, *bearer(account.test), *proof) as one,
        stream(behind_proxy, *bearer(account.test)) as two,
        stream(server, *bearer(other.test)) as ended,
    ):
        await app.idle(other)
        assert await app.concurrency(account) == 2
        one.cancel()
        two.cancel()
        assert (await failure(read(ended))).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await app.idle(account)
