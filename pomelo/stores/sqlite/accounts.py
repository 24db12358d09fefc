"""The statements about accounts and grants."""

import sqlite3

from pomelo.stores.base import UnknownAccountError
from pomelo.stores.ledger import AccountRecord, Balance, Grant, Wallet


def add_account(connection: sqlite3.Connection, account: AccountRecord) -> bool:
    """See AccountStore."""
    added = connection.execute(
        "INSERT INTO accounts (name, plan, created) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (account.name, account.plan, account.created),
    )
    return added.rowcount == 1


def get_account(connection: sqlite3.Connection, name: str) -> AccountRecord | None:
    """See AccountStore."""
    row = connection.execute("SELECT name, plan, created FROM accounts WHERE name = ?", (name,)).fetchone()
    return None if row is None else AccountRecord(*row)


def list_accounts(connection: sqlite3.Connection) -> list[AccountRecord]:
    """See AccountStore."""
    rows = connection.execute("SELECT name, plan, created FROM accounts ORDER BY name")
    return [AccountRecord(*row) for row in rows]


def set_plan(connection: sqlite3.Connection, name: str, plan: str) -> bool:
    """See AccountStore."""
    return connection.execute("UPDATE accounts SET plan = ? WHERE name = ?", (plan, name)).rowcount == 1


def grant(connection: sqlite3.Connection, given: Grant) -> Balance:
    """See AccountStore."""
    wallet = given.wallet
    if get_account(connection, wallet.account) is None:
        raise UnknownAccountError(wallet.account)
    known = connection.execute("SELECT 1 FROM grants WHERE grant_id = ?", (given.grant_id,)).fetchone()
    if known is None:
        connection.execute(
            "INSERT INTO wallets (account, live, granted) VALUES (?, ?, ?)"
            " ON CONFLICT (account, live) DO UPDATE SET granted = granted + excluded.granted",
            (wallet.account, wallet.live, given.amount),
        )
        connection.execute(
            "INSERT INTO grants (grant_id, account, live, amount, at, note) VALUES (?, ?, ?, ?, ?, ?)",
            (given.grant_id, wallet.account, wallet.live, given.amount, given.at, given.note),
        )
    return balance(connection, wallet)


def list_grants(connection: sqlite3.Connection, wallet: Wallet) -> list[Grant]:
    """See AccountStore."""
    rows = connection.execute(
        "SELECT grant_id, amount, at, note FROM grants WHERE account = ? AND live = ? ORDER BY at, rowid",
        (wallet.account, wallet.live),
    )
    return [Grant(grant_id, wallet, amount, at, note) for grant_id, amount, at, note in rows]


def balance(connection: sqlite3.Connection, wallet: Wallet) -> Balance:
    """See AccountStore."""
    row = connection.execute(
        "SELECT granted, spent, held FROM wallets WHERE account = ? AND live = ?",
        (wallet.account, wallet.live),
    ).fetchone()
    return Balance() if row is None else Balance(*row)
