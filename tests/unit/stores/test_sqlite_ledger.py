"""What is kept of the counts of a wallet, in memory and in the file, and for how long."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Grant, OverdrawnError, Wallet
from pomelo.stores.ledger import (
    Counter,
    IdempotencyKey,
    Refused,
    ReplayedAnswer,
    Reserved,
    ReserveRequest,
    Settlement,
)
from pomelo.stores.sqlite.writer import BATCH, nothing
from pomelo.stores.usage import UsageRecord
from tests.contract.ledger_rig import SqliteRig
from tests.unit.refusals import refused

WALLET = Wallet("default", False)
IMAGES = Counter("images", 2, None, 86_400.0)
STREAMS = (Counter("streams:ann", 1), Counter("streams:bob", 0))
"""What a task counts while it runs: of one key a stream, of another key none."""


def record(task_id: str, cost: int = 0) -> UsageRecord:
    return UsageRecord(task_id, "req", WALLET.account, WALLET.live, "k", "rest", "m", "text", cost=cost)


async def reserve(rig: SqliteRig, task_id: str, *counters: Counter) -> None:
    await rig.store.reserve(ReserveRequest(record(task_id), 10, 10, counters))


def counts(rig: SqliteRig) -> dict[str, list[Any]]:
    """The counts of the wallet in memory."""
    return rig.store._ledger._wallets[WALLET.account, WALLET.live].counts


async def stored(rig: SqliteRig) -> dict[str, list[Any]]:
    """The counts in the row of the wallet, after a change was written."""
    await rig.store.set_plan("", "")
    with closing(sqlite3.connect(rig.path)) as connection:
        sql = "SELECT counters FROM wallets WHERE account = 'default' AND live = 0"
        (text,) = connection.execute(sql).fetchone()
    found: dict[str, list[Any]] = json.loads(text)
    return found


@pytest.mark.parametrize("end", ["settled", "voided", "recovered"])
async def test_a_count_of_running_tasks_is_deleted_with_the_last_of_them(rig: SqliteRig, end: str) -> None:
    await reserve(rig, "a", *STREAMS)
    assert counts(rig) == {"streams:ann": [1, None, None], "streams:bob": [0, None, None]}
    assert await stored(rig) == {}  # it ends with the process
    if end == "settled":
        await rig.store.settle(Settlement(record("a", 10), STREAMS))
    elif end == "voided":
        await rig.store.void(WALLET, "a")
    else:
        await rig.store.recover(WALLET, "a")
    assert counts(rig) == await stored(rig) == {}


async def test_a_window_is_deleted_by_the_first_change_after_its_end(rig: SqliteRig) -> None:
    start = rig.clock.wall
    await reserve(rig, "a", IMAGES, Counter("calls", 1, None, 60.0))
    assert set(await stored(rig)) == {"images", "calls"}
    rig.clock.passes(60.0)
    await rig.store.void(WALLET, "a")
    assert counts(rig) == await stored(rig) == {"images": [2, start, start + 86_400.0]}
    rig.clock.passes(86_340.0)
    await reserve(rig, "b")
    assert counts(rig) == await stored(rig) == {}


async def test_counts_of_ended_tasks_and_windows_are_deleted_by_the_next_write(rig: SqliteRig) -> None:
    for key in ("ann", "bob"):
        await reserve(rig, key, Counter(f"streams:{key}"), Counter(f"calls:{key}", window=60.0))
    assert set(counts(rig)) == {"streams:ann", "calls:ann", "streams:bob", "calls:bob"}
    assert set(await stored(rig)) == {"calls:ann", "calls:bob"}
    rig.clock.passes(60)
    await rig.store.void(WALLET, "ann")
    assert counts(rig) == {"streams:bob": [1, None, None]}
    assert await stored(rig) == {}


async def test_wallets_that_no_task_uses_are_dropped_from_memory(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.stores.sqlite.ledger.MAX_WALLETS", 3)
    calls = (Counter("calls", 1, None, 60.0),)
    for number in range(20):
        assert await rig.store.add_account(f"a{number}", "pro", 1.0)
        draft = UsageRecord(f"t{number}", "r", f"a{number}", True, "k", "rest", "m", "text")
        await rig.store.reserve(ReserveRequest(draft, 0, 0, calls))
        if number > 1:
            await rig.store.settle(Settlement(draft))
    known = rig.store._ledger._wallets
    assert len(known) <= 3 + 2
    assert {("a0", True), ("a1", True)} <= set(known)  # their tasks run
    for number in range(20):
        status = await rig.store.limit_status(Wallet(f"a{number}", True), calls)
        assert status.counts["calls"].used == 1


async def test_a_wallet_is_not_dropped_while_a_reserve_looks_for_an_answer(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.stores.sqlite.ledger.MAX_WALLETS", 1)
    granted = (await rig.store.limit_status(WALLET)).available
    request = ReserveRequest(record("a"), 10, 10, idempotency_key=IdempotencyKey("key", b"one"))
    other = UsageRecord("b", "req", "default", True, "k", "rest", "m", "text")
    reserved, _ = await asyncio.gather(
        rig.store.reserve(request), rig.store.reserve(ReserveRequest(other, 0, 0))
    )
    assert isinstance(reserved, Reserved)
    assert (await rig.store.limit_status(WALLET)).available == granted - 10
    await rig.store.settle(Settlement(record("a", 10)))
    assert (await rig.store.limit_status(WALLET)).available == granted - 10


async def test_no_wallet_is_in_use_when_all_operations_have_ended(rig: SqliteRig) -> None:
    request = ReserveRequest(record("a"), 10, 10, idempotency_key=IdempotencyKey("key", b"one"))
    assert isinstance(await rig.store.reserve(request), Reserved)
    await rig.store.settle(Settlement(record("a", 10)))
    await rig.store.grant(Grant("g1", WALLET, 5, 1.0))
    await rig.store.set_credit_limit(WALLET, 7)
    with pytest.raises(OverdrawnError):
        await rig.store.grant(Grant("g2", WALLET, -(10**12), 1.0))
    assert [wallet for wallet in rig.store._ledger._wallets.values() if wallet.in_use] == []


async def test_a_task_has_one_wallet(rig: SqliteRig) -> None:
    await rig.store.add_account("other", "pro", 1.0)
    await reserve(rig, "a")
    draft = UsageRecord("a", "req", "other", WALLET.live, "k", "rest", "m", "text")
    with pytest.raises(PomeloError):
        await rig.store.reserve(ReserveRequest(draft, 0, 0))
    assert (await rig.store.balance(WALLET)).held == 10


async def test_an_unknown_account_reserves_nothing_until_it_is_created(rig: SqliteRig) -> None:
    draft = UsageRecord("a", "req", "later", True, "k", "rest", "m", "text")
    with refused("store_unavailable"):
        await rig.store.reserve(ReserveRequest(draft, 0, 0))
    await rig.store.add_account("later", "pro", 1.0)
    assert isinstance(await rig.store.reserve(ReserveRequest(draft, 0, 0)), Reserved)


async def test_a_repeated_request_waits_for_the_answer_of_a_task_that_is_being_settled(
    rig: SqliteRig,
) -> None:
    key = IdempotencyKey("key", b"one")
    await rig.store.reserve(ReserveRequest(record("a"), 10, 10, idempotency_key=key))
    settled, repeated = await asyncio.gather(
        rig.store.settle(Settlement(record("a", 10), answer=b"answer")),
        rig.store.reserve(ReserveRequest(record("b"), 10, 10, idempotency_key=key)),
    )
    assert isinstance(repeated, ReplayedAnswer)
    assert (repeated.answer, repeated.record) == (b"answer", settled.record)


async def test_the_progress_of_a_task_that_is_being_settled_is_not_noted(rig: SqliteRig) -> None:
    await reserve(rig, "a")
    settling = rig.store.settle(Settlement(record("a", 10)))
    assert await rig.store.note([record("a", 5)]) == ["a"]
    assert (await settling).record.cost == 10
    assert await rig.store.drafts() == []


async def test_credits_are_available_once_their_grant_is_written(rig: SqliteRig) -> None:
    granted = (await rig.store.limit_status(WALLET)).available
    more = ReserveRequest(record("a"), granted + 5, granted + 5)
    granting = asyncio.ensure_future(rig.store.grant(Grant("g1", WALLET, 5, 1.0)))
    await asyncio.sleep(0)  # it is being written
    assert isinstance(await rig.store.reserve(more), Refused)
    assert (await granting).granted == granted + 5
    assert isinstance(await rig.store.reserve(more), Reserved)


async def test_a_task_that_has_a_record_is_not_charged_again_at_the_next_start(rig: SqliteRig) -> None:
    await reserve(rig, "a")
    await rig.store.note([record("a", 3)])
    with closing(sqlite3.connect(rig.path)) as file:
        (noted,) = file.execute("SELECT * FROM holds").fetchall()
    await rig.store.settle(Settlement(record("a", 4), ()))
    await rig.close()
    with closing(sqlite3.connect(rig.path)) as file:  # as a version that wrote both in two steps
        file.execute(f"INSERT INTO holds VALUES ({', '.join('?' * len(noted))})", noted)
        file.commit()
    await rig.open()
    balance = await rig.store.balance(WALLET)
    assert (balance.spent, balance.held) == (4, 0)
    assert await rig.store.drafts() == []


async def test_a_task_that_ends_before_its_note_is_written_leaves_nothing_in_the_file(rig: SqliteRig) -> None:
    await reserve(rig, "a")
    writer = rig.store._writer
    waiting = [writer.do(nothing) for _ in range(BATCH + 2)]  # the note is not in the batch of the end
    noting = asyncio.ensure_future(rig.store.note([record("a", 3)]))
    await asyncio.sleep(0)
    await rig.store.settle(Settlement(record("a", 4), ()))
    await asyncio.gather(noting, *waiting)
    holds = writer.do(lambda connection: connection.execute("SELECT * FROM holds").fetchall(), reads=True)
    assert await holds == []


async def test_expired_answers_are_deleted_at_the_next_start(rig: SqliteRig) -> None:
    for task_id in ("a", "b"):
        key = IdempotencyKey(task_id, b"f")
        await rig.store.reserve(ReserveRequest(record(task_id), 10, 10, (), key))
        await rig.store.settle(Settlement(record(task_id), (), b"hello"))
        rig.clock.passes(12 * 3600.0)
    await rig.close()
    await rig.open()
    await rig.close()
    with closing(sqlite3.connect(rig.path)) as file:
        assert file.execute("SELECT task_id FROM repeats").fetchall() == [("b",)]
    await rig.open()


async def test_a_change_of_credits_keeps_its_wallet_in_memory_only_until_it_is_made(rig: SqliteRig) -> None:
    await rig.store.grant(Grant("more", WALLET, 5, 1.0))
    wallet = rig.store._ledger._wallets[WALLET.account, WALLET.live]
    assert not wallet.in_use
    with pytest.raises(OverdrawnError):
        await rig.store.grant(Grant("back", WALLET, -(10**12), 1.0))
    assert not wallet.in_use
