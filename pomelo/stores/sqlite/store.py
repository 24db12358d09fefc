"""The store in one SQLite file: one process, one thread that writes, and one thread that reads for reports.

A method that changes something returns after the change is on the disk (WAL, synchronous=FULL).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pomelo.errors import PomeloError
from pomelo.runtime.process import shielded
from pomelo.stores.accounts import DEFAULT_ACCOUNT, PAGE, AccountSummary, Wallet
from pomelo.stores.sqlite import accounts, acts, keys, usage
from pomelo.stores.sqlite.balances import Balances
from pomelo.stores.sqlite.checks import Checks, interrupt
from pomelo.stores.sqlite.damage import DamageMonitor, store_errors
from pomelo.stores.sqlite.file import WritableFile, connect_read_only
from pomelo.stores.sqlite.ledger import Ledger
from pomelo.stores.sqlite.log_size import LogSize
from pomelo.stores.sqlite.stored import recover_all
from pomelo.stores.sqlite.writer import Writer
from pomelo.stores.usage import UsageRecord, WalletState

LOCK_WAIT = 2.0
"""Seconds to wait for each other process: commands of the CLI open the store only for a moment."""

log = logging.getLogger("pomelo.stores")

P = ParamSpec("P")
T = TypeVar("T")


@asynccontextmanager
async def open_sqlite(
    path: Path,
    *,
    lock_wait: float = LOCK_WAIT,
    now: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
) -> AsyncIterator[SqliteStore]:
    """Opens the file, creates or migrates it if needed, and closes it on exit.

    Recovers the tasks that were running when the last process died.

    Raises:
        StoreError: another process uses the file; it is damaged, another program's or a newer version's.
    """
    clock = _steady_clock(now, monotonic)
    monitor = DamageMonitor(path)
    log_size = LogSize(path)
    checks = Checks(path)
    writer = await Writer.start(
        lambda: WritableFile(path, lock_wait, partial(_recover, now=clock()), monitor, log_size)
    )
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="sqlite-reports") as reader:
            loop = asyncio.get_running_loop()
            connecting = loop.run_in_executor(reader, _connect, path)
            try:
                connection = await shielded(connecting)
                yield SqliteStore(writer, clock, reader, connection, checks, monitor, log_size)
            finally:
                # Before the writer, so that its closing empties the log. Checks and reports end early.
                await checks.close()
                connection = await connecting
                closed = loop.run_in_executor(reader, connection.close)
                await interrupt(lambda: connection, closed)
                await closed
    finally:
        await writer.close()


def _connect(path: Path) -> sqlite3.Connection:
    with store_errors(path):
        return connect_read_only(path)


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
        checks: Checks,
        monitor: DamageMonitor,
        log_size: LogSize,
    ) -> None:
        self._checks = checks
        self._monitor = monitor
        self._writer = writer
        self._reader = reader
        self._connection = connection
        self._log_size = log_size
        self._ledger = Ledger(writer, clock)
        self.reservations = self._ledger.reservations
        self.reserve = self._ledger.reserve
        self.settle = self._ledger.settle
        self.void = self._ledger.void
        self.note = self._ledger.note
        self.limit_status = self._ledger.limit_status
        self.budget_use = self._ledger.budget_use
        self.recover = self._ledger.recover
        self._balances = Balances(writer, self._ledger)
        self.grant = self._balances.grant
        self.set_credit_limit = self._balances.set_credit_limit
        self.balance = self._balances.get
        self.get_key = _method(keys.get_key, self._read)
        self.add_key = _method(keys.add_key, writer.do)
        self.list_keys = _method(keys.list_keys, self._report)
        self.revoke_key = _method(keys.revoke_key, writer.do)
        self.replace_key = _method(keys.replace_key, writer.do)
        self.set_budget = _method(keys.set_budget, writer.do)
        self.record_key_use = _method(keys.record_key_use, writer.do)
        self.rehash_key = _method(keys.rehash_key, writer.do)
        self.keys_of_secret = _method(keys.keys_of_secret, self._report)
        self.add_account = _method(accounts.add_account, writer.do)
        self.get_account = _method(accounts.get_account, self._read)
        self.set_plan = _method(accounts.set_plan, writer.do)
        self.set_disabled = _method(accounts.set_disabled, writer.do)
        self.get_grant = _method(accounts.get_grant, self._read)
        self.list_grants = _method(accounts.list_grants, self._read)
        self.list_acts = _method(acts.list_acts, self._report)
        reports = usage.Reports(self._report)
        self.list_usage = reports.list_usage
        self.sum_usage = reports.sum_usage

    async def check(self) -> None:
        # While writes fail, it writes, so that an idle server notices when the disk has space again.
        reads = not self._writer.failing
        await self._writer.do(lambda c: accounts.get_account(c, DEFAULT_ACCOUNT), reads=reads)

    # --- AccountStore

    async def list_accounts(self, *, limit: int = PAGE, after: str = "") -> list[AccountSummary]:
        found = await self._report(lambda c: accounts.list_accounts(c, limit, after))
        return [self._balances.of_account(summary) for summary in found]

    # --- UsageStore

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
        return self._monitor.report(await self._translated(self._checks.run))

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> Awaitable[T]:
        return self._writer.do(work, reads=True)

    async def _report(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `work` in the thread of reports."""

        def step() -> T:
            with self._log_size.reading():
                return work(self._connection)

        loop = asyncio.get_running_loop()
        return await self._translated(lambda: loop.run_in_executor(self._reader, step))

    async def _translated(self, read: Callable[[], Awaitable[T]]) -> T:
        """The result of `read`, whose errors become store_unavailable."""
        try:
            return await read()
        except (sqlite3.Error, RuntimeError) as error:
            # RuntimeError: the store was closed meanwhile.
            self._monitor.receive(error)
            raise PomeloError("store_unavailable") from error
        except Exception as error:
            self._writer.unexpected.log("Reading the store failed", error)
            raise PomeloError("store_unavailable") from error


def _method(
    work: Callable[Concatenate[sqlite3.Connection, P], T],
    run: Callable[[Callable[[sqlite3.Connection], T]], Awaitable[T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """A method of a role that is nothing but `work`, whose arguments follow the connection."""

    async def method(*args: P.args, **kwargs: P.kwargs) -> T:
        return await run(lambda connection: work(connection, *args, **kwargs))

    return method
