"""The statements of the ledger role. Each function is part of a transaction of the writer thread.

A wallet's row has the sum of its reservations and all its counts, so that reserving reads one row however
many tasks run. The table of reservations is named `holds`, that of Idempotency-Keys `repeats`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pydantic_core import from_json, to_json

from pomelo.stores import records
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import (
    DEFAULT_SHARES,
    REPLAY_SECONDS,
    Count,
    Counter,
    IdempotencyKey,
    LimitStatus,
    LostReservationError,
    OpenReservation,
    Refused,
    ReplayedAnswer,
    Reserved,
    ReserveRequest,
    Settled,
    Settlement,
)
from pomelo.stores.sqlite.usage import find_record, insert_record
from pomelo.stores.usage import RECOVERED, UsageRecord

_STATE = """
    SELECT w.granted, w.spent, w.held, w.counters, h.amount, h.counted, h.repeat_key{}
    FROM (SELECT ?1 AS account, ?2 AS live, ?3 AS task_id) AS q
    LEFT JOIN wallets AS w ON w.account = q.account AND w.live = q.live
    LEFT JOIN holds AS h ON h.task_id = q.task_id AND h.account = q.account AND h.live = q.live
"""
_STATE_OF_RUNNING_TASK = _STATE.format("")
_STATE_OF_NEW_TASK = _STATE.format(", EXISTS (SELECT 1 FROM usage AS u WHERE u.task_id = q.task_id)")


_UNUSED = (0, None, None)
"""The count, and the start and end of the window, of a counter that is not in use."""


class _Reservation(NamedTuple):
    amount: int
    counted: dict[str, tuple[int, float | None]]
    """What it counted, by the names of the counters: the amount, and the start of the window or None."""
    idempotency_key: str | None


class _State:
    """A wallet and the reservation of one of its tasks, at one moment.

    `counts` have for each counter with a count or an open window: the count, and the start and end of the
    window, or None without one. `ended` (the task has its usage record) is only read with _STATE_OF_NEW_TASK.
    """

    __slots__ = ("counts", "ended", "exists", "granted", "held", "now", "reservation", "spent", "wallet")

    def __init__(
        self,
        connection: sqlite3.Connection,
        now: float,
        wallet: Wallet,
        task_id: str = "",
        sql: str = _STATE_OF_RUNNING_TASK,
    ) -> None:
        row = connection.execute(sql, (wallet.account, wallet.live, task_id)).fetchone()
        self.wallet, self.now = wallet, now
        self.exists = row[0] is not None
        self.granted: int = row[0] or 0
        self.spent: int = row[1] or 0
        self.held: int = row[2] or 0
        self.counts: dict[str, list[Any]] = {}
        if self.exists:
            # A start in the future is no open window: the clock may have been set back while no process ran.
            self.counts = {
                name: count
                for name, count in from_json(row[3]).items()
                if count[1] is None or count[1] <= now < count[2]
            }
        self.reservation = None if row[4] is None else _Reservation(row[4], from_json(row[5]), row[6])
        self.ended = sql is _STATE_OF_NEW_TASK and bool(row[7])

    @property
    def available(self) -> int:
        return self.granted - self.spent - self.held

    def used(self, name: str) -> int:
        count = self.counts.get(name)
        return 0 if count is None else count[0]

    def limit_status(self, counters: Sequence[Counter]) -> LimitStatus:
        counts = {}
        for counter in counters:
            used, _, end = self.counts.get(counter.name, _UNUSED)
            counts[counter.name] = Count(used, 0.0 if end is None else end - self.now)
        return LimitStatus(self.available, counts)


def limit_status(
    connection: sqlite3.Connection, now: float, wallet: Wallet, counters: Sequence[Counter]
) -> LimitStatus:
    return _State(connection, now, wallet).limit_status(counters)


# --- reserving


def reserve(
    connection: sqlite3.Connection, now: float, request: ReserveRequest
) -> Reserved | Refused | ReplayedAnswer:
    draft, key, counters = request.draft, request.idempotency_key, request.counters
    state = _State(connection, now, draft.wallet, draft.task_id, _STATE_OF_NEW_TASK)
    if state.reservation is not None:
        return Reserved(state.limit_status(counters), state.reservation.amount)
    if key is not None and (answer := _check_idempotency_key(connection, state, key, counters)) is not None:
        return answer
    if state.ended:
        raise LostReservationError(draft.task_id)
    if (refused := _refusal(state, request)) is not None:
        return refused
    amount = min(request.maximum, state.available)
    if request.sufficient:
        share = state.available // _shares(state, request)
        amount = min(amount, max(share, request.sufficient, request.minimum))
    counted = _count(connection, state, counters, amount)
    connection.execute(
        "INSERT INTO holds (task_id, account, live, amount, counted, repeat_key, record)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            draft.task_id,
            draft.account,
            draft.live,
            amount,
            _encode(counted),
            None if key is None else key.key,
            records.encode_record(draft),
        ),
    )
    if key is not None:
        connection.execute(
            "INSERT INTO repeats (account, live, key, fingerprint, task_id) VALUES (?, ?, ?, ?, ?)",
            (draft.account, draft.live, key.key, key.fingerprint, draft.task_id),
        )
    return Reserved(state.limit_status(counters), amount)


def _check_idempotency_key(
    connection: sqlite3.Connection, state: _State, key: IdempotencyKey, counters: Sequence[Counter]
) -> Refused | ReplayedAnswer | None:
    """The answer for a known Idempotency-Key. None: the key is new or has expired."""
    row_key = (state.wallet.account, state.wallet.live, key.key)
    row = connection.execute(
        "SELECT fingerprint, task_id, answer, expires FROM repeats"
        " WHERE account = ? AND live = ? AND key = ?",
        row_key,
    ).fetchone()
    if row is None:
        return None
    fingerprint, task_id, answer, expires = row
    if expires is not None and expires <= state.now:
        connection.execute("DELETE FROM repeats WHERE account = ? AND live = ? AND key = ?", row_key)
        return None
    if fingerprint != key.fingerprint:
        return Refused(state.limit_status(counters), "idempotency_mismatch")
    if expires is None:
        return Refused(state.limit_status(counters), "idempotency_conflict")
    record = find_record(connection, task_id)
    assert record is not None  # written in the same transaction as the answer
    return ReplayedAnswer(state.limit_status(counters), record, answer)


def _refusal(state: _State, request: ReserveRequest) -> Refused | None:
    for name, amount, limit, _ in request.counters:
        if limit is not None and amount and state.used(name) + amount > limit:
            return Refused(state.limit_status(request.counters), "limit_exceeded", name)
    if state.available < request.minimum:
        return Refused(state.limit_status(request.counters), "insufficient_credits")
    return None


def _shares(state: _State, request: ReserveRequest) -> int:
    """The number of tasks that the available credits are for."""
    for counter in request.counters:
        if counter.name == request.shares and counter.limit is not None:
            return max(1, counter.limit - state.used(counter.name))
    return DEFAULT_SHARES


def _count(
    connection: sqlite3.Connection, state: _State, counters: Sequence[Counter], amount: int
) -> dict[str, tuple[int, float | None]]:
    """Counts one more task, in the table and in the state. Returns what its reservation records of that."""
    counted = {}
    for name, taken, _, window in counters:
        count = state.counts.get(name)
        if count is None:
            times = (None, None) if window is None else (state.now, state.now + window)
            count = state.counts[name] = [0, *times]
        count[0] += taken
        counted[name] = (taken, count[1])
    state.held += amount
    values = (state.held, _encode(state.counts), state.wallet.account, state.wallet.live)
    if state.exists:
        connection.execute("UPDATE wallets SET held = ?, counters = ? WHERE account = ? AND live = ?", values)
    else:
        connection.execute("INSERT INTO wallets (held, counters, account, live) VALUES (?, ?, ?, ?)", values)
    return counted


def _encode(counts: Mapping[str, Sequence[Any]]) -> str:
    return to_json(counts).decode()


# --- settling and voiding


def settle(connection: sqlite3.Connection, now: float, settlement: Settlement) -> Settled:
    record, counters = settlement.record, settlement.counters
    state = _State(connection, now, record.wallet, record.task_id)
    reservation = state.reservation
    if reservation is None:
        first = find_record(connection, record.task_id)
        if first is None or first.source == RECOVERED:
            raise LostReservationError(record.task_id)
        return Settled(state.limit_status(counters), first)
    _change_counts(state, reservation, {counter.name: counter.amount for counter in counters})
    record = _charge(connection, state, reservation, record)
    if reservation.idempotency_key is not None:
        _store_answer(connection, state, reservation.idempotency_key, settlement.answer)
    return Settled(state.limit_status(counters), record)


def _charge(
    connection: sqlite3.Connection, state: _State, reservation: _Reservation, record: UsageRecord
) -> UsageRecord:
    """Charges a task, writes its record and releases the reservation. Returns the record as written."""
    charged = min(record.cost, reservation.amount + state.available)
    if charged < record.cost:
        record = replace(record, cost=charged, uncollected=record.cost - charged)
    _release(connection, state, reservation, record.task_id, charged)
    insert_record(connection, record)
    return record


def void(connection: sqlite3.Connection, now: float, wallet: Wallet, task_id: str, refund: bool) -> None:
    state = _State(connection, now, wallet, task_id)
    if state.reservation is not None:
        if refund:
            _change_counts(state, state.reservation, dict.fromkeys(state.reservation.counted, 0))
        _release_unpaid(connection, state, state.reservation, task_id)


def _change_counts(state: _State, reservation: _Reservation, amounts: Mapping[str, int]) -> None:
    """Counts `amounts`, by counter, in place of what was reserved in windows that are still open."""
    for name, amount in amounts.items():
        reserved, start = reservation.counted.get(name, (0, None))
        count = state.counts.get(name)
        if start is not None and count is not None and count[1] == start:
            count[0] += amount - reserved


def _release_unpaid(
    connection: sqlite3.Connection, state: _State, reservation: _Reservation, task_id: str
) -> None:
    """Releases a reservation and its Idempotency-Key without a charge."""
    _release(connection, state, reservation, task_id, 0)
    if reservation.idempotency_key is not None:
        _store_answer(connection, state, reservation.idempotency_key, None)


def _release(
    connection: sqlite3.Connection, state: _State, reservation: _Reservation, task_id: str, charged: int
) -> None:
    state.spent += charged
    state.held -= reservation.amount
    for name, (amount, start) in reservation.counted.items():
        count = state.counts.get(name)
        if start is None and count is not None:
            count[0] -= amount
            if not count[0]:
                del state.counts[name]
    connection.execute(
        "UPDATE wallets SET spent = ?, held = ?, counters = ? WHERE account = ? AND live = ?",
        (state.spent, state.held, _encode(state.counts), state.wallet.account, state.wallet.live),
    )
    connection.execute("DELETE FROM holds WHERE task_id = ?", (task_id,))


def _store_answer(connection: sqlite3.Connection, state: _State, key: str, answer: bytes | None) -> None:
    """Stores the answer under an Idempotency-Key, or frees the key if there is no answer."""
    row_key = (state.wallet.account, state.wallet.live, key)
    if answer is None:
        connection.execute("DELETE FROM repeats WHERE account = ? AND live = ? AND key = ?", row_key)
        return
    connection.execute(
        "UPDATE repeats SET state = 'done', answer = ?, expires = ?"
        " WHERE account = ? AND live = ? AND key = ?",
        (answer, state.now + REPLAY_SECONDS, *row_key),
    )
    # Each new answer deletes a few expired ones: there are never many more than those of one day.
    connection.execute(
        "DELETE FROM repeats WHERE rowid IN (SELECT rowid FROM repeats WHERE expires <= ? LIMIT 4)",
        (state.now,),
    )


# --- progress and recovery


def note(connection: sqlite3.Connection, noted: Sequence[UsageRecord]) -> list[str]:
    lost = []
    for record in noted:
        changed = connection.execute(
            "UPDATE holds SET record = ? WHERE task_id = ? AND account = ? AND live = ?",
            (records.encode_record(record), record.task_id, record.account, record.live),
        )
        if changed.rowcount == 0:
            lost.append(record.task_id)
    return lost


def reservations(connection: sqlite3.Connection) -> list[OpenReservation]:
    """All reservations. Every one is this process's own: no other process uses the file."""
    rows = connection.execute("SELECT record, amount FROM holds ORDER BY task_id")
    return [OpenReservation(records.decode_record(text), amount, own=True) for text, amount in rows]


def recover(connection: sqlite3.Connection, now: float, wallet: Wallet, task_id: str) -> None:
    row = connection.execute(
        "SELECT record FROM holds WHERE task_id = ? AND account = ? AND live = ?",
        (task_id, wallet.account, wallet.live),
    ).fetchone()
    if row is None:
        return
    record = records.decode_record(row[0])
    state = _State(connection, now, wallet, task_id)
    reservation = state.reservation
    assert reservation is not None
    if record.cost == 0:
        _release_unpaid(connection, state, reservation, task_id)
        return
    record = replace(record, uncollected=0, source=RECOVERED, complete=False, at=now)
    _charge(connection, state, reservation, record)
    if reservation.idempotency_key is not None:
        _store_answer(connection, state, reservation.idempotency_key, None)


def recover_all(connection: sqlite3.Connection, now: float) -> int:
    """Recovers the tasks of a process that died. Returns their number.

    Call before the store is used: every reservation is orphaned then.
    """
    connection.execute("DELETE FROM repeats WHERE expires <= ?", (now,))
    orphans = connection.execute("SELECT task_id, account, live FROM holds ORDER BY task_id").fetchall()
    for task_id, account, live in orphans:
        recover(connection, now, Wallet(account, bool(live)), task_id)
    return len(orphans)
