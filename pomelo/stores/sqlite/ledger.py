"""The statements of taking and settling. Each function is part of one transaction of the writer's thread.

A wallet's row counts its holds' amounts and slots along, so that a take reads one row however many tasks run.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from pomelo.stores import records
from pomelo.stores.ledger import (
    DEFAULT_SHARES,
    REPLAY_SECONDS,
    WINDOW,
    LimitStatus,
    LostReservationError,
    OpenReservation,
    Refused,
    ReplayedAnswer,
    Reserved,
    ReserveRequest,
    Settled,
    Settlement,
    UsageRecord,
    Wallet,
)

RECOVERED = "recovered"
"""The source of the records that the store itself made of orphaned holds."""

_STATE = """
    SELECT w.granted, w.spent, w.held, w.slots, w.window_start, w.window_requests, t.start, t.tokens,
        h.amount, h.window_start, h.token_start, h.tokens, h.repeat_key{}
    FROM (SELECT ?1 AS account, ?2 AS live, ?3 AS model, ?4 AS task_id) AS q
    LEFT JOIN wallets AS w ON w.account = q.account AND w.live = q.live
    LEFT JOIN token_windows AS t ON t.account = q.account AND t.live = q.live AND t.model = q.model
    LEFT JOIN holds AS h ON h.task_id = q.task_id AND h.account = q.account AND h.live = q.live
"""


_STATE_OF_HELD = _STATE.format("")
_STATE_OF_NEW = _STATE.format(", EXISTS (SELECT 1 FROM usage AS u WHERE u.task_id = q.task_id)")

_TOKENS = """
    INSERT INTO token_windows (account, live, model, start, tokens) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (account, live, model) DO UPDATE SET start = excluded.start, tokens = excluded.tokens
"""


class _Hold(NamedTuple):
    amount: int
    window_start: float
    token_start: float | None
    tokens: int
    repeat_key: str | None


class _State:
    """A wallet, its tokens of one model, and the hold of one of its tasks, at a moment.

    `start` and `token_start` are None, and the counts 0, where no window is open. `ended` (the task has its
    record) is told of _STATE_OF_NEW alone.
    """

    __slots__ = (
        "concurrency", "ended", "granted", "held", "hold", "known", "model", "now", "requests", "spent",
        "start", "token_start", "tokens", "wallet",
    )  # fmt: skip

    def __init__(
        self,
        connection: sqlite3.Connection,
        now: float,
        wallet: Wallet,
        model: str,
        task_id: str = "",
        sql: str = _STATE_OF_HELD,
    ) -> None:
        row = connection.execute(sql, (wallet.account, wallet.live, model, task_id)).fetchone()
        self.wallet, self.model, self.now = wallet, model, now
        self.known = row[0] is not None
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
        self.hold = None if row[8] is None else _Hold(*row[8:13])
        self.ended = sql is _STATE_OF_NEW and bool(row[13])

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
    # Not before its start either: the clock may have been set back while no process ran.
    return start is not None and start <= now < start + WINDOW


def limit_status(connection: sqlite3.Connection, now: float, wallet: Wallet, model: str) -> LimitStatus:
    """See LedgerStore."""
    return _State(connection, now, wallet, model).limit_status()


# --- taking


def reserve(
    connection: sqlite3.Connection, now: float, asked: ReserveRequest
) -> Reserved | Refused | ReplayedAnswer:
    """See LedgerStore.

    Raises:
        LostHoldError: the task has its record; it ended.
    """
    draft, repeatable = asked.draft, asked.idempotency_key
    state = _State(connection, now, draft.wallet, draft.model, draft.task_id, _STATE_OF_NEW)
    if state.hold is not None:
        return Reserved(state.limit_status(), state.hold.amount)
    if repeatable is not None and (answered := _repeat(connection, state, asked)) is not None:
        return answered
    if state.ended:
        raise LostReservationError(draft.task_id)
    if code := _refusal(state, asked):
        return Refused(state.limit_status(), code)
    held = min(asked.maximum, state.available)
    if asked.sufficient:
        free = (
            DEFAULT_SHARES if asked.concurrency_limit is None else asked.concurrency_limit - state.concurrency
        )
        held = min(held, max(state.available // free, asked.sufficient, asked.minimum))
    # Without tokens and a limit of them it is in no window, though one may be open.
    of_tokens = bool(asked.tokens) or asked.tokens_limit is not None
    _count(connection, state, asked, held, of_tokens)
    connection.execute(
        "INSERT INTO holds (task_id, account, live, amount, window_start, model, token_start, tokens,"
        " repeat_key, record) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            draft.task_id,
            draft.account,
            draft.live,
            held,
            state.start,
            draft.model,
            state.token_start if of_tokens else None,
            asked.tokens,
            None if repeatable is None else repeatable.key,
            records.encode_record(draft),
        ),
    )
    if repeatable is not None:
        connection.execute(
            "INSERT INTO repeats (account, live, key, fingerprint, task_id) VALUES (?, ?, ?, ?, ?)",
            (draft.account, draft.live, repeatable.key, repeatable.fingerprint, draft.task_id),
        )
    return Reserved(state.limit_status(), held)


def _repeat(
    connection: sqlite3.Connection, state: _State, asked: ReserveRequest
) -> Refused | ReplayedAnswer | None:
    """What an Idempotency-Key that is known answers; None: it is new, or as good as new."""
    repeatable = asked.idempotency_key
    assert repeatable is not None
    of_key = (state.wallet.account, state.wallet.live, repeatable.key)
    row = connection.execute(
        "SELECT fingerprint, task_id, answer, expires FROM repeats"
        " WHERE account = ? AND live = ? AND key = ?",
        of_key,
    ).fetchone()
    if row is None:
        return None
    fingerprint, task_id, answer, expires = row
    if expires is not None and expires <= state.now:
        connection.execute("DELETE FROM repeats WHERE account = ? AND live = ? AND key = ?", of_key)
        return None
    if fingerprint != repeatable.fingerprint:
        return Refused(state.limit_status(), "idempotency_mismatch")
    if expires is None:
        return Refused(state.limit_status(), "idempotency_conflict")
    record = records.find_record(connection, task_id)
    assert record is not None  # Kept in the transaction that kept the answer.
    return ReplayedAnswer(state.limit_status(), record, answer)


def _refusal(state: _State, asked: ReserveRequest) -> str | None:
    if asked.requests_limit is not None and state.requests >= asked.requests_limit:
        return "rate_limit_exceeded"
    if asked.concurrency_limit is not None and state.concurrency >= asked.concurrency_limit:
        return "concurrency_limit_exceeded"
    if asked.tokens_limit is not None and state.tokens + asked.tokens > asked.tokens_limit:
        return "token_limit_exceeded"
    if state.available < asked.minimum:
        return "insufficient_credits"
    return None


def _count(
    connection: sqlite3.Connection, state: _State, asked: ReserveRequest, held: int, of_tokens: bool
) -> None:
    """Counts one more task, in the tables and in the state."""
    account, live = state.wallet.account, state.wallet.live
    if state.start is None:
        state.start = state.now
    state.requests += 1
    state.concurrency += 1
    state.held += held
    counted = (state.held, state.concurrency, state.start, state.requests, account, live)
    if state.known:
        connection.execute(
            "UPDATE wallets SET held = ?, slots = ?, window_start = ?, window_requests = ?"
            " WHERE account = ? AND live = ?",
            counted,
        )
    else:
        connection.execute(
            "INSERT INTO wallets (held, slots, window_start, window_requests, account, live)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            counted,
        )
    if of_tokens:
        if state.token_start is None:
            state.token_start = state.now
        state.tokens += asked.tokens
        connection.execute(_TOKENS, (account, live, state.model, state.token_start, state.tokens))


# --- ending


def settle(connection: sqlite3.Connection, now: float, settlement: Settlement) -> Settled:
    """See LedgerStore.

    Raises:
        LostHoldError: the store charged it already.
    """
    record = settlement.record
    state = _State(connection, now, record.wallet, record.model, record.task_id)
    hold = state.hold
    if hold is None:
        first = records.find_record(connection, record.task_id)
        if first is None or first.source == RECOVERED:
            raise LostReservationError(record.task_id)
        return Settled(state.limit_status(), first)
    # What it used counts in place of what it took, if that window is still open.
    _retoken(connection, state, hold, settlement.tokens)
    kept = charge(connection, state, hold, record)
    if hold.repeat_key is not None:
        _answer(connection, state, hold.repeat_key, settlement.answer)
    return Settled(state.limit_status(), kept)


def charge(connection: sqlite3.Connection, state: _State, hold: _Hold, record: UsageRecord) -> UsageRecord:
    """Charges a task that has a hold, keeps its record and frees the hold; the record as it was kept."""
    charged = min(record.cost, hold.amount + state.available)
    if charged < record.cost:
        record = replace(record, cost=charged, uncollected=record.cost - charged)
    _free(connection, state, hold, record.task_id, charged)
    records.insert_record(connection, record)
    return record


def void(connection: sqlite3.Connection, now: float, wallet: Wallet, task_id: str, refund: bool) -> None:
    """See LedgerStore."""
    row = connection.execute("SELECT model FROM holds WHERE task_id = ?", (task_id,)).fetchone()
    if row is None:
        return
    state = _State(connection, now, wallet, row[0], task_id)
    hold = state.hold
    if hold is None:
        return  # It is another wallet's.
    requests = state.requests
    if refund:
        _retoken(connection, state, hold, 0)
        if state.start == hold.window_start:
            requests -= 1
    release(connection, state, hold, task_id)
    if requests != state.requests:
        connection.execute(
            "UPDATE wallets SET window_requests = ? WHERE account = ? AND live = ?",
            (requests, wallet.account, wallet.live),
        )


def release(connection: sqlite3.Connection, state: _State, hold: _Hold, task_id: str) -> None:
    """Frees a hold and its Idempotency-Key; the task costs nothing."""
    _free(connection, state, hold, task_id, 0)
    if hold.repeat_key is not None:
        _answer(connection, state, hold.repeat_key, None)


def _free(connection: sqlite3.Connection, state: _State, hold: _Hold, task_id: str, charged: int) -> None:
    state.spent += charged
    state.held -= hold.amount
    state.concurrency -= 1
    connection.execute(
        "UPDATE wallets SET spent = ?, held = ?, slots = ? WHERE account = ? AND live = ?",
        (state.spent, state.held, state.concurrency, state.wallet.account, state.wallet.live),
    )
    connection.execute("DELETE FROM holds WHERE task_id = ?", (task_id,))


def _retoken(connection: sqlite3.Connection, state: _State, hold: _Hold, tokens: int) -> None:
    """Lets `tokens` count in place of those that the hold took."""
    if state.token_start is None or state.token_start != hold.token_start or tokens == hold.tokens:
        return
    state.tokens += tokens - hold.tokens
    connection.execute(
        "UPDATE token_windows SET tokens = ? WHERE account = ? AND live = ? AND model = ?",
        (state.tokens, state.wallet.account, state.wallet.live, state.model),
    )


def _answer(connection: sqlite3.Connection, state: _State, key: str, answer: bytes | None) -> None:
    """Keeps the answer of an Idempotency-Key, or frees the key."""
    of_key = (state.wallet.account, state.wallet.live, key)
    if answer is None:
        connection.execute("DELETE FROM repeats WHERE account = ? AND live = ? AND key = ?", of_key)
        return
    connection.execute(
        "UPDATE repeats SET state = 'done', answer = ?, expires = ?"
        " WHERE account = ? AND live = ? AND key = ?",
        (answer, state.now + REPLAY_SECONDS, *of_key),
    )
    # Each answer that is kept takes some away that are over: there are never many more than a day's.
    connection.execute(
        "DELETE FROM repeats WHERE rowid IN (SELECT rowid FROM repeats WHERE expires <= ? LIMIT 4)",
        (state.now,),
    )


# --- while tasks run, and after a crash


def note(connection: sqlite3.Connection, noted: Sequence[UsageRecord]) -> list[str]:
    """See LedgerStore."""
    gone = []
    for record in noted:
        changed = connection.execute(
            "UPDATE holds SET record = ? WHERE task_id = ? AND account = ? AND live = ?",
            (records.encode_record(record), record.task_id, record.account, record.live),
        )
        if changed.rowcount == 0:
            gone.append(record.task_id)
    return gone


def reservations(connection: sqlite3.Connection) -> list[OpenReservation]:
    """See LedgerStore. This process took every hold: it alone uses the file."""
    rows = connection.execute("SELECT record, amount FROM holds ORDER BY task_id")
    return [OpenReservation(records.decode_record(text), amount, own=True) for text, amount in rows]


def recover(connection: sqlite3.Connection, now: float, wallet: Wallet, task_id: str) -> None:
    """See LedgerStore."""
    row = connection.execute(
        "SELECT model, record FROM holds WHERE task_id = ? AND account = ? AND live = ?",
        (task_id, wallet.account, wallet.live),
    ).fetchone()
    if row is None:
        return
    model, text = row
    record = records.decode_record(text)
    state = _State(connection, now, wallet, model, task_id)
    assert state.hold is not None
    if record.cost == 0:
        release(connection, state, state.hold, task_id)
        return
    charge(
        connection,
        state,
        state.hold,
        replace(record, uncollected=0, source=RECOVERED, complete=False, at=now),
    )
    if state.hold.repeat_key is not None:
        _answer(connection, state, state.hold.repeat_key, None)


def recover_all(connection: sqlite3.Connection, now: float) -> int:
    """Recovers the tasks of a process that died.

    To be done before the store is used: every hold is an orphan then. Gives how many there were.
    """
    connection.execute("DELETE FROM repeats WHERE expires <= ?", (now,))
    orphans = connection.execute("SELECT task_id, account, live FROM holds ORDER BY task_id").fetchall()
    for task_id, account, live in orphans:
        recover(connection, now, Wallet(account, bool(live)), task_id)
    return len(orphans)
