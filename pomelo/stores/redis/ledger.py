"""The ledger role: each method runs one script of the wallet."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from pomelo.errors import PomeloError
from pomelo.ids import new_id
from pomelo.stores import records
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import (
    DEFAULT_SHARES,
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
from pomelo.stores.redis.connection import Argument, Connection, one_deadline, translated_errors
from pomelo.stores.redis.key_names import names
from pomelo.stores.redis.ordered_tasks import OrderedTasks
from pomelo.stores.redis.scripts import LIMIT_STATUS, NOTE, RESERVE, SETTLE, VOID
from pomelo.stores.redis.usage import Usage
from pomelo.stores.redis.wallet_index import WalletIndex
from pomelo.stores.redis.workers import Worker
from pomelo.stores.usage import RECOVERED, UsageRecord

_COUNTER_NAME = re.compile(r"(?!(granted|spent|held)(:|\Z))[a-z]+(:|\Z)")
_MAX_NOTED = 100
_BACKOFF = 0.2
_CHECKS = 3
_CHECKS_IF_UNKNOWN = 30
"""How many checks of a wallet for reservations of this process must find none after its last reserve, until
it is checked no more. The second applies after an unknown outcome: that reserve may reach the server late."""


class Ledger:
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
        self._backoff: dict[Wallet, float] = {}
        """Wallets whose last reserve had an unknown outcome, and the time of the next attempt."""
        self._checks: dict[Wallet, int] = {}
        """Wallets that may have reservations of this process, and the number of checks that are left."""
        self._tombstone_ttl = round(connection.timing.tombstone_ttl)

    async def finish(self) -> None:
        """Waits for running operations. Later ones fail."""
        await self._operations.close(self._connection.timing.close)

    def reserve(self, request: ReserveRequest) -> Awaitable[Reserved | Refused | ReplayedAnswer]:
        task_id, wallet, call = request.draft.task_id, request.draft.wallet, new_id("")
        self._checks[wallet] = max(_CHECKS, self._checks.get(wallet, 0))
        # After an unknown outcome nobody will use the reservation: it must not stay, or arrive later.
        return self._operations.start(
            task_id,
            lambda: self._reserve(request, call),
            undo=lambda: self._void(wallet, task_id, True, call),
        )

    def settle(self, settlement: Settlement) -> Awaitable[Settled]:
        return self._operations.start(
            settlement.record.task_id, lambda: self._settle(settlement), ends_task=True
        )

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        return self._operations.start(task_id, lambda: self._void(wallet, task_id, refund), ends_task=True)

    @translated_errors
    async def note(self, noted: Sequence[UsageRecord]) -> list[str]:
        by_wallet: dict[Wallet, list[UsageRecord]] = {}
        for record in noted:
            by_wallet.setdefault(record.wallet, []).append(record)
        lost: set[tuple[Wallet, str]] = set()
        for wallet, of_wallet in by_wallet.items():
            keys = names(wallet)
            for start in range(0, len(of_wallet), _MAX_NOTED):
                args: list[Argument] = []
                for record in of_wallet[start : start + _MAX_NOTED]:
                    args += [record.task_id, record.cost, records.encode_record(record)]
                found = await self._connection.run(NOTE, [keys.wallet, keys.holds, keys.drafts], args)
                lost.update((wallet, task_id.decode()) for task_id in found)
        for _, task_id in lost:
            self._keys.pop(task_id, None)
        return [record.task_id for record in noted if (record.wallet, record.task_id) in lost]

    @translated_errors
    async def limit_status(self, wallet: Wallet, counters: Sequence[Counter] = ()) -> LimitStatus:
        keys = names(wallet)
        args = _format_counters(counters)
        status = await self._connection.run(LIMIT_STATUS, [keys.wallet, keys.holds], args)
        return _limit_status(status, counters)

    @translated_errors
    async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
        checked = dict(self._checks)
        wallets = checked if own else await self._wallet_index.with_data("holds")
        found = await self._wallet_index.running(wallets)
        if own:
            found = [(stored, record) for stored, record in found if stored.worker == self._worker.id]
            self._count_check(checked, {stored.wallet for stored, _ in found})
        reservations = [
            OpenReservation(
                record,
                stored.amount,
                own=stored.worker == self._worker.id and not self._operations.is_busy(stored.task_id),
            )
            for stored, record in found
        ]
        return sorted(
            (each for each in reservations if each.own or not own), key=lambda each: each.record.task_id
        )

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

    @one_deadline
    async def _reserve(self, request: ReserveRequest, call: str) -> Reserved | Refused | ReplayedAnswer:
        draft, idempotency_key = request.draft, request.idempotency_key
        self._check_backoff(draft.wallet)
        await self._wallet_index.add(draft.wallet)
        worker = await self._worker.live_id()
        keys = names(draft.wallet)
        tombstone = keys.tombstone(draft.task_id)
        key = "" if idempotency_key is None else "=" + idempotency_key.key
        try:
            reply = await self._connection.run(
                RESERVE,
                [keys.wallet, keys.holds, keys.drafts, tombstone, keys.answer(key[1:]) if key else tombstone],
                [
                    draft.task_id,
                    worker,
                    request.minimum,
                    request.maximum,
                    records.encode_record(draft),
                    key,
                    b"" if idempotency_key is None else idempotency_key.fingerprint,
                    call,
                    request.sufficient,
                    request.shares,
                    DEFAULT_SHARES,
                    *_format_counters(request.counters),
                ],
            )
        except UnknownOutcomeError:
            self._checks[draft.wallet] = _CHECKS_IF_UNKNOWN
            self._backoff[draft.wallet] = asyncio.get_running_loop().time() + _BACKOFF
            raise
        self._backoff.pop(draft.wallet, None)
        if reply[0] == b"ended":
            raise LostReservationError(draft.task_id)
        status = _limit_status(reply[1], request.counters)
        match reply:
            case [b"reserved", _, amount]:
                if key:
                    self._keys[draft.task_id] = key
                return Reserved(status, amount)
            case [b"refused", _, *reason]:
                return Refused(status, *[text.decode() for text in reason])
        _, _, text, cost, uncollected, answer = reply
        record = replace(records.decode_record(text), cost=int(cost), uncollected=int(uncollected))
        return ReplayedAnswer(status, record, answer)

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

    @one_deadline
    async def _settle(self, settlement: Settlement) -> Settled:
        record, answer = settlement.record, settlement.answer
        keys = names(record.wallet)
        tombstone = keys.tombstone(record.task_id)
        text = records.encode_record(record)
        digest = hashlib.blake2b(text, digest_size=8).hexdigest()

        async def run(key: str) -> Any:
            answer_key = keys.answer(key[1:]) if key else tombstone
            return await self._connection.run(
                SETTLE,
                [keys.wallet, keys.holds, keys.drafts, tombstone, keys.usage, answer_key],
                [
                    record.task_id,
                    record.cost,
                    text,
                    digest,
                    "" if answer is None else "1",
                    answer or b"",
                    key,
                    self._tombstone_ttl,
                    round(self._connection.timing.answer_ttl),
                    *_format_counters(settlement.counters),
                ],
            )

        reply = await run(self._keys.get(record.task_id, ""))
        if reply[0] == b"key":
            reply = await run(reply[1].decode())
        self._keys.pop(record.task_id, None)
        self._backoff.pop(record.wallet, None)
        self._usage.expect(record.wallet)
        if reply[0] == b"settled" and reply[4].decode() == digest:
            record = replace(record, cost=int(reply[2]), uncollected=int(reply[3]))
            return Settled(_limit_status(reply[1], settlement.counters), record)
        # It has ended otherwise, or so long ago that its tombstone has expired.
        first = await self._usage.get(record.wallet, record.task_id)
        if first is None or first.source == RECOVERED:
            raise LostReservationError(record.task_id)
        return Settled(await self.limit_status(record.wallet, settlement.counters), first)

    @one_deadline
    async def _void(self, wallet: Wallet, task_id: str, refund: bool, call: str = "") -> None:
        keys = names(wallet)
        tombstone = keys.tombstone(task_id)

        async def run(key: str) -> Any:
            answer_key = keys.answer(key[1:]) if key else tombstone
            return await self._connection.run(
                VOID,
                [keys.wallet, keys.holds, keys.drafts, tombstone, answer_key],
                [task_id, "1" if refund else "", key, call, self._tombstone_ttl],
            )

        reply = await run(self._keys.get(task_id, ""))
        if reply[0] == b"key":
            await run(reply[1].decode())
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
    counts = {
        counter.name: Count(used, left / 1e6)
        for counter, used, left in zip(counters, reply[1::2], reply[2::2], strict=True)
    }
    return LimitStatus(reply[0], counts)
