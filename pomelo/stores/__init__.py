"""Where what must outlive a process is kept. `open_store` picks the store by its URL."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pomelo.stores.base import Store, StoreError


def open_store(url: str, *, archive: str = "") -> AbstractAsyncContextManager[Store]:
    """A store, opened on entering and closed on leaving: `sqlite:PATH`, or Redis.

    `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `rediss://…` with TLS, `redis+cluster://HOST:PORT,HOST:PORT…`,
    `redis+sentinel://HOST:PORT,HOST:PORT…/SERVICE`; `?persistence=none` allows a server that forgets all when
    it restarts. `archive` is where usage goes from Redis: `sqlite:PATH` or
    `postgresql://USER:PASSWORD@HOST/DATABASE`.

    Raises:
        StoreError: there is no such kind of store; on entering: it can't be opened.
    """
    kind, _, rest = url.partition(":")
    if kind == "sqlite" and rest:
        from pomelo.stores.sqlite import open_sqlite

        return open_sqlite(Path(rest))
    if kind.startswith("redis") and rest.startswith("//"):
        from pomelo.stores.redis import open_redis

        return open_redis(url, archive)
    raise StoreError(f"There is no store of the kind {kind!r}. Use sqlite:PATH or redis://HOST:PORT")
