"""The list of all wallets, and what is read from many of them together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic_core import from_json

from pomelo.stores import records
from pomelo.stores.accounts import PAGE, Wallet
from pomelo.stores.redis.connection import REPORT_TIMEOUT, Connection, RefusedError, scan
from pomelo.stores.redis.key_names import WALLETS, key, member, names, search_turn, wallet_of
from pomelo.stores.redis.scripts import NON_EMPTY, Script
from pomelo.stores.usage import UsageRecord

_MAX_CONCURRENT = 32
_WALLETS_PER_CALL = 100
"""Wallets per call of a script, if all are on one server. A call takes about a millisecond."""

S = TypeVar("S")
T = TypeVar("T")


class StoredReservation(NamedTuple):
    """The fields of a stored reservation that are used here. `key` is empty, or '=' and its
    Idempotency-Key."""

    wallet: Wallet
    task_id: str
    worker: str
    amount: int
    key: str


class WalletIndex:
    """The wallets that may have data."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._known: set[Wallet] = set()

    def has(self, wallet: Wallet) -> bool:
        return wallet in self._known

    async def add(self, wallet: Wallet) -> None:
        """Adds a wallet; call it before the wallet gets data. Asks the server only once per wallet."""
        if wallet not in self._known:
            await self._connection.send("SADD", WALLETS, member(wallet))
            self._known.add(wallet)

    async def add_again(self) -> None:
        """Adds all wallets of this process again: a failover may have lost some."""
        known = list(self._known)
        for start in range(0, len(known), PAGE):
            page = [member(wallet) for wallet in known[start : start + PAGE]]
            await self._connection.send("SADD", WALLETS, *page)

    async def pages(self) -> AsyncIterator[list[Wallet]]:
        """Yields all wallets that exist during the whole scan, in any order. One may be yielded twice."""
        async for found in scan(self._connection, "SSCAN", WALLETS):
            yield [wallet_of(text) for text in found]

    async def with_data(self, table: str) -> list[Wallet]:
        """The wallets whose `table` (holds, drafts or usage) is not empty, sorted."""
        found: dict[Wallet, None] = {}
        async for page in self.pages():
            for wallets, positions in await self.run(NON_EMPTY, page, lambda w: [key(w, table)], table):
                found |= dict.fromkeys(wallets[position - 1] for position in positions)
        return sorted(found, key=lambda w: (w.account, w.live))

    async def run(
        self,
        script: Script,
        wallets: Sequence[Wallet],
        keys: Callable[[Wallet], Sequence[str]],
        *args: str,
    ) -> list[tuple[Sequence[Wallet], Any]]:
        """Runs a script for wallets, as many per call as possible. Returns the wallets and the reply of each
        call, in order. `keys` returns the keys of one wallet for the script."""
        size = 1 if self._connection.cluster else _WALLETS_PER_CALL
        parts = [wallets[start : start + size] for start in range(0, len(wallets), size)]
        with self._connection.one_deadline(REPORT_TIMEOUT):
            replies = await for_each(
                parts,
                lambda part: self._connection.run(
                    script, [key for wallet in part for key in keys(wallet)], args
                ),
            )
        return list(zip(parts, replies, strict=True))

    async def take_turn(self, purpose: str, seconds: float) -> bool:
        """Whether this process is to search all wallets for a purpose now. At most one of all processes gets
        True in a period of `seconds`."""
        turn, millis = search_turn(purpose), round(seconds * 1000)
        if await self._connection.send("SET", turn, "", "NX", "PX", millis):
            return True
        if await self._connection.send("PTTL", turn) > millis:  # the server's clock was set back
            await self._connection.send("DEL", turn)
        return False

    async def reservations(self, wallets: Iterable[Wallet] | None = None) -> list[StoredReservation]:
        """The reservations of these wallets, or of all."""
        if wallets is None:
            wallets = await self.with_data("holds")
        pages = await for_each(wallets, self._reservations_of)
        return [reservation for page in pages for reservation in page]

    async def reservation(self, wallet: Wallet, task_id: str) -> StoredReservation | None:
        text = await self._connection.send("HGET", names(wallet).holds, task_id)
        return None if text is None else _parse(wallet, task_id, text.decode())

    async def running(self, wallets: Iterable[Wallet]) -> list[tuple[StoredReservation, UsageRecord]]:
        """The reservations of these wallets, with their tasks' records so far."""

        async def of_wallet(wallet: Wallet) -> list[tuple[StoredReservation, UsageRecord]]:
            reservations = await self._reservations_of(wallet)
            if not reservations:
                return []
            ids = [reservation.task_id for reservation in reservations]
            drafts = await self._connection.send("HMGET", names(wallet).drafts, *ids)
            return [
                (reservation, records.decode_record(draft))
                for reservation, draft in zip(reservations, drafts, strict=True)
                if draft is not None  # the task has ended meanwhile
            ]

        return [each for page in await for_each(wallets, of_wallet) for each in page]

    async def _reservations_of(self, wallet: Wallet) -> list[StoredReservation]:
        """The reservations of a wallet. An unreadable one is logged: the others must still be recovered."""
        found = []
        unexpected = self._connection.unexpected
        try:
            for task_id, text in (await self._connection.send("HGETALL", names(wallet).holds)).items():
                try:
                    found.append(_parse(wallet, task_id.decode(), text.decode()))
                except ValueError as error:
                    unexpected.log(f"A reservation of {member(wallet)} can't be read", error)
        except RefusedError as error:
            unexpected.log(f"The reservations of {member(wallet)} can't be read", error)
        return found


class Role:
    """A part of RedisStore, which sets these."""

    _connection: Connection
    _wallet_index: WalletIndex


def _parse(wallet: Wallet, task_id: str, text: str) -> StoredReservation:
    """Parses a reservation as wallet.lua formats it, or did before there were counters.

    Raises:
        ValueError: the text has another format.
    """
    worker, _, amount, _, rest = text.split(" ", 4)
    if rest.startswith("["):
        key = from_json(rest)[0]
    else:
        *_, length, names = rest.split(" ", 4)
        key = names.encode()[int(length) :].decode()  # the length is in bytes, as Lua counts
    return StoredReservation(wallet, task_id, worker, int(amount), key)


async def for_each(items: Iterable[S], do: Callable[[S], Awaitable[T]]) -> list[T]:
    """The result of `do` for each item, in order. Up to _MAX_CONCURRENT calls run concurrently."""
    slots = asyncio.Semaphore(_MAX_CONCURRENT)

    async def run(item: S) -> T:
        async with slots:
            return await do(item)

    return list(await asyncio.gather(*[run(item) for item in items]))
