"""The thread that writes: what has gathered is committed at once, and what fails fails alone."""

import asyncio
import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.ledger import LostHoldError, Repeatable, Settlement, Taken, UsageQuery, Wallet
from pomelo.stores.sqlite import open_sqlite
from tests.contract.ledger_rig import SqliteRig, ending, record, taking

WALLET = Wallet("default", False)


@pytest.fixture
async def rig(tmp_path: Path):
    made = SqliteRig(tmp_path)
    await made.open()
    yield made
    await made.close()


def ours(task_id: str, **changes):
    return taking(task_id, account="default", live=False, **changes)


async def test_of_a_batch_what_fails_fails_alone_and_wholly(rig):
    async def half_done() -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO accounts (name) VALUES ('half')")
            connection.execute("INSERT INTO accounts (name) VALUES ('default')")

        await rig.store._writer.do(work)

    outcomes = await asyncio.gather(
        rig.store.take(ours("a")),
        rig.store.settle(ending("nothing")),
        half_done(),
        rig.store.take(ours("b")),
        rig.store.get_account("half"),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], Taken)
    assert isinstance(outcomes[1], LostHoldError)
    assert isinstance(outcomes[2], PomeloError)
    assert outcomes[2].code == "store_unavailable"
    assert isinstance(outcomes[3], Taken)
    assert outcomes[4] is None
    assert (await rig.store.standing(WALLET)).slots == 2


async def test_a_task_that_has_its_record_can_not_take_again(rig):
    await rig.store.take(ours("a"))
    await rig.store.settle(Settlement(record("a", account="default", live=False, cost=3)))
    with pytest.raises(LostHoldError):
        await rig.store.take(ours("a"))
    assert (await rig.store.balance(WALLET)).held == 0


async def test_reports_do_not_hold_up_takes(rig):
    long = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    report = asyncio.ensure_future(rig.store._report(lambda c: c.execute(long).fetchone()))
    for number in range(50):
        await rig.store.take(ours(f"t{number}"))
    assert not report.done()
    # Nor the closing.
    await rig.close()
    with pytest.raises(PomeloError):
        await report
    await rig.open()


async def test_reports_can_not_write(rig):
    with pytest.raises(PomeloError):
        await rig.store._report(lambda c: c.execute("INSERT INTO accounts (name) VALUES ('x')"))
    settings = await rig.store._report(lambda c: c.execute("PRAGMA wal_autocheckpoint").fetchone())
    assert settings == (0,)


async def test_orphans_are_told_in_one_line(rig, caplog):
    for number in range(3):
        await rig.store.take(ours(f"t{number}"))
    with caplog.at_level(logging.INFO, "pomelo.stores"):
        await rig.crash()
        await rig.crash()
    assert [entry.getMessage() for entry in caplog.records] == [
        "3 tasks of a process that died were charged what was last noted of them"
    ]


async def test_answers_that_are_over_are_deleted(rig):
    def number_kept() -> int:
        with closing(sqlite3.connect(rig.path)) as connection:
            return connection.execute("SELECT count(*) FROM repeats").fetchone()[0]

    async def answered(first: int, last: int) -> None:
        for number in range(first, last):
            await rig.store.take(ours(f"t{number}", least=0, repeatable=Repeatable(f"k{number}", b"")))
            ended = record(f"t{number}", account="default", live=False)
            await rig.store.settle(Settlement(ended, answer=b"answer"))

    await answered(0, 40)
    rig.clock.passes(24 * 3600.0)
    await answered(40, 50)
    assert number_kept() == 10
    rig.clock.passes(24 * 3600.0)
    await rig.close()
    await rig.open()
    assert number_kept() == 0


async def test_an_opening_that_is_cancelled_leaves_the_file_free(tmp_path):
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
