"""Which wallets there are, and what all of them hold."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple, TypeVar

from pomelo.stores.ledger import UsageRecord, Wallet
from pomelo.stores.redis.link import Link, RefusedError
from pomelo.stores.redis.names import WALLETS, member, names, wallet_of
from pomelo.stores.sqlite import records

_AT_ONCE = 32

T = TypeVar("T")


class Held(NamedTuple):
    """A hold, as far as it is of interest here. `key` is its Idempotency-Key with '=' before it, or empty."""

    wallet: Wallet
    task_id: str
    owner: str
    amount: int
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
        return [one for found in await each(await self.all(), self._holds) for one in found]

    async def hold(self, wallet: Wallet, task_id: str) -> Held | None:
        """A task's hold."""
        text = await self._link.send("HGET", names(wallet).holds, task_id)
        return None if text is None else _hold(wallet, task_id, text.decode())

    async def running(self, wallets: Iterable[Wallet]) -> list[tuple[Held, UsageRecord]]:
        """The holds of these wallets, and the records so far of their tasks."""

        async def of_wallet(wallet: Wallet) -> list[tuple[Held, UsageRecord]]:
            holds = await self._holds(wallet)
            if not holds:
                return []
            ids = [hold.task_id for hold in holds]
            drafts = await self._link.send("HMGET", names(wallet).drafts, *ids)
            return [
                (hold, records.read(draft))
                for hold, draft in zip(holds, drafts, strict=True)
                if draft is not None  # It has ended meanwhile.
            ]

        return [one for found in await each(wallets, of_wallet) for one in found]

    async def _holds(self, wallet: Wallet) -> list[Held]:
        """The holds of a wallet. What can't be read must not keep others from being ended; it is logged."""
        found = []
        try:
            for task_id, text in (await self._link.send("HGETALL", names(wallet).holds)).items():
                try:
                    found.append(_hold(wallet, task_id.decode(), text.decode()))
                except ValueError as error:
                    self._link.unforeseen.tell(f"A hold of {member(wallet)} can't be read", error)
        except RefusedError as error:
            self._link.unforeseen.tell(f"The holds of {member(wallet)} can't be read", error)
        return found


def _hold(wallet: Wallet, task_id: str, text: str) -> Held:
    """The hold that wallet.lua wrote.

    Raises:
        ValueError: it did not write it.
    """
    owner, _, amount, *_, length, rest = text.split(" ", 8)
    # The length is of bytes, as Lua counts.
    key = rest.encode()[int(length) :].decode()
    return Held(wallet, task_id, owner, int(amount), key)


async def each(of: Iterable[Wallet], do: Callable[[Wallet], Awaitable[T]]) -> list[T]:
    """What `do` gives for each wallet, some at once."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(wallet: Wallet) -> T:
        async with gate:
            return await do(wallet)

    return list(await asyncio.gather(*[one(wallet) for wallet in of]))
