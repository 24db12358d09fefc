"""Archives of usage records, in SQLite or Postgres. `open_archive` opens one by its URL."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pomelo import install_command
from pomelo.stores.archive.base import Archive
from pomelo.stores.base import StoreError


def open_archive(url: str) -> AbstractAsyncContextManager[Archive]:
    """Opens an archive, `sqlite:PATH` or `postgresql://…`, and closes it on exit.

    Raises:
        StoreError: the URL has another scheme; on entering: the archive can't be opened.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite" and rest:
        from pomelo.stores.archive.sqlite import open_sqlite_archive

        return open_sqlite_archive(Path(rest))
    if scheme in ("postgresql", "postgres"):
        try:
            from pomelo.stores.archive.postgres import open_postgres_archive
        except ModuleNotFoundError as error:
            raise StoreError(
                f"An archive in Postgres needs another package: {install_command('postgres')}"
            ) from error
        return open_postgres_archive(url)
    raise StoreError(f"There is no archive of the kind {scheme!r}. Use sqlite:PATH or postgresql://…")
