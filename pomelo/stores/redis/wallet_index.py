"""Which wallets there are, and what all of them hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from pomelo.stores import records
from pomelo.stores.ledger import PAGE, UsageRecord, Wallet
from pomelo.stores.redis.connection import PATIENCE, Link, RefusedError
from pomelo.stores.redis.key_names import WALLETS, key, member, names, wallet_of
from pomelo.stores.redis.scripts import FILLED, Script

_AT_ONCE = 32
_TOGETHER = 100
"""Wallets per call of a script, where all are on one server. A call takes about a millisecond."""

S = TypeVar("S")
T = TypeVar("T")


class Held(NamedTuple):
    """The fields of a hold that are used here. `key` is its Idempotency-Key after '=', or empty."""

    wallet: Wallet
    task_id: str
    owner: str
    amount: int
    key: str


class WalletIndex:
    """See the module."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._known: set[Wallet] = set()

    async def note(self, wallet: Wallet) -> None:
        """Notes a wallet, before anything is put there. Asks the server once for each."""
        if wallet not in self._known:
            await self._link.send("SADD", WALLETS, member(wallet))
            self._known.add(wallet)

    async def note_again(self) -> None:
        """Notes all wallets of this process again: a server that failed over may have lost some."""
        if self._known:
            await self._link.send("SADD", WALLETS, *[member(wallet) for wallet in self._known])

    async def pages(self) -> AsyncIterator[list[Wallet]]:
        """Yields all wallets that exist during the whole scan, in any order. One may come twice."""
        cursor = 0
        while True:
            with self._link.one_call(PATIENCE if cursor else 0.0):
                cursor, found = await self._link.send("SSCAN", WALLETS, cursor, "COUNT", PAGE)
            if found:
                yield [wallet_of(text) for text in found]
            if not cursor:
                return

    async def having(self, table: str) -> list[Wallet]:
        """The wallets whose table is not empty. `table`: `holds`, `drafts` or `usage`."""
        having: dict[Wallet, None] = {}
        async for wallets in self.pages():
            for some, filled in await self.ask(FILLED, wallets, lambda w: [key(w, table)], table):
                having |= dict.fromkeys(some[number - 1] for number in filled)
        return sorted(having, key=lambda w: (w.account, w.live))

    async def ask(
        self,
        script: Script,
        wallets: Sequence[Wallet],
        keys: Callable[[Wallet], Sequence[str]],
        *args: str,
    ) -> list[tuple[Sequence[Wallet], Any]]:
        """Runs a script on wallets, as many per call as possible. Returns the wallets and the
        answer of each call, in order. `keys` returns the keys of one wallet that the script
        takes."""
        size = 1 if self._link.cluster else _TOGETHER
        parts = [wallets[start : start + size] for start in range(0, len(wallets), size)]
        with self._link.one_call(PATIENCE):
            answers = await each(
                parts,
                lambda part: self._link.run(script, [key for wallet in part for key in keys(wallet)], args),
            )
        return list(zip(parts, answers, strict=True))

    async def held(self) -> list[Held]:
        """All holds."""
        return [one for found in await each(await self.having("holds"), self._holds) for one in found]

    async def hold(self, wallet: Wallet, task_id: str) -> Held | None:
        """A task's hold."""
        text = await self._link.send("HGET", names(wallet).holds, task_id)
        return None if text is None else _hold(wallet, task_id, text.decode())

    async def running(self, wallets: Iterable[Wallet]) -> list[tuple[Held, UsageRecord]]:
        """The holds of these wallets, with their tasks' records so far."""

        async def of_wallet(wallet: Wallet) -> list[tuple[Held, UsageRecord]]:
            holds = await self._holds(wallet)
            if not holds:
                return []
            ids = [hold.task_id for hold in holds]
            drafts = await self._link.send("HMGET", names(wallet).drafts, *ids)
            return [
                (hold, records.decode_record(draft))
                for hold, draft in zip(holds, drafts, strict=True)
                if draft is not None  # It has ended meanwhile.
            ]

        return [one for found in await each(wallets, of_wallet) for one in found]

    async def _holds(self, wallet: Wallet) -> list[Held]:
        """The holds of a wallet. An unreadable one is logged: others must still be ended."""
        found = []
        try:
            for task_id, text in (await self._link.send("HGETALL", names(wallet).holds)).items():
                try:
                    found.append(_hold(wallet, task_id.decode(), text.decode()))
                except ValueError as error:
                    self._link.unexpected.log(f"A hold of {member(wallet)} can't be read", error)
        except RefusedError as error:
            self._link.unexpected.log(f"The holds of {member(wallet)} can't be read", error)
        return found


def _hold(wallet: Wallet, task_id: str, text: str) -> Held:
    """Parses a hold that wallet.lua wrote.

    Raises:
        ValueError: wallet.lua did not write this text.
    """
    owner, _, amount, *_, length, rest = text.split(" ", 8)
    # The length is of bytes, as Lua counts.
    key = rest.encode()[int(length) :].decode()
    return Held(wallet, task_id, owner, int(amount), key)


async def each(of: Iterable[S], do: Callable[[S], Awaitable[T]]) -> list[T]:
    """The result of `do` for each item, in order; at most _AT_ONCE of them run concurrently."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(part: S) -> T:
        async with gate:
            return await do(part)

    return list(await asyncio.gather(*[one(part) for part in of]))
