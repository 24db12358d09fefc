"""How the operator's commands ask: the running server through its socket, or a servicer made for a moment.

`keys`, `accounts`, `usage`, `audit` and `doctor` ask here. Where no server runs, the store is opened and the
same servicer asked, so that the answer is the same.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomelo.cli.terminal import FailureError

if TYPE_CHECKING:
    from pomelo.server.admin import AdminServicer
    from pomelo.settings import Settings

TIMEOUT = 30.0
"""Seconds that an answer may take."""

PAGE = 1_000
"""Entries of a page of a list."""

_MAKING = frozenset({"CreateKey", "CreateAccount"})
"""What may be the first thing that is done with a data folder."""


def asked(config: Path | None, method: str, request: Any, timeout: float = TIMEOUT) -> Any:
    """As `ask`, under the settings of a command."""
    from pomelo.settings import load

    return ask(load(config), method, request, timeout)


def ask(settings: Settings, method: str, request: Any, timeout: float = TIMEOUT) -> Any:
    """What AdminService answers: the server's, or one that is made here for a moment.

    Raises:
        PomeloError: a refusal; SettingsError, StoreError: the data folder can't be used.
    """
    from pomelo.cli.client import is_served, operator

    if is_served(settings.admin_socket):
        from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceStub

        with operator(settings.admin_socket) as channel:
            return getattr(AdminServiceStub(channel), method)(request, timeout=timeout)
    _check_folder(settings, method)
    import asyncio

    return asyncio.run(_ask_here(settings, method, request))


def pages(settings: Settings, method: str, request: Any) -> Iterator[Any]:
    """Yields the pages that AdminService returns for a list request: at least one, which may be empty.

    Raises:
        PomeloError, SettingsError, StoreError: as `ask`.
    """
    from pomelo.cli.client import is_served, operator

    request.page_size = PAGE
    if is_served(settings.admin_socket):
        from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceStub

        with operator(settings.admin_socket) as channel:
            while True:
                page = getattr(AdminServiceStub(channel), method)(request, timeout=TIMEOUT)
                yield page
                if not page.next_page_token:
                    return
                request.page_token = page.next_page_token
    _check_folder(settings, method)
    import asyncio

    # Read all pages before printing, so that the store is not held open while somebody reads the output.
    yield from asyncio.run(_pages_here(settings, method, request))


def _check_folder(settings: Settings, method: str) -> None:
    kept_here = settings.store_url().startswith("sqlite:")
    if kept_here and method not in _MAKING and not settings.data.exists():
        raise FailureError(f"There is no data folder {settings.data}. Set POMELO_DATA, or run: pomelo serve")


async def _ask_here(settings: Settings, method: str, request: Any) -> Any:
    async with _servicer(settings) as servicer:
        return await getattr(servicer, _lower(method))(request)


async def _pages_here(settings: Settings, method: str, request: Any) -> list[Any]:
    async with _servicer(settings) as servicer:
        found = [await getattr(servicer, _lower(method))(request)]
        while found[-1].next_page_token:
            request.page_token = found[-1].next_page_token
            found.append(await getattr(servicer, _lower(method))(request))
    return found


def _lower(method: str) -> str:
    """The name of a method as Python writes it: create_key for CreateKey."""
    return re.sub(r"(?<!^)([A-Z])", r"_\1", method).lower()


@asynccontextmanager
async def _servicer(settings: Settings) -> AsyncIterator[AdminServicer]:
    from pomelo.accounts.accounts import AccountAdmin
    from pomelo.accounts.keys import Keyring
    from pomelo.accounts.usage import UsageReader
    from pomelo.configuration import find_plans, find_providers, store_of
    from pomelo.server.admin import AdminServicer

    catalog = find_providers(settings).catalog
    plans = find_plans(settings, catalog)
    secret = settings.root_secret()
    async with store_of(settings) as store:
        yield AdminServicer(
            store,
            Keyring(store, secret),
            AccountAdmin(store, plans),
            UsageReader(store, secret),
            catalog.models,
        )
