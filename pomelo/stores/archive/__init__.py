"""Archives of usage records, in SQLite or Postgres. `open_archive` opens one by its URL."""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

from pomelo import install_command
from pomelo.stores.archive.base import Archive
from pomelo.stores.base import StoreError

_POSTGRES = "postgresql"


def open_archive(url: str) -> AbstractAsyncContextManager[Archive]:
    """Opens an archive, `sqlite:PATH` or `postgresql://…`, and closes it on exit.

    Raises:
        StoreError: the URL has another scheme; on entering: the archive can't be opened.
    """
    if (file := archive_file(url)) is not None:
        from pomelo.stores.archive.sqlite import open_sqlite_archive

        return open_sqlite_archive(file)
    scheme = url.partition(":")[0]
    if scheme == _POSTGRES:
        archive: AbstractAsyncContextManager[Archive] = _postgres().open_postgres_archive(url)
        return archive
    raise StoreError(f"There is no archive of the kind {scheme!r}. Use sqlite:PATH or postgresql://…")


async def check_archive(url: str) -> None:
    """Checks that an archive can be reached, without changing anything: a file that does not exist is fine if
    it can be created.

    Raises:
        StoreError: it can't be reached.
    """
    if (file := archive_file(url)) is not None:
        from pomelo.stores.archive.sqlite import check_sqlite_archive

        check_sqlite_archive(file)
    elif url.partition(":")[0] == _POSTGRES:
        await _postgres().check_postgres(url)


def archive_file(url: str) -> Path | None:
    """Returns the absolute path of an archive in SQLite; None if it is in no file."""
    scheme, _, path = url.partition(":")
    # SQLite takes the relative path `:memory:` for a database that is in no file.
    return Path(os.path.realpath(path)) if scheme == "sqlite" and path else None


def _postgres() -> Any:
    try:
        return import_module("pomelo.stores.archive.postgres")
    except ModuleNotFoundError as error:
        raise StoreError(
            f"An archive in Postgres needs another package: {install_command('postgres')}"
        ) from error
