"""Stores of keys, accounts, credits, limits and usage records. `open_store` opens one by its URL."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pomelo.stores.base import Store, StoreError


def open_store(url: str, *, archive: str = "") -> AbstractAsyncContextManager[Store]:
    """Opens a store and closes it on exit: `sqlite:PATH`, or Redis.

    Redis: `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `rediss://…` with TLS,
    `redis+cluster://HOST:PORT,HOST:PORT…` or `redis+sentinel://HOST:PORT,HOST:PORT…/SERVICE`.
    `?persistence=none` allows a server that loses its data when it restarts. `archive` is where usage records
    are moved from Redis: `sqlite:PATH` or `postgresql://USER:PASSWORD@HOST/DATABASE`.

    Raises:
        StoreError: the URL has another scheme; on entering: the store can't be opened.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite" and rest:
        from pomelo.stores.sqlite import open_sqlite

        return open_sqlite(Path(rest))
    if scheme.startswith("redis") and rest.startswith("//"):
        from pomelo.stores.redis import open_redis

        return open_redis(url, archive)
    raise StoreError(f"There is no store of the kind {scheme!r}. Use sqlite:PATH or redis://HOST:PORT")
