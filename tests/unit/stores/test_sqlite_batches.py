"""What one transaction of the writer contains, in which order it is repeated after a failure, and how the writer
ends."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Balance, Grant, Wallet
from pomelo.stores.base import StoreError
from pomelo.stores.ledger import Counter, Reserved
from pomelo.stores.sqlite import SqliteStore, open_sqlite
from pomelo.stores.sqlite import writer as writer_module
from pomelo.stores.sqlite.journal import Batch, Operation
from pomelo.stores.sqlite.wallets import LoadedWallet
from pomelo.stores.sqlite.writer import Writer, nothing
from tests.contract.ledger_rig import SqliteRig, record
from tests.limits import limits
from tests.unit.stores.own_tasks import WALLET, own_request, own_settlement
from tests.unit.stores.test_sqlite_failures import Failing
from tests.waiting import cancel, until

CALLS = Counter("calls", 1, None, 60.0)
LIVE = Wallet("default", True)


@pytest.fixture
async def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SqliteStore]:
    """A store whose connections fail with SQLite's error, as `Failing.fails` says."""
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Failing))
    Failing.fails, Failing.error, Failing.late = ("", 0), sqlite3.OperationalError, False
    async with open_sqlite(tmp_path / "own.db") as store:
        yield store


async def version(store: SqliteStore) -> int:
    """The number that a write changes if it must not be left out."""
    sql = "PRAGMA user_version"
    (found,) = await store._writer.do(lambda connection: connection.execute(sql).fetchone(), reads=True)
    return int(found)


async def test_the_operations_of_a_failed_batch_are_repeated_before_its_ends(failing: SqliteStore) -> None:
    await failing.reserve(own_request("a"))
    Failing.fails = ("INSERT INTO usage", 1)
    order: list[str] = []
    calls: dict[str, Awaitable[object]] = {
        "written first": failing._writer.do(nothing),
        "end": failing.settle(own_settlement("a")),
        "operation": failing._writer.do(nothing),
    }
    for name, call in calls.items():
        asyncio.ensure_future(call).add_done_callback(lambda _, name=name: order.append(name))  # type: ignore[misc]
    await until(lambda: len(order) == 3)
    assert Failing.fails[1] == 0
    assert order == ["written first", "operation", "end"]


async def test_a_write_after_a_failure_changes_the_file_even_if_it_has_all_of_it_already(
    failing: SqliteStore,
) -> None:
    await failing.reserve(own_request("a"))
    before = await version(failing)
    assert isinstance(await failing.reserve(own_request("b")), Reserved)
    await failing.settle(own_settlement("b"))
    assert await version(failing) == before
    Failing.fails = ("BEGIN", 2)
    with pytest.raises(PomeloError):
        await failing.settle(own_settlement("a"))
    assert isinstance(await failing.reserve(own_request("c")), Reserved)
    assert await version(failing) == before + 1
    await failing.settle(own_settlement("c"))
    assert await version(failing) == before + 1


async def test_the_counts_of_a_failed_batch_are_written_with_the_next_one(
    failing: SqliteStore, tmp_path: Path
) -> None:
    await failing.reserve(replace(own_request("a"), counters=(CALLS,)))
    Failing.fails = ("BEGIN", 1)
    await failing.set_plan("", "")
    assert Failing.fails[1] == 0
    with closing(sqlite3.connect(tmp_path / "own.db")) as connection:
        sql = "SELECT counters FROM wallets WHERE account = 'default' AND live = 0"
        (counters,) = connection.execute(sql).fetchone()
    assert json.loads(counters)["calls"][0] == 1


async def test_credits_that_could_not_be_taken_back_are_available_again(failing: SqliteStore) -> None:
    granted = (await limits(failing, WALLET)).available
    Failing.fails = ("BEGIN", 2)
    with pytest.raises(PomeloError):
        await failing.grant(Grant("g", WALLET, -5, 1.0))
    assert (await limits(failing, WALLET)).available == granted
    assert (await failing.grant(Grant("g", WALLET, -5, 1.0))).granted == granted - 5
    assert (await limits(failing, WALLET)).available == granted - 5


async def test_a_task_that_is_reserved_again_long_after_its_end_is_not_charged_twice(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.stores.sqlite.ledger.MAX_ENDED", 1)
    for task_id in "ab":
        await rig.store.reserve(own_request(task_id))
        await rig.store.settle(own_settlement(task_id))
    assert isinstance(await rig.store.reserve(own_request("a")), Reserved)
    assert (await rig.store.settle(own_settlement("a", 9))).record.cost == 3
    balance = Balance(100_000_000, 6, 0)
    assert await rig.store.balance(WALLET) == balance
    assert (await limits(rig.store, WALLET)).available == balance.available


async def test_a_wallet_whose_counts_are_not_written_stays_in_memory(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.stores.sqlite.ledger.MAX_WALLETS", 1)
    await rig.store.reserve(replace(own_request("a"), counters=(CALLS,)))
    await rig.store.void(WALLET, "a")
    await rig.store.limit_status(LIVE)
    assert (await rig.store.limit_status(WALLET, [CALLS])).counts["calls"].used == 1


async def test_a_wallet_that_is_being_read_stays_in_memory(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.stores.sqlite.ledger.MAX_WALLETS", 1)
    await asyncio.gather(rig.store.reserve(own_request("a")), rig.store.limit_status(LIVE))
    assert (await limits(rig.store, WALLET)).concurrency == 1


async def test_two_tasks_that_are_recovered_cost_no_more_than_their_account_has(rig: SqliteRig) -> None:
    await rig.store.grant(Grant("all but 1000", WALLET, 1_000 - 100_000_000, 1.0))
    for task_id in "ab":
        await rig.store.reserve(own_request(task_id))
    await rig.store.note([record(task_id, account="default", live=False, cost=600) for task_id in "ab"])
    await rig.crash()
    assert await rig.store.balance(WALLET) == Balance(1_000, 1_000, 0)


def test_nothing_is_written_after_a_read_whose_error_rolled_back_the_transaction() -> None:
    def roll_back(connection: sqlite3.Connection) -> None:
        connection.execute("ROLLBACK")
        raise KeyError("the disk fails")

    def write(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t VALUES (1)")

    def done(value: object, error: Exception | None) -> None:
        raise AssertionError

    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t (n)")
        batch = Batch([], [Operation(roll_back, done, True), Operation(write, done, False)])
        with pytest.raises(KeyError):
            batch.commit(connection)
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


async def test_a_read_that_fails_affects_no_other_operation_of_its_batch() -> None:
    missing, reads = sqlite3.OperationalError("no such table"), [True, False]

    def fail(connection: sqlite3.Connection) -> None:
        raise missing

    def done(value: object, error: Exception | None) -> None:
        raise AssertionError

    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t (n)")
        for others_read in reads:
            work = "SELECT 1" if others_read else "INSERT INTO t VALUES (1) RETURNING n"
            other = Operation(lambda c, sql=work: c.execute(sql).fetchall(), done, others_read)  # type: ignore[misc]
            batch = Batch([], [other, Operation(fail, done, True), other])
            assert batch.writes != others_read
            assert batch.commit(connection) == [([(1,)], None), (None, missing), ([(1,)], None)]
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (2,)


class Target:
    """A file in memory. Its closing sets `closing`, waits for `may_close`, and raises the error, if there is
    one."""

    def __init__(
        self, closing: threading.Event, may_close: threading.Event, error: Exception | None = None
    ) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.closing, self.may_close, self.error = closing, may_close, error

    def failed(self, error: BaseException) -> None:
        """Does nothing."""

    def before_batch(self) -> None:
        """Does nothing."""

    def between_batches(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Closes the file."""
        self.closing.set()
        self.may_close.wait(20)
        self.connection.close()
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [OSError("the disk fails"), sqlite3.OperationalError("the disk fails")])
async def test_an_error_of_closing_the_file_is_raised(error: Exception) -> None:
    may_close, closing = threading.Event(), threading.Event()
    may_close.set()
    writer = await Writer.start(lambda: Target(closing, may_close, error))
    with pytest.raises(type(error)):
        await writer.close()


async def test_a_cancelled_close_is_continued_by_the_next_one() -> None:
    may_close, closing = threading.Event(), threading.Event()
    writer = await Writer.start(lambda: Target(closing, may_close))
    first = asyncio.create_task(writer.close())
    await asyncio.to_thread(closing.wait, 20)
    await cancel(first)
    may_close.set()
    async with asyncio.timeout(20):
        await writer.close()


async def test_a_caller_who_no_longer_waits_is_no_error(
    rig: SqliteRig, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = rig.store._writer.do(nothing)
    waiting.cancel()
    await rig.store._writer.do(nothing)
    assert [each.getMessage() for each in caplog.records] == []


async def test_a_file_that_is_in_use_names_its_process_and_is_left_without_a_descriptor(
    rig: SqliteRig,
) -> None:
    lock = rig.path.with_name(f"{rig.path.name}.lock")
    own = f"pid {os.getpid()}"
    for holder, shown in ((own, rf" \({own}\)"), ("", "")):
        with pytest.raises(StoreError, match=rf"is used by another process{shown}\. Stop it, or set POMELO"):
            async with open_sqlite(rig.path, lock_wait=0.0):
                pytest.fail(f"it was opened in spite of {holder}")
        os.truncate(lock, 0)
    assert [each.path for each in psutil.Process().open_files() if each.path == str(lock)] == [str(lock)]


async def test_a_file_names_only_the_process_that_uses_it_now(tmp_path: Path) -> None:
    path = tmp_path / "own.db"
    lock = tmp_path / "own.db.lock"
    lock.write_text("pid 123456789012345")
    async with open_sqlite(path):
        assert lock.read_text() == f"pid {os.getpid()}"


async def test_a_cancelled_opening_ends_if_the_file_can_not_be_opened() -> None:
    begun, may_fail = threading.Event(), threading.Event()

    def fail() -> Target:
        begun.set()
        may_fail.wait(20)
        raise OSError("no such disk")

    opening = asyncio.create_task(Writer.start(fail))
    await asyncio.to_thread(begun.wait, 20)
    opening.cancel()
    may_fail.set()
    async with asyncio.timeout(20):
        await asyncio.wait([opening])
    assert opening.cancelled()


async def test_counts_are_not_written_before_their_batch_is(rig: SqliteRig) -> None:
    writer, ledger = rig.store._writer, rig.store._ledger
    await rig.store.reserve(own_request("a"))
    wallet = ledger._wallets["default", False]
    assert not writer.is_written(wallet)
    written = writer.do(nothing)
    assert wallet not in writer._changed
    assert not writer.is_written(wallet)
    await written
    assert writer.is_written(wallet)


async def test_changed_counts_set_one_timer_and_none_after_closing(rig: SqliteRig) -> None:
    writer = rig.store._writer
    first, second = LoadedWallet("first", True), LoadedWallet("second", True)
    writer.counts_changed(first)
    timer = writer._timer
    assert timer is not None
    writer.counts_changed(second)
    assert writer._timer is timer
    writer._changed.clear()
    timer.cancel()
    writer._timer = None
    await rig.close()
    writer.counts_changed(first)
    assert writer._timer is None
    await rig.open()


async def test_a_balance_that_is_read_together_with_the_end_of_a_task_has_all_of_the_end(
    rig: SqliteRig,
) -> None:
    for task_id in ("a", "b"):
        await rig.store.reserve(own_request(task_id))
    before = await rig.store.balance(WALLET)
    assert before.held == 20
    settling = rig.store.settle(own_settlement("a", 3))
    balance = await rig.store.balance(WALLET)
    assert (balance.spent, balance.held) == (before.spent + 3, 10)
    assert (await settling).record.cost == 3


async def test_a_task_that_is_reserved_while_the_file_is_being_closed_counts_in_its_windows(
    rig: SqliteRig,
) -> None:
    request = own_request("a")
    reserving = rig.store.reserve(request)  # it waits for its wallet, which is read from the file
    await rig.store._writer.close()
    await rig.close()
    assert isinstance(await reserving, Reserved)
    await rig.open()
    counts = (await rig.store.limit_status(WALLET, request.counters)).counts
    assert (counts["requests"].used, counts["concurrency"].used) == (1, 0)


async def test_reads_do_not_write_the_counts_that_are_not_due(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "COUNTS_DELAY", 3600.0)
    writer, ledger = rig.store._writer, rig.store._ledger
    await rig.store.reserve(own_request("a"))
    wallet = ledger._wallets["default", False]
    writer._counts_due()
    await writer.do(nothing, reads=True)
    assert writer.is_written(wallet)
    await rig.store.reserve(own_request("b"))
    await writer.do(nothing, reads=True)
    assert not writer.is_written(wallet)


async def test_what_follows_a_reserve_that_waits_for_its_wallet_does_not_overtake_it(rig: SqliteRig) -> None:
    writer, ledger, may_end = rig.store._writer, rig.store._ledger, threading.Event()
    reserving = rig.store.reserve(own_request("a"))
    blocked = writer.do(lambda connection: may_end.wait(20), reads=True)
    await until(lambda: ledger._wallets["default", False].loaded)
    voiding = rig.store.void(WALLET, "a")
    may_end.set()
    assert isinstance(await reserving, Reserved)
    assert await blocked
    await voiding
    assert await rig.store.reservations() == []


async def test_a_task_that_ends_while_it_is_noted_leaves_nothing_in_the_file(rig: SqliteRig) -> None:
    writer = rig.store._writer
    before, noted, may_end = threading.Event(), threading.Event(), threading.Event()
    await rig.store.reserve(own_request("a"))
    first = writer.do(lambda connection: before.wait(20))
    noting = asyncio.ensure_future(rig.store.note([record("a", account="default", live=False, cost=2)]))
    await asyncio.sleep(0)

    def wait(connection: sqlite3.Connection) -> None:
        noted.set()
        may_end.wait(20)

    last = writer.do(wait)
    before.set()
    await asyncio.to_thread(noted.wait, 20)
    voiding = rig.store.void(WALLET, "a")
    may_end.set()
    await asyncio.gather(first, noting, last, voiding)
    holds = writer.do(lambda connection: connection.execute("SELECT * FROM holds").fetchall(), reads=True)
    assert await holds == []
