"""What one transaction writes: the ends of tasks, and the operations that bring their own statements.

Ends are collected in the event loop and written in the writer's thread, the rows of one table by one call.
The table of noted tasks is named `holds`, that of the answers to Idempotency-Keys `repeats`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from pomelo.stores.ledger import REPLAY_SECONDS
from pomelo.stores.sqlite.transaction import Transaction
from pomelo.stores.sqlite.usage import find_record, insert_records
from pomelo.stores.sqlite.wallets import LoadedWallet, Reservation
from pomelo.stores.usage import UsageRecord

_ADD_WALLET = "INSERT INTO wallets (account, live) VALUES (?, ?) ON CONFLICT DO NOTHING"
_WRITE_WALLET = "UPDATE wallets SET spent = spent + ?, counters = ? WHERE account = ? AND live = ?"
_CHARGE_BUDGET = (
    "INSERT INTO budgets (account, live, name, start, spent) VALUES (?, ?, ?, ?, ?)"
    " ON CONFLICT (account, live, name) DO UPDATE SET"
    " spent = iif(start = excluded.start, spent, 0) + excluded.spent, start = excluded.start"
    " WHERE start <= excluded.start"
)
_FORGET = "DELETE FROM holds WHERE task_id = ?"
_ANSWER = (
    "INSERT INTO repeats (account, live, key, fingerprint, state, task_id, answer, expires)"
    " VALUES (?, ?, ?, ?, 'done', ?, ?, ?) ON CONFLICT (account, live, key) DO UPDATE SET"
    " fingerprint = excluded.fingerprint, state = 'done', task_id = excluded.task_id,"
    " answer = excluded.answer, expires = excluded.expires"
)
# Each new answer deletes a few expired ones: there are never many more than those of one day.
_EXPIRE = "DELETE FROM repeats WHERE rowid IN (SELECT rowid FROM repeats WHERE expires <= ? LIMIT ?)"

Done = Callable[[Any, Exception | None], None]
"""Receives in the event loop, after the commit, what an operation returned, or the error that it or the
commit raised. Raises nothing."""


class Operation(NamedTuple):
    """Statements of its own, which see all ends of their batch. `reads`: they change nothing."""

    run: Callable[[sqlite3.Connection], Any]
    done: Done
    reads: bool


class End(NamedTuple):
    """The end of a task at `now`: with its `record`, which is charged, or without a charge. `answer` is
    stored under its Idempotency-Key. EndedBeforeError is the outcome if the task has a record already."""

    task: Reservation
    done: Done
    record: UsageRecord | None = None
    answer: bytes | None = None
    now: float = 0.0


class EndedBeforeError(Exception):
    """A task that is to end has `record` already. Nothing was written."""

    def __init__(self, record: UsageRecord) -> None:
        super().__init__(record.task_id)
        self.record = record


class Batch:
    """What is written in one transaction. `wallets` are those whose counts are written too. `repeated`: it
    is a part of a batch that failed. `certainly`: it fails if nothing can be written, even if it has no more
    than the file has already."""

    def __init__(
        self,
        ends: Sequence[End],
        operations: Sequence[Operation],
        wallets: Iterable[LoadedWallet] = (),
        *,
        repeated: bool = False,
        certainly: bool = False,
    ) -> None:
        self.ends = ends
        self.operations = operations
        self.repeated = repeated
        self._certainly = certainly
        self.wallets = dict.fromkeys(wallets, 0)
        """What each is charged."""
        for end in ends:
            wallet = end.task.wallet
            charged = 0 if end.record is None else end.record.cost
            self.wallets[wallet] = self.wallets.get(wallet, 0) + charged
        # Encoded here, in the event loop, which may change the counts while the thread writes.
        self._rows = [
            (charged, wallet.encode_windows(), wallet.account, wallet.live)
            for wallet, charged in self.wallets.items()
        ]
        self._new = [(wallet.account, wallet.live) for wallet in self.wallets if not wallet.stored]
        self.writes = bool(self.wallets) or not all(operation.reads for operation in operations)

    def commit(self, connection: sqlite3.Connection) -> list[tuple[Any, Exception | None]]:
        """Writes everything, or nothing. Returns the value or the error of each operation.

        Raises:
            EndedBeforeError: one of the tasks that end has a record.
            Exception: raised by an operation or the connection.
        """
        if connection.in_transaction:
            connection.execute("ROLLBACK")  # of an earlier batch that could not be rolled back
        if not self.writes:
            return [_read(connection, operation) for operation in self.operations]
        with Transaction(connection):
            if self._certainly:
                write_certainly(connection)
            self.write_ends(connection)
            outcomes = [
                _read(connection, operation) if operation.reads else (operation.run(connection), None)
                for operation in self.operations
            ]
            # After the operations, because one may have noted the task.
            if stored := [(end.task.task_id,) for end in self.ends if end.task.stored]:
                connection.executemany(_FORGET, stored)
        return outcomes

    def write_ends(self, connection: sqlite3.Connection) -> None:
        """Writes the records, answers and wallets, as a part of a transaction.

        Raises:
            EndedBeforeError: one of the tasks has a record already.
        """
        for end in self.ends:
            if end.task.unsure and (first := find_record(connection, end.task.task_id)) is not None:
                raise EndedBeforeError(first)
        if self._new:
            connection.executemany(_ADD_WALLET, self._new)
        if charged := [end.record for end in self.ends if end.record is not None]:
            _insert(connection, charged)
        if self._rows:
            connection.executemany(_WRITE_WALLET, self._rows)
        if budgets := [_charged_budget(end) for end in self.ends if end.task.budget is not None]:
            connection.executemany(_CHARGE_BUDGET, budgets)
        if answers := [_answer(end) for end in self.ends if end.answer is not None]:
            connection.executemany(_ANSWER, answers)
            connection.execute(_EXPIRE, (self.ends[-1].now, 4 * len(answers)))


def write_certainly(connection: sqlite3.Connection) -> None:
    """Changes the file, so that the commit fails if nothing can be written: SQLite does not write what the
    file has already."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.execute(f"PRAGMA user_version = {(version + 1) % 2**31}")


def _insert(connection: sqlite3.Connection, charged: list[UsageRecord]) -> None:
    try:
        insert_records(connection, charged)
    except sqlite3.IntegrityError as error:
        # Of several it is found by repeating each one separately.
        if len(charged) == 1 and (first := find_record(connection, charged[0].task_id)) is not None:
            raise EndedBeforeError(first) from error
        raise


def _charged_budget(end: End) -> tuple[Any, ...]:
    wallet, budget = end.task.wallet, end.task.budget
    assert budget is not None
    charged = 0 if end.record is None else end.record.cost
    return wallet.account, wallet.live, budget.name, budget.start, charged


def _answer(end: End) -> tuple[Any, ...]:
    task = end.task
    assert task.key is not None
    key, wallet = task.key, task.wallet
    expires = end.now + REPLAY_SECONDS
    return wallet.account, wallet.live, key.key, key.fingerprint, task.task_id, end.answer, expires


def _read(connection: sqlite3.Connection, operation: Operation) -> tuple[Any, Exception | None]:
    """Runs an operation that only reads: its error does not affect others."""
    inside = connection.in_transaction
    try:
        return operation.run(connection), None
    except Exception as error:
        if inside and not connection.in_transaction:
            raise  # SQLite has rolled back everything, for example because the disk fails
        return None, error
