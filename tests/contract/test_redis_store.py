"""The store on Redis: its keys, and several processes."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.archive.sqlite import _SqliteArchive
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord
from pomelo.stores.ledger import IdempotencyKey, LostReservationError, Refused, ReplayedAnswer, Reserved
from pomelo.stores.redis import Timing, open_redis, usage
from pomelo.stores.redis.key_names import ACCOUNT_ORDER, KEY_ORDER, key_order, key_position, names
from pomelo.stores.redis.store import RedisStore
from pomelo.stores.usage import MetadataKey, UsageQuery, UsageRecord
from tests.contract.ledger_rig import WALLET, record, refusal, request, run_task, settlement
from tests.contract.redis_rig import Opener, open_with_credits
from tests.limits import limits, used
from tests.redis_server import RedisServer

ALL = UsageQuery()


# --- its keys


def test_all_keys_of_a_wallet_share_a_slot_and_belong_to_no_other_wallet() -> None:
    accounts = ("acme", "a/b", "{", "}", "{}", "}{", "ü", "a}b", "live", "")
    for account in accounts:
        for live in (False, True):
            wallet = names(Wallet(account, live))
            keys = [*wallet[1:], wallet.tombstone("task}{"), wallet.answer("any {key}")]
            assert len({key_slot(key.encode()) for key in keys}) == 1
            assert len(set(keys)) == len(keys)
    assert len({names(Wallet(account, live)).wallet for account in accounts for live in (False, True)}) == 20


def test_a_script_uses_only_the_keys_that_are_passed_to_it() -> None:
    folder = Path(__file__).parents[2] / "pomelo" / "stores" / "redis" / "lua"
    calls = re.compile(r"redis\.p?call\('(\w+)'(?:, ([^,)]+))?")
    found = [
        (script.name, command, key)
        for script in folder.glob("*.lua")
        for command, key in calls.findall(script.read_text())
    ]
    assert {name for name, _, _ in found} > {"wallet.lua", "reserve.lua", "non_empty.lua"}
    others = [each for each in found if not each[2].startswith("KEYS[") and each[2] != "answer_key"]
    assert {command for _, command, _ in others} == {"TIME"}, others


async def test_accounts_and_keys_of_a_pomelo_without_orders_are_sorted(
    server: RedisServer, opened: Opener
) -> None:
    store = await opened()
    for n in range(5):
        await store.add_account(f"acct{n}", "free", 1.0)
        await store.add_key(KeyRecord(f"key{n}", f"acct{n % 2}", False, b"x", (), 9.0 - n))
    accounts, keys = await store.list_accounts(), await store.list_keys()
    assert [key.key_id for key in keys] == ["key4", "key3", "key2", "key1", "key0"]
    for lost in await asyncio.to_thread(server.do, "KEYS", "*:order*"):
        server.do("DEL", lost)
    assert await store.list_keys("acct1") == [key for key in keys if key.account == "acct1"]
    assert await store.list_keys() == keys
    assert await store.list_accounts() == accounts


async def test_what_an_older_pomelo_adds_while_a_newer_one_runs_is_listed(
    server: RedisServer, opened: Opener
) -> None:
    store = await opened()
    for n in range(3):
        await store.add_account(f"acct{n}", "free", 1.0)
        await store.add_key(KeyRecord(f"key{n}", f"acct{n}", False, b"x", (), 1.0 + n))
    accounts, keys = await store.list_accounts(), await store.list_keys()
    server.do("ZREM", ACCOUNT_ORDER, "acct1")
    server.do("ZREM", KEY_ORDER, key_position(2.0, "key1"))
    server.do("DEL", key_order("acct1"))
    assert await store.list_accounts() == accounts
    assert await store.list_keys() == keys
    assert await store.list_keys("acct1") == [keys[1]]


async def test_records_of_a_pomelo_without_user_and_metadata_are_read(
    server: RedisServer, opened: Opener
) -> None:
    old = (
        '{"task_id":"old","request_id":"req_1","account":"acme","live":true,"key_id":"k1","wire":"rest","model":"gpt-4",'
        '"task_type":"text","provider":"openai","provider_model":"m","input_tokens":20,"cached_input_tokens":5,'
        '"cache_write_input_tokens":0,"cache_write_1h_input_tokens":0,"output_tokens":3,"characters":0,"images":0,'
        '"pixels":0,"audio_ms":0,"provider_micros":0,"processing_ms":0,"first_byte_ms":0,"output_bytes":0,"cost":7,'
        '"uncollected":0,"prices":"","price_version":"","source":"provider","complete":true,"at":1795690000.25}'
    )
    read = record(
        "old", request_id="req_1", key_id="k1", provider="openai", provider_model="m", input_tokens=20,
        cached_input_tokens=5, output_tokens=3, cost=7, at=1795690000.25, reasoning_tokens=0, user="", metadata="",
    )  # fmt: skip
    keys = names(WALLET)
    store = await opened()
    await store.reserve(request("old"))
    server.do("HSET", keys.drafts, "old", old)
    assert await store.drafts() == [read]
    assert [each.record for each in await store.reservations()] == [read]
    await store.void(WALLET, "old")
    server.do("XADD", keys.usage, "*", "record", old, "cost", 7, "uncollected", 0)
    assert await store.list_usage(ALL, limit=9) == ([read], "")
    (total,) = await store.sum_usage(ALL, ("user", MetadataKey("team")))
    assert (total.groups, total.tasks, total.cost) == (("", ""), 1, 7)
    key = IdempotencyKey("order-7", b"f")
    await store.reserve(request("new", idempotency_key=key))
    await store.settle(settlement("new", answer=b"answer"))
    server.do("HSET", keys.answer("order-7"), "record", old)
    replayed = await store.reserve(request("again", idempotency_key=key))
    assert isinstance(replayed, ReplayedAnswer)
    assert (replayed.record.task_id, replayed.record.user, replayed.record.metadata) == ("old", "", "")


# --- several processes


async def test_two_processes_share_the_credits_of_a_wallet(opened: Opener) -> None:
    stores = [await opened() for _ in range(2)]
    calls = [stores[n % 2].reserve(request(f"t{n}", 10)) for n in range(1_000)]
    answers = await asyncio.gather(*calls)
    assert sum(isinstance(answer, Reserved) for answer in answers) == 100
    assert {answer.code for answer in answers if isinstance(answer, Refused)} == {"insufficient_credits"}
    assert (await stores[0].balance(WALLET)).available == 0


@pytest.mark.parametrize(
    ("limit", "counter"),
    [("requests_limit", "requests"), ("concurrency_limit", "concurrency")],
)
async def test_two_processes_share_a_limit(limit: str, counter: str, opened: Opener) -> None:
    stores = [await opened() for _ in range(2)]
    full: dict[str, Any] = {limit: 20}
    calls = [stores[n % 2].reserve(request(f"t{n}", 1, **full)) for n in range(200)]
    answers = await asyncio.gather(*calls)
    assert sum(isinstance(answer, Reserved) for answer in answers) == 20
    assert {answer.counter for answer in answers if isinstance(answer, Refused)} == {counter}


async def test_fifty_concurrent_requests_with_one_key_run_once(opened: Opener) -> None:
    key = IdempotencyKey("order", b"digest")
    stores = [await opened() for _ in range(2)]
    calls = [stores[n % 2].reserve(request(f"t{n}", idempotency_key=key)) for n in range(50)]
    answers = await asyncio.gather(*calls)
    [first] = [n for n, answer in enumerate(answers) if isinstance(answer, Reserved)]
    codes = {answer.code for answer in answers if isinstance(answer, Refused)}
    assert codes == {"idempotency_conflict"}
    # The answer is stored even if another process than the one that reserved the task settles it.
    await stores[(first + 1) % 2].settle(settlement(f"t{first}", answer=b"\x00answer"))
    again = await stores[0].reserve(request("again", idempotency_key=key))
    assert isinstance(again, ReplayedAnswer)
    assert again.answer == b"\x00answer"


async def test_a_record_settled_by_one_process_is_immediately_visible_to_another(
    server: RedisServer, opened: Opener
) -> None:
    stores = [await opened(drain=0.01) for _ in range(2)]

    async def run(n: int) -> None:
        await stores[n % 2].reserve(request(f"t{n}", 1))
        await stores[n % 2].settle(settlement(f"t{n}", 1))
        stored, _ = await stores[(n + 1) % 2].list_usage(ALL, limit=1_000)
        assert f"t{n}" in {found.task_id for found in stored}

    await asyncio.gather(*[run(n) for n in range(100)])
    stored, _ = await stores[0].list_usage(ALL, limit=1_000)
    assert sorted(found.task_id for found in stored) == sorted(f"t{n}" for n in range(100))
    assert server.do("XLEN", names(WALLET).usage) == 0


async def test_records_are_moved_to_the_archive_in_steps_of_few(
    monkeypatch: pytest.MonkeyPatch, opened: Opener
) -> None:
    monkeypatch.setattr(usage, "_ENTRIES", 10)
    monkeypatch.setattr(usage, "_WALLETS", 4)
    steps: list[list[str]] = []
    add = _SqliteArchive.add

    async def noted(archive: _SqliteArchive, moved: Sequence[UsageRecord]) -> None:
        steps.append([one.task_id for one in moved])
        await add(archive, moved)

    monkeypatch.setattr(_SqliteArchive, "add", noted)
    counts = [23, 0, 1, 2, 3, 10, 11]
    expected = [f"t{account}-{n}" for account, count in enumerate(counts) for n in range(count)]
    store = await opened(drain=3600.0)
    for account, count in enumerate(counts):
        wallet = Wallet(f"account-{account}", True)
        await store.add_account(wallet.account, "pro", 1.0)
        await store.grant(Grant(wallet.account, wallet, 1_000, 1.0))
        for n in range(count):
            await run_task(store, f"t{account}-{n}", 1, account=wallet.account)
    steps.clear()
    (total,) = await store.sum_usage(ALL, ())
    assert total.tasks == len(expected)
    assert sorted(task_id for step in steps for task_id in step) == sorted(expected)
    assert max(map(len, steps)) <= 10


PROCESS = """
import asyncio, sys
from pomelo.stores.redis import Timing, open_redis, usage
from tests.contract.ledger_rig import record, request

async def main():
    async with open_redis(sys.argv[1], sys.argv[2], timing=Timing(heartbeat=0.1, dead_after=1.0)) as store:
        for n in range(5):
            await store.reserve(request(f"t{n}", 100))
        await store.note([record("t0", cost=30, output_tokens=4)])
        print("reserved", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_the_tasks_of_a_killed_process_are_recovered_by_another(
    server: RedisServer, tmp_path: Path, opened: Opener
) -> None:
    store = await opened(heartbeat=0.1, dead_after=1.0)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROCESS, server.url, f"sqlite:{tmp_path / 'usage.db'}"),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"reserved\n"
    await store.reserve(request("mine", 100))
    process.send_signal(signal.SIGKILL)
    await process.wait()
    async with asyncio.timeout(20):
        while (await limits(store, WALLET)).concurrency > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    [stored], _ = await store.list_usage(ALL, limit=9)
    assert (stored.task_id, stored.cost, stored.output_tokens, stored.source) == (
        "t0",
        30,
        4,
        "recovered",
    )
    assert not stored.complete
    assert abs(stored.at - time.time()) < 60
    with pytest.raises(LostReservationError):
        await store.settle(settlement("t0", 40))
    assert (await store.settle(settlement("mine", 50))).record.cost == 50
    found = await store.balance(WALLET)
    assert (found.spent, found.held) == (80, 0)


async def test_a_silent_worker_is_not_marked_dead_if_no_worker_was_watching(
    server: RedisServer, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        clock = [0.0]
        store = await open_with_credits(stack, server, tmp_path, heartbeat=0.02, dead_after=1_000.0)
        await store.reserve(request("a", 100))
        watcher = await stack.enter_async_context(
            open_redis(
                *(server.url, f"sqlite:{tmp_path / 'usage.db'}"),
                timing=Timing(heartbeat=0.02, dead_after=1_000.0),
                monotonic=lambda: clock[0],
            )
        )
        await store._worker.stop()

        async def check() -> None:
            assert isinstance(watcher, RedisStore)
            await watcher._worker._check_workers()

        await check()
        # One check before and one after a gap do not show what happened in between.
        clock[0] = 5_000.0
        await check()
        assert [draft.task_id for draft in await watcher.drafts()] == ["a"]
        for _ in range(1_100):
            clock[0] += 0.92
            await check()
        assert await watcher.drafts() == []
        await store.note([record("a")])


async def test_an_idempotency_key_without_an_answer_leaves_nothing_in_the_server(
    server: RedisServer, opened: Opener
) -> None:
    store = await opened()
    answer = names(WALLET).answer("order-7")
    ends: tuple[Callable[[str], Awaitable[object]], ...] = (
        lambda task: store.settle(settlement(task)),
        lambda task: store.void(WALLET, task),
        lambda task: store.recover(WALLET, task),
    )
    for number, end in enumerate(ends):
        await store.reserve(request(f"t{number}", idempotency_key=IdempotencyKey("order-7", b"digest")))
        assert server.do("EXISTS", answer) == 1
        await end(f"t{number}")
        assert server.do("EXISTS", answer) == 0


async def test_no_answer_is_stored_under_a_key_that_the_task_no_longer_has(
    server: RedisServer, opened: Opener
) -> None:
    store = await opened()
    answer = names(WALLET).answer("order-7")
    await store.reserve(request("a", idempotency_key=IdempotencyKey("order-7", b"digest")))
    server.do("DEL", answer)
    await store.settle(settlement("a", answer=b"hello"))
    assert server.do("EXISTS", answer) == 0


async def test_undoing_a_repeated_reserve_keeps_the_first_reservation(opened: Opener) -> None:
    store = await opened()
    await store.reserve(request("a", 100))
    for _ in range(2):  # before and after its end
        await store._void(WALLET, "a", True, "another-call")
        assert (await store.settle(settlement("a", 60))).record.cost == 60
    await store._void(WALLET, "a", True, "another-call")
    with pytest.raises(LostReservationError):
        await store.reserve(request("a", 100))


@pytest.fixture
async def clocked(server: RedisServer, tmp_path: Path) -> AsyncIterator[tuple[Store, list[float]]]:
    """A store in which the default account has 100 microcredits, and the clock of its server."""
    wall = [1_800_000_000.0]
    opening = open_redis(server.url, f"sqlite:{tmp_path / 'usage.db'}", server_time=lambda: wall[0])
    async with opening as store:
        await store.grant(Grant("g", Wallet("default", True), 100, 1.0))
        yield store, wall


async def test_setting_the_server_clock_back_makes_no_window_longer(
    clocked: tuple[Store, list[float]],
) -> None:
    store, wall = clocked
    await store.reserve(request("a", 1, account="default", tokens=1))
    wall[0] -= 86_400
    full: dict[str, Any] = {"account": "default", "requests_limit": 1}
    assert await refusal(store.reserve(request("b", 1, **full))) == "requests"
    await store.reserve(request("c", 1, account="default", tokens=1))
    wall[0] += 59.5
    assert await refusal(store.reserve(request("d", 1, **full))) == "requests"
    wall[0] += 0.5
    assert isinstance(await store.reserve(request("e", 1, **full)), Reserved)


async def test_a_window_that_began_in_the_future_begins_anew_with_the_next_task(
    clocked: tuple[Store, list[float]],
) -> None:
    store, wall = clocked
    await store.reserve(request("a", 1, account="default"))
    wall[0] -= 86_400
    found = await store.reserve(request("b", 1, account="default"))
    assert used(found)[1:3] == (2, 60.0)
    wall[0] += 60
    assert isinstance(await store.reserve(request("c", 1, account="default", requests_limit=1)), Reserved)


async def test_setting_the_server_clock_back_blocks_no_account_for_longer_than_a_window(
    clocked: tuple[Store, list[float]],
) -> None:
    store, wall = clocked
    full: dict[str, Any] = {"account": "default", "requests_limit": 1, "tokens": 1}
    await store.reserve(request("a", 1, **full))
    wall[0] -= 86_400
    for seconds in (0, 30, 29.5):
        wall[0] += seconds
        assert await refusal(store.reserve(request("b", 1, **full))) == "requests"
    wall[0] += 0.5
    assert isinstance(await store.reserve(request("c", 1, **full)), Reserved)
