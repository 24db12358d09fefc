"""The accounts role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json, to_json

from pomelo.errors import invalid
from pomelo.ids import new_id
from pomelo.stores.accounts import (
    PAGE,
    AccountRecord,
    AccountSummary,
    Balance,
    Grant,
    OverdrawnError,
    UnknownAccountError,
    Wallet,
)
from pomelo.stores.acts import Act
from pomelo.stores.redis.acts import act_args
from pomelo.stores.redis.connection import (
    REPORT_TIMEOUT,
    Connection,
    one_deadline,
    scan,
    translated_errors,
)
from pomelo.stores.redis.key_names import (
    ACCOUNT_ACTS,
    ACCOUNT_ORDER,
    ACCOUNTS,
    DISABLED,
    GRANTED,
    PLANS,
    key,
    member,
    names,
)
from pomelo.stores.redis.scripts import (
    ADD_ACCOUNT,
    BALANCES,
    GRANT,
    READ_FIELDS,
    SET_CREDIT_LIMIT,
    SET_DISABLED,
    SET_PLAN,
)
from pomelo.stores.redis.wallet_index import Role


class Accounts(Role):
    """Implements AccountStore."""

    @translated_errors
    async def add_account(self, name: str, plan: str, at: float, act: Act | None = None) -> bool:
        added = await self._connection.run(
            ADD_ACCOUNT,
            [ACCOUNTS, PLANS, ACCOUNT_ORDER, ACCOUNT_ACTS],
            [name, plan, f"{at!r} {new_id('')}", *act_args(act)],
        )
        return bool(added)

    @one_deadline
    async def get_account(self, name: str) -> AccountRecord | None:
        ((created, plan, disabled),) = await self._read_accounts([name])
        return None if created is None else AccountRecord(*_decode(name.encode(), created, plan, disabled))

    async def _read_accounts(self, names: Sequence[str | bytes]) -> list[tuple[Any, Any, Any]]:
        """When each account was created, its plan, and since when it is disabled."""
        found = await self._connection.run(READ_FIELDS, [ACCOUNTS, PLANS, DISABLED], names)
        return list(zip(*found, strict=True))

    @translated_errors
    async def list_accounts(self, *, limit: int = PAGE, after: str = "") -> list[AccountSummary]:
        if not after:
            await self._complete_account_order()
        start = f"({after}" if after else "-"
        found = await self._connection.send("ZRANGEBYLEX", ACCOUNT_ORDER, start, "+", "LIMIT", 0, limit)
        if not found:
            return []
        with self._connection.one_deadline(REPORT_TIMEOUT):
            accounts = await self._read_accounts(found)
        wallets = [Wallet(name.decode(), live) for name in found for live in (True, False)]
        balances = [
            _balance(amounts[n : n + 4])
            for _, amounts in await self._wallet_index.run(BALANCES, wallets, lambda w: [key(w, "wallet")])
            for n in range(0, len(amounts), 4)
        ]
        rows = zip(found, accounts, balances[::2], balances[1::2], strict=True)
        return [AccountSummary(*_decode(name, *account), live, test) for name, account, live, test in rows]

    async def _complete_account_order(self) -> None:
        """Adds the accounts that an earlier Pomelo, without ACCOUNT_ORDER, has stored."""
        known = await self._connection.send("ZCARD", ACCOUNT_ORDER)
        if known >= await self._connection.send("HLEN", ACCOUNTS):
            return
        async for page in scan(self._connection, "HSCAN", ACCOUNTS):
            with self._connection.one_deadline(REPORT_TIMEOUT):
                await self._connection.send(
                    "ZADD", ACCOUNT_ORDER, *[part for name in page for part in (0, name)]
                )

    @translated_errors
    async def set_plan(self, name: str, plan: str, act: Act | None = None) -> bool:
        args = [name, plan, *act_args(act)]
        return bool(await self._connection.run(SET_PLAN, [ACCOUNTS, PLANS, ACCOUNT_ACTS], args))

    @translated_errors
    async def set_disabled(self, name: str, disabled: float | None, act: Act | None = None) -> bool:
        args = [name, "" if disabled is None else repr(disabled), *act_args(act)]
        return bool(await self._connection.run(SET_DISABLED, [ACCOUNTS, DISABLED, ACCOUNT_ACTS], args))

    @one_deadline
    async def grant(self, grant: Grant, act: Act | None = None) -> Balance:
        wallet = grant.wallet
        await check_account(self._connection, wallet.account)
        # An id belongs to one wallet for good. A call that stopped after this step can be repeated.
        await self._connection.send("HSETNX", GRANTED, grant.grant_id, member(wallet))
        owner = await self._connection.send("HGET", GRANTED, grant.grant_id)
        if owner not in (None, member(wallet).encode()):  # None: a concurrent call was refused
            return await self.balance(wallet)
        await self._wallet_index.add(wallet)
        keys = names(wallet)
        text = to_json({"amount": grant.amount, "at": grant.at, "note": grant.note})
        reply = await self._connection.run(
            GRANT,
            [keys.wallet, keys.holds, keys.grants, keys.acts],
            [grant.grant_id, grant.amount, text, *act_args(act)],
        )
        if reply[0] != b"granted":  # the id was not used
            await self._connection.send("HDEL", GRANTED, grant.grant_id)
        # A refused adjustment may have freed the id of a call that is made concurrently.
        may_be_free = owner is None or grant.amount < 0
        if may_be_free and await self._connection.send("HEXISTS", keys.grants, grant.grant_id):
            await self._connection.send("HSETNX", GRANTED, grant.grant_id, member(wallet))
        return _changed_balance(wallet, reply)

    @one_deadline
    async def set_credit_limit(self, wallet: Wallet, credit_limit: int, act: Act | None = None) -> Balance:
        await check_account(self._connection, wallet.account)
        await self._wallet_index.add(wallet)
        keys = names(wallet)
        reply = await self._connection.run(
            SET_CREDIT_LIMIT, [keys.wallet, keys.holds, keys.acts], [credit_limit, *act_args(act)]
        )
        return _changed_balance(wallet, reply)

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
        fields = ("granted", "spent", "held", "credit_limit")
        return _balance(await self._connection.send("HMGET", names(wallet).wallet, *fields))


async def check_account(connection: Connection, name: str) -> None:
    """Checks that an account exists. Accounts are never deleted, so this need not be part of a script.

    Raises:
        UnknownAccountError: it does not exist.
    """
    if not await connection.send("HEXISTS", ACCOUNTS, name):
        raise UnknownAccountError(name)


def _balance(amounts: Sequence[bytes | None]) -> Balance:
    """A balance from the fields of a wallet, whose `granted` includes the credit limit."""
    granted, spent, held, credit_limit = [int(amount or 0) for amount in amounts]
    return Balance(granted - credit_limit, spent, held, credit_limit)


def _changed_balance(wallet: Wallet, reply: list[Any]) -> Balance:
    if reply[0] == b"full":
        raise invalid("credits", "few enough to keep the sum of all grants below 9,007,199,254")
    if reply[0] == b"overdrawn":
        raise OverdrawnError(wallet.account)
    return Balance(*reply[1:])


def _decode_grant(wallet: Wallet, grant_id: str, text: bytes) -> tuple[int, Grant]:
    """A grant, preceded by the number of the wallet's earlier grants."""
    position, _, values = text.partition(b" ")
    return int(position), Grant(grant_id=grant_id, wallet=wallet, **from_json(values))


def _decode(
    name: bytes, created: bytes, plan: bytes, disabled: bytes | None
) -> tuple[str, str, float, float | None]:
    # The time is followed by the id of the call.
    since = None if disabled is None else float(disabled)
    return name.decode(), plan.decode(), float(created.split()[0]), since
