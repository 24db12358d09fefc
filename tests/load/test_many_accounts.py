"""An operator's lists, sums and audit with very many accounts: complete, bounded, and without delaying other callers.

`make load` has 100,000 accounts; an ordinary run of the tests fewer.
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
from pomelo.gen.v1 import admin_service_pb2 as pb
from pomelo.gen.v1.account_service_pb2 import USAGE_GROUP_ACCOUNT, USAGE_GROUP_KEY, ListUsageRequest
from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceStub
from pomelo.settings import Settings
from pomelo.stores import open_store
from pomelo.stores.usage import UsageQuery
from tests.many_accounts import fill_redis, fill_sqlite
from tests.redis_server import any_server

ACCOUNTS = int(os.environ.get("LOAD_ACCOUNTS", "0"))
log = logging.getLogger(__name__)

LONGEST = 1.0
"""Seconds that another caller may wait at most while the operator reads; some ten times what was measured."""


@pytest.fixture(params=["sqlite", "redis"])
async def filled(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[App, int]]:
    """An app with many accounts, each with a key and a grant in each mode; and how many there are."""
    count = ACCOUNTS or {"sqlite": 20_000, "redis": 3_000}[request.param]
    settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", data=tmp_path / "data", grace=0.5)
    if request.param == "redis":
        url = any_server()
        with Redis.from_url(url) as server:
            server.flushdb()
        await asyncio.to_thread(fill_redis, url, count)
        settings = settings.model_copy(update={"store": f"{url}?persistence=none"})
    else:
        await make(settings)
        await asyncio.to_thread(fill_sqlite, settings.database, count)
    async with open_app(settings) as app:
        yield app, count


async def make(settings: Settings) -> None:
    """Makes the data folder and the store in it."""
    settings.root_secret()
    async with open_store(settings.store_url()):
        pass


async def paged(method: Callable[[Any], Awaitable[Any]], request: Any, entries: str) -> list[Any]:
    """All entries of a list. Every page fits gRPC's default message limit."""
    found: list[Any] = []
    while True:
        page = await method(request)
        assert page.ByteSize() < 2**21
        found += getattr(page, entries)
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def longest_wait(app: App, until: asyncio.Event, key: str) -> float:
    """The longest that another caller waited for a small answer."""
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
async def test_an_operator_reads_all_there_is_of_very_many_accounts(
    filled: tuple[App, int],
) -> None:
    app, count = filled
    _, key = await app.keyring.create()
    took: dict[str, float] = {}
    waited: dict[str, float] = {}

    async def timed(name: str, work: Awaitable[Any]) -> Any:
        done = asyncio.Event()
        watching = asyncio.create_task(longest_wait(app, done, key))
        began = time.perf_counter()
        try:
            return await work
        finally:
            took[name] = time.perf_counter() - began
            done.set()
            waited[name] = await watching

    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(f"unix:{app.settings.admin_socket}")
        )
        admin = AdminServiceStub(channel)
        accounts = await timed(
            "accounts", paged(admin.ListAccounts, pb.ListAccountsRequest(page_size=1_000), "accounts")
        )
        keys = await timed("keys", paged(admin.ListKeys, pb.ListKeysRequest(page_size=5_000), "keys"))
        one = await timed("keys of one", admin.ListKeys(pb.ListKeysRequest(account="acct-0000007")))
        usage = await timed("usage of all", admin.QueryUsage(pb.QueryUsageRequest()))
        audit = await timed("audit", admin.Audit(pb.AuditRequest()))
    names = [account.name for account in accounts]
    assert names == sorted(names)
    assert len(names) == len(set(names)) == count + 1
    assert {account.live.granted_micros for account in accounts if account.name != "default"} == {5_000_000}
    assert len({key.key_id for key in keys}) == count + 1
    assert [key.key_id for key in one.keys] == ["key000000007"]
    assert not usage.usage.records
    assert (audit.wallets, list(audit.findings)) == (2 * count + 1, [])
    for name in took:
        log.info("%d accounts, %s: %.2f s, others waited %.3f s", count, name, took[name], waited[name])
    assert max(waited.values()) < LONGEST, waited


@pytest.mark.timeout(600)
async def test_sums_of_very_many_accounts_and_keys_come_in_bounded_pages(tmp_path: Path) -> None:
    count = ACCOUNTS or 12_000
    settings = Settings(rest="", grpc="127.0.0.1:0", data=tmp_path / "data", grace=0.5)
    await make(settings)
    await asyncio.to_thread(fill_sqlite, settings.database, count, records=1)
    async with (
        open_app(settings) as app,
        grpc.aio.insecure_channel(f"unix:{app.settings.admin_socket}") as channel,
    ):
        admin = AdminServiceStub(channel)
        for group, first in ((USAGE_GROUP_ACCOUNT, "acct-0000000"), (USAGE_GROUP_KEY, "key000000000")):
            request = pb.QueryUsageRequest(query=ListUsageRequest(group_by=group))
            found: list[Any] = []
            while True:
                page = await admin.QueryUsage(request)
                assert page.ByteSize() < 2**21
                found += page.usage.totals
                if not page.usage.next_page_token:
                    break
                request.query.page_token = page.usage.next_page_token
            assert found[0].group == first
            assert len({total.group for total in found}) == len(found) == count
            assert {(total.tasks, total.cost_micros) for total in found} == {(1, 3)}
        assert len((await app.store.list_usage(UsageQuery(), limit=9))[0]) == 9
