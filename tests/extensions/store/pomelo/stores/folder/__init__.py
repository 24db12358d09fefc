"""A store in a folder of its own."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from pomelo.stores.base import Store
from pomelo.stores.sqlite import open_sqlite


def open_folder(url: str, archive: str, **clocks: Any) -> AbstractAsyncContextManager[Store]:
    """Opens the store of `folder://PATH`; `archive` is not used."""
    folder = Path(url.removeprefix("folder://"))
    folder.mkdir(mode=0o700, exist_ok=True)
    return open_sqlite(folder / "pomelo.db", **clocks)
