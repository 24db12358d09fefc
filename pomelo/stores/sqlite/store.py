"""The store in one SQLite file: one process, one thread that writes, and one thread that reads for reports.

A method that changes something returns after the change is on the disk (WAL, synchronous=FULL).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from pomelo.errors import PomeloError
from pomelo.stores.accounts import PAGE, AccountRecord, AccountSummary, Grant, Wallet
from pomelo.stores.acts import Act
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord
from pomelo.stores.ledger import OpenReservation
from pomelo.stores.sqlite import accounts, acts, keys, usage
from pomelo.stores.sqlite.balances import Balances
from pomelo.stores.sqlite.damage import DamageMonitor, check_completely
from pomelo.stores.sqlite.file import WritableFile, connect_read_only
from pomelo.stores.sqlite.ledger import Ledger
from pomelo.stores.sqlite.log_size import LogSize
from pomelo.stores.sqlite.stored import recover_all
from pomelo.stores.sqlite.writer import Writer
from pomelo.stores.usage import Grouping, UsageQuery, UsageRecord, UsageTotal, WalletState

LOCK_WAIT = 2.0
"""Seconds to wait for another process: commands of the CLI open the store only for a moment."""

_INTERRUPT_INTERVAL = 0.01
"""Seconds between two attempts to end a report, while the file is being closed."""

log = logging.getLogger("pomelo.stores")

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class _Report(Protocol[T_co]):
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
    """Opens the file, creates or migrates it if needed, and closes it on exit.

    Recovers the tasks that were running when the last process died.

    Raises:
        StoreError: another process uses the file; it is damaged, another program's or a newer version's.
    """
    clock = _steady_clock(now, monotonic)
    monitor = DamageMonitor(path)
    log_size = LogSize(path)
    writer = await Writer.start(
        lambda: WritableFile(path, lock_wait, partial(_recover, now=clock()), monitor, log_size)
    )
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="sqlite-reports") as reader:
            loop = asyncio.get_running_loop()
            connecting = loop.run_in_executor(reader, connect_read_only, path)
            try:
                connection = await asyncio.shield(connecting)
                yield SqliteStore(writer, clock, reader, connection, path, monitor, log_size)
            finally:
                # Before the writer, so that its closing empties the log. Reports end early.
                connection = await connecting
                closed = loop.run_in_executor(reader, connection.close)
                while not closed.done():
                    # Repeated, because it does not affect a statement that begins afterwards.
                    with suppress(sqlite3.ProgrammingError):  # it was closed meanwhile
                        connection.interrupt()
                    await asyncio.wait([closed], timeout=_INTERRUPT_INTERVAL)
                await closed
    finally:
        await writer.close()


def _steady_clock(now: Callable[[], float], monotonic: Callable[[], float]) -> Callable[[], float]:
    """A clock that starts with the wall time and then ignores changes of the machine's clock."""
    start = now() - monotonic()
    return lambda: start + monotonic()


def _recover(connection: sqlite3.Connection, *, now: float) -> None:
    if count := recover_all(connection, now):
        log.warning("%d tasks of a process that died were charged their last noted cost", count)


class SqliteStore:
    """All roles, on an open file. Create it with `open_sqlite`."""

    def __init__(
        self,
        writer: Writer,
        clock: Callable[[], float],
        reader: ThreadPoolExecutor,
        connection: sqlite3.Connection,
        path: Path,
        monitor: DamageMonitor,
        log_size: LogSize,
    ) -> None:
        self._path = path
        self._monitor = monitor
        self._writer = writer
        self._reader = reader
        self._connection = connection
        self._log_size = log_size
        self._ledger = Ledger(writer, clock)
        self.reserve = self._ledger.reserve
        self.settle = self._ledger.settle
        self.void = self._ledger.void
        self.limit_status = self._ledger.limit_status
        self.budget_use = self._ledger.budget_use
        self.recover = self._ledger.recover
        self._balances = Balances(writer, self._ledger)
        self.grant = self._balances.grant
        self.set_credit_limit = self._balances.set_credit_limit
        self.balance = self._balances.get

    # --- KeyStore

    async def get_key(self, key_id: str) -> KeyRecord | None:
        return await self._writer.do(lambda c: keys.get_key(c, key_id), reads=True)

    async def add_key(self, record: KeyRecord, act: Act | None = None) -> None:
        await self._writer.do(lambda c: keys.add_key(c, record, act))

    async def list_keys(
        self, account: str | None = None, *, limit: int = PAGE, after: tuple[float, str] | None = None
    ) -> list[KeyRecord]:
        return await self._report(lambda c: keys.list_keys(c, account, limit, after))

    async def revoke_key(self, key_id: str, at: float, act: Act | None = None) -> KeyRecord | None:
        return await self._writer.do(lambda c: keys.revoke_key(c, key_id, at, act))

    async def replace_key(
        self,
        key_id: str,
        successor: KeyRecord,
        at: float,
        act: Act | None = None,
        *,
        expires: float | None = None,
    ) -> bool:
        return await self._writer.do(lambda c: keys.replace_key(c, key_id, successor, at, expires, act))

    async def set_budget(self, key_id: str, budget: str, act: Act | None = None) -> bool:
        return await self._writer.do(lambda c: keys.set_budget(c, key_id, budget, act))

    async def record_key_use(self, used: Mapping[str, float]) -> None:
        await self._writer.do(lambda c: keys.record_key_use(c, used))

    async def rehash_key(self, key_id: str, old: bytes, new: bytes, secret_id: str) -> None:
        await self._writer.do(lambda c: keys.rehash_key(c, key_id, old, new, secret_id))

    async def keys_of_secret(self, secret_id: str, key_ids: Sequence[str]) -> set[str]:
        return await self._report(lambda c: keys.keys_of_secret(c, secret_id, key_ids))

    # --- LedgerStore

    async def note(self, records: Sequence[UsageRecord]) -> list[str]:
        return await self._ledger.note(tuple(records))

    async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
        return await self._ledger.reservations()

    # --- AccountStore

    async def add_account(self, name: str, plan: str, at: float, act: Act | None = None) -> bool:
        account = AccountRecord(name, plan, at)
        return await self._writer.do(lambda c: accounts.add_account(c, account, act))

    async def get_account(self, name: str) -> AccountRecord | None:
        return await self._writer.do(lambda c: accounts.get_account(c, name), reads=True)

    async def list_accounts(self, *, limit: int = PAGE, after: str = "") -> list[AccountSummary]:
        found = await self._report(lambda c: accounts.list_accounts(c, limit, after))
        return [self._balances.of_account(summary) for summary in found]

    async def set_plan(self, name: str, plan: str, act: Act | None = None) -> bool:
        return await self._writer.do(lambda c: accounts.set_plan(c, name, plan, act))

    async def set_disabled(self, name: str, disabled: float | None, act: Act | None = None) -> bool:
        return await self._writer.do(lambda c: accounts.set_disabled(c, name, disabled, act))

    async def get_grant(self, wallet: Wallet, grant_id: str) -> Grant | None:
        return await self._writer.do(lambda c: accounts.get_grant(c, wallet, grant_id), reads=True)

    async def list_grants(self, wallet: Wallet) -> list[Grant]:
        return await self._writer.do(lambda c: accounts.list_grants(c, wallet), reads=True)

    # --- ActStore

    async def list_acts(
        self,
        account: str | None = None,
        *,
        since: float | None = None,
        limit: int,
        after: tuple[float, str] | None = None,
    ) -> list[Act]:
        return await self._report(lambda c: acts.list_acts(c, account, since, limit, after))

    # --- UsageStore

    async def list_usage(
        self, query: UsageQuery, *, limit: int, after: str = ""
    ) -> tuple[list[UsageRecord], str]:
        return await self._run_report(usage.UsagePage(query, limit, after))

    async def sum_usage(
        self,
        query: UsageQuery,
        by: Sequence[Grouping],
        *,
        limit: int | None = None,
        after: tuple[str, ...] | None = None,
    ) -> list[UsageTotal]:
        return await self._run_report(usage.UsageSum(query, by, limit, after))

    async def drafts(self) -> list[UsageRecord]:
        return [reservation.record for reservation in await self._ledger.reservations()]

    async def wallet_states(self) -> AsyncIterator[list[WalletState]]:
        after: Wallet | None = None
        while page := await self._ledger.wallet_states(after):
            yield page
            last = page[-1].wallet
            if after is not None and (last.account, last.live) <= (after.account, after.live):
                return  # A damaged file would repeat the page for ever; the audit finds what is missing.
            after = last

    async def damage(self) -> list[tuple[str, str]]:
        findings = await self._report(
            lambda _: check_completely(self._path, connect_read_only, references=True)
        )
        return self._monitor.report(findings)

    async def _run_report(self, report: _Report[T]) -> T:
        """Runs a report that may take long, in steps. Other reports may run between two steps."""
        while (result := await self._report(report.step)) is None:
            pass
        return result

    async def _report(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `work` in the thread of reports."""

        def step() -> T:
            with self._log_size.reading():
                return work(self._connection)

        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._reader, step)
        except (sqlite3.Error, RuntimeError) as error:
            # RuntimeError: the store was closed meanwhile.
            self._monitor.receive(error)
            raise PomeloError("store_unavailable") from error
        except Exception as error:
            self._writer.unexpected.log("Reading the store failed", error)
            raise PomeloError("store_unavailable") from error
