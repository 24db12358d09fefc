"""The ledger role: each method runs one script of the wallet."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import count
from secrets import randbits
from typing import Any

from pomelo.errors import PomeloError
from pomelo.stores import records
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import (
    DEFAULT_SHARES,
    Budget,
    BudgetUse,
    Count,
    Counter,
    LimitStatus,
    LostReservationError,
    OpenReservation,
    Refused,
    ReplayedAnswer,
    Reserved,
    ReserveRequest,
    Settled,
    Settlement,
    UnknownOutcomeError,
)
from pomelo.stores.redis.connection import Argument, Attempt, Connection, one_deadline, translated_errors
from pomelo.stores.redis.key_names import budget_start, names
from pomelo.stores.redis.ordered_tasks import Operation, OrderedTasks
from pomelo.stores.redis.scripts import LIMIT_STATUS, NOTE, RESERVE, SETTLE, VOID
from pomelo.stores.redis.usage import Usage
from pomelo.stores.redis.wallet_index import Role, WalletIndex, for_each
from pomelo.stores.redis.workers import Worker
from pomelo.stores.usage import RECOVERED, UsageRecord

_COUNTER_NAME = re.compile(r"(?!(granted|spent|held)(:|\Z))[a-z]+(:|\Z)")
_MAX_NOTED = 100
_BACKOFF = 0.2
_CHECKS = 3
_CHECKS_IF_UNKNOWN = 30
"""How many checks of a wallet for reservations of this process must find none after its last reserve, until
it is checked no more. The second applies after an unknown outcome: that reserve may reach the server late."""


class Ledger(Role):
    """Implements LedgerStore."""

    def __init__(
        self, connection: Connection, worker: Worker, wallet_index: WalletIndex, usage: Usage
    ) -> None:
        self._connection = connection
        self._worker = worker
        self._wallet_index = wallet_index
        self._usage = usage
        self._operations = OrderedTasks(connection.timing.timeout, connection.unexpected)
        self._keys: dict[str, str] = {}
        """The Idempotency-Keys of this process's tasks, as stored reservations have them. The server returns
        a missing one."""
        self._calls = count(randbits(64))
        """Distinguish the reserves of a task, whichever process made them."""
        self._backoff: dict[Wallet, float] = {}
        """Wallets whose last reserve had an unknown outcome, and the time of the next attempt."""
        self._checks: dict[Wallet, int] = {}
        """Wallets that may have reservations of this process, and the number of checks that are left."""
        self._tombstone_ttl = round(connection.timing.tombstone_ttl)
        self._answer_ttl = round(connection.timing.answer_ttl)

    async def finish(self) -> None:
        """Waits for running operations. Later ones fail."""
        await self._operations.close(self._connection.timing.close)

    def reserve(self, request: ReserveRequest) -> Awaitable[Reserved | Refused | ReplayedAnswer]:
        task_id, wallet, call = request.draft.task_id, request.draft.wallet, str(next(self._calls))
        if self._checks.get(wallet, 0) < _CHECKS:
            self._checks[wallet] = _CHECKS
        return self._operations.start(
            task_id,
            Operation(
                partial(self._send_reserve, request, wallet, call),
                partial(self._reserved, request),
                partial(self._reserve, request, call),
            ),
            # After an unknown outcome nobody will use the reservation: it must not stay, or arrive later.
            undo=lambda: self._void(wallet, task_id, True, call),
        )

    def settle(self, settlement: Settlement) -> Awaitable[Settled]:
        return self._operations.start(
            settlement.record.task_id,
            Operation(
                partial(self._send_settle, settlement),
                partial(self._settled, settlement),
                partial(self._settle, settlement),
            ),
            ends_task=True,
        )

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        return self._operations.start(
            task_id,
            Operation(
                partial(self._send_void, wallet, task_id, refund),
                partial(self._voided, wallet, task_id),
                partial(self._void, wallet, task_id, refund, ""),
            ),
            ends_task=True,
            gives_up=True,
        )

    @translated_errors
    async def note(self, noted: Sequence[UsageRecord]) -> list[str]:
        by_wallet: dict[Wallet, list[UsageRecord]] = {}
        for record in noted:
            by_wallet.setdefault(record.wallet, []).append(record)
        lost: set[tuple[Wallet, str]] = set()
        failed: list[PomeloError] = []

        async def note_wallet(wallet: Wallet) -> None:
            keys, of_wallet = names(wallet), by_wallet[wallet]
            try:
                for start in range(0, len(of_wallet), _MAX_NOTED):
                    args: list[Argument] = []
                    for record in of_wallet[start : start + _MAX_NOTED]:
                        args += [record.task_id, record.cost, records.encode_record(record)]
                    found = await self._connection.run(NOTE, [keys.wallet, keys.holds, keys.drafts], args)
                    lost.update((wallet, task_id.decode()) for task_id in found)
            except PomeloError as error:  # of this wallet, or of its server in a cluster
                failed.append(error)

        await for_each(by_wallet, note_wallet)
        for _, task_id in lost:
            self._keys.pop(task_id, None)
        if failed and not lost:  # else the caller gives the others again, and that call fails
            raise failed[0]
        return [record.task_id for record in noted if (record.wallet, record.task_id) in lost]

    @translated_errors
    async def limit_status(self, wallet: Wallet, counters: Sequence[Counter] = ()) -> LimitStatus:
        keys = names(wallet)
        args = _format_counters(counters)
        status = await self._connection.run(LIMIT_STATUS, [keys.wallet, keys.holds], args)
        return _limit_status(status, counters)

    @translated_errors
    async def budget_use(self, wallet: Wallet, budgets: Sequence[Budget]) -> list[BudgetUse]:
        fields = [field for budget in budgets for field in (budget.name, budget_start(budget.name))]
        found = await self._connection.send("HMGET", names(wallet).wallet, *fields) if fields else []
        return [
            BudgetUse(int(used or 0), int(start) / 1e6)
            if start and int(start) >= round(budget.start * 1e6)
            else BudgetUse(0, budget.start)
            for budget, used, start in zip(budgets, found[::2], found[1::2], strict=True)
        ]

    @translated_errors
    async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
        checked = dict(self._checks)
        wallets = checked if own else await self._wallet_index.with_data("holds")
        found = await self._wallet_index.running(wallets)
        if own:
            found = [(stored, record) for stored, record in found if stored.worker == self._worker.id]
            self._count_check(checked, {stored.wallet for stored, _ in found})
        reservations = []
        for stored, record in sorted(found, key=lambda each: each[0].task_id):
            is_own = stored.worker == self._worker.id and not self._operations.is_busy(stored.task_id)
            if is_own or not own:
                reservations.append(OpenReservation(record, stored.amount, is_own))
        return reservations

    def _count_check(self, checked: dict[Wallet, int], with_own: set[Wallet]) -> None:
        """Counts a check of the wallets `checked`; those in `with_own` have reservations of this process."""
        for wallet in checked.keys() - with_own:
            if self._checks.get(wallet) != checked[wallet]:
                continue  # a reserve has reset the count meanwhile
            self._checks[wallet] -= 1
            if not self._checks[wallet]:
                del self._checks[wallet]

    @one_deadline
    async def recover(self, wallet: Wallet, task_id: str) -> None:
        await self._worker.recover(wallet, task_id)
        self._keys.pop(task_id, None)
        self._usage.expect(wallet)

    # --- reserve

    def _send_reserve(self, request: ReserveRequest, wallet: Wallet, call: str) -> Attempt | None:
        if self._backoff and wallet in self._backoff:
            return None
        if not self._wallet_index.has(wallet) or not self._worker.is_live:
            return None
        return self._start_reserve(request, wallet, call)

    def _start_reserve(self, request: ReserveRequest, wallet: Wallet, call: str) -> Attempt:
        draft, idempotency_key, budget = request.draft, request.idempotency_key, request.budget
        key = "" if idempotency_key is None else "=" + idempotency_key.key
        return self._connection.start(
            RESERVE,
            names(wallet).of_task(draft.task_id, key),
            [
                draft.task_id,
                self._worker.id,
                request.minimum,
                request.maximum,
                records.encode_record(draft),
                key,
                b"" if idempotency_key is None else idempotency_key.fingerprint,
                call,
                request.sufficient,
                request.shares,
                DEFAULT_SHARES,
                *(("", 0, 0) if budget is None else (budget.name, budget.limit, round(budget.start * 1e6))),
                *_format_counters(request.counters),
            ],
        )

    def _reserved(self, request: ReserveRequest, reply: Any) -> Reserved | Refused | ReplayedAnswer:
        """The outcome of a reserve by its reply.

        Raises:
            LostReservationError: the task has already ended.
        """
        draft = request.draft
        if self._backoff:
            self._backoff.pop(draft.wallet, None)
        result = reply[0]
        if result == b"ended":
            raise LostReservationError(draft.task_id)
        status = _limit_status(reply[1], request.counters)
        if result == b"reserved":
            if request.idempotency_key is not None:
                self._keys[draft.task_id] = "=" + request.idempotency_key.key
            return Reserved(status, reply[2])
        if result == b"refused":
            return Refused(status, *[text.decode() for text in reply[2:]])
        _, _, text, cost, uncollected, answer = reply
        record = replace(records.decode_record(text), cost=int(cost), uncollected=int(uncollected))
        return ReplayedAnswer(status, record, answer)

    async def _reserve(
        self, request: ReserveRequest, call: str, attempt: Attempt | None = None
    ) -> Reserved | Refused | ReplayedAnswer:
        wallet = request.draft.wallet
        with self._connection.one_deadline(attempt=attempt), self._connection.translated_errors():
            if attempt is None:
                self._check_backoff(wallet)
                await self._wallet_index.add(wallet)
                await self._worker.ensure_live()
                attempt = self._start_reserve(request, wallet, call)
            try:
                reply = await self._connection.finish(attempt)
            except UnknownOutcomeError:
                self._checks[wallet] = _CHECKS_IF_UNKNOWN
                self._backoff[wallet] = asyncio.get_running_loop().time() + _BACKOFF
                raise
            return self._reserved(request, reply)

    def _check_backoff(self, wallet: Wallet) -> None:
        """After an unknown outcome, lets one reserve at a time try whether the server answers again: each one
        with an unknown outcome must be undone later.

        Raises:
            PomeloError: store_unavailable.
        """
        until = self._backoff.get(wallet)
        if until is not None:
            now = asyncio.get_running_loop().time()
            if now < until:
                raise PomeloError("store_unavailable")
            self._backoff[wallet] = now + self._connection.timing.timeout

    # --- settle and void

    def _send_settle(self, settlement: Settlement, key: str | None = None) -> Attempt:
        record, answer = settlement.record, settlement.answer
        keys = names(record.wallet)
        text = records.encode_record(record)
        if key is None:
            key = self._keys.get(record.task_id, "")
        return self._connection.start(
            SETTLE,
            [*keys.of_task(record.task_id, key), keys.usage],
            [
                record.task_id,
                record.cost,
                text,
                hashlib.blake2b(text, digest_size=8).hexdigest(),
                "" if answer is None else "1",
                answer or b"",
                key,
                self._tombstone_ttl,
                self._answer_ttl,
                *_format_counters(settlement.counters),
            ],
        )

    def _settled(self, settlement: Settlement, reply: Any) -> Settled:
        """The outcome of a settlement by its reply, if that says it.

        Raises:
            LookupError: it does not.
        """
        record = settlement.record
        if reply[0] != b"settled":
            raise LookupError(record.task_id)
        wallet = record.wallet
        self._ended(wallet, record.task_id)
        self._usage.expect(wallet)
        _, status, cost, uncollected = reply
        if cost != record.cost or uncollected != record.uncollected:
            record = replace(record, cost=cost, uncollected=uncollected)
        return Settled(_limit_status(status, settlement.counters), record)

    async def _settle(self, settlement: Settlement, attempt: Attempt | None) -> Settled:
        record = settlement.record
        with self._connection.one_deadline(attempt=attempt), self._connection.translated_errors():
            reply = await self._connection.finish(attempt or self._send_settle(settlement))
            if reply[0] == b"key":
                reply = await self._connection.finish(self._send_settle(settlement, reply[1].decode()))
            if reply[0] == b"settled":
                return self._settled(settlement, reply)
            # It has ended otherwise, or so long ago that its tombstone has expired.
            self._ended(record.wallet, record.task_id)
            first = await self._usage.get(record.wallet, record.task_id)
            if first is None or first.source == RECOVERED:
                raise LostReservationError(record.task_id)
            return Settled(await self.limit_status(record.wallet, settlement.counters), first)

    def _send_void(
        self, wallet: Wallet, task_id: str, refund: bool, call: str = "", key: str | None = None
    ) -> Attempt:
        if key is None:
            key = self._keys.get(task_id, "")
        return self._connection.start(
            VOID,
            names(wallet).of_task(task_id, key),
            [task_id, "1" if refund else "", key, call, round(self._connection.timing.void_ttl)],
        )

    def _voided(self, wallet: Wallet, task_id: str, reply: Any) -> None:
        """Notes that a task is void, if the reply says it.

        Raises:
            LookupError: it does not.
        """
        if reply[0] != b"void":
            raise LookupError(task_id)
        self._ended(wallet, task_id)

    async def _void(
        self, wallet: Wallet, task_id: str, refund: bool, call: str, attempt: Attempt | None = None
    ) -> None:
        with self._connection.one_deadline(attempt=attempt), self._connection.translated_errors():
            reply = await self._connection.finish(attempt or self._send_void(wallet, task_id, refund, call))
            if reply[0] == b"key":
                attempt = self._send_void(wallet, task_id, refund, call, reply[1].decode())
                reply = await self._connection.finish(attempt)
            self._ended(wallet, task_id)

    def _ended(self, wallet: Wallet, task_id: str) -> None:
        self._keys.pop(task_id, None)
        self._backoff.pop(wallet, None)


def _format_counters(counters: Sequence[Counter]) -> list[Argument]:
    args: list[Argument] = []
    for name, amount, limit, window in counters:
        args += (
            _checked(name),
            amount,
            "" if limit is None else limit,
            0 if window is None else round(window * 1e6),
        )
    return args


@lru_cache(10_000)
def _checked(name: str) -> str:
    """The name of a counter, which can't be that of another field of the wallet."""
    if not _COUNTER_NAME.match(name):
        raise ValueError(f"not the name of a counter: {name}")
    return name


def _limit_status(reply: Any, counters: Sequence[Counter]) -> LimitStatus:
    available, *counted = reply
    counts = {
        counter.name: Count(used, left / 1e6)
        for counter, used, left in zip(counters, counted[::2], counted[1::2], strict=True)
    }
    return LimitStatus(available, counts)
