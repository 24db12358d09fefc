"""The statements of the ledger role. Each function is part of a transaction of the writer thread.

A wallet's row has the sum and number of its reservations, so that reserving reads one row however many tasks
run. The table of reservations is named `holds`, that of Idempotency-Keys `repeats`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from pomelo.stores import records
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import (
    DEFAULT_SHARES,
    REPLAY_SECONDS,
    WINDOW,
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
    SELECT w.granted, w.spent, w.held, w.slots, w.window_start, w.window_requests, t.start, t.tokens,
        h.amount, h.window_start, h.token_start, h.tokens, h.repeat_key{}
    FROM (SELECT ?1 AS account, ?2 AS live, ?3 AS model, ?4 AS task_id) AS q
    LEFT JOIN wallets AS w ON w.account = q.account AND w.live = q.live
    LEFT JOIN token_windows AS t ON t.account = q.account AND t.live = q.live AND t.model = q.model
    LEFT JOIN holds AS h ON h.task_id = q.task_id AND h.account = q.account AND h.live = q.live
"""
_STATE_OF_RUNNING_TASK = _STATE.format("")
_STATE_OF_NEW_TASK = _STATE.format(", EXISTS (SELECT 1 FROM usage AS u WHERE u.task_id = q.task_id)")

_UPSERT_TOKENS = """
    INSERT INTO token_windows (account, live, model, start, tokens) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (account, live, model) DO UPDATE SET start = excluded.start, tokens = excluded.tokens
"""


class _Reservation(NamedTuple):
    amount: int
    window_start: float
    token_start: float | None
    tokens: int
    idempotency_key: str | None


class _State:
    """A wallet, its tokens of one model, and the reservation of one of its tasks, at one moment.

    Without an open window, `start` or `token_start` is None and the count is 0. `ended` (the task has its
    usage record) is only read with _STATE_OF_NEW_TASK.
    """

    __slots__ = (
        "concurrency", "ended", "exists", "granted", "held", "model", "now", "requests", "reservation",
        "spent", "start", "token_start", "tokens", "wallet",
    )  # fmt: skip

    def __init__(
        self,
        connection: sqlite3.Connection,
        now: float,
        wallet: Wallet,
        model: str,
        task_id: str = "",
        sql: str = _STATE_OF_RUNNING_TASK,
    ) -> None:
        row = connection.execute(sql, (wallet.account, wallet.live, model, task_id)).fetchone()
        self.wallet, self.model, self.now = wallet, model, now
        self.exists = row[0] is not None
        self.granted: int = row[0] or 0
        self.spent: int = row[1] or 0
        self.held: int = row[2] or 0
        self.concurrency: int = row[3] or 0
        self.start: float | None = None
        self.requests = 0
        if _is_open(row[4], now):
            self.start, self.requests = row[4], row[5]
        self.token_start: float | None = None
        self.tokens = 0
        if _is_open(row[6], now):
            self.token_start, self.tokens = row[6], row[7]
        self.reservation = None if row[8] is None else _Reservation(*row[8:13])
        self.ended = sql is _STATE_OF_NEW_TASK and bool(row[13])

    @property
    def available(self) -> int:
        return self.granted - self.spent - self.held

    def limit_status(self) -> LimitStatus:
        return LimitStatus(
            self.available,
            self.requests,
            0.0 if self.start is None else self.start + WINDOW - self.now,
            self.concurrency,
            self.tokens,
            0.0 if self.token_start is None else self.token_start + WINDOW - self.now,
        )


def _is_open(start: float | None, now: float) -> bool:
    # A start in the future is no open window: the clock may have been set back while no process ran.
    return start is not None and start <= now < start + WINDOW


def limit_status(connection: sqlite3.Connection, now: float, wallet: Wallet, model: str) -> LimitStatus:
    return _State(connection, now, wallet, model).limit_status()


# --- reserving


def reserve(
    connection: sqlite3.Connection, now: float, request: ReserveRequest
) -> Reserved | Refused | ReplayedAnswer:
    draft, key = request.draft, request.idempotency_key
    state = _State(connection, now, draft.wallet, draft.model, draft.task_id, _STATE_OF_NEW_TASK)
    if state.reservation is not None:
        return Reserved(state.limit_status(), state.reservation.amount)
    if key is not None and (answer := _check_idempotency_key(connection, state, key)) is not None:
        return answer
    if state.ended:
        raise LostReservationError(draft.task_id)
    if code := _refusal_code(state, request):
        return Refused(state.limit_status(), code)
    amount = min(request.maximum, state.available)
    if request.sufficient:
        limit = request.concurrency_limit
        shares = DEFAULT_SHARES if limit is None else limit - state.concurrency
        amount = min(amount, max(state.available // shares, request.sufficient, request.minimum))
    # A task without tokens and token limit is counted in no window, even if one is open.
    counts_tokens = bool(request.tokens) or request.tokens_limit is not None
    _count(connection, state, request.tokens if counts_tokens else None, amount)
    connection.execute(
        "INSERT INTO holds (task_id, account, live, amount, window_start, model, token_start, tokens,"
        " repeat_key, record) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            draft.task_id,
            draft.account,
            draft.live,
            amount,
            state.start,
            draft.model,
            state.token_start if counts_tokens else None,
            request.tokens,
            None if key is None else key.key,
            records.encode_record(draft),
        ),
    )
    if key is not None:
        connection.execute(
            "INSERT INTO repeats (account, live, key, fingerprint, task_id) VALUES (?, ?, ?, ?, ?)",
            (draft.account, draft.live, key.key, key.fingerprint, draft.task_id),
        )
    return Reserved(state.limit_status(), amount)


def _check_idempotency_key(
    connection: sqlite3.Connection, state: _State, key: IdempotencyKey
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
        return Refused(state.limit_status(), "idempotency_mismatch")
    if expires is None:
        return Refused(state.limit_status(), "idempotency_conflict")
    record = find_record(connection, task_id)
    assert record is not None  # written in the same transaction as the answer
    return ReplayedAnswer(state.limit_status(), record, answer)


def _refusal_code(state: _State, request: ReserveRequest) -> str | None:
    if request.requests_limit is not None and state.requests >= request.requests_limit:
        return "rate_limit_exceeded"
    if request.concurrency_limit is not None and state.concurrency >= request.concurrency_limit:
        return "concurrency_limit_exceeded"
    if request.tokens_limit is not None and state.tokens + request.tokens > request.tokens_limit:
        return "token_limit_exceeded"
    if state.available < request.minimum:
        return "insufficient_credits"
    return None


def _count(connection: sqlite3.Connection, state: _State, tokens: int | None, amount: int) -> None:
    """Counts one more task, in the tables and in the state. `tokens` of None are counted in no window."""
    account, live = state.wallet.account, state.wallet.live
    if state.start is None:
        state.start = state.now
    state.requests += 1
    state.concurrency += 1
    state.held += amount
    values = (state.held, state.concurrency, state.start, state.requests, account, live)
    if state.exists:
        connection.execute(
            "UPDATE wallets SET held = ?, slots = ?, window_start = ?, window_requests = ?"
            " WHERE account = ? AND live = ?",
            values,
        )
    else:
        connection.execute(
            "INSERT INTO wallets (held, slots, window_start, window_requests, account, live)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            values,
        )
    if tokens is not None:
        if state.token_start is None:
            state.token_start = state.now
        state.tokens += tokens
        connection.execute(_UPSERT_TOKENS, (account, live, state.model, state.token_start, state.tokens))


# --- settling and voiding


def settle(connection: sqlite3.Connection, now: float, settlement: Settlement) -> Settled:
    record = settlement.record
    state = _State(connection, now, record.wallet, record.model, record.task_id)
    reservation = state.reservation
    if reservation is None:
        first = find_record(connection, record.task_id)
        if first is None or first.source == RECOVERED:
            raise LostReservationError(record.task_id)
        return Settled(state.limit_status(), first)
    _replace_tokens(connection, state, reservation, settlement.tokens)
    record = _charge(connection, state, reservation, record)
    if reservation.idempotency_key is not None:
        _store_answer(connection, state, reservation.idempotency_key, settlement.answer)
    return Settled(state.limit_status(), record)


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
    row = connection.execute("SELECT model FROM holds WHERE task_id = ?", (task_id,)).fetchone()
    if row is None:
        return
    state = _State(connection, now, wallet, row[0], task_id)
    reservation = state.reservation
    if reservation is None:
        return  # the task belongs to another wallet
    requests = state.requests
    if refund:
        _replace_tokens(connection, state, reservation, 0)
        if state.start == reservation.window_start:
            requests -= 1
    _release_unpaid(connection, state, reservation, task_id)
    if requests != state.requests:
        connection.execute(
            "UPDATE wallets SET window_requests = ? WHERE account = ? AND live = ?",
            (requests, wallet.account, wallet.live),
        )


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
    state.concurrency -= 1
    connection.execute(
        "UPDATE wallets SET spent = ?, held = ?, slots = ? WHERE account = ? AND live = ?",
        (state.spent, state.held, state.concurrency, state.wallet.account, state.wallet.live),
    )
    connection.execute("DELETE FROM holds WHERE task_id = ?", (task_id,))


def _replace_tokens(
    connection: sqlite3.Connection, state: _State, reservation: _Reservation, tokens: int
) -> None:
    """Counts `tokens` in place of the reserved ones, if their window is still open."""
    if state.token_start is None or state.token_start != reservation.token_start:
        return
    if tokens == reservation.tokens:
        return
    state.tokens += tokens - reservation.tokens
    connection.execute(
        "UPDATE token_windows SET tokens = ? WHERE account = ? AND live = ? AND model = ?",
        (state.tokens, state.wallet.account, state.wallet.live, state.model),
    )


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
        "SELECT model, record FROM holds WHERE task_id = ? AND account = ? AND live = ?",
        (task_id, wallet.account, wallet.live),
    ).fetchone()
    if row is None:
        return
    model, text = row
    record = records.decode_record(text)
    state = _State(connection, now, wallet, model, task_id)
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
