"""The accounts role."""

from __future__ import annotations

from pydantic_core import from_json, to_json

from pomelo.errors import invalid
from pomelo.ids import new_id
from pomelo.stores.accounts import (
    PAGE,
    AccountRecord,
    AccountSummary,
    Balance,
    Grant,
    UnknownAccountError,
    Wallet,
)
from pomelo.stores.redis.connection import (
    REPORT_TIMEOUT,
    Connection,
    one_deadline,
    scan_hash,
    translated_errors,
)
from pomelo.stores.redis.key_names import ACCOUNT_ORDER, ACCOUNTS, GRANTED, PLANS, key, member, names
from pomelo.stores.redis.scripts import ADD_ACCOUNT, BALANCES, GRANT, SET_PLAN
from pomelo.stores.redis.wallet_index import WalletIndex


class Accounts:
    """Implements AccountStore."""

    def __init__(self, connection: Connection, wallet_index: WalletIndex) -> None:
        self._connection = connection
        self._wallet_index = wallet_index

    @translated_errors
    async def add_account(self, name: str, plan: str, at: float) -> bool:
        added = await self._connection.run(
            ADD_ACCOUNT, [ACCOUNTS, PLANS, ACCOUNT_ORDER], [name, plan, f"{at!r} {new_id('')}"]
        )
        return bool(added)

    @one_deadline
    async def get_account(self, name: str) -> AccountRecord | None:
        created = await self._connection.send("HGET", ACCOUNTS, name)
        if created is None:
            return None
        plan = await self._connection.send("HGET", PLANS, name)
        return AccountRecord(*_decode(name.encode(), plan, created))

    @translated_errors
    async def list_accounts(self, *, limit: int = PAGE, after: str = "") -> list[AccountSummary]:
        if not after:
            await self._complete_account_order()
        start = f"({after}" if after else "-"
        found = await self._connection.send("ZRANGEBYLEX", ACCOUNT_ORDER, start, "+", "LIMIT", 0, limit)
        if not found:
            return []
        with self._connection.one_deadline(REPORT_TIMEOUT):
            created = await self._connection.send("HMGET", ACCOUNTS, *found)
            plans = await self._connection.send("HMGET", PLANS, *found)
        wallets = [Wallet(name.decode(), live) for name in found for live in (True, False)]
        balances = [
            Balance(*map(int, amounts[n : n + 3]))
            for _, amounts in await self._wallet_index.run(BALANCES, wallets, lambda w: [key(w, "wallet")])
            for n in range(0, len(amounts), 3)
        ]
        rows = zip(found, plans, created, balances[::2], balances[1::2], strict=True)
        return [AccountSummary(*_decode(name, plan, at), live, test) for name, plan, at, live, test in rows]

    async def _complete_account_order(self) -> None:
        """Adds the accounts that an earlier Pomelo, without ACCOUNT_ORDER, has stored."""
        known = await self._connection.send("ZCARD", ACCOUNT_ORDER)
        if known >= await self._connection.send("HLEN", ACCOUNTS):
            return
        async for page in scan_hash(self._connection, ACCOUNTS):
            with self._connection.one_deadline(REPORT_TIMEOUT):
                await self._connection.send(
                    "ZADD", ACCOUNT_ORDER, *[part for name in page for part in (0, name)]
                )

    @translated_errors
    async def set_plan(self, name: str, plan: str) -> bool:
        return bool(await self._connection.run(SET_PLAN, [ACCOUNTS, PLANS], [name, plan]))

    @one_deadline
    async def grant(self, grant: Grant) -> Balance:
        wallet = grant.wallet
        if not await self._connection.send("HEXISTS", ACCOUNTS, wallet.account):
            raise UnknownAccountError(wallet.account)
        # An id belongs to one wallet for good. A call that stopped after this step can be repeated.
        await self._connection.send("HSETNX", GRANTED, grant.grant_id, member(wallet))
        if (await self._connection.send("HGET", GRANTED, grant.grant_id)).decode() != member(wallet):
            return await self.balance(wallet)
        await self._wallet_index.add(wallet)
        keys = names(wallet)
        text = to_json({"amount": grant.amount, "at": grant.at, "note": grant.note})
        reply = await self._connection.run(
            GRANT, [keys.wallet, keys.holds, keys.grants], [grant.grant_id, grant.amount, text]
        )
        if reply[0] == b"full":
            raise invalid("credits", "few enough to keep the sum of all grants below 9,007,199,254")
        return Balance(*reply[1:])

    @translated_errors
    async def get_grant(self, wallet: Wallet, grant_id: str) -> Grant | None:
        text = await self._connection.send("HGET", names(wallet).grants, grant_id)
        return None if text is None else _decode_grant(wallet, grant_id, text)[1]

    @translated_errors
    async def list_grants(self, wallet: Wallet) -> list[Grant]:
        found = []
        for grant_id, text in (await self._connection.send("HGETALL", names(wallet).grants)).items():
            position, grant = _decode_grant(wallet, grant_id.decode(), text)
            found.append((grant.at, position, grant))
        return [grant for *_, grant in sorted(found, key=lambda each: each[:2])]

    @translated_errors
    async def balance(self, wallet: Wallet) -> Balance:
        found = await self._connection.send("HMGET", names(wallet).wallet, "granted", "spent", "held")
        return Balance(*[int(value or 0) for value in found])


def _decode_grant(wallet: Wallet, grant_id: str, text: bytes) -> tuple[int, Grant]:
    """A grant, preceded by the number of the wallet's earlier grants."""
    position, _, values = text.partition(b" ")
    return int(position), Grant(grant_id=grant_id, wallet=wallet, **from_json(values))


def _decode(name: bytes, plan: bytes, created: bytes) -> tuple[str, str, float]:
    # The time is followed by the id of the call.
    return name.decode(), plan.decode(), float(created.split()[0])
