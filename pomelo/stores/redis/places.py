"""Which wallets there are, and what all of them hold."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple, TypeVar

from pomelo.stores.ledger import Wallet
from pomelo.stores.redis.link import Link
from pomelo.stores.redis.names import WALLETS, member, names, wallet_of

_AT_ONCE = 32

T = TypeVar("T")


class Held(NamedTuple):
    """A hold, as far as its owner and its Idempotency-Key go. `key` has '=' before it, or is empty."""

    wallet: Wallet
    task_id: str
    owner: str
    key: str


class Places:
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

    async def all(self) -> list[Wallet]:
        """Every wallet, by account and mode."""
        found = await self._link.send("SMEMBERS", WALLETS)
        return sorted((wallet_of(text) for text in found), key=lambda w: (w.account, w.live))

    async def used(self) -> list[Wallet]:
        """Every wallet that ever had a grant or a hold."""
        wallets = await self.all()
        there = await each(wallets, lambda w: self._link.send("EXISTS", names(w).wallet))
        return [wallet for wallet, found in zip(wallets, there, strict=True) if found]

    async def held(self) -> list[Held]:
        """All holds."""
        wallets = await self.all()
        tables = await each(wallets, lambda w: self._link.send("HGETALL", names(w).holds))
        return [
            _hold(wallet, task_id.decode(), text.decode())
            for wallet, table in zip(wallets, tables, strict=True)
            for task_id, text in table.items()
        ]


def _hold(wallet: Wallet, task_id: str, text: str) -> Held:
    owner, *_, length, rest = text.split(" ", 8)
    # The length is of bytes, as Lua counts.
    key = rest.encode()[int(length) :].decode()
    return Held(wallet, task_id, owner, key)


async def each(of: Iterable[Wallet], do: Callable[[Wallet], Awaitable[T]]) -> list[T]:
    """What `do` gives for each wallet, some at once."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(wallet: Wallet) -> T:
        async with gate:
            return await do(wallet)

    return list(await asyncio.gather(*[one(wallet) for wallet in of]))
