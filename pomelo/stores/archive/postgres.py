"""The archive in Postgres, which several machines may share. Needs the extra `postgres`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import asyncpg

from pomelo.errors import PomeloError
from pomelo.stores.archive.base import Archive, FailureLog
from pomelo.stores.base import StoreError
from pomelo.stores.records import (
    COLUMNS,
    DIMENSIONS,
    OUTCOMES,
    SUMMED,
    decode_position,
    encode_position,
    from_row,
    values,
)
from pomelo.stores.schema import USAGE_VERSION, usage_columns
from pomelo.stores.usage import Grouping, MetadataKey, UsageQuery, UsageRecord, UsageTotal, check_sum

_TYPES = {"str": "TEXT", "int": "BIGINT", "bool": "BOOLEAN", "float": "DOUBLE PRECISION"}
_CONSTRAINTS = {
    "task_id": "PRIMARY KEY",
    "cost": "CHECK (cost >= 0)",
    "uncollected": "CHECK (uncollected >= 0)",
}
_ADDED = [each for n in range(2, USAGE_VERSION + 1) for each in usage_columns(n, _TYPES, {})]

_TABLE = f"""
    CREATE TABLE IF NOT EXISTS pomelo_usage (
        place BIGINT GENERATED ALWAYS AS IDENTITY,
        {", ".join(usage_columns(1, _TYPES, _CONSTRAINTS))}
    );
    DO $$ BEGIN
        -- Even an ALTER that changes nothing waits for running reports, and blocks everybody else meanwhile.
        IF (
            SELECT count(*) FROM pg_attribute
            WHERE attrelid = 'pomelo_usage'::regclass AND NOT attisdropped AND attname = ANY ('{{{COLUMNS}}}')
        ) <= {COLUMNS.count(",")} THEN
            ALTER TABLE pomelo_usage {", ".join(f"ADD COLUMN IF NOT EXISTS {each}" for each in _ADDED)};
        END IF;
    END $$;
    CREATE INDEX IF NOT EXISTS pomelo_usage_of_wallet ON pomelo_usage (account, live, at);
    CREATE INDEX IF NOT EXISTS pomelo_usage_by_time ON pomelo_usage (at);
"""  # noqa: S608
_LOCK = 0x504D4C41
"""An advisory lock that is held while the table is created: two processes that create it would conflict."""

_DIMENSIONS = {**DIMENSIONS, "day": "to_char(to_timestamp(at) AT TIME ZONE 'UTC', 'YYYY-MM-DD')"}
_METADATA = "coalesce(nullif(metadata, '')::jsonb ->> {}::text, '')"
_MAX_CONNECTIONS = 4
_MAX_REPORTS = _MAX_CONNECTIONS - 1
"""Reports that run at a time: a connection is left to add records."""

_TIMEOUT = 5.0
"""Seconds to wait for a connection or a reply."""

_REPORT_TIMEOUT = 600.0
"""Seconds to wait for a report, which may read every record."""

_FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)

T = TypeVar("T")


async def check_postgres(url: str) -> None:
    """Connects to the database at a URL.

    Raises:
        StoreError: it can't be reached.
    """
    with _store_errors():
        connection = await asyncpg.connect(url, timeout=_TIMEOUT)
        await connection.close()


@asynccontextmanager
async def open_postgres_archive(url: str) -> AsyncIterator[Archive]:
    """Opens the archive in the database at a URL, creates or extends its table if needed, and closes it on
    exit.

    Raises:
        StoreError: the database can't be reached or used.
    """
    with _store_errors():
        pool = await asyncpg.create_pool(
            url, min_size=0, max_size=_MAX_CONNECTIONS, timeout=_TIMEOUT, command_timeout=_TIMEOUT
        )
    try:
        with _store_errors():
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
                await connection.execute(_TABLE)
        yield _PostgresArchive(pool)
    finally:
        pool.terminate()


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except (*_FAILURES, ValueError) as error:
        # Only its type: its message may contain the user's name, the URL contains the password.
        raise StoreError(
            f"The archive in Postgres can't be used ({type(error).__name__}). "
            "Start it, or correct POMELO_ARCHIVE"
        ) from error


class _PostgresArchive:
    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._reports = asyncio.Semaphore(_MAX_REPORTS)
        self._failures = FailureLog()

    async def add(self, records: Sequence[UsageRecord]) -> None:
        if not records:
            return
        numbers = ", ".join(f"${n}" for n in range(1, COLUMNS.count(",") + 2))
        statement = (
            f"INSERT INTO pomelo_usage ({COLUMNS}) VALUES ({numbers})"  # noqa: S608
            " ON CONFLICT (task_id) DO NOTHING"
        )
        rows = [_storable(record) for record in records]
        # executemany is one transaction, which is committed when it returns.
        await self._run(lambda connection: connection.executemany(statement, rows))
        self._failures.worked()

    async def get(self, task_id: str) -> UsageRecord | None:
        statement = f"SELECT {COLUMNS} FROM pomelo_usage WHERE task_id = $1"  # noqa: S608
        row = await self._run(lambda connection: connection.fetchrow(statement, task_id))
        return None if row is None else from_row(row)

    async def list_usage(
        self, query: UsageQuery, *, limit: int, after: str = ""
    ) -> tuple[list[UsageRecord], str]:
        filters = _Filters(query)
        if after:
            filters.add("(at, place) < ({}, {})", *decode_position(after))
        # One record more than the limit shows whether the page is the last.
        statement = (
            f"SELECT place, {COLUMNS} FROM pomelo_usage WHERE {filters}"  # noqa: S608
            f" ORDER BY at DESC, place DESC LIMIT {limit + 1}"
        )
        rows = await self._report(statement, filters)
        page = [from_row(tuple(row)[1:]) for row in rows[:limit]]
        if len(rows) <= limit or not page:
            return page, ""
        return page, encode_position(page[-1].at, rows[limit - 1][0])

    async def sum_usage(
        self,
        query: UsageQuery,
        by: Sequence[Grouping],
        *,
        limit: int | None = None,
        after: tuple[str, ...] | None = None,
    ) -> list[UsageTotal]:
        check_sum(by, after)
        if after == ():  # the only total
            return []
        filters = _Filters(query)
        groups = [f'{filters.expression(each)} COLLATE "C"' for each in by]
        if after:
            filters.add(f"({', '.join(groups)}) > ({', '.join(['{}'] * len(by))})", *after)
        sums = ", ".join(f"sum({name})::bigint" for name in SUMMED)
        columns = ", ".join(str(n + 1) for n in range(len(by)))
        statement = (
            f"SELECT {', '.join([*groups, 'count(*)', sums])} FROM pomelo_usage WHERE {filters}"  # noqa: S608
            f" GROUP BY {columns or '()'} HAVING count(*) > 0"
            f" ORDER BY {columns or 'count(*)'} LIMIT {'ALL' if limit is None else limit}"
        )
        rows = await self._report(statement, filters)
        return [UsageTotal(tuple(row)[: len(by)], *tuple(row)[len(by) :]) for row in rows]

    async def damage(self) -> list[tuple[str, str]]:
        return []

    async def _report(self, statement: str, filters: _Filters) -> list[Any]:
        async with self._reports:
            return await self._run(
                lambda connection: connection.fetch(statement, *filters.values, timeout=_REPORT_TIMEOUT)
            )

    async def _run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        try:
            async with self._pool.acquire(timeout=_TIMEOUT) as connection:
                return await work(connection)
        except _FAILURES as error:
            # Not its message, which may contain values and the address.
            self._failures.failed(type(error).__name__)
            raise PomeloError("store_unavailable") from error


def _storable(record: UsageRecord) -> list[Any]:
    """The values of a record. Postgres can't store a NUL: the values have U+FFFD instead."""
    return [value.replace("\0", "\ufffd") if isinstance(value, str) else value for value in values(record)]


class _Filters:
    """The condition of a query in SQL, and the values of its numbered parameters."""

    def __init__(self, query: UsageQuery) -> None:
        self.values: list[Any] = []
        self._conditions = [OUTCOMES[query.failed]]
        for name in ("account", "live", "model", "key_id"):
            if (value := getattr(query, name)) is not None:
                self.add(f"{name} = {{}}", value)
        if query.since is not None:
            self.add("at >= {}", query.since)
        if query.until is not None:
            self.add("at < {}", query.until)

    def add(self, condition: str, *parameters: Any) -> None:
        """Adds a condition with a pair of braces for each parameter."""
        self._conditions.append(self._format(condition, *parameters))

    def expression(self, grouping: Grouping) -> str:
        """The SQL expression of a grouping. Adds its parameter, if it has one."""
        if isinstance(grouping, MetadataKey):
            return self._format(_METADATA, grouping.name)
        return _DIMENSIONS[grouping]

    def _format(self, text: str, *parameters: Any) -> str:
        start = len(self.values) + 1
        self.values += parameters
        return text.format(*[f"${start + n}" for n in range(len(parameters))])

    def __str__(self) -> str:
        return " AND ".join(self._conditions)
