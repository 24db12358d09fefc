"""Where what must outlive a process is kept. `open_store` picks the store by its URL."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pomelo.stores.base import Store, StoreError


def open_store(url: str) -> AbstractAsyncContextManager[Store]:
    """A store, opened on entering and closed on leaving: `sqlite:PATH`.

    Raises:
        StoreError: there is no such kind of store; on entering: it can't be opened.
    """
    kind, _, rest = url.partition(":")
    if kind == "sqlite" and rest:
        from pomelo.stores.sqlite import open_sqlite

        return open_sqlite(Path(rest))
    raise StoreError(f"There is no store of the kind {kind!r}. Use sqlite:PATH")
