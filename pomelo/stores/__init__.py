"""Stores of keys, accounts, credits, limits and usage records. `open_store` opens one by its URL."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pomelo.stores.base import Store

STORES: Mapping[str, str] = {
    "sqlite:": "pomelo.stores.sqlite:open_url",
    "redis://": "pomelo.stores.redis:open_redis",
    "rediss://": "pomelo.stores.redis:open_redis",
    "redis+cluster://": "pomelo.stores.redis:open_redis",
    "redis+sentinel://": "pomelo.stores.redis:open_redis",
}
"""Beginning of a URL -> "module:function", which opens the store of a URL and an archive."""


def open_store(url: str, *, archive: str = "") -> AbstractAsyncContextManager[Store]:
    """Opens a store and closes it on exit: `sqlite:PATH`, or Redis.

    Redis: `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `rediss://…` with TLS,
    `redis+cluster://HOST:PORT,HOST:PORT…` or `redis+sentinel://HOST:PORT,HOST:PORT…/SERVICE`.
    `?persistence=none` allows a server that loses its data when it restarts. `archive` is where usage records
    are moved from Redis: `sqlite:PATH` or `postgresql://USER:PASSWORD@HOST/DATABASE`.

    Raises:
        StoreError: the URL has another scheme; on entering: the store can't be opened.
    """
    from pomelo.stores.base import StoreError

    for beginning, opener in STORES.items():
        if url.startswith(beginning) and url != beginning:
            module, _, function = opener.partition(":")
            store: AbstractAsyncContextManager[Store]
            store = getattr(import_module(module), function)(url, archive)
            return store
    scheme = url.partition(":")[0]
    raise StoreError(f"There is no store of the kind {scheme!r}. Use sqlite:PATH or redis://HOST:PORT")
