"""The statements of the accounts role."""

from __future__ import annotations

import sqlite3

from pomelo.stores.accounts import AccountRecord, AccountSummary, Balance, Grant, UnknownAccountError, Wallet
from pomelo.stores.acts import Act
from pomelo.stores.sqlite.acts import add_act

# The column `granted` includes the credit limit.
_AMOUNTS = "granted - credit_limit, spent, held, credit_limit"


def add_account(
    connection: sqlite3.Connection, name: str, plan: str, at: float, act: Act | None = None
) -> bool:
    added = connection.execute(
        "INSERT INTO accounts (name, plan, created) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (name, plan, at),
    )
    if added.rowcount == 1:
        add_act(connection, act)
    return added.rowcount == 1


def get_account(connection: sqlite3.Connection, name: str) -> AccountRecord | None:
    row = connection.execute(
        "SELECT name, plan, created, disabled FROM accounts WHERE name = ?", (name,)
    ).fetchone()
    return None if row is None else AccountRecord(*row)


_LIST = """
    SELECT a.name, a.plan, a.created, a.disabled,
        coalesce(l.granted - l.credit_limit, 0), coalesce(l.spent, 0), coalesce(l.held, 0),
        coalesce(l.credit_limit, 0),
        coalesce(t.granted - t.credit_limit, 0), coalesce(t.spent, 0), coalesce(t.held, 0),
        coalesce(t.credit_limit, 0)
    FROM accounts AS a
    LEFT JOIN wallets AS l ON l.account = a.name AND l.live = 1
    LEFT JOIN wallets AS t ON t.account = a.name AND t.live = 0
    WHERE a.name > ? ORDER BY a.name LIMIT ?
"""


def list_accounts(connection: sqlite3.Connection, limit: int, after: str) -> list[AccountSummary]:
    rows = connection.execute(_LIST, (after, limit)).fetchall()
    return [
        AccountSummary(name, plan, created, disabled, Balance(*amounts[:4]), Balance(*amounts[4:]))
        for name, plan, created, disabled, *amounts in rows
    ]


def set_plan(connection: sqlite3.Connection, name: str, plan: str, act: Act | None = None) -> bool:
    account = get_account(connection, name)
    if account is None:
        return False
    if account.plan != plan:
        connection.execute("UPDATE accounts SET plan = ? WHERE name = ?", (plan, name))
        add_act(connection, act, old=account.plan)
    return True


def set_disabled(
    connection: sqlite3.Connection, name: str, disabled: float | None, act: Act | None = None
) -> bool:
    account = get_account(connection, name)
    if account is None:
        return False
    if (account.disabled is None) != (disabled is None):
        connection.execute("UPDATE accounts SET disabled = ? WHERE name = ?", (disabled, name))
        add_act(connection, act)
    return True


def add_grant(connection: sqlite3.Connection, covered: bool, grant: Grant, act: Act | None) -> Balance | None:
    """Gives credits or takes them back, once per grant_id. `covered` is whether as much is available. None:
    it is not, and nothing was changed."""
    wallet = grant.wallet
    _check_account(connection, wallet)
    known = connection.execute("SELECT 1 FROM grants WHERE grant_id = ?", (grant.grant_id,)).fetchone()
    if known is None:
        if not covered:
            return None
        _add_wallet(connection, wallet)
        connection.execute(
            "UPDATE wallets SET granted = granted + ? WHERE account = ? AND live = ?",
            (grant.amount, wallet.account, wallet.live),
        )
        connection.execute(
            "INSERT INTO grants (grant_id, account, live, amount, at, note) VALUES (?, ?, ?, ?, ?, ?)",
            (grant.grant_id, wallet.account, wallet.live, grant.amount, grant.at, grant.note),
        )
        granted = balance(connection, wallet).granted
        add_act(connection, act, old=str(granted - grant.amount), new=str(granted))
    return balance(connection, wallet)


def set_credit_limit(
    connection: sqlite3.Connection, covered: bool, wallet: Wallet, credit_limit: int, act: Act | None
) -> Balance | None:
    """Changes a credit limit. `covered` is whether as much is available as it is reduced by. None: it is not,
    and nothing was changed."""
    _check_account(connection, wallet)
    old = balance(connection, wallet).credit_limit
    if old != credit_limit:
        if not covered:
            return None
        _add_wallet(connection, wallet)
        connection.execute(
            "UPDATE wallets SET granted = granted - credit_limit + ?1, credit_limit = ?1"
            " WHERE account = ?2 AND live = ?3",
            (credit_limit, wallet.account, wallet.live),
        )
        add_act(connection, act, old=str(old))
    return balance(connection, wallet)


def _add_wallet(connection: sqlite3.Connection, wallet: Wallet) -> None:
    connection.execute(
        "INSERT INTO wallets (account, live) VALUES (?, ?) ON CONFLICT DO NOTHING",
        (wallet.account, wallet.live),
    )


def _check_account(connection: sqlite3.Connection, wallet: Wallet) -> None:
    if get_account(connection, wallet.account) is None:
        raise UnknownAccountError(wallet.account)


def get_grant(connection: sqlite3.Connection, wallet: Wallet, grant_id: str) -> Grant | None:
    row = connection.execute(
        "SELECT amount, at, note FROM grants WHERE grant_id = ? AND account = ? AND live = ?",
        (grant_id, wallet.account, wallet.live),
    ).fetchone()
    return None if row is None else Grant(grant_id, wallet, *row)


def list_grants(connection: sqlite3.Connection, wallet: Wallet) -> list[Grant]:
    rows = connection.execute(
        "SELECT grant_id, amount, at, note FROM grants WHERE account = ? AND live = ? ORDER BY at, rowid",
        (wallet.account, wallet.live),
    )
    return [Grant(grant_id, wallet, amount, at, note) for grant_id, amount, at, note in rows]


def balance(connection: sqlite3.Connection, wallet: Wallet) -> Balance:
    row = connection.execute(
        f"SELECT {_AMOUNTS} FROM wallets WHERE account = ? AND live = ?",  # noqa: S608
        (wallet.account, wallet.live),
    ).fetchone()
    return Balance() if row is None else Balance(*row)
