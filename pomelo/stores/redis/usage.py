"""The way of usage records out of Redis: from each wallet's stream into the archive, and reading them there.

A record is taken out of its stream after the archive has committed it, and the archive keeps one of each
task: so it is there exactly once, whoever brings it and however often. Reading brings first what is in the
streams.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pomelo.errors import PomeloError
from pomelo.process import periodically
from pomelo.stores import records
from pomelo.stores.archive.sqlite import Archive
from pomelo.stores.ledger import Balance, UsageQuery, UsageRecord, UsageTotal, Wallet, WalletState
from pomelo.stores.redis.connection import Link, contained
from pomelo.stores.redis.key_names import key, names
from pomelo.stores.redis.scripts import HOLDING, STATES
from pomelo.stores.redis.wallet_index import WalletIndex, each
from pomelo.stores.sqlite.ledger import RECOVERED

log = logging.getLogger("pomelo.stores")

_AT_ONCE = 500
_ROUND = 60
"""After so many times of bringing what this process settled, all wallets are looked at."""


class Usage:
    """See UsageStore."""

    def __init__(self, link: Link, places: WalletIndex, archive: Archive) -> None:
        self._link = link
        self._places = places
        self._archive = archive
        self._expected: set[Wallet] = set()
        self._rounds = 0
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begins to bring records to the archive."""
        self._task = asyncio.create_task(
            periodically(
                self._bring,
                self._link.timing.drain,
                "Usage could not be brought to the archive",
                self._link.unexpected,
                immediately=True,
            )
        )

    async def close(self) -> None:
        """Brings what is there, if it can, and ends."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        with suppress(PomeloError), self._link.contained():
            await self.drain(self._expected)

    def expect(self, wallet: Wallet) -> None:
        """Tells that a wallet has a new record."""
        self._expected.add(wallet)

    @contained
    async def list_usage(
        self, query: UsageQuery, *, limit: int, after: str = ""
    ) -> tuple[list[UsageRecord], str]:
        """See UsageStore."""
        # Later pages are older, and were drained to the archive for the first page.
        if not after:
            await self.drain(await self._asked(query))
        return await self._archive.list_usage(query, limit, after)

    @contained
    async def sum_usage(
        self, query: UsageQuery, by: str, *, limit: int | None = None, after: str = ""
    ) -> list[UsageTotal]:
        """See UsageStore."""
        if not after:
            await self.drain(await self._asked(query))
        return await self._archive.sum_usage(query, by, limit=limit, after=after)

    async def get(self, wallet: Wallet, task_id: str) -> UsageRecord | None:
        """A task's record."""
        await self.drain([wallet])
        found = await self._archive.get(task_id)
        return found if found is not None and found.wallet == wallet else None

    @contained
    async def held(self) -> list[UsageRecord]:
        """See UsageStore."""
        wallets = await self._places.having("drafts")
        tables = await each(wallets, lambda w: self._link.send("HVALS", names(w).drafts))
        found = [records.decode_record(text) for table in tables for text in table]
        return sorted(found, key=lambda record: record.task_id)

    @contained
    async def holding(self, wallet: Wallet) -> tuple[int, int]:
        """See UsageStore."""
        of = names(wallet)
        kept, tasks = await self._link.run(HOLDING, [of.wallet, of.holds, of.drafts], [])
        return kept, tasks

    @contained
    async def wallets(self) -> list[Wallet]:
        """See UsageStore."""
        found = {state.wallet async for page in self.wallet_states() for state in page}
        return sorted(found, key=lambda w: (w.account, w.live))

    async def wallet_states(self) -> AsyncIterator[list[WalletState]]:
        """See UsageStore."""
        async for wallets in self._places.pages():
            states = []
            with self._link.contained():
                answers = await self._places.ask(STATES, wallets, _state_keys)
            for some, answer in answers:
                for wallet, start in zip(some, range(0, len(answer), 6), strict=True):
                    there, granted, spent, held, given, holding = answer[start : start + 6]
                    if there:
                        balance = Balance(granted, spent, held)
                        states.append(WalletState(wallet, balance, given, holding))
            yield states

    async def damage(self) -> list[tuple[str, str]]:
        """See UsageStore."""
        return await self._archive.damage()

    async def drain(self, wallets: Iterable[Wallet]) -> None:
        """Brings all that is in the streams of these wallets.

        Raises:
            PomeloError: store_unavailable, of either side.
        """
        left = dict.fromkeys(wallets, "-")
        while left:
            found: list[tuple[tuple[int, int], bytes, Wallet, UsageRecord]] = []
            pages = await each(
                left, lambda w: self._link.send("XRANGE", names(w).usage, left[w], "+", "COUNT", _AT_ONCE)
            )
            for (wallet, _), page in zip(list(left.items()), pages, strict=True):
                if len(page) == _AT_ONCE:
                    left[wallet] = "(" + page[-1][0].decode()
                else:
                    del left[wallet]
                for entry, fields in page:
                    with suppress(ValueError):
                        found.append((_order(entry), entry, wallet, _record(entry, fields)))
            if found:
                # The archive's order among records of one moment is that in which it got them.
                found.sort(key=lambda each: each[0])
                await self._archive.add([each[3] for each in found])
                await self._drop(found)

    async def _drop(self, kept: list[tuple[tuple[int, int], bytes, Wallet, UsageRecord]]) -> None:
        entries: dict[Wallet, list[bytes]] = {}
        for _, entry, wallet, _ in kept:
            entries.setdefault(wallet, []).append(entry)
        await each(entries, lambda w: self._link.send("XDEL", names(w).usage, *entries[w]))

    async def _asked(self, query: UsageQuery) -> list[Wallet]:
        if query.account is not None:
            return [Wallet(query.account, live) for live in (False, True) if query.live in (None, live)]
        return [w for w in await self._places.having("usage") if query.live in (None, w.live)]

    async def _bring(self) -> None:
        """Drains the records of this process, and from time to time those of all processes."""
        rounds, self._rounds = self._rounds, self._rounds + 1
        wallets, self._expected = self._expected, set()
        try:
            await self.drain(wallets if rounds % _ROUND else await self._places.having("usage"))
        except BaseException:
            self._expected |= wallets
            raise


def _state_keys(wallet: Wallet) -> list[str]:
    return [key(wallet, table) for table in ("wallet", "holds", "grants")]


def _order(entry: bytes) -> tuple[int, int]:
    time, _, number = entry.partition(b"-")
    return int(time), int(number)


def _record(entry: bytes, fields: dict[bytes, Any]) -> UsageRecord:
    """The record of a stream's entry.

    Raises:
        ValueError: it is none, and stays where it is.
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
        log.error("The usage entry %s can't be read: %s", entry.decode(), type(error).__name__)
        raise ValueError("no record") from error
    return record
