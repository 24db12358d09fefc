"""The store in one SQLite file: one process, one thread that writes, and one for reports, which only reads.

What a method returns is on the disk (WAL, synchronous=FULL).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from pomelo.errors import PomeloError
from pomelo.stores.base import KeyRecord, Store
from pomelo.stores.ledger import (
    PAGE,
    AccountRecord,
    AccountSummary,
    Balance,
    Grant,
    LimitStatus,
    OpenReservation,
    Refused,
    ReplayedAnswer,
    Reserved,
    ReserveRequest,
    Settled,
    Settlement,
    UsageQuery,
    UsageRecord,
    UsageTotal,
    Wallet,
    WalletState,
)
from pomelo.stores.sqlite import accounts, keys, ledger, usage
from pomelo.stores.sqlite.damage import Watch, looked_over
from pomelo.stores.sqlite.file import WritingFile, open_reading
from pomelo.stores.sqlite.log_size import LogSize
from pomelo.stores.sqlite.writer import Writer

LOCK_WAIT = 2.0
"""Seconds to wait for another process: the command line holds the store for a moment only."""

log = logging.getLogger("pomelo.stores")

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Reading(Protocol[T_co]):
    """Something that is read step by step."""

    def step(self, connection: sqlite3.Connection) -> T_co | None:
        """Reads the next step. None: there is more to read."""
        ...


@asynccontextmanager
async def open_sqlite(
    path: Path,
    *,
    lock_wait: float = LOCK_WAIT,
    now: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Store]:
    """Opens the file, makes or migrates it where needed, and closes it on leaving.

    The tasks that a process left running when it died are charged what was last noted of them.

    Raises:
        StoreError: another process has it; it isn't ours, is damaged, or is of a newer version.
    """
    clock = _steady(now, monotonic)
    watch = Watch(path)
    log_size = LogSize(path)
    writer = await Writer.start(
        lambda: WritingFile(path, lock_wait, partial(_recover, now=clock()), watch, log_size)
    )
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="sqlite-reports") as reader:
            loop = asyncio.get_running_loop()
            opening = loop.run_in_executor(reader, open_reading, path)
            try:
                reading = await asyncio.shield(opening)
                yield SqliteStore(writer, clock, reader, reading, path, watch, log_size)
            finally:
                # Before the writer, whose closing then empties the log; a report under way ends early.
                reading = await opening
                reading.interrupt()
                await asyncio.shield(loop.run_in_executor(reader, reading.close))
    finally:
        await writer.close()


def _steady(now: Callable[[], float], monotonic: Callable[[], float]) -> Callable[[], float]:
    """A clock that no jump of the machine's moves: wall time at first, and monotonic time since."""
    start = now() - monotonic()
    return lambda: start + monotonic()


def _recover(connection: sqlite3.Connection, *, now: float) -> None:
    if count := ledger.recover_all(connection, now):
        log.warning("%d tasks of a process that died were charged what was last noted of them", count)


class SqliteStore:
    """See `pomelo.stores.base` for the roles. Made by `open_sqlite` alone."""

    def __init__(
        self,
        writer: Writer,
        clock: Callable[[], float],
        reader: ThreadPoolExecutor,
        reading: sqlite3.Connection,
        path: Path,
        watch: Watch,
        log_size: LogSize,
    ) -> None:
        self._path = path
        self._watch = watch
        self._writer = writer
        self._clock = clock
        self._reader = reader
        self._reading = reading
        self._log_size = log_size

    # --- KeyStore

    async def get_key(self, key_id: str) -> KeyRecord | None:
        """See KeyStore."""
        return await self._writer.do(lambda c: keys.get_key(c, key_id), reads=True)

    async def add_key(self, record: KeyRecord) -> None:
        """See KeyStore."""
        await self._writer.do(lambda c: keys.add_key(c, record))

    async def list_keys(
        self, account: str | None = None, *, limit: int = PAGE, after: tuple[float, str] | None = None
    ) -> list[KeyRecord]:
        """See KeyStore."""
        return await self._report(lambda c: keys.list_keys(c, account, limit, after))

    async def revoke_key(self, key_id: str, at: float) -> KeyRecord | None:
        """See KeyStore."""
        return await self._writer.do(lambda c: keys.revoke_key(c, key_id, at))

    async def replace_key(self, key_id: str, successor: KeyRecord, at: float) -> bool:
        """See KeyStore."""
        return await self._writer.do(lambda c: keys.replace_key(c, key_id, successor, at))

    # --- LedgerStore

    def reserve(self, take: ReserveRequest) -> Awaitable[Reserved | Refused | ReplayedAnswer]:
        """See LedgerStore."""
        return self._writer.do(lambda c: ledger.reserve(c, self._clock(), take))

    def settle(self, settlement: Settlement) -> Awaitable[Settled]:
        """See LedgerStore."""
        return self._writer.do(lambda c: ledger.settle(c, self._clock(), settlement))

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        """See LedgerStore."""
        return self._writer.do(lambda c: ledger.void(c, self._clock(), wallet, task_id, refund))

    async def note(self, records: Sequence[UsageRecord]) -> list[str]:
        """See LedgerStore."""
        noted = tuple(records)
        return await self._writer.do(lambda c: ledger.note(c, noted))

    async def limit_status(self, wallet: Wallet, model: str = "") -> LimitStatus:
        """See LedgerStore."""
        return await self._writer.do(
            lambda c: ledger.limit_status(c, self._clock(), wallet, model), reads=True
        )

    async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
        """See LedgerStore."""
        return await self._writer.do(ledger.reservations, reads=True)

    async def recover(self, wallet: Wallet, task_id: str) -> None:
        """See LedgerStore."""
        await self._writer.do(lambda c: ledger.recover(c, self._clock(), wallet, task_id))

    # --- AccountStore

    async def add_account(self, name: str, plan: str, at: float) -> bool:
        """See AccountStore."""
        account = AccountRecord(name, plan, at)
        return await self._writer.do(lambda c: accounts.add_account(c, account))

    async def get_account(self, name: str) -> AccountRecord | None:
        """See AccountStore."""
        return await self._writer.do(lambda c: accounts.get_account(c, name), reads=True)

    async def list_accounts(self, *, limit: int = PAGE, after: str = "") -> list[AccountSummary]:
        """See AccountStore."""
        return await self._report(lambda c: accounts.list_accounts(c, limit, after))

    async def set_plan(self, name: str, plan: str) -> bool:
        """See AccountStore."""
        return await self._writer.do(lambda c: accounts.set_plan(c, name, plan))

    async def grant(self, grant: Grant) -> Balance:
        """See AccountStore."""
        return await self._writer.do(lambda c: accounts.grant(c, grant))

    async def get_grant(self, wallet: Wallet, grant_id: str) -> Grant | None:
        """See AccountStore."""
        return await self._writer.do(lambda c: accounts.get_grant(c, wallet, grant_id), reads=True)

    async def list_grants(self, wallet: Wallet) -> list[Grant]:
        """See AccountStore."""
        return await self._writer.do(lambda c: accounts.list_grants(c, wallet), reads=True)

    async def balance(self, wallet: Wallet) -> Balance:
        """See AccountStore."""
        return await self._writer.do(lambda c: accounts.balance(c, wallet), reads=True)

    # --- UsageStore

    async def list_usage(
        self, query: UsageQuery, *, limit: int, after: str = ""
    ) -> tuple[list[UsageRecord], str]:
        """See UsageStore."""
        return await self._read(usage.UsagePage(query, limit, after))

    async def sum_usage(
        self, query: UsageQuery, by: str, *, limit: int | None = None, after: str = ""
    ) -> list[UsageTotal]:
        """See UsageStore."""
        return await self._read(usage.UsageSum(query, by, limit, after))

    async def held(self) -> list[UsageRecord]:
        """See UsageStore."""
        return await self._report(usage.held)

    async def holding(self, wallet: Wallet) -> tuple[int, int]:
        """See UsageStore."""
        return await self._report(lambda c: usage.holding(c, wallet))

    async def wallets(self) -> list[Wallet]:
        """See UsageStore."""
        return [state.wallet async for page in self.wallet_states() for state in page]

    async def wallet_states(self) -> AsyncIterator[list[WalletState]]:
        """See UsageStore."""
        after: Wallet | None = None
        while page := await self._report(partial(usage.wallet_states, after=after, limit=PAGE)):
            yield page
            after = page[-1].wallet

    async def _read(self, reading: Reading[T]) -> T:
        """Reads to the end. Other reports may run between two steps."""
        while (found := await self._report(reading.step)) is None:
            pass
        return found

    async def damage(self) -> list[tuple[str, str]]:
        """See UsageStore."""
        found = await self._report(lambda _: looked_over(self._path, open_reading, references=True))
        return self._watch.reported(found)

    async def _report(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Reads in the thread of reports. What may take long is done in steps, see `_read`."""

        def step() -> T:
            with self._log_size.reading():
                return work(self._reading)

        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._reader, step)
        except (sqlite3.Error, RuntimeError) as error:
            # RuntimeError: the store was closed while a caller was on its way.
            self._watch.see(error)
            raise PomeloError("store_unavailable") from error
        except Exception as error:
            self._writer.unexpected.log("Reading the store failed", error)
            raise PomeloError("store_unavailable") from error
