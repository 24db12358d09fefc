"""The thread that writes: it commits queued operations together, and a failure affects only one of them."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Balance, UnknownAccountError
from pomelo.stores.ledger import (
    IdempotencyKey,
    LostReservationError,
    Reserved,
    Settled,
    Settlement,
    UnknownOutcomeError,
)
from pomelo.stores.sqlite import open_sqlite, writer
from pomelo.stores.sqlite.writer import BATCH
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import SqliteRig, record, settlement
from tests.limits import limits
from tests.unit.stores.own_tasks import WALLET, own_request, own_settlement


async def test_an_operation_that_fails_is_undone_without_affecting_its_batch(rig: SqliteRig) -> None:
    async def fail_halfway() -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO accounts (name) VALUES ('half')")
            connection.execute("INSERT INTO accounts (name) VALUES ('default')")

        await rig.store._writer.do(work)

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


def timing(monkeypatch: pytest.MonkeyPatch, interval: float, quiet: float) -> None:
    """Sets when a batch of ends begins. Counts of wallets begin none."""
    monkeypatch.setattr(writer, "MAX_INTERVAL", interval)
    monkeypatch.setattr(writer, "QUIET", quiet)
    monkeypatch.setattr(writer, "COUNTS_DELAY", 3600.0)


async def running(rig: SqliteRig, task_ids: str) -> None:
    """Starts tasks, and lets a batch begin."""
    for task_id in task_ids:
        await rig.store.reserve(own_request(task_id))
    await rig.store._writer.do(writer.nothing, reads=True)


def settle(rig: SqliteRig, task_ids: str) -> list[asyncio.Future[Settled]]:
    return [asyncio.ensure_future(rig.store.settle(own_settlement(task_id))) for task_id in task_ids]


async def assert_waiting(rig: SqliteRig, ends: list[asyncio.Future[Settled]]) -> None:
    """Checks that the ends wait for others, and that none is being written."""
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(rig.store._writer._ends) == len(ends)
    assert not any(end.done() for end in ends)


async def test_ends_that_follow_a_batch_closely_share_a_commit_unless_one_task_is_alone(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing(monkeypatch, interval=3600.0, quiet=3600.0)
    await running(rig, "abcd")
    ends = settle(rig, "abc")
    await assert_waiting(rig, ends)
    async with asyncio.timeout(60):
        await rig.store._writer.do(writer.nothing, reads=True)  # what else is written takes them along
        await asyncio.gather(*ends)
        await rig.store.settle(own_settlement("d"))


@pytest.mark.parametrize(("interval", "quiet"), [(0.02, 3600.0), (3600.0, 0.01)])
async def test_ends_are_written_after_the_interval_or_when_no_task_begins_or_ends(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch, interval: float, quiet: float
) -> None:
    timing(monkeypatch, interval, quiet)
    await running(rig, "abc")
    async with asyncio.timeout(60):
        await asyncio.gather(*settle(rig, "ab"))


async def test_a_task_that_is_alone_ends_with_the_batch_after_the_one_that_is_being_written(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing(monkeypatch, interval=3600.0, quiet=3600.0)
    await rig.store.reserve(own_request("a"))
    writing = rig.store._writer.do(writer.nothing, reads=True)
    async with asyncio.timeout(60):
        await asyncio.gather(writing, *settle(rig, "a"))


async def wait_in_vain_and_skip_two(rig: SqliteRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a batch wait in vain, and the next two begin once all tasks have ended."""
    timing(monkeypatch, interval=3600.0, quiet=0.01)
    async with asyncio.timeout(60):
        for task_ids in ("ab", "cd", "ef"):
            await running(rig, task_ids)
            await asyncio.gather(*settle(rig, task_ids))
            timing(monkeypatch, interval=3600.0, quiet=3600.0)


async def test_after_a_wait_in_vain_the_next_two_batches_do_not_wait_once_all_tasks_have_ended(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await wait_in_vain_and_skip_two(rig, monkeypatch)
    await running(rig, "gh")
    ends = settle(rig, "gh")
    await assert_waiting(rig, ends)
    async with asyncio.timeout(60):
        await rig.store._writer.do(writer.nothing, reads=True)
        await asyncio.gather(*ends)


async def test_a_beginning_during_the_wait_lets_later_batches_wait_again(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await wait_in_vain_and_skip_two(rig, monkeypatch)
    timing(monkeypatch, interval=3600.0, quiet=0.0)
    queue = rig.store._writer
    await running(rig, "gh")
    ends = settle(rig, "gh")
    for number in range(10):
        await asyncio.sleep(0)
        await rig.store.reserve(own_request(f"new_{number}"))
    assert (queue._in_vain, queue._skips) == (0, 0)
    async with asyncio.timeout(60):
        await asyncio.gather(*ends)


async def test_ends_are_not_written_before_the_interval_while_tasks_begin(
    rig: SqliteRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing(monkeypatch, interval=3600.0, quiet=0.0)
    await running(rig, "ab")
    (end,) = settle(rig, "a")
    for number in range(20):
        await rig.store.reserve(own_request(f"new_{number}"))
        await asyncio.sleep(0)
        assert not end.done()
    async with asyncio.timeout(60):
        await end


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
                await rig.store._writer.do(raising(declared), reads=reads)
    with caplog.at_level(logging.ERROR, "pomelo.stores"):
        for _ in range(5):
            for reads in (False, True):
                with pytest.raises(UnknownOutcomeError):
                    await rig.store._writer.do(raising(KeyError("secret")), reads=reads)
            with pytest.raises(PomeloError):
                await rig.store._report(raising(KeyError("secret")))
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
    # The second one begins only once the first one has been ended.
    reports = [
        asyncio.ensure_future(rig.store._report(lambda c: c.execute(endless).fetchone())) for _ in range(2)
    ]
    for number in range(50):
        await rig.store.reserve(own_request(f"t{number}"))
    assert not any(report.done() for report in reports)
    # Closing does not wait either.
    await rig.close()
    for report in reports:
        with pytest.raises(PomeloError):
            await report
    await rig.open()


async def test_reports_can_not_write(rig: SqliteRig) -> None:
    with pytest.raises(PomeloError):
        await rig.store._report(lambda c: c.execute("INSERT INTO accounts (name) VALUES ('x')"))
    settings = await rig.store._report(lambda c: c.execute("PRAGMA wal_autocheckpoint").fetchone())
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
    others = [rig.store._writer.do(lambda _: None, reads=True) for _ in range(BATCH + 1)]
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
async def test_counts_that_can_not_be_read_affect_only_their_wallet_and_are_logged(
    rig: SqliteRig, caplog: pytest.LogCaptureFixture, counters: str
) -> None:
    with closing(sqlite3.connect(rig.path)) as connection:
        sql = "UPDATE wallets SET counters = ? WHERE account = 'default' AND live = 0"
        connection.execute(sql, (counters,))
        connection.commit()
    for _ in range(2):
        with pytest.raises(PomeloError):
            async with asyncio.timeout(20):
                await rig.store.reserve(own_request("a"))
        assert await rig.store.get_account("default") is not None
    assert "The store failed" in caplog.text


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


async def test_an_idempotency_key_of_a_task_of_an_earlier_version_is_free_after_its_recovery(
    rig: SqliteRig,
) -> None:
    for task_id in "ab":
        await rig.store.reserve(own_request(task_id))
    await rig.store.note([record(task_id, account="default", live=False) for task_id in "ab"])
    await rig.close()
    with closing(sqlite3.connect(rig.path)) as connection:
        connection.execute("UPDATE holds SET repeat_key = 'of a' WHERE task_id = 'a'")
        connection.executemany(
            "INSERT INTO repeats (account, live, key, fingerprint, task_id, state, answer, expires)"
            " VALUES ('default', 0, ?, x'00', 't', ?, ?, ?)",
            [("of a", "running", None, None), ("other", "done", b"x", 1e12)],
        )
        connection.commit()
    await rig.open()
    with closing(sqlite3.connect(rig.path)) as connection:
        assert connection.execute("SELECT key FROM repeats").fetchall() == [("other",)]


async def test_connections_check_what_they_read_and_write_durably(rig: SqliteRig) -> None:
    def pragmas(names: str) -> Callable[[sqlite3.Connection], list[object]]:
        return lambda connection: [
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names.split()
        ]

    names = "cell_size_check trusted_schema wal_autocheckpoint query_only"
    assert await rig.store._report(pragmas(names)) == [1, 0, 0, 1]
    names += " journal_mode synchronous foreign_keys ignore_check_constraints"
    assert await rig.store._writer.do(pragmas(names), reads=True) == [1, 0, 0, 0, "wal", 2, 1, 0]
    assert await rig.store._writer.do(pragmas("busy_timeout"), reads=True) == [1_000]
