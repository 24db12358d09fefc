"""What the ledger reads from the file: wallets, answers, and the noted tasks of a process that has died."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from pydantic_core import from_json, to_json

from pomelo.stores import records
from pomelo.stores.ledger import REPLAY_SECONDS, IdempotencyKey, LimitStatus, Refused, ReplayedAnswer
from pomelo.stores.sqlite.journal import Batch, End, write_certainly
from pomelo.stores.sqlite.usage import find_record
from pomelo.stores.sqlite.wallets import LoadedBudget, LoadedWallet, Reservation, WalletRow
from pomelo.stores.usage import RECOVERED, UsageRecord

_WALLET = """
    SELECT a.name IS NOT NULL, w.account IS NOT NULL, w.granted, w.spent, w.counters, w.credit_limit
    FROM (SELECT ?1 AS account, ?2 AS live) AS q
    LEFT JOIN accounts AS a ON a.name = q.account
    LEFT JOIN wallets AS w ON w.account = q.account AND w.live = q.live
"""

_NOTE = (
    "INSERT INTO holds (task_id, account, live, amount, record, counted) VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (task_id) DO UPDATE SET record = excluded.record"
)

_LAST_DELAY = (
    "SELECT usage.at + ? - repeats.expires FROM repeats JOIN usage USING (task_id)"
    " WHERE repeats.rowid = (SELECT max(rowid) FROM repeats)"
)
_PROLONG = (
    "UPDATE repeats SET expires = usage.at + ?1 FROM usage"
    " WHERE usage.task_id = repeats.task_id AND usage.at + ?1 > repeats.expires AND usage.at <= ?2"
)
_MAX_DELAY = 60.0
"""Seconds by which the clock of a store may be behind that of the machine before answers are prolonged."""


def read_wallet(connection: sqlite3.Connection, account: str, live: bool) -> WalletRow:
    row = connection.execute(_WALLET, (account, live)).fetchone()
    known, stored, granted, spent, counters, credit_limit = row
    if not stored:
        return WalletRow(bool(known), False)
    budgets = connection.execute(
        "SELECT name, start, spent FROM budgets WHERE account = ? AND live = ?", (account, live)
    ).fetchall()
    return WalletRow(True, True, granted, spent, from_json(counters), credit_limit, budgets)


class StoredAnswer(NamedTuple):
    """What is stored under an Idempotency-Key."""

    fingerprint: bytes
    record: UsageRecord
    answer: bytes


def find_answer(
    connection: sqlite3.Connection, wallet: LoadedWallet, key: str, now: float
) -> StoredAnswer | None:
    """The answer under an Idempotency-Key. None: the key is unknown or has expired."""
    row = connection.execute(
        "SELECT fingerprint, task_id, answer FROM repeats"
        " WHERE account = ? AND live = ? AND key = ? AND expires > ?",
        (wallet.account, wallet.live, key, now),
    ).fetchone()
    if row is None:
        return None
    fingerprint, task_id, answer = row
    record = find_record(connection, task_id)
    assert record is not None  # written in the same transaction as the answer
    return StoredAnswer(fingerprint, record, answer)


def replay(
    key: IdempotencyKey, holder: Reservation | None, answer: StoredAnswer | None, status: LimitStatus
) -> Refused | ReplayedAnswer | None:
    """The answer to a known Idempotency-Key. None: it is new."""
    if holder is not None:
        assert holder.key is not None
        same = holder.key.fingerprint == key.fingerprint
        return Refused(status, "idempotency_conflict" if same else "idempotency_mismatch")
    if answer is None:
        return None
    if answer.fingerprint != key.fingerprint:
        return Refused(status, "idempotency_mismatch")
    return ReplayedAnswer(status, answer.record, answer.answer)


def write_notes(connection: sqlite3.Connection, noted: Iterable[tuple[Reservation, UsageRecord]]) -> None:
    """Stores what running tasks have used so far."""
    # One may have ended in an earlier batch than this operation, which was queued before its end.
    rows = [
        (
            task.task_id,
            task.wallet.account,
            task.wallet.live,
            task.amount,
            records.encode_record(record),
            _encode_budget(task),
        )
        for task, record in noted
        if not task.ended
    ]
    connection.executemany(_NOTE, rows)


def _encode_budget(task: Reservation) -> str:
    """The budget of a task, in the form of the column `counted`."""
    if task.budget is None:
        return "{}"
    return to_json({task.budget.name: [task.amount, task.budget.start]}).decode()


def recovered(record: UsageRecord, now: float) -> UsageRecord:
    """The record of a task whose process died, from what was last noted."""
    return replace(record, uncollected=0, source=RECOVERED, complete=False, at=now)


def recover_all(connection: sqlite3.Connection, now: float) -> int:
    """Ends the noted tasks of a process that died: charges what was last noted. Returns their number.

    Call before the store is used, in a transaction: every task in the file is orphaned then.
    """
    write_certainly(connection)  # A file that can't be written is not opened.
    _prolong_answers(connection, now)
    connection.execute("DELETE FROM repeats WHERE expires <= ?", (now,))
    rows = connection.execute(
        "SELECT task_id, account, live, amount, repeat_key, record, counted FROM holds ORDER BY task_id"
    ).fetchall()
    wallets: dict[tuple[str, int], LoadedWallet] = {}
    tasks = []
    for _, account, live, amount, _, record, counted in rows:
        wallet = wallets.get((account, live))
        if wallet is None:
            wallet = wallets[account, live] = LoadedWallet(account, bool(live))
            wallet.load(read_wallet(connection, account, bool(live)), now)
        task = Reservation(wallet, records.decode_record(record), amount)
        tasks.append(task)
        for name, (_, start) in from_json(counted).items():
            if name.startswith("budget:"):  # of others, versions before 7 wrote what was counted
                task.budget = LoadedBudget(name, start)
        wallet.held += amount
        wallet.running += 1
    # Versions before 7 wrote what all tasks hold, and the Idempotency-Keys of running tasks.
    connection.executemany("UPDATE wallets SET held = 0 WHERE account = ? AND live = ?", wallets)
    for task in tasks:
        charged = None
        if task.record.cost and find_record(connection, task.task_id) is None:
            charged = task.charge(recovered(task.record, now))
        Batch([End(task, lambda *_: None, charged)], ()).write_ends(connection)
        task.wallet.spent += 0 if charged is None else charged.cost
        task.release(now)
    connection.executemany(
        "DELETE FROM repeats WHERE account = ? AND live = ? AND key = ? AND state = 'running'",
        [(account, live, key) for _, account, live, _, key, *_ in rows if key is not None],
    )
    connection.execute("DELETE FROM holds")
    return len(rows)


def _prolong_answers(connection: sqlite3.Connection, now: float) -> None:
    """Lets answers expire by the times of their records, if the clock of the process that stored them was
    behind: that of the machine was when the process started, or the machine was suspended."""
    last = connection.execute(_LAST_DELAY, (REPLAY_SECONDS,)).fetchone()
    if last is not None and last[0] is not None and last[0] > _MAX_DELAY:
        connection.execute(_PROLONG, (REPLAY_SECONDS, now))
