"""The usage role: moves usage records from each wallet's stream in Redis to the archive, and reads them
there.

A record is deleted from its stream after the archive has committed it, and the archive keeps one record per
task: so it has each record exactly once, whichever process adds it and how often. Reports drain the streams
first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from pomelo.errors import PomeloError
from pomelo.runtime.process import periodically, stop
from pomelo.stores import records
from pomelo.stores.accounts import Balance, Wallet
from pomelo.stores.archive.base import Archive
from pomelo.stores.redis.connection import Connection, RefusedError, translated_errors
from pomelo.stores.redis.key_names import key, member, names
from pomelo.stores.redis.scripts import WALLET_STATES
from pomelo.stores.redis.wallet_index import WalletIndex, for_each
from pomelo.stores.usage import (
    RECOVERED,
    Grouping,
    UsageQuery,
    UsageRecord,
    UsageTotal,
    WalletState,
    check_sum,
)

log = logging.getLogger("pomelo.stores")

_ENTRIES = 256
"""Maximum number of entries that are moved at a time. Other commands wait for the replies that have them,
which have 17 MB if each record has metadata of 65 kB."""

_BYTES = 4 * 1024 * 1024
"""The size of the records that are moved at a time, if they are as large as those before. At first, half of
_ENTRIES are moved."""

_WALLETS = 50
"""Wallets whose entries are moved at a time."""

_FULL_DRAIN = 60
"""Every so many intervals of `Timing.drain`, one process drains all wallets."""


class _Entry(NamedTuple):
    """An entry of a stream."""

    entry_id: bytes
    wallet: Wallet
    record: UsageRecord


class Usage:
    """Implements UsageStore."""

    def __init__(self, connection: Connection, wallet_index: WalletIndex, archive: Archive) -> None:
        self._connection = connection
        self._wallet_index = wallet_index
        self._archive = archive
        self._expected: set[Wallet] = set()
        self._drains = 0
        self._task: asyncio.Task[None] | None = None
        self._on_failure: Callable[[], None] = lambda: None

    def open(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Starts to move records to the archive. `on_failure` is called each time that the archive
        fails."""
        self._on_failure = on_failure
        self._task = asyncio.create_task(
            periodically(
                self._drain_periodically,
                self._connection.timing.drain,
                "Usage records could not be moved to the archive",
                self._connection.unexpected,
                immediately=True,
            )
        )

    async def close(self) -> None:
        """Moves the remaining records of this process, if possible, and stops."""
        await stop(self._task)
        with suppress(PomeloError), self._connection.translated_errors():
            await self.drain(self._expected)

    def expect(self, wallet: Wallet) -> None:
        """Announces a new record of a wallet."""
        self._expected.add(wallet)

    async def list_usage(
        self, query: UsageQuery, *, limit: int, after: str = ""
    ) -> tuple[list[UsageRecord], str]:
        if after:
            records.decode_position(after)  # raises ValueError
        with self._connection.translated_errors():
            # Later pages are older: the first page has drained them.
            if not after:
                await self.drain(await self._wallets_of(query))
            return await self._archive.list_usage(query, limit=limit, after=after)

    async def sum_usage(
        self,
        query: UsageQuery,
        by: Sequence[Grouping],
        *,
        limit: int | None = None,
        after: tuple[str, ...] | None = None,
    ) -> list[UsageTotal]:
        check_sum(by, after)
        with self._connection.translated_errors():
            if after is None:
                await self.drain(await self._wallets_of(query))
            return await self._archive.sum_usage(query, by, limit=limit, after=after)

    async def get(self, wallet: Wallet, task_id: str) -> UsageRecord | None:
        await self.drain([wallet])
        found = await self._archive.get(task_id)
        return found if found is not None and found.wallet == wallet else None

    @translated_errors
    async def drafts(self) -> list[UsageRecord]:
        wallets = await self._wallet_index.with_data("drafts")
        pages = await for_each(wallets, lambda w: self._connection.send("HVALS", names(w).drafts))
        found = [records.decode_record(text) for page in pages for text in page]
        return sorted(found, key=lambda record: record.task_id)

    async def wallet_states(self) -> AsyncIterator[list[WalletState]]:
        async for page in self._wallet_index.pages():
            states = []
            with self._connection.translated_errors():
                replies = await self._wallet_index.run(WALLET_STATES, page, _state_keys)
            for wallets, reply in replies:
                for wallet, start in zip(wallets, range(0, len(reply), 7), strict=True):
                    exists, *amounts, grants, reservations = reply[start : start + 7]
                    if exists:
                        balance = Balance(*amounts)
                        states.append(WalletState(wallet, balance, grants, reservations))
            yield states

    async def damage(self) -> list[tuple[str, str]]:
        return await self._archive.damage()

    async def drain(self, wallets: Iterable[Wallet]) -> None:
        """Moves all records of these wallets to the archive, also if those of some can't be read.

        Raises:
            PomeloError: store_unavailable, of Redis or of the archive.
        """
        everyone = list(dict.fromkeys(wallets))
        failed: list[PomeloError] = []
        for at in range(0, len(everyone), _WALLETS):
            some = everyone[at : at + _WALLETS]
            errors = await self._drain_some(some)
            failed += errors
            if len(errors) == len(some):
                break  # the server can't be reached
        if failed:
            raise failed[0]

    async def _drain_some(self, wallets: list[Wallet]) -> list[PomeloError]:
        """Moves the records of these wallets. Returns an error for each wallet that can't be read."""
        next_ids, most = dict.fromkeys(wallets, "-"), _ENTRIES // 2
        failed: list[PomeloError] = []
        while next_ids:
            entries: list[_Entry] = []
            limit = max(1, most // len(next_ids))
            pages = await for_each(next_ids.items(), partial(self._read, limit, failed))
            sizes = [len(fields.get(b"record", b"")) for page in pages for _, fields in page]
            most = min(2 * most, _ENTRIES, _BYTES * len(sizes) // max(1, sum(sizes)))
            for wallet, page in zip(list(next_ids), pages, strict=True):
                if len(page) == limit:
                    next_ids[wallet] = "(" + page[-1][0].decode()
                else:
                    del next_ids[wallet]
                for entry_id, fields in page:
                    with suppress(ValueError):
                        entries.append(_Entry(entry_id, wallet, _decode_entry(entry_id, fields)))
            if entries:
                # The archive orders records with equal times by their arrival. In Postgres, two processes
                # that add the same records in different orders would wait for each other (a deadlock).
                entries.sort(key=lambda entry: (_number(entry.entry_id), entry.record.task_id))
                try:
                    await self._archive.add([entry.record for entry in entries])
                except PomeloError:
                    self._on_failure()
                    raise
                await self._delete(entries)
        return failed

    async def _read(self, limit: int, failed: list[PomeloError], start: tuple[Wallet, str]) -> list[Any]:
        """Up to `limit` entries of a wallet, from an id on; none after an error, which `failed` gets."""
        wallet, first_id = start
        page: list[Any] = []
        try:
            page = await self._connection.send("XRANGE", names(wallet).usage, first_id, "+", "COUNT", limit)
        except PomeloError as error:  # of this wallet, or of its server in a cluster
            failed.append(error)
            if isinstance(error, RefusedError):
                self._connection.unexpected.log(f"Usage entries of {member(wallet)} can't be read", error)
        return page

    async def _delete(self, entries: list[_Entry]) -> None:
        ids: dict[Wallet, list[bytes]] = {}
        for entry in entries:
            ids.setdefault(entry.wallet, []).append(entry.entry_id)
        await for_each(ids, lambda w: self._connection.send("XDEL", names(w).usage, *ids[w]))

    async def _wallets_of(self, query: UsageQuery) -> list[Wallet]:
        if query.account is not None:
            return [Wallet(query.account, live) for live in (False, True) if query.live in (None, live)]
        return [w for w in await self._wallet_index.with_data("usage") if query.live in (None, w.live)]

    async def _drain_periodically(self) -> None:
        """Drains the records of this process, and from time to time those of all processes."""
        drains, self._drains = self._drains, self._drains + 1
        wallets, self._expected = self._expected, set()
        try:
            await self.drain(wallets)
        except RefusedError:
            pass  # a wallet can't be read, which stops no other; the move of all records tries it again
        except BaseException:
            self._expected |= wallets
            raise
        interval = _FULL_DRAIN * self._connection.timing.drain
        try:
            # The first time in any case: the process whose turn it was may have died, and left records.
            is_due = await self._wallet_index.take_turn("records", interval) or not drains
        except RefusedError:  # the server may be out of memory, which the move frees
            is_due = drains % _FULL_DRAIN == 0
        if is_due:
            await self.drain(await self._wallet_index.with_data("usage"))


def _state_keys(wallet: Wallet) -> list[str]:
    return [key(wallet, table) for table in ("wallet", "holds", "grants")]


def _number(entry_id: bytes) -> tuple[int, int]:
    """Orders the entries of all streams by their time."""
    time, _, sequence = entry_id.partition(b"-")
    return int(time), int(sequence)


def _decode_entry(entry_id: bytes, fields: dict[bytes, Any]) -> UsageRecord:
    """The record of an entry of a stream.

    Raises:
        ValueError: the entry is damaged. It stays in the stream.
    """
    try:
        record = replace(
            records.decode_record(fields[b"record"]),
            cost=int(fields[b"cost"]),
            uncollected=int(fields[b"uncollected"]),
        )
        recovered = fields.get(b"recovered")
        if recovered is not None:
            record = replace(record, source=RECOVERED, complete=False, at=float(recovered))
    except (KeyError, TypeError, ValueError) as error:
        log.error("The usage entry %s can't be read: %s", entry_id.decode(), type(error).__name__)
        raise ValueError("not a usage record") from error
    return record
