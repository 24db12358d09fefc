"""The store on Redis or Valkey: every role, and its opening and closing.

Several processes, of several machines, may have it open. Money and limits are in Redis, where each step is
one script; usage records go on to an archive.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pomelo.errors import PomeloError
from pomelo.stores.archive.sqlite import open_archive
from pomelo.stores.base import DEFAULT_ACCOUNT, Store, StoreError
from pomelo.stores.ledger import GROUPS, Grant, UsageQuery, UsageRecord, UsageTotal, Wallet, WalletState
from pomelo.stores.redis.accounts import Accounts
from pomelo.stores.redis.connection import Link, Timing
from pomelo.stores.redis.key_names import FORMAT
from pomelo.stores.redis.keys import Keys
from pomelo.stores.redis.ledger import Ledger
from pomelo.stores.redis.url import connect, read_url
from pomelo.stores.redis.usage import Usage
from pomelo.stores.redis.wallet_index import WalletIndex
from pomelo.stores.redis.workers import Worker
from pomelo.stores.sqlite.usage import read_place

_FORMAT = b"1"
_FIRST_PLAN = "pro"
_FIRST_CREDITS = 100_000_000


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
    """Opens the store at a URL (see `opening`) with its archive, and closes it on leaving.

    `now` dates the first account and its credits; `monotonic` watches the other processes;
    `server_time` stands for the server's own clock.

    Raises:
        StoreError: the server or the archive can't be reached or used.
    """
    timing = timing or Timing()
    place = read_url(url)
    async with open_archive(archive) as opened:
        link = Link(await connect(place, timing), timing, server_time)
        try:
            places = WalletIndex(link)
            usage = Usage(link, places, opened)
            owner = Worker(link, places, monotonic)
            store = RedisStore(link, places, owner, usage)
            try:
                await store.begin(now())
                await owner.open()
            except PomeloError as error:
                raise StoreError(
                    "The Redis server does not do what Pomelo needs; the log says what it answered"
                ) from error
            usage.open()
            try:
                yield store
            finally:
                # A cancelled exit must not leave half of it.
                ending = asyncio.ensure_future(store.end())
                try:
                    await asyncio.shield(ending)
                except asyncio.CancelledError:
                    await asyncio.wait({ending})
                    raise
        finally:
            await link.close()


class RedisStore(Keys, Accounts, Ledger):
    """See `pomelo.stores.base` for the roles. Made by `open_redis` alone."""

    def __init__(self, link: Link, places: WalletIndex, owner: Worker, usage: Usage) -> None:
        Keys.__init__(self, link)
        Accounts.__init__(self, link, places)
        Ledger.__init__(self, link, owner, places, usage)

    async def list_usage(
        self, query: UsageQuery, *, limit: int, after: str = ""
    ) -> tuple[list[UsageRecord], str]:
        """See UsageStore."""
        if after:
            read_place(after)  # raises if it is invalid
        return await self._usage.list_usage(query, limit=limit, after=after)

    async def sum_usage(
        self, query: UsageQuery, by: str, *, limit: int | None = None, after: str = ""
    ) -> list[UsageTotal]:
        """See UsageStore."""
        if by not in GROUPS:
            raise ValueError(f"by must be one of {', '.join(GROUPS)}")
        return await self._usage.sum_usage(query, by, limit=limit, after=after)

    async def held(self) -> list[UsageRecord]:
        """See UsageStore."""
        return await self._usage.held()

    async def holding(self, wallet: Wallet) -> tuple[int, int]:
        """See UsageStore."""
        return await self._usage.holding(wallet)

    async def wallets(self) -> list[Wallet]:
        """See UsageStore."""
        return await self._usage.wallets()

    async def damage(self) -> list[tuple[str, str]]:
        """See UsageStore."""
        return await self._usage.damage()

    def wallet_states(self) -> AsyncIterator[list[WalletState]]:
        """See UsageStore."""
        return self._usage.wallet_states()

    async def begin(self, at: float) -> None:
        """Makes what every store has from the first.

        Raises:
            StoreError: what is there is of a newer Pomelo.
        """
        await self._link.send("SET", FORMAT, _FORMAT, "NX")
        version = await self._link.send("GET", FORMAT)
        if version != _FORMAT:
            raise StoreError(
                f"What the Redis server has was written by a newer Pomelo ({version!r}). Upgrade Pomelo"
            )
        await self.add_account(DEFAULT_ACCOUNT, _FIRST_PLAN, at)
        account = await self.get_account(DEFAULT_ACCOUNT)
        if account is not None:
            wallet = Wallet(DEFAULT_ACCOUNT, live=False)
            await self.grant(
                Grant("test credits of default", wallet, _FIRST_CREDITS, account.created, "to begin with")
            )

    async def abandon(self) -> None:
        """Does and says nothing more, as a process that is killed; for tests. It is still to be closed."""
        self._link.closed = True
        await self._owner.stop()

    async def end(self) -> None:
        """Waits for what is under way, and ends what is left."""
        await self.finish()
        await self._owner.close()
        await self._usage.close()
