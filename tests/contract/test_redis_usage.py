"""Usage records of the store on Redis: how they are moved to the archive, by one process or several."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.runtime.process import stop
from pomelo.stores import records
from pomelo.stores.accounts import Wallet
from pomelo.stores.redis import usage
from pomelo.stores.redis.key_names import WALLETS, member, names, search_turn
from pomelo.stores.usage import UsageQuery, UsageRecord, encode_metadata
from tests.contract.ledger_rig import WALLET, record, request, run_task, settlement
from tests.contract.redis_rig import IDLE, ONE_SERVER, FaultyClient, Opener, lose_replies, until
from tests.redis_server import RedisServer
from tests.unit.refusals import refused

pytestmark = ONE_SERVER

NAMES = names(WALLET)
ALL = UsageQuery()


def add_entry(server: RedisServer, entry: UsageRecord, entry_id: str = "*") -> None:
    """Adds a record to its wallet's stream, with a cost of 3, including 1 that is uncollected."""
    values = ("record", records.encode_record(entry), "cost", 3, "uncollected", 1)
    server.do("XADD", names(entry.wallet).usage, entry_id, *values)


async def open_usage(opened: Opener) -> Any:
    """The usage role of a store that moves records only when the test says so."""
    opened_usage = (await opened(**IDLE))._usage
    await stop(opened_usage._task)
    return opened_usage


async def test_records_that_another_process_left_are_moved_from_time_to_time(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, opened: Opener
) -> None:
    monkeypatch.setattr(usage, "_FULL_DRAIN", 3)
    store = await opened(heartbeat=3600.0, drain=0.01)
    await until(lambda: store._usage._drains > 1)
    add_entry(server, record("left", cost=4))
    await until(lambda: server.do("XLEN", NAMES.usage) == 0)
    assert await store._wallet_index.with_data("usage") == []
    assert await store._usage._archive.get("left") == record("left", cost=3, uncollected=1)


async def test_records_of_all_wallets_are_moved_by_the_process_whose_turn_it_is(
    server: RedisServer, opened: Opener
) -> None:
    moving = await open_usage(opened)
    moving._drains = 1  # the first time, it moves those of all wallets in any case
    server.do("SET", search_turn("records"), "")
    add_entry(server, record("left"))
    for left in (1, 0):
        await moving._drain_periodically()
        assert server.do("XLEN", NAMES.usage) == left
        server.do("DEL", search_turn("records"))


async def test_records_of_all_wallets_are_moved_although_the_server_is_out_of_memory(
    server: RedisServer, opened: Opener
) -> None:
    moving = await open_usage(opened)
    for drains, left in ((1, 1), (usage._FULL_DRAIN, 0)):
        add_entry(server, record("left"))
        server.do("CONFIG", "SET", "maxmemory", 1)
        try:
            moving._drains = drains
            await moving._drain_periodically()
        finally:
            server.do("CONFIG", "SET", "maxmemory", 0)
        assert server.do("XLEN", NAMES.usage) == left


@pytest.mark.parametrize("end", ["settled", "settled, but the reply is lost", "recovered"])
async def test_the_record_of_any_end_is_moved_without_waiting_for_a_move_of_all_wallets(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, opened: Opener, end: str
) -> None:
    monkeypatch.setattr(usage, "_FULL_DRAIN", 10**9)
    store = await opened(heartbeat=3600.0, drain=0.01)
    await until(lambda: store._usage._drains > 1)
    await store.reserve(request("a"))
    if end == "recovered":
        assert await store.note([record("a", cost=4)]) == []
        await store.recover(WALLET, "a")
    else:
        if end != "settled":
            lose_replies(store, NAMES.usage)
        await store.settle(settlement("a"))
    await until(lambda: server.do("XLEN", NAMES.usage) == 0)
    assert await store._usage._archive.get("a") is not None


@pytest.mark.parametrize(("small", "most"), [(0, 8), (600, 16)])
async def test_large_records_are_moved_in_replies_that_other_commands_can_wait_for(
    server: RedisServer, opened: Opener, small: int, most: int
) -> None:
    store = await opened(**IDLE)
    metadata = encode_metadata({f"{number:064}": "\x01" * 512 for number in range(16)})
    for number in range(small + 300):
        add_entry(server, record(f"t{number:03}", metadata="" if number < small else metadata))
    client, replies = store._connection._client, []

    def execute(*command: Any) -> asyncio.Future[Any]:
        reply: asyncio.Future[Any] = client.execute_command(*command)
        if command[0] == "XRANGE":
            replies.append(reply)
        return reply

    store._connection._client = SimpleNamespace(execute_command=execute, aclose=client.aclose)
    (moved,) = await store.sum_usage(ALL, ())
    assert moved.tasks == small + 300
    sizes = [sum(len(fields[b"record"]) for _, fields in reply.result()) for reply in replies]
    assert sum(sizes) > 300 * 50_000
    assert max(sizes) < most * 1024 * 1024


async def test_a_record_that_can_not_be_read_stays_and_blocks_no_other(
    server: RedisServer, caplog: pytest.LogCaptureFixture, opened: Opener
) -> None:
    store = await opened(**IDLE)
    await run_task(store, "a")
    for junk in (("record", "{", "cost", 1, "uncollected", 0), ("some", "field")):
        server.do("XADD", NAMES.usage, "*", *junk)
    await run_task(store, "b")
    found, _ = await store.list_usage(ALL, limit=9)
    assert [each.task_id for each in found] == ["b", "a"]
    assert server.do("XLEN", NAMES.usage) == 2
    assert "can't be read" in caplog.text


async def test_a_stream_that_can_not_be_read_keeps_no_others_from_the_archive(
    server: RedisServer, caplog: pytest.LogCaptureFixture, opened: Opener
) -> None:
    moving = await open_usage(opened)
    damaged = Wallet(WALLET.account, False)
    server.do("SADD", WALLETS, member(damaged))
    server.do("SET", names(damaged).usage, "not a stream")
    add_entry(server, record("a"))
    with refused("store_unavailable"):  # the report would not be complete
        await moving.list_usage(ALL, limit=9)
    assert "Usage entries of test/acme can't be read" in caplog.text
    assert server.do("XLEN", NAMES.usage) == 0
    found, _ = await moving.list_usage(UsageQuery(live=True), limit=9)
    assert [each.task_id for each in found] == ["a"]


async def test_records_of_all_wallets_are_moved_although_one_of_this_process_can_not_be_read(
    server: RedisServer, opened: Opener
) -> None:
    moving = await open_usage(opened)
    damaged = Wallet(WALLET.account, False)
    server.do("SET", names(damaged).usage, "not a stream")
    add_entry(server, record("left"))
    moving.expect(damaged)
    moving._drains = 0  # the first time, it moves those of all wallets
    await moving._drain_periodically()
    assert server.do("XLEN", NAMES.usage) == 0
    assert moving._expected == set()


async def test_a_server_that_can_not_be_reached_is_not_asked_for_every_wallet(
    monkeypatch: pytest.MonkeyPatch, opened: Opener
) -> None:
    monkeypatch.setattr(usage, "_WALLETS", 2)
    store = await opened(**IDLE)
    faults = FaultyClient(store, 0.02)
    faults.hits = lambda command: command[0] == "XRANGE"
    wallets = [Wallet(f"account{number}", True) for number in range(6)]
    with refused("store_unavailable"):
        await store._usage.drain(wallets)
    assert {command[1] for command in faults.failed} == {names(wallet).usage for wallet in wallets[:2]}


async def test_records_of_equal_times_are_in_the_order_of_the_entries_of_all_streams(
    server: RedisServer, opened: Opener
) -> None:
    reports = await open_usage(opened)  # no records are moved earlier than others
    server.do("SADD", WALLETS, member(Wallet(WALLET.account, False)))
    for number in range(20):
        entry = record(f"t{number:02}", live=number % 3 == 0, at=7.0)
        add_entry(server, entry, f"{9 + number // 8}-{number}")
    found, _ = await reports.list_usage(ALL, limit=99)
    assert [each.task_id for each in found] == [f"t{number:02}" for number in reversed(range(20))]


async def test_all_processes_add_the_same_records_to_the_archive_in_the_same_order(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, opened: Opener
) -> None:
    moving = (await opened(**IDLE))._usage
    wallets = [Wallet(f"account{number}", True) for number in range(5)]
    for number, wallet in enumerate(wallets):
        add_entry(server, record(f"t{number}", account=wallet.account), "7-0")
    orders: list[list[str]] = []

    async def fail(added: Sequence[UsageRecord]) -> None:
        orders.append([one.task_id for one in added])
        raise PomeloError("store_unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(moving._archive, "add", fail)
        for order in (wallets, wallets[::-1]):
            with refused("store_unavailable"):
                await moving.drain(order)
    assert orders[0] == orders[1]
    assert len(orders[0]) == len(wallets)


async def test_a_settlement_that_was_forgotten_is_found_in_the_archive_of_its_wallet(
    server: RedisServer, opened: Opener
) -> None:
    store = await opened(**IDLE)
    first = await run_task(store, "a", 7)
    server.do("DEL", NAMES.tombstone("a"))
    again = await store.settle(settlement("a", 8))
    assert again.record == first.record
    assert again.limit_status.available == 993
    assert await store._usage.get(Wallet("acme", False), "a") is None
