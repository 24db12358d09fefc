"""What the store on Redis keeps to beyond what every store does: its keys, and several processes."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis.cluster import key_slot

from pomelo.stores.base import KeyRecord
from pomelo.stores.ledger import (
    Grant,
    IdempotencyKey,
    LostReservationError,
    Refused,
    ReplayedAnswer,
    Reserved,
    UsageQuery,
    Wallet,
)
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.redis.key_names import names
from tests.contract.ledger_rig import WALLET, ending, record, taking
from tests.contract.redis_rig import emptied, open_with_credits, server

__all__ = ["emptied", "server"]


ALL = UsageQuery()


# --- its keys


def test_all_keys_of_a_wallet_are_of_one_slot_and_of_no_other_wallet():
    accounts = ("acme", "a/b", "{", "}", "{}", "}{", "ü", "a}b", "live", "")
    for account in accounts:
        for live in (False, True):
            of = names(Wallet(account, live))
            keys = [*of[1:], of.mark("task}{"), of.answer("any {key}")]
            assert len({key_slot(key.encode()) for key in keys}) == 1
            assert len(set(keys)) == len(keys)
    assert len({names(Wallet(account, live)).wallet for account in accounts for live in (False, True)}) == 20


async def test_a_script_touches_no_key_that_it_was_not_given(server, tmp_path):
    folder = Path(__file__).parents[2] / "pomelo" / "stores" / "redis" / "lua"
    calls = re.compile(r"redis\.call\('(\w+)'(?:, ([^,)]+))?")
    for script in folder.glob("*.lua"):
        for command, key in calls.findall(script.read_text()):
            assert command == "TIME" or key.startswith("KEYS[") or key == "place", (script.name, command, key)


async def test_accounts_and_keys_of_a_pomelo_that_kept_no_order_are_put_in_order(server, tmp_path):
    async with AsyncExitStack() as stack:
        store = await open_with_credits(stack, server, tmp_path)
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


# --- several processes


async def test_two_processes_together_admit_what_one_may(server, tmp_path):
    async with AsyncExitStack() as stack:
        stores = [await open_with_credits(stack, server, tmp_path) for _ in range(2)]
        asked = [stores[n % 2].reserve(taking(f"t{n}", 10)) for n in range(1_000)]
        answers = await asyncio.gather(*asked)
        assert sum(isinstance(answer, Reserved) for answer in answers) == 100
        assert {answer.code for answer in answers if isinstance(answer, Refused)} == {"insufficient_credits"}
        assert (await stores[0].balance(WALLET)).available == 0


@pytest.mark.parametrize(
    ("limit", "code"),
    [("requests_limit", "rate_limit_exceeded"), ("concurrency_limit", "concurrency_limit_exceeded")],
)
async def test_two_processes_together_keep_a_limit(server, tmp_path, limit, code):
    async with AsyncExitStack() as stack:
        stores = [await open_with_credits(stack, server, tmp_path) for _ in range(2)]
        asked = [stores[n % 2].reserve(taking(f"t{n}", 1, **{limit: 20})) for n in range(200)]
        answers = await asyncio.gather(*asked)
        assert sum(isinstance(answer, Reserved) for answer in answers) == 20
        assert {answer.code for answer in answers if isinstance(answer, Refused)} == {code}


async def test_a_request_that_comes_fifty_times_at_once_runs_once(server, tmp_path):
    key = IdempotencyKey("order", b"digest")
    async with AsyncExitStack() as stack:
        stores = [await open_with_credits(stack, server, tmp_path) for _ in range(2)]
        asked = [stores[n % 2].reserve(taking(f"t{n}", idempotency_key=key)) for n in range(50)]
        answers = await asyncio.gather(*asked)
        [first] = [n for n, answer in enumerate(answers) if isinstance(answer, Reserved)]
        codes = {answer.code for answer in answers if isinstance(answer, Refused)}
        assert codes == {"idempotency_conflict"}
        # Settled by a process that did not take it, it keeps its answer all the same.
        await stores[(first + 1) % 2].settle(ending(f"t{first}", answer=b"\x00answer"))
        again = await stores[0].reserve(taking("again", idempotency_key=key))
        assert isinstance(again, ReplayedAnswer)
        assert again.answer == b"\x00answer"


async def test_a_record_that_one_settled_can_be_read_by_another_at_once(server, tmp_path):
    async with AsyncExitStack() as stack:
        stores = [await open_with_credits(stack, server, tmp_path, drain=0.01) for _ in range(2)]

        async def run(n: int) -> None:
            await stores[n % 2].reserve(taking(f"t{n}", 1))
            await stores[n % 2].settle(ending(f"t{n}", 1))
            kept, _ = await stores[(n + 1) % 2].list_usage(ALL, limit=1_000)
            assert f"t{n}" in {found.task_id for found in kept}

        await asyncio.gather(*[run(n) for n in range(100)])
        kept, _ = await stores[0].list_usage(ALL, limit=1_000)
        assert sorted(found.task_id for found in kept) == sorted(f"t{n}" for n in range(100))
        assert server.do("XLEN", names(WALLET).usage) == 0


PROCESS = """
import asyncio, sys
from pomelo.stores.redis import Timing, open_redis
from tests.contract.ledger_rig import record, taking

async def main():
    async with open_redis(sys.argv[1], sys.argv[2], timing=Timing(beat=0.1, dead=1.0)) as store:
        for n in range(5):
            await store.reserve(taking(f"t{n}", 100))
        await store.note([record("t0", cost=30, output_tokens=4)])
        print("holds", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_what_a_killed_process_held_is_ended_by_another(server, tmp_path):
    async with AsyncExitStack() as stack:
        store = await open_with_credits(stack, server, tmp_path, beat=0.1, dead=1.0)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROCESS, server.url, f"sqlite:{tmp_path / 'usage.db'}"),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"holds\n"
        await store.reserve(taking("mine", 100))
        process.send_signal(signal.SIGKILL)
        await process.wait()
        async with asyncio.timeout(20):
            while (await store.limit_status(WALLET)).concurrency > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        [kept], _ = await store.list_usage(ALL, limit=9)
        assert (kept.task_id, kept.cost, kept.output_tokens, kept.source) == ("t0", 30, 4, "recovered")
        assert not kept.complete
        assert abs(kept.at - time.time()) < 60
        with pytest.raises(LostReservationError):
            await store.settle(ending("t0", 40))
        assert (await store.settle(ending("mine", 50))).record.cost == 50
        found = await store.balance(WALLET)
        assert (found.spent, found.held) == (80, 0)


async def test_a_process_that_stands_still_is_let_live_as_long_as_nobody_looked(server, tmp_path):
    async with AsyncExitStack() as stack:
        clock = [0.0]
        store = await open_with_credits(stack, server, tmp_path, beat=0.02, dead=1_000.0)
        await store.reserve(taking("a", 100))
        watcher = await stack.enter_async_context(
            open_redis(
                *(server.url, f"sqlite:{tmp_path / 'usage.db'}"),
                timing=Timing(beat=0.02, dead=1_000.0),
                monotonic=lambda: clock[0],
            )
        )
        await store._owner.stop()

        async def look() -> None:
            await watcher._owner._look()

        await look()
        # One look before and one after a gap tell nothing of what was between.
        clock[0] = 5_000.0
        await look()
        assert [held.task_id for held in await watcher.held()] == ["a"]
        for _ in range(1_100):
            clock[0] += 0.92
            await look()
        assert await watcher.held() == []
        await store.note([record("a")])


async def test_a_take_that_comes_after_it_was_voided_is_not_done(server, tmp_path):
    async with AsyncExitStack() as stack:
        store = await open_with_credits(stack, server, tmp_path)
        await store._void(WALLET, "late", True, "call-1")
        with pytest.raises(LostReservationError):
            await store._take(taking("late"), "call-1")
        assert isinstance(await store._take(taking("late"), "call-2"), Reserved)


async def test_an_idempotency_key_without_an_answer_leaves_nothing_in_the_server(server, tmp_path):
    async with AsyncExitStack() as stack:
        store = await open_with_credits(stack, server, tmp_path)
        answer = names(WALLET).answer("order-7")
        for number, end in enumerate(
            (
                lambda task: store.settle(ending(task)),
                lambda task: store.void(WALLET, task),
                lambda task: store.recover(WALLET, task),
            )
        ):
            await store.reserve(taking(f"t{number}", idempotency_key=IdempotencyKey("order-7", b"digest")))
            assert server.do("EXISTS", answer) == 1
            await end(f"t{number}")
            assert server.do("EXISTS", answer) == 0


async def test_undoing_a_repeated_take_leaves_what_the_first_one_took(server, tmp_path):
    async with AsyncExitStack() as stack:
        store = await open_with_credits(stack, server, tmp_path)
        await store.reserve(taking("a", 100))
        await store._void(WALLET, "a", True, "another-call")
        assert (await store.settle(ending("a", 60))).record.cost == 60


async def test_a_server_clock_that_was_set_back_makes_no_window_longer(server, tmp_path):
    wall = [1_800_000_000.0]
    opened = open_redis(server.url, f"sqlite:{tmp_path / 'usage.db'}", server_time=lambda: wall[0])
    async with opened as store:
        await store.grant(Grant("g", Wallet("default", True), 100, 1.0))
        await store.reserve(taking("a", 1, account="default", tokens=1))
        wall[0] -= 86_400
        full = {"account": "default", "requests_limit": 1}
        assert (await store.reserve(taking("b", 1, **full))).code == "rate_limit_exceeded"
        await store.reserve(taking("c", 1, account="default", tokens=1))
        wall[0] += 59.5
        assert (await store.reserve(taking("d", 1, **full))).code == "rate_limit_exceeded"
        wall[0] += 0.5
        assert isinstance(await store.reserve(taking("e", 1, **full)), Reserved)
