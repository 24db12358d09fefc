"""The store on Redis or Valkey: all roles, opening and closing.

Several processes on several machines may have it open. Credits and limits are in Redis, where each step is
one script; usage records are moved to an archive.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pomelo.errors import PomeloError
from pomelo.runtime.process import shielded
from pomelo.stores.accounts import DEFAULT_ACCOUNT, Grant, Wallet
from pomelo.stores.archive import check_archive, open_archive
from pomelo.stores.base import Store, StoreError
from pomelo.stores.redis.accounts import Accounts
from pomelo.stores.redis.acts import Acts
from pomelo.stores.redis.connection import Connection, Timing, one_deadline
from pomelo.stores.redis.keys import Keys
from pomelo.stores.redis.ledger import Ledger
from pomelo.stores.redis.processes import Processes, check_format
from pomelo.stores.redis.url import check_server, connect, parse_url
from pomelo.stores.redis.usage import Usage
from pomelo.stores.redis.wallet_index import WalletIndex
from pomelo.stores.redis.workers import Worker

log = logging.getLogger("pomelo.stores")

_FIRST_PLAN = "pro"
_FIRST_CREDITS = 100_000_000


async def check_url(url: str, archive: str) -> None:
    """Checks the server and the archive, as `pomelo.stores.check_store`."""
    await check_server(parse_url(url), Timing())
    await check_archive(archive)


@asynccontextmanager
async def open_redis(
    url: str,
    archive: str,
    *,
    timing: Timing | None = None,
    now: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    server_time: Callable[[], float] | None = None,
) -> AsyncIterator[Store]:
    """Opens the store and its archive by their URLs, and closes them on exit.

    `now` is the time of the first account and its credits, `monotonic` the clock for watching other
    processes, `server_time` replaces the server's clock in tests.

    Raises:
        StoreError: the server or the archive can't be reached or used.
    """
    timing = timing or Timing()
    server = parse_url(url)
    async with open_archive(archive) as opened:
        connection = Connection(await connect(server, timing, timing.open), timing, server_time)
        try:
            wallet_index = WalletIndex(connection)
            usage = Usage(connection, wallet_index, opened)
            worker = Worker(connection, wallet_index, monotonic)
            store = RedisStore(connection, wallet_index, worker, usage)
            try:
                with connection.one_deadline(timing.open):
                    await store.initialise(now())
                await worker.open()
            except PomeloError as error:
                raise StoreError(
                    "The Redis server does not do what Pomelo needs; the log says what it answered"
                ) from error
            try:
                yield store
            finally:
                # A cancelled exit must not stop halfway.
                closing = asyncio.ensure_future(store.close())
                try:
                    await shielded(closing)
                except asyncio.CancelledError:
                    await asyncio.wait({closing})
                    raise
        finally:
            await connection.close()


class RedisStore(Keys, Accounts, Acts, Ledger, Processes):
    """All roles, on an open connection. Create it with `open_redis`."""

    def __init__(
        self, connection: Connection, wallet_index: WalletIndex, worker: Worker, usage: Usage
    ) -> None:
        Ledger.__init__(self, connection, worker, wallet_index, usage)
        self.drain_usage = usage.open
        self.list_usage = usage.list_usage
        self.sum_usage = usage.sum_usage
        self.drafts = usage.drafts
        self.wallet_states = usage.wallet_states
        self.damage = usage.damage
        self._created = 0.0
        """When the account was created that every store has."""
        self._is_lost = False

    async def initialise(self, at: float) -> None:
        """Creates the account and credits that every new store has.

        Raises:
            StoreError: a newer version of Pomelo has written to the server.
        """
        await check_format(self._connection)
        await self.add_account(DEFAULT_ACCOUNT, _FIRST_PLAN, at)
        account = await self.get_account(DEFAULT_ACCOUNT)
        if account is not None:
            self._created = account.created
            wallet = Wallet(DEFAULT_ACCOUNT, live=False)
            await self.grant(
                Grant("test credits of default", wallet, _FIRST_CREDITS, account.created, "to begin with")
            )

    @one_deadline
    async def check(self) -> None:
        await self._worker.check()
        # Every store has this account. Another process may have begun the store anew.
        account = await self.get_account(DEFAULT_ACCOUNT)
        lost = account is None or account.created != self._created
        if lost and not self._is_lost:
            log.error(
                "Redis has lost its data, with accounts, keys and credits. Restore a backup "
                "(docs/maintenance.md, Backups), or start Pomelo again to begin anew"
            )
        self._is_lost = lost
        if lost:
            raise PomeloError("store_unavailable")

    async def close(self) -> None:
        """Waits for running operations, recovers the tasks that are left, and drains the usage records."""
        await self.finish()
        await self._worker.close(self._checks)
        await self._usage.close()
