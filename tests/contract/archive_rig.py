"""Fixtures for tests of archives: a SQLite file, and Postgres if this machine has it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pomelo.stores.archive import open_archive
from pomelo.stores.archive.base import Archive
from tests.postgres_server import PostgresServer, programs, user

ARCHIVES = ["sqlite", "postgres"]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    if programs() is None or user() is None:
        pytest.skip("Postgres is not installed: apt-get install postgresql")
    server = PostgresServer()
    server.start()
    yield server
    server.close()


async def new_url(request: pytest.FixtureRequest, kind: str, folder: Path) -> str:
    """The URL of an archive without records, of one of ARCHIVES."""
    if kind == "sqlite":
        return f"sqlite:{folder / 'usage.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    import asyncpg

    connection = await asyncpg.connect(server.url)
    await connection.execute("DROP TABLE IF EXISTS pomelo_usage")
    await connection.close()
    return server.url


@pytest.fixture(params=ARCHIVES)
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of each archive, without records."""
    return await new_url(request, request.param, tmp_path)


@pytest.fixture
async def archive(url: str) -> AsyncIterator[Archive]:
    async with open_archive(url) as opened:
        yield opened
