"""Reports that take long, and an archive in Postgres to which records are added meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.stores.archive import open_archive
from pomelo.stores.archive.base import Archive
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_rig import record
from tests.postgres_server import PostgresServer
from tests.waiting import first

ALL = UsageQuery()

# A report reads each record only once it gets the lock 7.
_SLOW = """
    ALTER TABLE pomelo_usage RENAME TO records;
    CREATE VIEW pomelo_usage AS SELECT * FROM records WHERE pg_advisory_xact_lock_shared(7) IS NOT NULL;
"""
_WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 7 AND NOT granted"


@pytest.fixture
async def slow(postgres: PostgresServer) -> AsyncIterator[tuple[Archive, Any]]:
    """An archive with a record, whose reports take until a connection, which is returned too, gives up a lock."""
    import asyncpg

    operator = await asyncpg.connect(postgres.url)
    await operator.execute("DROP DATABASE IF EXISTS slow")
    await operator.execute("CREATE DATABASE slow")
    await operator.close()
    url = postgres.url.removesuffix("postgres") + "slow"
    async with open_archive(url) as archive:
        await archive.add([record("a")])
        connection = await asyncpg.connect(url)
        await connection.execute(_SLOW)
        await connection.execute("SELECT pg_advisory_lock(7)")
        yield archive, connection
        await connection.close()


async def test_reports_that_take_long_do_not_keep_records_out_of_the_archive(
    slow: tuple[Archive, Any],
) -> None:
    archive, connection = slow
    reports = [asyncio.ensure_future(archive.sum_usage(ALL, ())) for _ in range(6)]
    await first(lambda: connection.fetchval(_WAITING), lambda waiting: waiting >= 3)
    await archive.add([record("b")])
    await connection.execute("SELECT pg_advisory_unlock(7)")
    for (total,) in await asyncio.gather(*reports):
        assert total.tasks in (1, 2)
