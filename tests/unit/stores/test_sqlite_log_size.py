"""The write-ahead log stays small under continuous reports, and no commit waits long for it."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from pomelo.stores.ledger import IdempotencyKey, ReserveRequest, Settlement
from pomelo.stores.sqlite import SqliteStore, log_size, open_sqlite, usage
from pomelo.stores.usage import UsageQuery
from tests.load.process_usage import queued_seconds
from tests.many_accounts import fill_sqlite
from tests.unit.accounts.audited_store import ACME, add_account, draft

MIB = 1024 * 1024
BOUND = 16 * MIB
ANSWER = bytes(range(256)) * 512
"""The bytes that each task adds to the log: 128 KiB."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pomelo.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    """A store with 4,000 records, and an account that has credits."""
    async with open_sqlite(path):
        pass
    fill_sqlite(path, 2_000, records=2)
    async with open_sqlite(path) as opened:
        await add_account(opened, micros=10**9)
        yield opened


def size(path: Path) -> int:
    return path.with_name("pomelo.db-wal").stat().st_size


def clock() -> float:
    """Time that stands still while a thread of this process waits for a processor."""
    return time.perf_counter() - sum(queued_seconds(thread.id) for thread in psutil.Process().threads())


async def task(store: SqliteStore, number: int) -> float:
    """Runs a task whose answer is stored; returns the duration of its longest step in seconds."""
    began = clock()
    await store.reserve(
        ReserveRequest(
            draft(f"t{number}"),
            minimum=1,
            maximum=5_000,
            idempotency_key=IdempotencyKey(f"k{number}", b"digest"),
        )
    )
    reserved = clock()
    await store.settle(Settlement(draft(f"t{number}", cost=1), answer=ANSWER))
    return max(reserved - began, clock() - reserved)


async def test_the_log_stays_small_while_sums_are_read_back_to_back(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "STEP", 100)
    numbers, ended, largest, sums = itertools.count(), 0, 0, 0
    waits: list[float] = []

    async def write() -> None:
        nonlocal ended, largest
        while (number := next(numbers)) < 400:
            waits.append(await task(store, number))
            ended += 1
            largest = max(largest, size(path))

    async def read() -> None:
        nonlocal sums
        seen = 0
        while ended < 400:
            before = ended
            totals = await store.sum_usage(UsageQuery(), ("key",))
            count, cost = sum(total.tasks for total in totals), sum(total.cost for total in totals)
            new = count - 4_000
            assert before <= new <= ended + 8
            assert cost == 4_000 * 3 + new
            assert new >= seen
            seen, sums = new, sums + 1

    await asyncio.gather(*[write() for _ in range(8)], *[read() for _ in range(3)])
    assert sums > 3
    assert 400 * len(ANSWER) > 3 * BOUND
    assert largest < BOUND
    # Not the longest: a disk that is busy for a moment delays all eight writers.
    assert sorted(waits)[-20] < 2


async def test_a_large_log_is_emptied_at_the_next_commit_and_nothing_is_lost(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_size, "LARGE", 10**12)
    for number in range(80):
        await task(store, number)
    assert size(path) > 8 * MIB
    monkeypatch.setattr(log_size, "LARGE", 4 * MIB)
    await task(store, 80)
    await task(store, 81)
    assert size(path) < 1 * MIB
    # Commits wait for other programs again.
    (wait,) = await store._writer.do(lambda c: c.execute("PRAGMA busy_timeout").fetchone(), reads=True)
    assert wait == 1_000
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT count(*) FROM usage WHERE account = 'acme'").fetchone() == (82,)
    assert (await store.balance(ACME)).spent == 82


async def test_the_file_of_the_log_is_overwritten_until_it_is_twice_as_large(
    store: SqliteStore, path: Path
) -> None:
    sizes = [0]
    for number in range(300):
        await task(store, number)
        if size(path) != sizes[-1]:
            sizes.append(size(path))
    grown = [after - before for before, after in itertools.pairwise(sizes) if before >= log_size.LARGE]
    assert sum(growth > 0 for growth in grown) > 3
    assert len(sizes) < 150  # most of the 300 commits change no size
    assert log_size.LARGE < max(sizes) < log_size.TOO_LARGE + MIB
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT count(*) FROM usage WHERE account = 'acme'").fetchone() == (300,)


async def test_commits_do_not_wait_for_another_program_that_reads(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_size, "BUSY_PAUSE", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        assert other.execute("SELECT count(*) FROM usage").fetchone() == (4_000,)
        waits = sorted([await task(store, number) for number in range(100)])
        assert size(path) > 8 * MIB
        assert waits[-5] < 2  # those that wait for a reader take 5 s, and the longest may be the disk's
        assert other.execute("SELECT count(*) FROM usage").fetchone() == (4_000,)
        other.execute("COMMIT")
    number = itertools.count(100)
    async with asyncio.timeout(20):
        while size(path) > 4 * MIB:
            await task(store, next(number))


async def test_commits_do_not_wait_for_a_long_step_of_a_report(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_size, "STEP_PAUSE", 0.1)
    reading = store._log_size.reading()
    await asyncio.get_running_loop().run_in_executor(None, reading.__enter__)
    try:
        waits = sorted([await task(store, number) for number in range(60)])
        assert size(path) > log_size.LARGE
        assert waits[-5] < 2  # those that wait for a reader take 5 s, and the longest may be the disk's
    finally:
        reading.__exit__(None, None, None)
    number = itertools.count(60)
    async with asyncio.timeout(20):
        while size(path) > log_size.LARGE:
            await task(store, next(number))


def test_after_a_long_step_of_a_report_the_log_is_not_emptied_until_a_pause_is_over(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.with_name("pomelo.db-wal").write_bytes(bytes(log_size.LARGE))
    now = 100.0
    monkeypatch.setattr("pomelo.stores.sqlite.log_size.time.monotonic", lambda: now)
    log = log_size.LogSize(path)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        statements: list[str] = []
        connection.set_trace_callback(statements.append)
        with log.reading():
            log.keep_small(connection)
        now += log_size.STEP_PAUSE - 0.01
        log.keep_small(connection)
        assert statements == []
        now += 0.01
        log.keep_small(connection)
        assert "PRAGMA wal_checkpoint(RESTART)" in statements


async def test_a_large_log_left_by_a_crash_is_emptied(
    store: SqliteStore, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_size, "LARGE", 10**12)
    for number in range(80):
        await task(store, number)
    left = tmp_path / "left"
    left.mkdir()
    for name in ("pomelo.db", "pomelo.db-wal"):
        (left / name).write_bytes((tmp_path / name).read_bytes())
    monkeypatch.setattr(log_size, "LARGE", 4 * MIB)
    async with open_sqlite(left / "pomelo.db") as opened:
        assert (await opened.balance(ACME)).spent == 80
        await task(opened, 80)
        await task(opened, 81)
        assert size(left / "pomelo.db") < 4 * MIB


def test_no_step_of_a_report_begins_while_the_log_is_to_be_emptied(path: Path) -> None:
    emptied, begun = log_size.LogSize(path), threading.Event()

    def read() -> None:
        with emptied.reading():
            begun.set()

    reading = threading.Thread(target=read)
    with emptied._turnstile:
        reading.start()
        assert not begun.wait(0.05)
    reading.join(20)
    assert begun.is_set()
