"""The thread that writes: it commits queued operations together, and a failure affects only one of them."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Balance, UnknownAccountError, Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import (
    IdempotencyKey,
    LostReservationError,
    Refused,
    Reserved,
    ReserveRequest,
    Settled,
    Settlement,
    UnknownOutcomeError,
)
from pomelo.stores.sqlite import open_sqlite
from pomelo.stores.sqlite.store import SqliteStore
from pomelo.stores.sqlite.writer import BATCH
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import SqliteRig, record, request, settlement
from tests.limits import Used, limits

WALLET = Wallet("default", False)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[SqliteRig]:
    created = SqliteRig(tmp_path)
    await created.open()
    yield created
    await created.close()


def inner(rig: SqliteRig) -> SqliteStore:
    """The store behind its interface."""
    assert isinstance(rig.store, SqliteStore)
    return rig.store


def own_request(task_id: str, **changes: Any) -> ReserveRequest:
    return request(task_id, account="default", live=False, **changes)


def own_settlement(task_id: str, cost: int = 3) -> Settlement:
    return Settlement(record(task_id, account="default", live=False, cost=cost))


async def test_an_operation_that_fails_is_undone_without_affecting_its_batch(rig: SqliteRig) -> None:
    async def fail_halfway() -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO accounts (name) VALUES ('half')")
            connection.execute("INSERT INTO accounts (name) VALUES ('default')")

        await inner(rig)._writer.do(work)

    outcomes = await asyncio.gather(
        rig.store.reserve(own_request("a")),
        rig.store.settle(settlement("nothing")),
        fail_halfway(),
        rig.store.reserve(own_request("b")),
        rig.store.get_account("half"),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], Reserved)
    assert isinstance(outcomes[1], LostReservationError)
    assert isinstance(outcomes[2], PomeloError)
    assert outcomes[2].code == "store_unavailable"
    assert isinstance(outcomes[3], Reserved)
    assert outcomes[4] is None
    assert (await limits(rig.store, WALLET)).concurrency == 2


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
async def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Store]:
    """A store whose connections are Failing."""
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Failing))
    Failing.fails, Failing.error, Failing.late = ("", 0), RuntimeError, False
    async with open_sqlite(tmp_path / "own.db") as store:
        yield store


@pytest.mark.parametrize("error", [RuntimeError, KeyError, MemoryError, sqlite3.OperationalError])
@pytest.mark.parametrize("start", ["BEGIN", "SELECT a.name", "INSERT INTO usage", "UPDATE wallets", "COMMIT"])
async def test_any_error_of_a_statement_is_store_unavailable_and_the_thread_continues(
    failing: Store, start: str, error: type[Exception]
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


async def test_a_failed_rollback_is_repeated(failing: Store) -> None:
    def work(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO accounts (name) VALUES ('half')")
        Failing.fails = ("ROLLBACK", 4)
        raise KeyError

    assert isinstance(failing, SqliteStore)
    with pytest.raises(PomeloError):
        await failing._writer.do(work)
    # The transaction is still open; the next operation must not be part of it.
    assert Failing.fails == ("ROLLBACK", 2)
    with pytest.raises(PomeloError):
        await failing.get_account("half")
    assert await failing.get_account("half") is None
    assert isinstance(await failing.reserve(own_request("a", minimum=0)), Reserved)
    assert await failing.get_account("half") is None


async def test_the_outcome_is_known_after_an_sqlite_error_and_unknown_after_others(failing: Store) -> None:
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
    failing: Store, caplog: pytest.LogCaptureFixture
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
    *failed, last = [record.getMessage() for record in caplog.records]
    assert set(failed) == {"An operation failed: database or disk is full"}
    assert last == "The database can be written again"
    Failing.fails = ("BEGIN", 1)
    assert isinstance(await failing.reserve(own_request("d")), Reserved)  # nothing is written for it
    assert Failing.fails == ("BEGIN", 1)


@pytest.mark.parametrize("end", ["settle", "void", "recover"])
async def test_a_commit_that_fails_after_it_was_made_charges_once(failing: Store, end: str) -> None:
    await failing.reserve(own_request("a"))
    await failing.reserve(own_request("b"))
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


async def test_a_charge_that_is_found_later_is_not_available_to_a_waiting_task(failing: Store) -> None:
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


async def test_a_task_whose_settlement_fails_is_recovered_with_what_was_noted(failing: Store) -> None:
    await failing.reserve(own_request("a"))
    await failing.note([record("a", account="default", live=False, cost=2)])
    Failing.error, Failing.fails = sqlite3.OperationalError, ("COMMIT", 2)
    outcomes = await asyncio.gather(
        failing.settle(own_settlement("a")), failing.recover(WALLET, "a"), return_exceptions=True
    )
    assert isinstance(outcomes[0], PomeloError)
    assert outcomes[1] is None
    assert await failing.balance(WALLET) == Balance(100_000_000, 2, 0)


async def test_declared_errors_are_raised_and_all_others_are_store_unavailable(
    rig: SqliteRig, caplog: pytest.LogCaptureFixture
) -> None:
    def raising(error: Exception) -> Callable[[sqlite3.Connection], None]:
        def work(connection: sqlite3.Connection) -> None:
            raise error

        return work

    for declared in (LostReservationError("a"), UnknownAccountError("b"), PomeloError("invalid_parameter")):
        for reads in (False, True):
            with pytest.raises(type(declared)):
                await inner(rig)._writer.do(raising(declared), reads=reads)
    with caplog.at_level(logging.ERROR, "pomelo.stores"):
        for _ in range(5):
            for reads in (False, True):
                with pytest.raises(UnknownOutcomeError):
                    await inner(rig)._writer.do(raising(KeyError("secret")), reads=reads)
            with pytest.raises(PomeloError):
                await inner(rig)._report(raising(KeyError("secret")))
    logged = [one.getMessage() for one in caplog.records]
    assert len(logged) == 1, "once, however often it happened"
    assert "builtins.KeyError" in logged[0]
    assert "secret" not in logged[0]


async def test_a_settled_task_can_not_reserve_again(rig: SqliteRig) -> None:
    await rig.store.reserve(own_request("a"))
    await rig.store.settle(Settlement(record("a", account="default", live=False, cost=3)))
    with pytest.raises(LostReservationError):
        await rig.store.reserve(own_request("a"))
    assert (await rig.store.balance(WALLET)).held == 0


async def test_reservations_do_not_wait_for_reports(rig: SqliteRig) -> None:
    endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    report = asyncio.ensure_future(inner(rig)._report(lambda c: c.execute(endless).fetchone()))
    for number in range(50):
        await rig.store.reserve(own_request(f"t{number}"))
    assert not report.done()
    # Closing does not wait either.
    await rig.close()
    with pytest.raises(PomeloError):
        await report
    await rig.open()


async def test_reports_can_not_write(rig: SqliteRig) -> None:
    with pytest.raises(PomeloError):
        await inner(rig)._report(lambda c: c.execute("INSERT INTO accounts (name) VALUES ('x')"))
    settings = await inner(rig)._report(lambda c: c.execute("PRAGMA wal_autocheckpoint").fetchone())
    assert settings == (0,)


async def test_recovered_tasks_are_logged_in_one_line(
    rig: SqliteRig, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        await rig.store.reserve(own_request(f"t{number}"))
    await rig.store.note([record(f"t{number}", account="default", live=False) for number in range(3)])
    with caplog.at_level(logging.INFO, "pomelo.stores"):
        await rig.crash()
        await rig.crash()
    assert [entry.getMessage() for entry in caplog.records] == [
        "3 tasks of a process that died were charged their last noted cost"
    ]


@pytest.mark.parametrize("end", ["settled", "voided"])
async def test_a_note_that_is_written_after_the_end_of_its_task_has_no_effect(
    rig: SqliteRig, end: str
) -> None:
    await rig.store.reserve(own_request("a"))
    others = [inner(rig)._writer.do(lambda _: None, reads=True) for _ in range(BATCH + 1)]
    note = asyncio.create_task(rig.store.note([record("a", account="default", live=False, cost=2)]))
    await asyncio.sleep(0)
    if end == "settled":
        await rig.store.settle(own_settlement("a"))
    else:
        await rig.store.void(WALLET, "a")
    await asyncio.gather(note, *others)
    await rig.close()
    await rig.open()
    assert (await rig.store.balance(WALLET)).spent == (3 if end == "settled" else 0)


async def test_a_file_opens_if_an_earlier_version_held_all_credits_for_a_noted_task(rig: SqliteRig) -> None:
    await rig.store.reserve(own_request("a", maximum=100_000_000))
    await rig.store.note([record("a", account="default", live=False, cost=2)])
    await rig.close()
    with closing(sqlite3.connect(rig.path)) as connection:
        connection.execute("UPDATE wallets SET held = 100000000 WHERE account = 'default' AND live = 0")
        connection.commit()
    await rig.open()
    assert await rig.store.balance(WALLET) == Balance(100_000_000, 2, 0)


async def test_a_file_opens_if_a_noted_task_has_a_record(rig: SqliteRig) -> None:
    await rig.store.reserve(own_request("a"))
    await rig.store.note([record("a", account="default", live=False, cost=2)])
    with closing(sqlite3.connect(rig.path)) as connection:
        (hold,) = connection.execute("SELECT * FROM holds").fetchall()
        await rig.store.settle(own_settlement("a"))
        connection.execute(f"INSERT INTO holds VALUES ({', '.join('?' * len(hold))})", hold)
        connection.commit()
    await rig.close()
    await rig.open()
    assert await rig.store.balance(WALLET) == Balance(100_000_000, 3, 0)


@pytest.mark.parametrize("counters", ['{"calls": [1]}', '{"calls": ["a", "b", "c"]}', "[1]", "7"])
async def test_counts_that_can_not_be_read_affect_only_their_wallet(rig: SqliteRig, counters: str) -> None:
    with closing(sqlite3.connect(rig.path)) as connection:
        sql = "UPDATE wallets SET counters = ? WHERE account = 'default' AND live = 0"
        connection.execute(sql, (counters,))
        connection.commit()
    for _ in range(2):
        with pytest.raises(PomeloError):
            async with asyncio.timeout(5):
                await rig.store.reserve(own_request("a"))
        assert await rig.store.get_account("default") is not None


async def test_expired_answers_are_deleted(rig: SqliteRig) -> None:
    def stored_answers() -> int:
        with closing(sqlite3.connect(rig.path)) as connection:
            return int(connection.execute("SELECT count(*) FROM repeats").fetchone()[0])

    async def run_tasks(first: int, last: int) -> None:
        for number in range(first, last):
            await rig.store.reserve(
                own_request(f"t{number}", minimum=0, idempotency_key=IdempotencyKey(f"k{number}", b""))
            )
            settled = record(f"t{number}", account="default", live=False)
            await rig.store.settle(Settlement(settled, answer=b"answer"))

    await run_tasks(0, 40)
    rig.clock.passes(24 * 3600.0)
    await run_tasks(40, 50)
    assert stored_answers() == 10
    rig.clock.passes(24 * 3600.0)
    await rig.close()
    await rig.open()
    assert stored_answers() == 0


async def test_a_cancelled_opening_releases_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"

    async def opening() -> None:
        async with open_sqlite(path):
            await asyncio.Event().wait()

    for _ in range(5):
        task = asyncio.create_task(opening())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with open_sqlite(path, lock_wait=0.0) as store:
            assert await store.list_usage(UsageQuery(), limit=1) == ([], "")
