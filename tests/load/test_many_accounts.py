"""With very many accounts, the operator's lists, sums and audit are complete, and delay no other caller.

`make load` has 100,000 accounts, `make test` fewer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from redis import Redis

from pomelo.app import App, open_app
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.gen.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from pomelo.gen.v1.account_service_pb2 import USAGE_DIMENSION_KEY
from pomelo.settings import Settings
from pomelo.stores import open_store
from pomelo.stores.usage import UsageQuery
from tests.many_accounts import fill_redis, fill_sqlite
from tests.redis_server import any_server

ACCOUNTS = int(os.environ.get("LOAD_ACCOUNTS", "0"))
log = logging.getLogger(__name__)

MAX_WAIT = 1.0
"""The longest that another caller may wait while the operator reads, in seconds; about ten times the measured
wait."""


@pytest.fixture(params=["sqlite", "redis"])
async def filled(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[App, int]]:
    """An app with many accounts, each with a key and a grant in each mode; and the number of accounts."""
    count = ACCOUNTS or {"sqlite": 20_000, "redis": 3_000}[request.param]
    settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", data=tmp_path / "data", grace=0.5)
    if request.param == "redis":
        url = any_server()
        with Redis.from_url(url) as server:
            server.flushdb()
        await asyncio.to_thread(fill_redis, url, count)
        settings = settings.model_copy(update={"store": f"{url}?persistence=none"})
    else:
        await create_store(settings)
        await asyncio.to_thread(fill_sqlite, settings.database, count)
    async with open_app(settings) as app:
        yield app, count


async def create_store(settings: Settings) -> None:
    """Creates the data folder and the store in it."""
    settings.root_secret()
    async with open_store(settings.store_url()):
        pass


async def read_pages(method: Callable[[Any], Awaitable[Any]], request: Any, entries: str) -> list[Any]:
    """Reads all entries of a list, and checks that every page fits gRPC's default message limit."""
    result: list[Any] = []
    while True:
        page = await method(request)
        assert page.ByteSize() < 2**21
        result += getattr(page, entries)
        if not page.next_page_token:
            return result
        request.page_token = page.next_page_token


async def longest_wait(app: App, until: asyncio.Event, key: str) -> float:
    """Makes small requests until the event is set; returns the longest wait in seconds."""
    assert app.rest is not None
    url = "http://{}:{}/api/v1/account".format(*app.rest)
    longest = 0.0
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session:
        while not until.is_set():
            began = time.perf_counter()
            async with session.get(url) as answer:
                assert answer.status == 200
                await answer.read()
            longest = max(longest, time.perf_counter() - began)
            await asyncio.sleep(0.01)
    return longest


@pytest.mark.timeout(600)
async def test_the_operator_reads_very_many_accounts_without_delaying_other_callers(
    filled: tuple[App, int],
) -> None:
    app, count = filled
    _, key = await app.keyring.create()
    durations: dict[str, float] = {}
    waits: dict[str, float] = {}

    async def timed(name: str, work: Awaitable[Any]) -> Any:
        done = asyncio.Event()
        other_caller = asyncio.create_task(longest_wait(app, done, key))
        began = time.perf_counter()
        try:
            return await work
        finally:
            durations[name] = time.perf_counter() - began
            done.set()
            waits[name] = await other_caller

    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(f"unix:{app.settings.admin_socket}")
        )
        admin = AdminServiceStub(channel)
        accounts = await timed(
            "accounts", read_pages(admin.ListAccounts, pb.ListAccountsRequest(page_size=1_000), "accounts")
        )
        keys = await timed("keys", read_pages(admin.ListKeys, pb.ListKeysRequest(page_size=5_000), "keys"))
        one_key = await timed("keys of one", admin.ListKeys(pb.ListKeysRequest(account_id="acct-0000007")))
        usage = await timed("usage of all", admin.ListUsage(pb.ListUsageRequest()))
        audit = await timed("audit", admin.AuditLedger(pb.AuditLedgerRequest()))
    names = [account.id for account in accounts]
    assert names == sorted(names)
    assert len(names) == len(set(names)) == count + 1
    assert {account.live.granted_micros for account in accounts if account.id != "default"} == {5_000_000}
    assert len({key.id for key in keys}) == count + 1
    assert [key.id for key in one_key.keys] == ["key000000007"]
    assert not usage.records
    assert (audit.wallets, list(audit.findings)) == (2 * count + 1, [])
    for name in durations:
        log.info("%d accounts, %s: %.2f s, others waited %.3f s", count, name, durations[name], waits[name])
    assert max(waits.values()) < MAX_WAIT, waits


@pytest.mark.timeout(600)
async def test_sums_of_very_many_accounts_and_keys_are_in_bounded_pages(tmp_path: Path) -> None:
    count = ACCOUNTS or 12_000
    settings = Settings(rest="", grpc="127.0.0.1:0", data=tmp_path / "data", grace=0.5)
    await create_store(settings)
    await asyncio.to_thread(fill_sqlite, settings.database, count, records=1)
    async with (
        open_app(settings) as app,
        grpc.aio.insecure_channel(f"unix:{app.settings.admin_socket}") as channel,
    ):
        admin = AdminServiceStub(channel)
        by_account = pb.UsageGrouping(operator_dimension=pb.OPERATOR_DIMENSION_ACCOUNT)
        by_key = pb.UsageGrouping(dimension=USAGE_DIMENSION_KEY)
        for grouping, first in ((by_account, "acct-0000000"), (by_key, "key000000000")):
            request = pb.SumUsageRequest(group_by=[grouping])
            sums: list[Any] = []
            while True:
                page = await admin.SumUsage(request)
                assert page.ByteSize() < 2**21
                sums += page.sums
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
            assert list(sums[0].groups) == [first]
            assert len({row.groups[0] for row in sums}) == len(sums) == count
            assert {(row.tasks, row.cost_micros) for row in sums} == {(1, 3)}
        assert len((await app.store.list_usage(UsageQuery(), limit=9))[0]) == 9
