"""The statements of the accounts role."""

from __future__ import annotations

import sqlite3

from pomelo.stores.accounts import AccountRecord, AccountSummary, Balance, Grant, UnknownAccountError, Wallet


def add_account(connection: sqlite3.Connection, account: AccountRecord) -> bool:
    added = connection.execute(
        "INSERT INTO accounts (name, plan, created) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (account.name, account.plan, account.created),
    )
    return added.rowcount == 1


def get_account(connection: sqlite3.Connection, name: str) -> AccountRecord | None:
    row = connection.execute("SELECT name, plan, created FROM accounts WHERE name = ?", (name,)).fetchone()
    return None if row is None else AccountRecord(*row)


_LIST = """
    SELECT a.name, a.plan, a.created, coalesce(l.granted, 0), coalesce(l.spent, 0), coalesce(l.held, 0),
        coalesce(t.granted, 0), coalesce(t.spent, 0), coalesce(t.held, 0)
    FROM accounts AS a
    LEFT JOIN wallets AS l ON l.account = a.name AND l.live = 1
    LEFT JOIN wallets AS t ON t.account = a.name AND t.live = 0
    WHERE a.name > ? ORDER BY a.name LIMIT ?
"""


def list_accounts(connection: sqlite3.Connection, limit: int, after: str) -> list[AccountSummary]:
    rows = connection.execute(_LIST, (after, limit)).fetchall()
    return [
        AccountSummary(name, plan, created, live=Balance(*amounts[:3]), test=Balance(*amounts[3:]))
        for name, plan, created, *amounts in rows
    ]


def set_plan(connection: sqlite3.Connection, name: str, plan: str) -> bool:
    return connection.execute("UPDATE accounts SET plan = ? WHERE name = ?", (plan, name)).rowcount == 1


def add_grant(connection: sqlite3.Connection, grant: Grant) -> Balance:
    wallet = grant.wallet
    if get_account(connection, wallet.account) is None:
        raise UnknownAccountError(wallet.account)
    known = connection.execute("SELECT 1 FROM grants WHERE grant_id = ?", (grant.grant_id,)).fetchone()
    if known is None:
        connection.execute(
            "INSERT INTO wallets (account, live, granted) VALUES (?, ?, ?)"
            " ON CONFLICT (account, live) DO UPDATE SET granted = granted + excluded.granted",
            (wallet.account, wallet.live, grant.amount),
        )
        connection.execute(
            "INSERT INTO grants (grant_id, account, live, amount, at, note) VALUES (?, ?, ?, ?, ?, ?)",
            (grant.grant_id, wallet.account, wallet.live, grant.amount, grant.at, grant.note),
        )
    return balance(connection, wallet)


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
        "SELECT granted, spent, held FROM wallets WHERE account = ? AND live = ?",
        (wallet.account, wallet.live),
    ).fetchone()
    return Balance() if row is None else Balance(*row)
