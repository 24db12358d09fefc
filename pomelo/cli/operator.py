"""Runs requests of the operator: on the running server if there is one, otherwise on the store itself."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pomelo.cli.terminal import FailureError

if TYPE_CHECKING:
    from pomelo.errors import PomeloError
    from pomelo.service import Operator
    from pomelo.settings import Settings

TIMEOUT = 30.0
"""Seconds that a response of the server may take."""

PAGE_SIZE = 1_000
"""Entries on a page of a list."""

_BATCH_BYTES = 16 * 1024 * 1024
"""Bytes of pages that are read from a store before they are printed: those of some 100,000 usage records."""

_UNKNOWN_OUTCOMES = frozenset(
    {"server_unavailable", "store_unavailable", "deadline_exceeded", "shutting_down", "internal_error"}
)
"""The codes of errors that can occur after the request was carried out."""

T = TypeVar("T")


def call_operator(
    settings: Settings,
    request: Callable[[Operator], Awaitable[T]],
    timeout: float = TIMEOUT,
    *,
    names: Mapping[str, str] | None = None,
    creates: bool = False,
    changes: bool = False,
) -> T:
    """Returns the result of one request. `names` are those of the request's fields on the command line, for
    messages; `creates` allows it to create the data folder. If it `changes` something, an error has a note if
    the change may have been made all the same.

    Raises:
        FailureError: the server does not respond, or there is no data folder.
        PomeloError: the request was refused.
        SettingsError, StoreError: the data folder can't be used.
    """

    async def run() -> T:
        async with _open_operator(settings, timeout, creates) as operator:
            return await request(operator)

    try:
        with _renamed_fields(names):
            return asyncio.run(run())
    except Exception as error:
        if changes and getattr(error.__cause__ or error, "code", "") in _UNKNOWN_OUTCOMES:
            error.add_note("The change may have been made: see pomelo log")
        raise


@contextmanager
def _renamed_fields(names: Mapping[str, str] | None) -> Iterator[None]:
    """Raises an error of a field that has a name on the command line as a FailureError with that name."""
    from pomelo.errors import PomeloError

    try:
        yield
    except PomeloError as error:
        field, names = error.field or "", names or {}
        if field not in names:
            raise
        message = re.sub(rf"\b{re.escape(field)}\b", names[field], error.message, count=1)
        if field.endswith("_micros"):
            message = _with_credits(message, error)
        raise FailureError(f"{error.code}: {message}") from error


def _with_credits(message: str, error: PomeloError) -> str:
    """Returns the message of an error with its bounds in credits, as the command line takes them."""
    from pomelo.money import format_credits

    for bound in {error.values[name] for name in ("minimum", "maximum") if name in error.values}:
        micros = int(bound)
        message = re.sub(
            rf"(?<![\d,.-]){micros:,}(?![\d,.])( microcredits)?", format_credits(micros), message
        )
    return message


def list_pages(
    settings: Settings,
    query: Any,
    request: Callable[[Operator], Awaitable[T]],
    timeout: float = TIMEOUT,
    *,
    names: Mapping[str, str] | None = None,
) -> Iterator[T]:
    """Yields the pages of a list: at least one, which may be empty. `request` sends the `query` for a page;
    `timeout` and `names` are those of `call_operator`.

    A running server sends each page when it is needed. Without one, many pages are read before the first of
    them is yielded: opening a store takes long, and it must not be open while they are printed.

    Raises:
        FailureError, PomeloError, SettingsError, StoreError: as `call_operator`.
    """
    from pomelo.cli.client import is_served

    async def read_pages() -> AsyncGenerator[Any]:
        async with _open_operator(settings, timeout, creates=False) as operator:
            while True:
                page: Any = await request(operator)
                query.page_token = page.next_page_token
                yield page
                if not query.page_token:
                    return

    async def read_batch() -> list[T]:
        batch: list[Any] = []
        size = 0
        async with aclosing(read_pages()) as pages:
            async for page in pages:
                batch.append(page)
                size += page.ByteSize()
                if size >= _BATCH_BYTES:
                    break
        return batch

    async def read_next() -> T | None:
        return await anext(served_pages, None)

    query.page_size = query.page_size or PAGE_SIZE
    with _renamed_fields(names), asyncio.Runner() as runner:
        if is_served(settings.admin_socket):
            served_pages = read_pages()
            try:
                while (page := runner.run(read_next())) is not None:
                    yield page
            finally:  # the caller may stop early, such as when its output can't be written
                runner.run(served_pages.aclose())
            return
        yield from runner.run(read_batch())
        while query.page_token:
            yield from runner.run(read_batch())


@asynccontextmanager
async def _open_operator(settings: Settings, seconds: float, creates: bool) -> AsyncIterator[Operator]:
    from pomelo.cli.client import is_served

    if is_served(settings.admin_socket):
        async with _open_remote(settings.admin_socket, seconds) as operator:
            yield operator
        return
    if not creates and (missing := find_missing(settings)):
        raise FailureError(missing)
    async with _open_local(settings, creates) as operator:
        yield operator


def find_missing(settings: Settings) -> str:
    """Says what a command would have to create to open the store itself; empty: nothing. A root secret that
    it creates would differ from that of the servers.

    Raises:
        SettingsError: the root secret can't be used.
    """
    if settings.uses_sqlite:
        missing, what = not has_database(settings), "database"
        remedy = "Set POMELO_DATA, or run: pomelo serve"
    else:
        missing = settings.shared_secret() is None or not (settings.archive or settings.data.exists())
        what = "root secret"
        remedy = (
            "Set POMELO_DATA to the folder of a server, or POMELO_SECRET and POMELO_ARCHIVE to those of the "
            "servers"
        )
    if not missing:
        return ""
    what = f"{what} in the" if settings.data.exists() else "data"
    return f"There is no {what} folder {settings.data}. {remedy}"


def has_database(settings: Settings) -> bool:
    """Whether there is a store in SQLite, or a folder of another user, which is refused when it is opened."""
    try:
        return settings.database.exists()
    except PermissionError:
        return True


@asynccontextmanager
async def _open_remote(path: Path, seconds: float) -> AsyncIterator[Operator]:
    from pomelo.errors import PomeloError
    from pomelo.server.operator import open_operator

    try:
        async with open_operator(path, seconds) as operator:
            yield operator
    except PomeloError as error:
        if error.code != "server_unavailable":
            raise
        raise FailureError(f"The server at {path} does not answer") from error


@asynccontextmanager
async def _open_local(settings: Settings, creates: bool) -> AsyncIterator[Operator]:
    from pomelo.accounts.keys import Keyring
    from pomelo.accounts.operator import LocalOperator
    from pomelo.accounts.usage import UsageReader
    from pomelo.configuration import find_plans, find_providers, store_of
    from pomelo.configuration.fleet import check_command

    catalog = find_providers(settings).catalog
    plans = find_plans(settings, catalog)
    await check_command(settings)
    # Without a folder, as with an archive in Postgres, the secret is in the settings.
    secret = settings.root_secret() if creates or settings.data.exists() else settings.shared_secret()
    assert secret is not None
    previous = settings.previous_secrets()
    async with store_of(settings) as store:
        yield LocalOperator(
            store,
            Keyring(store, secret, previous=previous),
            plans,
            UsageReader(store, secret, previous),
            catalog.models,
        )
