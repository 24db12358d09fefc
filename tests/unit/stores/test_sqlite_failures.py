"""Errors of SQLite's statements: each affects one operation, whose outcome is known or checked later."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Balance, Grant, UnknownAccountError
from pomelo.stores.ledger import (
    Budget,
    BudgetUse,
    Counter,
    LostReservationError,
    Refused,
    Reserved,
    Settled,
    UnknownOutcomeError,
)
from pomelo.stores.sqlite import SqliteStore, open_sqlite, writer
from pomelo.stores.sqlite.damage import REMEDY
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import record
from tests.limits import Used, limits
from tests.unit.stores.own_tasks import WALLET, own_request, own_settlement


class Failing(sqlite3.Connection):
    """A connection on which statements with a prefix fail a given number of times. `late`: the next COMMIT
    fails after it was executed, and the next transaction fails too."""

    fails: tuple[str, int] = ("", 0)
    error: Callable[[], Exception] = RuntimeError
    late = False

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        self.fail(sql)
        cursor = super().execute(sql, parameters)
        if Failing.late and sql == "COMMIT":
            Failing.late, Failing.fails = False, ("BEGIN", 1)
            raise Failing.error()
        return cursor

    def executemany(self, sql: str, parameters: Any, /) -> sqlite3.Cursor:
        self.fail(sql)
        return super().executemany(sql, parameters)

    def fail(self, sql: str) -> None:
        start, times = Failing.fails
        if times and sql.lstrip().startswith(start):
            Failing.fails = (start, times - 1)
            raise Failing.error()


@pytest.fixture
async def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SqliteStore]:
    """A store whose connections are Failing."""
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Failing))
    monkeypatch.setattr(writer, "COUNTS_DELAY", 3600.0)  # a write of counts alone would take a failure
    Failing.fails, Failing.error, Failing.late = ("", 0), RuntimeError, False
    async with open_sqlite(tmp_path / "own.db") as store:
        yield store


@pytest.mark.parametrize("error", [RuntimeError, KeyError, MemoryError, sqlite3.OperationalError])
@pytest.mark.parametrize("start", ["BEGIN", "SELECT a.name", "INSERT INTO usage", "UPDATE wallets", "COMMIT"])
async def test_any_error_of_a_statement_is_store_unavailable_and_the_thread_continues(
    failing: SqliteStore, start: str, error: type[Exception]
) -> None:
    Failing.error = error
    Failing.fails = (start, 3)
    tasks = ("a", "b")
    outcomes = await asyncio.gather(
        *(failing.reserve(own_request(task_id, minimum=0)) for task_id in tasks), return_exceptions=True
    )
    ends = await asyncio.gather(
        *(failing.settle(own_settlement(task_id)) for task_id in tasks), return_exceptions=True
    )
    assert all(
        isinstance(one, Reserved | Settled | LostReservationError)
        or getattr(one, "code", "") == "store_unavailable"
        for one in (*outcomes, *ends)
    )
    assert Failing.fails[1] < 3
    Failing.fails = ("", 0)
    for task_id in tasks:
        with suppress(LostReservationError):  # it is settled
            assert isinstance(await failing.reserve(own_request(task_id, minimum=0)), Reserved)
        assert (await failing.settle(own_settlement(task_id))).record.cost == 3
    assert (await limits(failing, WALLET)).concurrency == 0
    assert (await failing.balance(WALLET)).spent == 6


@pytest.mark.parametrize("start", ["INSERT INTO usage", "COMMIT"])
async def test_damage_that_a_write_finds_is_logged_with_its_remedy(
    failing: SqliteStore, caplog: pytest.LogCaptureFixture, start: str
) -> None:
    def damaged() -> Exception:
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        return error

    await failing.reserve(own_request("a"))
    Failing.error, Failing.fails = damaged, (start, 1)
    with suppress(PomeloError):
        await failing.settle(own_settlement("a"))
    assert REMEDY in caplog.text


async def test_a_failed_rollback_is_repeated(failing: SqliteStore) -> None:
    def work(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO accounts (name) VALUES ('half')")
        Failing.fails = ("ROLLBACK", 4)
        raise KeyError

    with pytest.raises(PomeloError):
        await failing._writer.do(work)
    # The transaction is still open; the next operation must not be part of it.
    assert Failing.fails == ("ROLLBACK", 2)
    with pytest.raises(PomeloError):
        await failing.get_account("half")
    assert await failing.get_account("half") is None
    assert isinstance(await failing.reserve(own_request("a", minimum=0)), Reserved)
    assert await failing.get_account("half") is None


async def test_the_outcome_is_known_after_an_sqlite_error_and_unknown_after_others(
    failing: SqliteStore,
) -> None:
    errors = ((lambda: sqlite3.OperationalError("disk I/O error"), False), (RuntimeError, True))
    await failing.reserve(own_request("a"))
    for start in ("INSERT INTO usage", "COMMIT"):
        for error, unknown in errors:
            Failing.error, Failing.fails = error, (start, 2)
            with pytest.raises(PomeloError) as caught:
                await failing.settle(own_settlement("a"))
            assert isinstance(caught.value, UnknownOutcomeError) == unknown
            assert (await limits(failing, WALLET)).concurrency == 1
            assert (await failing.balance(WALLET)).held == 10


async def test_after_a_failed_write_a_task_is_reserved_only_once_its_counts_are_written(
    failing: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    await failing.reserve(own_request("a"))
    Failing.error = lambda: sqlite3.OperationalError("database or disk is full")
    Failing.fails = ("BEGIN", 4)
    with pytest.raises(PomeloError):
        await failing.settle(own_settlement("a"))
    with pytest.raises(PomeloError):
        await failing.reserve(own_request("b"))
    assert Failing.fails == ("BEGIN", 0)
    assert (await limits(failing, WALLET)).without_resets() == Used(100_000_000 - 10, 1, 0, 1)
    assert isinstance(await failing.reserve(own_request("c")), Reserved)
    await failing.settle(own_settlement("c"))  # logs nothing
    *failed, last = [record.getMessage() for record in caplog.records]
    assert set(failed) == {"An operation failed: database or disk is full"}
    assert last == "The database can be written again"
    Failing.fails = ("BEGIN", 1)
    assert isinstance(await failing.reserve(own_request("d")), Reserved)  # nothing is written for it
    assert Failing.fails == ("BEGIN", 1)


async def test_the_check_of_a_store_fails_while_it_can_not_be_written(failing: SqliteStore) -> None:
    await failing.reserve(own_request("a"))
    Failing.error = lambda: sqlite3.OperationalError("database or disk is full")
    Failing.fails = ("COMMIT", 4)
    with pytest.raises(PomeloError):
        await failing.settle(own_settlement("a"))
    assert await failing.get_account("default") is not None  # what can be read says nothing
    with pytest.raises(PomeloError) as caught:
        await failing.check()
    assert caught.value.code == "store_unavailable"
    assert Failing.fails == ("COMMIT", 0)
    await failing.check()  # which writes; the next one only reads
    Failing.fails = ("COMMIT", 1)
    await failing.check()
    assert isinstance(await failing.reserve(own_request("b")), Reserved)
    assert Failing.fails == ("COMMIT", 1)


async def test_a_failure_is_logged_once_and_a_different_one_too(
    failing: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    for text in ("disk I/O error", "disk I/O error", "unable to open database file"):
        Failing.error, Failing.fails = partial(sqlite3.OperationalError, text), ("SELECT name", 1)
        with pytest.raises(PomeloError):
            await failing.get_account("default")
    assert [each.getMessage() for each in caplog.records] == [
        "An operation failed: disk I/O error",
        "An operation failed: unable to open database file",
    ]


@pytest.mark.parametrize("code", [sqlite3.SQLITE_BUSY, sqlite3.SQLITE_BUSY_RECOVERY])
async def test_all_that_a_locked_file_keeps_from_being_written_waits_once(
    failing: SqliteStore, code: int
) -> None:
    def locked() -> Exception:
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = code
        return error

    Failing.error, Failing.fails = locked, ("BEGIN", 9)
    writes = [failing._writer.do(writer.nothing) for _ in range(4)]  # a batch of one, then one of three
    found = await asyncio.gather(*writes, return_exceptions=True)
    assert {getattr(one, "code", one) for one in found} == {"store_unavailable"}
    assert Failing.fails == ("BEGIN", 7)


@pytest.mark.parametrize("error", [UnknownAccountError("b"), LostReservationError("a")])
async def test_a_refused_operation_is_no_failure_to_write(
    failing: SqliteStore, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def refuse(connection: sqlite3.Connection) -> None:
        raise error

    await failing.reserve(own_request("a"))
    with pytest.raises(type(error)):
        await failing._writer.do(refuse)
    assert not failing._writer.failing
    await failing.settle(own_settlement("a"))
    Failing.error = lambda: sqlite3.OperationalError("database or disk is full")
    Failing.fails = ("BEGIN", 1)
    assert isinstance(await failing.reserve(own_request("b")), Reserved)  # waits for no commit
    await failing.check()  # only reads
    assert Failing.fails == ("BEGIN", 1)
    assert not caplog.records


async def test_the_check_of_a_store_fails_while_it_can_not_be_read(failing: SqliteStore) -> None:
    Failing.fails = ("SELECT", 2)
    with pytest.raises(PomeloError):
        await failing.check()
    Failing.fails = ("", 0)
    await failing.check()


@pytest.mark.parametrize("noted", [False, True])
@pytest.mark.parametrize("end", ["settle", "void", "recover"])
async def test_a_commit_that_fails_after_it_was_made_charges_once(
    failing: SqliteStore, end: str, noted: bool
) -> None:
    await failing.reserve(own_request("a"))
    await failing.reserve(own_request("b"))
    if noted:
        await failing.note([record("a", account="default", live=False, cost=2)])
    Failing.late = True
    with pytest.raises(UnknownOutcomeError):
        await failing.settle(own_settlement("a"))
    assert (await failing.balance(WALLET)).held == 20
    assert await failing.drafts() != []
    ends: dict[str, Callable[[], Awaitable[object]]] = {
        "settle": partial(failing.settle, own_settlement("a", 5)),
        "void": partial(failing.void, WALLET, "a", refund=True),
        "recover": partial(failing.recover, WALLET, "a"),
    }
    await ends[end]()
    assert (await failing.settle(own_settlement("a"))).record.cost == 3
    assert await failing.balance(WALLET) == Balance(100_000_000, 3, 10)
    status = await limits(failing, WALLET)
    assert (status.available, status.concurrency) == (100_000_000 - 3 - 10, 1)
    with pytest.raises(LostReservationError):
        await failing.reserve(own_request("a"))
    assert [draft.task_id for draft in await failing.drafts()] == ["b"]
    records, _ = await failing.list_usage(UsageQuery(), limit=9)
    assert [found.cost for found in records] == [3]


async def test_a_charge_that_is_found_later_is_not_available_to_a_waiting_task(failing: SqliteStore) -> None:
    await failing.reserve(own_request("a", minimum=60_000_000))
    Failing.late = True
    with pytest.raises(UnknownOutcomeError):
        await failing.settle(own_settlement("a", 60_000_000))
    settled, refused = await asyncio.gather(
        failing.settle(own_settlement("a", 60_000_000)), failing.reserve(own_request("b", minimum=60_000_000))
    )
    assert settled.limit_status.available == 40_000_000
    assert isinstance(refused, Refused)
    assert (await limits(failing, WALLET)).available == 40_000_000


async def test_credits_that_were_taken_back_are_not_missing_twice_after_a_commit_that_failed(
    failing: SqliteStore,
) -> None:
    await failing.grant(Grant("back", WALLET, -40_000_000, 1.0))
    await failing.reserve(own_request("a"))
    Failing.late = True
    with pytest.raises(UnknownOutcomeError):
        await failing.settle(own_settlement("a"))
    await failing.settle(own_settlement("a"))
    assert (await limits(failing, WALLET)).available == 60_000_000 - 3


async def test_a_task_whose_settlement_fails_is_recovered_with_what_was_noted(failing: SqliteStore) -> None:
    await failing.reserve(own_request("a"))
    await failing.note([record("a", account="default", live=False, cost=2)])
    Failing.error, Failing.fails = sqlite3.OperationalError, ("COMMIT", 2)
    outcomes = await asyncio.gather(
        failing.settle(own_settlement("a")), failing.recover(WALLET, "a"), return_exceptions=True
    )
    assert isinstance(outcomes[0], PomeloError)
    assert outcomes[1] is None
    assert await failing.balance(WALLET) == Balance(100_000_000, 2, 0)


async def test_a_charge_above_the_reservation_that_was_not_written_is_taken_back(
    failing: SqliteStore,
) -> None:
    budget = Budget("budget:key", 1_000, 0.0)
    tokens = Counter("tokens", 10, 1_000, 60.0)
    await failing.reserve(replace(own_request("a"), budget=budget, counters=(tokens,)))
    charge = replace(own_settlement("a", 25), counters=(tokens._replace(amount=40),))
    for _ in range(2):
        Failing.error, Failing.fails = sqlite3.OperationalError, ("UPDATE wallets", 2)
        with pytest.raises(PomeloError):
            await failing.settle(charge)
        assert await failing.balance(WALLET) == Balance(100_000_000, 0, 10)
        assert await failing.budget_use(WALLET, [budget]) == [BudgetUse(10, 0.0)]
        assert (await failing.limit_status(WALLET, [tokens])).counts["tokens"].used == 10
    settled = await failing.settle(charge)
    assert (settled.record.cost, settled.record.uncollected) == (25, 0)
    assert await failing.balance(WALLET) == Balance(100_000_000, 25, 0)
    assert await failing.budget_use(WALLET, [budget]) == [BudgetUse(25, 0.0)]
    assert (await failing.limit_status(WALLET, [tokens])).counts["tokens"].used == 40


async def test_a_task_that_was_noted_and_settled_in_a_failed_batch_leaves_no_reservation(
    failing: SqliteStore,
) -> None:
    await failing.reserve(own_request("a"))
    Failing.error, Failing.fails = sqlite3.OperationalError, ("INSERT INTO usage", 1)
    noted = record("a", account="default", live=False, cost=2)
    await asyncio.gather(
        failing.add_account("written first", "free", 1.0),
        failing.note([noted]),
        failing.settle(own_settlement("a")),
    )
    assert Failing.fails[1] == 0
    assert (
        await failing._writer.do(lambda connection: connection.execute("SELECT * FROM holds").fetchall())
        == []
    )
