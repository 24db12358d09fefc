"""The role of accounts and grants."""

from __future__ import annotations

from pydantic_core import from_json, to_json

from pomelo.errors import invalid
from pomelo.ids import new_id
from pomelo.stores.base import UnknownAccountError
from pomelo.stores.ledger import PAGE, AccountRecord, AccountSummary, Balance, Grant, Wallet
from pomelo.stores.redis.connection import PATIENCE, Link, contained, one_call, scanned
from pomelo.stores.redis.key_names import ACCOUNT_ORDER, ACCOUNTS, GRANTED, PLANS, key, member, names
from pomelo.stores.redis.scripts import ADD_ACCOUNT, BALANCES, GRANT, SET_PLAN
from pomelo.stores.redis.wallet_index import WalletIndex


class Accounts:
    """See AccountStore."""

    def __init__(self, link: Link, places: WalletIndex) -> None:
        self._link = link
        self._places = places

    @contained
    async def add_account(self, name: str, plan: str, at: float) -> bool:
        """See AccountStore."""
        made = await self._link.run(
            ADD_ACCOUNT, [ACCOUNTS, PLANS, ACCOUNT_ORDER], [name, plan, f"{at!r} {new_id('')}"]
        )
        return bool(made)

    @one_call
    async def get_account(self, name: str) -> AccountRecord | None:
        """See AccountStore."""
        created = await self._link.send("HGET", ACCOUNTS, name)
        if created is None:
            return None
        return _account(name, await self._link.send("HGET", PLANS, name), created)

    @contained
    async def list_accounts(self, *, limit: int = PAGE, after: str = "") -> list[AccountSummary]:
        """See AccountStore."""
        if not after:
            await self._complete_account_order()
        start = f"({after}" if after else "-"
        found = await self._link.send("ZRANGEBYLEX", ACCOUNT_ORDER, start, "+", "LIMIT", 0, limit)
        if not found:
            return []
        with self._link.one_call(PATIENCE):
            created = await self._link.send("HMGET", ACCOUNTS, *found)
            plans = await self._link.send("HMGET", PLANS, *found)
        wallets = [Wallet(name.decode(), live) for name in found for live in (True, False)]
        balances = [
            Balance(*map(int, amounts[n : n + 3]))
            for _, amounts in await self._places.ask(BALANCES, wallets, lambda w: [key(w, "wallet")])
            for n in range(0, len(amounts), 3)
        ]
        return [
            _summary(_account(name.decode(), plan, at), live, test)
            for name, plan, at, live, test in zip(
                found, plans, created, balances[::2], balances[1::2], strict=True
            )
        ]

    async def _complete_account_order(self) -> None:
        """Adds the accounts of an earlier Pomelo, which kept no order, to ACCOUNT_ORDER."""
        known = await self._link.send("ZCARD", ACCOUNT_ORDER)
        if known >= await self._link.send("HLEN", ACCOUNTS):
            return
        async for page in scanned(self._link, ACCOUNTS):
            with self._link.one_call(PATIENCE):
                await self._link.send("ZADD", ACCOUNT_ORDER, *[part for name in page for part in (0, name)])

    @contained
    async def set_plan(self, name: str, plan: str) -> bool:
        """See AccountStore."""
        return bool(await self._link.run(SET_PLAN, [ACCOUNTS, PLANS], [name, plan]))

    @one_call
    async def grant(self, grant: Grant) -> Balance:
        """See AccountStore."""
        wallet = grant.wallet
        if not await self._link.send("HEXISTS", ACCOUNTS, wallet.account):
            raise UnknownAccountError(wallet.account)
        # An id is of one wallet for good; whoever stopped after this step can go on.
        await self._link.send("HSETNX", GRANTED, grant.grant_id, member(wallet))
        if (await self._link.send("HGET", GRANTED, grant.grant_id)).decode() != member(wallet):
            return await self.balance(wallet)
        await self._places.note(wallet)
        of = names(wallet)
        text = to_json({"amount": grant.amount, "at": grant.at, "note": grant.note})
        reply = await self._link.run(
            GRANT, [of.wallet, of.holds, of.grants], [grant.grant_id, grant.amount, text]
        )
        if reply[0] == b"full":
            raise invalid("credits", "few enough that all that were given stay below 9,007,199,254")
        return Balance(*reply[1:])

    @contained
    async def get_grant(self, wallet: Wallet, grant_id: str) -> Grant | None:
        """See AccountStore."""
        text = await self._link.send("HGET", names(wallet).grants, grant_id)
        return None if text is None else _grant(wallet, grant_id, text)[1]

    @contained
    async def list_grants(self, wallet: Wallet) -> list[Grant]:
        """See AccountStore."""
        found = []
        for grant_id, text in (await self._link.send("HGETALL", names(wallet).grants)).items():
            place, given = _grant(wallet, grant_id.decode(), text)
            found.append((given.at, place, given))
        return [given for *_, given in sorted(found, key=lambda each: each[:2])]

    @contained
    async def balance(self, wallet: Wallet) -> Balance:
        """See AccountStore."""
        found = await self._link.send("HMGET", names(wallet).wallet, "granted", "spent", "held")
        return Balance(*[int(value or 0) for value in found])


def _grant(wallet: Wallet, grant_id: str, text: bytes) -> tuple[int, Grant]:
    """Parses a stored grant. Also returns the number of grants before it."""
    place, _, values = text.partition(b" ")
    return int(place), Grant(grant_id=grant_id, wallet=wallet, **from_json(values))


def _summary(account: AccountRecord, live: Balance, test: Balance) -> AccountSummary:
    return AccountSummary(account.name, account.plan, account.created, live=live, test=test)


def _account(name: str, plan: bytes, created: bytes) -> AccountRecord:
    # Behind the time is who made it.
    return AccountRecord(name, plan.decode(), float(created.split()[0]))
