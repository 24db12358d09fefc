"""The archive in Postgres, which several machines may share. Needs the extra `postgres`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, TypeVar

import asyncpg

from pomelo.errors import PomeloError
from pomelo.stores import records
from pomelo.stores.archive.sqlite import Archive
from pomelo.stores.base import StoreError
from pomelo.stores.ledger import UsageQuery, UsageRecord, UsageTotal
from pomelo.stores.sqlite import usage

_TABLE = """
    CREATE TABLE IF NOT EXISTS pomelo_usage (
        place BIGINT GENERATED ALWAYS AS IDENTITY,
        task_id TEXT NOT NULL PRIMARY KEY,
        request_id TEXT NOT NULL,
        account TEXT NOT NULL,
        live BOOLEAN NOT NULL,
        key_id TEXT NOT NULL,
        wire TEXT NOT NULL,
        model TEXT NOT NULL,
        task_type TEXT NOT NULL,
        provider TEXT NOT NULL,
        provider_model TEXT NOT NULL,
        input_tokens BIGINT NOT NULL,
        output_tokens BIGINT NOT NULL,
        characters BIGINT NOT NULL,
        images BIGINT NOT NULL,
        pixels BIGINT NOT NULL,
        audio_ms BIGINT NOT NULL,
        processing_ms BIGINT NOT NULL,
        first_byte_ms BIGINT NOT NULL,
        output_bytes BIGINT NOT NULL,
        cost BIGINT NOT NULL CHECK (cost >= 0),
        uncollected BIGINT NOT NULL CHECK (uncollected >= 0),
        prices TEXT NOT NULL,
        price_version TEXT NOT NULL,
        source TEXT NOT NULL,
        complete BOOLEAN NOT NULL,
        at DOUBLE PRECISION NOT NULL
    );
    DO $$ BEGIN
        -- Even an ALTER that changes nothing waits for reports, and everybody else for it.
        IF NOT EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = 'pomelo_usage'::regclass AND attname = 'provider_micros' AND NOT attisdropped
        ) THEN
            ALTER TABLE pomelo_usage
                ADD COLUMN cached_input_tokens BIGINT NOT NULL DEFAULT 0,
                ADD COLUMN cache_write_input_tokens BIGINT NOT NULL DEFAULT 0,
                ADD COLUMN cache_write_1h_input_tokens BIGINT NOT NULL DEFAULT 0,
                ADD COLUMN provider_micros BIGINT NOT NULL DEFAULT 0;
        END IF;
    END $$;
    CREATE INDEX IF NOT EXISTS pomelo_usage_of_wallet ON pomelo_usage (account, live, at);
    CREATE INDEX IF NOT EXISTS pomelo_usage_by_time ON pomelo_usage (at);
"""
_LOCK = 0x504D4C41
"""Taken while the table is made: two that make it at once are in each other's way."""

_GROUPS = {
    "model": "model",
    "key": "key_id",
    "day": "to_char(to_timestamp(at) AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    "account": "account",
}
_SUMMED = (
    "input_tokens",
    "output_tokens",
    "characters",
    "images",
    "audio_ms",
    "output_bytes",
    "cost",
    "uncollected",
    "cached_input_tokens",
    "cache_write_input_tokens",
)
_CONNECTIONS = 4
_SECONDS = 5.0
"""How long a connection, or an answer, is waited for."""

_REPORT = 600.0
"""How long a report is waited for, which may look at every record."""

_FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)

T = TypeVar("T")


@asynccontextmanager
async def open_postgres_archive(url: str) -> AsyncIterator[Archive]:
    """An archive in the database at a URL; its table is made where it is missing.

    Raises:
        StoreError: the database can't be reached or used.
    """
    try:
        pool = await asyncpg.create_pool(
            url, min_size=0, max_size=_CONNECTIONS, timeout=_SECONDS, command_timeout=_SECONDS
        )
    except (*_FAILURES, ValueError) as error:
        raise _refused(error) from error
    try:
        try:
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
                await connection.execute(_TABLE)
        except (*_FAILURES, ValueError) as error:
            raise _refused(error) from error
        yield PostgresArchive(pool)
    finally:
        pool.terminate()


def _refused(error: Exception) -> StoreError:
    # Of what Postgres says only its kind: the message may have the user's name, the URL has the password.
    return StoreError(
        f"The archive in Postgres can't be used ({type(error).__name__}). Start it, or correct POMELO_ARCHIVE"
    )


class PostgresArchive:
    """See Archive. Made by `open_postgres_archive` alone."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    async def add(self, found: Sequence[UsageRecord]) -> None:
        """See Archive."""
        if not found:
            return
        marks = ", ".join(f"${n}" for n in range(1, len(records.values(found[0])) + 1))
        statement = (
            f"INSERT INTO pomelo_usage ({records.COLUMNS}) VALUES ({marks})"  # noqa: S608
            " ON CONFLICT (task_id) DO NOTHING"
        )

        async def write(connection: Any) -> None:
            # All of it in one transaction, which is committed when this returns.
            await connection.executemany(statement, [records.values(record) for record in found])

        await self._do(write)

    async def get(self, task_id: str) -> UsageRecord | None:
        """See Archive."""
        statement = f"SELECT {records.COLUMNS} FROM pomelo_usage WHERE task_id = $1"  # noqa: S608
        row = await self._do(lambda connection: connection.fetchrow(statement, task_id))
        return None if row is None else records.from_row(row)

    async def list_usage(self, query: UsageQuery, limit: int, after: str) -> tuple[list[UsageRecord], str]:
        """See UsageStore."""
        conditions, values = usage.where(query)
        if after:
            conditions.append("(at, place) < (?, ?)")
            values.extend(usage.read_place(after))
        # One more than asked for tells whether that is the end.
        statement = (
            f"SELECT place, {records.COLUMNS} FROM pomelo_usage WHERE {_marked(conditions)}"  # noqa: S608
            f" ORDER BY at DESC, place DESC LIMIT {limit + 1}"
        )
        rows = await self._do(lambda connection: connection.fetch(statement, *values, timeout=_REPORT))
        found = [records.from_row(tuple(row)[1:]) for row in rows[:limit]]
        if len(rows) <= limit or not found:
            return found, ""
        return found, usage.PLACE.pack(found[-1].at, rows[limit - 1][0]).hex()

    async def sum_usage(
        self, query: UsageQuery, by: str, *, limit: int | None = None, after: str = ""
    ) -> list[UsageTotal]:
        """See UsageStore."""
        conditions, values = usage.where(query)
        part = f'{_GROUPS[by]} COLLATE "C"'
        if after:
            conditions.append(f"{part} > ?")
            values.append(after)
        sums = ", ".join(f"sum({name})::bigint" for name in _SUMMED)
        statement = (
            f"SELECT {part} AS part, count(*), {sums} FROM pomelo_usage"  # noqa: S608
            f" WHERE {_marked(conditions)} GROUP BY part ORDER BY part"
            f" LIMIT {'ALL' if limit is None else limit}"
        )
        rows = await self._do(lambda connection: connection.fetch(statement, *values, timeout=_REPORT))
        return [UsageTotal(*row) for row in rows]

    async def damage(self) -> list[tuple[str, str]]:
        """See UsageStore. Pomelo keeps no file here."""
        return []

    async def _do(self, work: Callable[[Any], Awaitable[T]]) -> T:
        try:
            async with self._pool.acquire(timeout=_SECONDS) as connection:
                return await work(connection)
        except _FAILURES as error:
            raise PomeloError("store_unavailable") from error


def _marked(conditions: list[str]) -> str:
    """The conditions as Postgres has them: with $1 and so on for question marks. The first one is "1"."""
    numbers = count(1)
    return re.sub(r"\?", lambda _: f"${next(numbers)}", " AND ".join(["true", *conditions[1:]]))
