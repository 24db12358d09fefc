"""Stores of keys, accounts, credits, limits and usage records. `open_store` opens one by its URL."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pomelo.stores.base import Store
    from pomelo.stores.fleet import Process

STORES: Mapping[str, str] = {
    "sqlite:": "pomelo.stores.sqlite:open_url",
    "redis://": "pomelo.stores.redis:open_redis",
    "rediss://": "pomelo.stores.redis:open_redis",
    "redis+cluster://": "pomelo.stores.redis:open_redis",
    "rediss+cluster://": "pomelo.stores.redis:open_redis",
    "redis+sentinel://": "pomelo.stores.redis:open_redis",
    "rediss+sentinel://": "pomelo.stores.redis:open_redis",
}
"""Beginning of a URL -> "module:function", which opens the store of a URL and an archive. The module's
`check_url` checks them, and `read_fleet` lists the processes that serve with one that several share."""


def open_store(url: str, *, archive: str = "") -> AbstractAsyncContextManager[Store]:
    """Opens a store and closes it on exit: `sqlite:PATH`, or Redis.

    Redis: `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `redis+cluster://HOST:PORT,HOST:PORT…` or
    `redis+sentinel://HOST:PORT,HOST:PORT…/SERVICE`; with `rediss` in place of `redis` over TLS.
    `?persistence=none` allows a server that loses its data when it restarts. `archive` is where usage records
    are moved from Redis: `sqlite:PATH` or `postgresql://USER:PASSWORD@HOST/DATABASE`.

    Raises:
        StoreError: the URL has another scheme; on entering: the store can't be opened.
    """
    module, function = _find(url)
    store: AbstractAsyncContextManager[Store] = getattr(module, function)(url, archive)
    return store


async def check_store(url: str, *, archive: str = "") -> None:
    """Checks that a store can be opened, as far as that changes nothing: a file that does not exist is fine.

    Raises:
        StoreError: it can't be opened.
    """
    module, _ = _find(url)
    await module.check_url(url, archive)


async def read_fleet(url: str, *, living: bool = False) -> list[Process]:
    """Returns the processes that serve with a store, oldest first; none if it serves one process alone.

    A process that was killed is listed until another marks it dead. `living` waits until each process has
    sent a heartbeat, which takes up to 3 seconds, or was marked dead, after 20, and lists none of the dead.

    Raises:
        StoreError: it can't be reached.
        PomeloError: store_unavailable.
    """
    module, _ = _find(url)
    return (await module.read_fleet(url, living=living))[0] if hasattr(module, "read_fleet") else []


def _find(url: str) -> tuple[Any, str]:
    """The module of a URL's store, and the name of the function that opens it."""
    from pomelo.stores.base import StoreError

    for beginning, opener in STORES.items():
        if url.startswith(beginning) and url != beginning:
            module, _, function = opener.partition(":")
            return import_module(module), function
    scheme = url.partition(":")[0]
    if url in STORES and url != "sqlite:":
        raise StoreError(f"The URL of the store names no server. Use {url}HOST:PORT")
    raise StoreError(f"There is no store of the kind {scheme!r}. Use sqlite:PATH or redis://HOST:PORT")
