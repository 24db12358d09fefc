"""Graceful shutdown on both protocols: short tasks end, long ones get shutting_down, new ones are refused."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.app import App, open_app, open_gateway
from pomelo.errors import PomeloError
from pomelo.gen.v1.account_service_pb2 import ListUsageRequest
from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.settings import Settings
from pomelo.stores.base import Store
from pomelo.stores.ledger import Settled, Settlement
from pomelo.testing import Answer, FaultUpstream, Gate
from tests.app import app_settings, endow, run_app
from tests.calls import bearer, call_of
from tests.driver import PROTOCOLS, STREAM, Outcome, TaskRequest
from tests.grpc_driver import GrpcDriver
from tests.rest_driver import RestDriver
from tests.tasks import text_body
from tests.waiting import until


def ask(key: str, text: str, *, stream: bool) -> TaskRequest:
    """Returns a text task of one message."""
    return TaskRequest(text_body(text), key, stream)


async def warm(clients: list[Any], key: str) -> None:
    """Runs one task on each client, so that the front ends know the model and need no other calls from now
    on."""
    for client in clients:
        assert (await client(ask(key, "Hi", stream=False))).code == "ok"


async def started(app: App, tasks: int) -> None:
    """Returns when that many tasks are running."""
    await until(lambda: len(app.draining.scopes) >= tasks)


@STREAM
async def test_short_tasks_complete_and_long_ones_get_shutting_down(tmp_path: Path, stream: bool) -> None:
    settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", data=tmp_path / "data", grace=3.0)
    async with aiohttp.ClientSession() as session:
        async with open_app(settings) as app:
            assert app.rest is not None
            assert app.grpc is not None
            _, key = await app.keyring.create()
            channel = grpc.aio.insecure_channel(app.grpc)
            clients: list[Any] = [GrpcDriver(channel), RestDriver(session, "http://{}:{}".format(*app.rest))]
            await warm(clients, key)
            short = [asyncio.create_task(w(ask(key, "[[delay:0.4]]", stream=stream))) for w in clients]
            long = [asyncio.create_task(w(ask(key, "[[stall]]", stream=stream))) for w in clients]
            await started(app, 4)
            ending = asyncio.get_running_loop().time()
            late: list[asyncio.Task[Any]] = []
            asyncio.get_running_loop().call_later(
                0.2,
                lambda: late.extend(asyncio.create_task(w(ask(key, "Hi", stream=False))) for w in clients),
            )
        elapsed = asyncio.get_running_loop().time() - ending
        assert [(await task).code for task in short] == ["ok", "ok"]
        assert [(await task).code for task in long] == ["shutting_down", "shutting_down"]
        assert [(await task).code for task in late] == ["shutting_down", "shutting_down"]
        assert elapsed < settings.grace + 2
        await channel.close()


class SlowlySettled:
    """A store that settles once `settled` is set. `settling` are the ids of the tasks that wait."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.settling: list[str] = []
        self.settled = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def settle(self, settlement: Settlement) -> Settled:
        self.settling.append(settlement.record.task_id)
        await self.settled.wait()
        return await self._inner.settle(settlement)


async def test_a_task_that_is_being_charged_when_the_server_ends_is_delivered(tmp_path: Path) -> None:
    stores: list[SlowlySettled] = []

    def wrap(store: Store) -> Any:
        stores.append(SlowlySettled(store))
        return stores[0]

    async with run_app(tmp_path, wrap_store=wrap) as app:
        account = await app.account()
        tasks = [
            asyncio.create_task(app.ask(protocol, account.test, text_body(), stream=stream))
            for protocol in PROTOCOLS
            for stream in (False, True)
        ]
        (store,) = stores
        await until(lambda: len(store.settling) == len(tasks))
        app.server.draining.stop()
        store.settled.set()
        outcomes = await asyncio.gather(*tasks)
        assert [outcome.code for outcome in outcomes] == ["ok"] * len(tasks)
        records = await app.records(account)
        assert {record.task_id for record in records} == set(store.settling)
        assert all(record.complete for record in records)


async def test_two_apps_live_in_one_process(tmp_path: Path) -> None:
    one = Settings(rest="127.0.0.1:0", grpc="", data=tmp_path / "one")
    two = Settings(rest="127.0.0.1:0", grpc="", data=tmp_path / "two")
    async with open_app(one) as first, open_app(two) as second, aiohttp.ClientSession() as session:
        _, key = await first.keyring.create()
        for app, code in ((first, "ok"), (second, "invalid_api_key")):
            assert app.rest is not None
            client = RestDriver(session, "http://{}:{}".format(*app.rest))
            assert (await client(ask(key, "Hi", stream=False))).code == code


async def test_a_separate_gateway_drains(tmp_path: Path) -> None:
    settings = Settings(rest="", grpc="127.0.0.1:0", data=tmp_path / "data")
    alone = Settings(rest="127.0.0.1:0", data=tmp_path / "none", grace=2.0)
    async with open_app(settings) as app, aiohttp.ClientSession() as session:
        assert app.grpc is not None
        _, key = await app.keyring.create()
        async with open_gateway(alone, app.grpc) as (host, port):
            client = RestDriver(session, f"http://{host}:{port}")
            await warm([client], key)
            short = asyncio.create_task(client(ask(key, "[[delay:0.4]]", stream=True)))
            long = [asyncio.create_task(client(ask(key, "[[stall]]", stream=s))) for s in (False, True)]
            await started(app, 3)
            began = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - began < alone.grace + 15
        assert (await short).code == "ok"
        assert [(await task).code for task in long] == ["shutting_down", "shutting_down"]


async def test_a_running_upload_completes_within_the_grace_and_a_new_one_is_refused(tmp_path: Path) -> None:
    settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", data=tmp_path / "data", grace=5.0)
    ending = asyncio.Event()
    async with open_app(settings) as app:
        assert app.grpc is not None
        _, key = await app.keyring.create()
        async with grpc.aio.insecure_channel(app.grpc) as channel:
            media = MediaServiceStub(channel)
            upload = media.UploadMedia(metadata=bearer(key))
            await upload.write(UploadMediaRequest(header=UploadMediaHeader(content_type="audio/mpeg")))
            await upload.write(UploadMediaRequest(chunk=b"ID3" * 100))
            await started(app, 1)

            async def finish_upload() -> tuple[int, grpc.StatusCode]:
                await ending.wait()
                late = media.UploadMedia(metadata=bearer(key))
                await late.done_writing()
                refused = await late.code()
                await upload.write(UploadMediaRequest(chunk=b"x" * 100))
                await upload.done_writing()
                return (await upload).media.size_bytes, refused

            finished = asyncio.create_task(finish_upload())
            asyncio.get_running_loop().call_soon(ending.set)
            app.draining.drain()
            assert await finished == (400, grpc.StatusCode.UNAVAILABLE)


async def test_the_account_is_shown_until_draining_begins(tmp_path: Path) -> None:
    settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", data=tmp_path / "data", grace=1.0)
    async with open_app(settings) as app:
        _, key = await app.keyring.create()
        accounts = app.services.accounts
        await accounts.get_account(call_of(key))
        app.draining.drain()
        usage = accounts.list_usage(ListUsageRequest(), call_of(key))
        for request in (accounts.get_account(call_of(key)), usage):
            with pytest.raises(PomeloError) as caught:
                await request
            assert caught.value.code == "shutting_down"


async def test_clients_without_a_running_call_are_led_to_another_server(tmp_path: Path) -> None:
    own = [("grpc.use_local_subchannel_pool", 1)]
    gate = Gate()
    async with AsyncExitStack() as stack:
        vendor = await stack.enter_async_context(FaultUpstream())
        vendor.when("until it drains", Answer("one two", at={0: gate}))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        settings = app_settings(tmp_path / "data", vendor, grace=20.0)
        async with asyncio.timeout(60), open_app(settings) as app:
            assert app.rest is not None
            assert app.grpc is not None
            await endow(app.store)
            _, key = await app.keyring.create(live=True)
            busy, unused = [
                await stack.enter_async_context(grpc.aio.insecure_channel(app.grpc, own)) for _ in range(2)
            ]
            rest = RestDriver(session, "http://{}:{}".format(*app.rest))
            await warm([GrpcDriver(busy), GrpcDriver(unused), rest], key)
            running = [
                asyncio.create_task(client(ask(key, "until it drains", stream=stream)))
                for client, stream in ((GrpcDriver(busy), True), (rest, False))
            ]
            await until(lambda: vendor.serving == 2)

            async def call_while_it_drains() -> Outcome:
                try:
                    state = unused.get_state()
                    while state == grpc.ChannelConnectivity.READY:
                        await unused.wait_for_state_change(state)
                        state = unused.get_state()
                    return await rest(ask(key, "Hi", stream=False))
                finally:
                    gate.open()

            calling = asyncio.create_task(call_while_it_drains())
        refused = await calling
        assert (refused.code, refused.headers["connection"]) == ("shutting_down", "close")
        streamed, whole = [await task for task in running]
        assert (streamed.code, whole.code, whole.headers["connection"]) == ("ok", "ok", "close")
