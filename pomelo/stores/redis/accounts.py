"""The role of accounts and grants."""

from pydantic_core import from_json, to_json

from pomelo.errors import invalid
from pomelo.ids import new_id
from pomelo.stores.base import UnknownAccountError
from pomelo.stores.ledger import AccountRecord, Balance, Grant, Wallet
from pomelo.stores.redis.link import Link, contained, one_call
from pomelo.stores.redis.names import ACCOUNTS, GRANTED, PLANS, member, names
from pomelo.stores.redis.places import Places
from pomelo.stores.redis.scripts import ADD_ACCOUNT, GRANT, SET_PLAN


class Accounts:
    """See AccountStore."""

    def __init__(self, link: Link, places: Places) -> None:
        self._link = link
        self._places = places

    @contained
    async def add_account(self, name: str, plan: str, at: float) -> bool:
        """See AccountStore."""
        made = await self._link.run(ADD_ACCOUNT, [ACCOUNTS, PLANS], [name, plan, f"{at!r} {new_id('')}"])
        return bool(made)

    @one_call
    async def get_account(self, name: str) -> AccountRecord | None:
        """See AccountStore."""
        created = await self._link.send("HGET", ACCOUNTS, name)
        if created is None:
            return None
        return _account(name, await self._link.send("HGET", PLANS, name), created)

    @one_call
    async def list_accounts(self) -> list[AccountRecord]:
        """See AccountStore."""
        created = await self._link.send("HGETALL", ACCOUNTS)
        plans = await self._link.send("HGETALL", PLANS)
        return [_account(name.decode(), plans[name], created[name]) for name in sorted(created)]

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
    async def list_grants(self, wallet: Wallet) -> list[Grant]:
        """See AccountStore."""
        found = []
        for grant_id, text in (await self._link.send("HGETALL", names(wallet).grants)).items():
            place, _, values = text.partition(b" ")
            given = Grant(grant_id=grant_id.decode(), wallet=wallet, **from_json(values))
            found.append((given.at, int(place), given))
        return [given for *_, given in sorted(found, key=lambda each: each[:2])]

    @contained
    async def balance(self, wallet: Wallet) -> Balance:
        """See AccountStore."""
        found = await self._link.send("HMGET", names(wallet).wallet, "granted", "spent", "held")
        return Balance(*[int(value or 0) for value in found])


def _account(name: str, plan: bytes, created: bytes) -> AccountRecord:
    # Behind the time is who made it.
    return AccountRecord(name, plan.decode(), float(created.split()[0]))
