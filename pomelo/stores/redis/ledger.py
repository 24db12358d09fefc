"""The ledger's role: each method is one script of the wallet."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any

from pomelo.errors import PomeloError
from pomelo.ids import new_id
from pomelo.stores import records
from pomelo.stores.ledger import (
    DEFAULT_SHARES,
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
    UsageRecord,
    Wallet,
)
from pomelo.stores.redis.connection import Link, Part, contained, one_call
from pomelo.stores.redis.key_names import names
from pomelo.stores.redis.ordered_tasks import OrderedTasks
from pomelo.stores.redis.scripts import NOTE, SETTLE, STANDING, TAKE, VOID
from pomelo.stores.redis.usage import Usage
from pomelo.stores.redis.wallet_index import WalletIndex
from pomelo.stores.redis.workers import Worker
from pomelo.stores.sqlite.ledger import RECOVERED

_NOTED_AT_ONCE = 100
_SHUT = 0.2
_LOOKS = 3
_MANY_LOOKS = 30
"""How often a wallet is checked for holds of this process after its last take, while none is found.
The second applies after a take with unknown outcome, which may reach the server late."""


class Ledger:
    """See LedgerStore."""

    def __init__(self, link: Link, owner: Worker, places: WalletIndex, usage: Usage) -> None:
        self._link = link
        self._owner = owner
        self._places = places
        self._usage = usage
        self._running = OrderedTasks(link.timing.limit, link.unexpected)
        self._keys: dict[str, str] = {}
        """The Idempotency-Keys of this process's tasks, as holds have them. A missing one is asked for."""
        self._shut: dict[Wallet, float] = {}
        """Wallets whose last take had an unknown outcome, and until when no other is tried."""
        self._looks: dict[Wallet, int] = {}
        """Wallets that may have holds of this process, and how many checks each has left."""
        self._span = round(link.timing.window * 1e6)
        self._remember = round(link.timing.remember)

    async def finish(self) -> None:
        """Waits for what is under way; what comes later is refused."""
        await self._running.close(self._link.timing.close)

    def reserve(self, take: ReserveRequest) -> Awaitable[Reserved | Refused | ReplayedAnswer]:
        """See LedgerStore."""
        task_id, wallet, call = take.draft.task_id, take.draft.wallet, new_id("")
        self._looks[wallet] = max(_LOOKS, self._looks.get(wallet, 0))
        # Whether it was taken is unknown, and nobody will use it: it must not stay, or come later.
        return self._running.start(
            task_id,
            lambda: self._take(take, call),
            undo=lambda: self._void(wallet, task_id, True, call),
        )

    def settle(self, settlement: Settlement) -> Awaitable[Settled]:
        """See LedgerStore."""
        return self._running.start(settlement.record.task_id, lambda: self._settle(settlement), lasting=True)

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        """See LedgerStore."""
        return self._running.start(task_id, lambda: self._void(wallet, task_id, refund), lasting=True)

    @contained
    async def note(self, noted: Sequence[UsageRecord]) -> list[str]:
        """See LedgerStore."""
        by_wallet: dict[Wallet, list[UsageRecord]] = {}
        for record in noted:
            by_wallet.setdefault(record.wallet, []).append(record)
        gone: set[tuple[Wallet, str]] = set()
        for wallet, its in by_wallet.items():
            of = names(wallet)
            for at in range(0, len(its), _NOTED_AT_ONCE):
                args: list[Part] = []
                for record in its[at : at + _NOTED_AT_ONCE]:
                    args += [record.task_id, record.cost, records.encode_record(record)]
                found = await self._link.run(NOTE, [of.wallet, of.holds, of.drafts], args)
                gone.update((wallet, task_id.decode()) for task_id in found)
        for _, task_id in gone:
            self._keys.pop(task_id, None)
        return [record.task_id for record in noted if (record.wallet, record.task_id) in gone]

    @contained
    async def limit_status(self, wallet: Wallet, model: str = "") -> LimitStatus:
        """See LedgerStore."""
        of = names(wallet)
        return _standing(await self._link.run(STANDING, [of.wallet, of.holds], [model, self._span]))

    @contained
    async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
        """See LedgerStore."""
        looked = dict(self._looks)
        found = await self._places.running(looked if own else await self._places.having("holds"))
        if own:
            found = [(hold, record) for hold, record in found if hold.owner == self._owner.id]
            self._looked_at(looked, {hold.wallet for hold, _ in found})
        reservations = [
            OpenReservation(
                record,
                hold.amount,
                own=hold.owner == self._owner.id and not self._running.works_on(hold.task_id),
            )
            for hold, record in found
        ]
        return sorted((one for one in reservations if one.own or not own), key=lambda one: one.record.task_id)

    def _looked_at(self, looked: dict[Wallet, int], held: set[Wallet]) -> None:
        """Counts a check of the wallets `looked`. Those in `held` have holds of this process."""
        for wallet in looked.keys() - held:
            if self._looks.get(wallet) != looked[wallet]:
                continue  # There was a take with unknown outcome meanwhile.
            self._looks[wallet] -= 1
            if not self._looks[wallet]:
                del self._looks[wallet]

    @one_call
    async def recover(self, wallet: Wallet, task_id: str) -> None:
        """See LedgerStore."""
        await self._owner.recover(wallet, task_id)
        self._keys.pop(task_id, None)
        self._usage.expect(wallet)

    @one_call
    async def _take(self, take: ReserveRequest, call: str) -> Reserved | Refused | ReplayedAnswer:
        draft, repeatable = take.draft, take.idempotency_key
        self._knock(draft.wallet)
        await self._places.note(draft.wallet)
        owner = await self._owner.current()
        of = names(draft.wallet)
        mark = of.mark(draft.task_id)
        key = "" if repeatable is None else "=" + repeatable.key
        try:
            reply = await self._link.run(
                TAKE,
                [of.wallet, of.holds, of.drafts, mark, of.answer(key[1:]) if key else mark],
                [
                    draft.task_id,
                    owner,
                    take.minimum,
                    take.maximum,
                    _limit(take.requests_limit),
                    _limit(take.concurrency_limit),
                    take.tokens,
                    _limit(take.tokens_limit),
                    draft.model,
                    records.encode_record(draft),
                    self._span,
                    key,
                    b"" if repeatable is None else repeatable.fingerprint,
                    call,
                    take.sufficient,
                    DEFAULT_SHARES,
                ],
            )
        except UnknownOutcomeError:
            self._looks[draft.wallet] = _MANY_LOOKS
            self._shut[draft.wallet] = asyncio.get_running_loop().time() + _SHUT
            raise
        self._shut.pop(draft.wallet, None)
        match reply:
            case [b"taken", standing, held]:
                if key:
                    self._keys[draft.task_id] = key
                return Reserved(_standing(standing), held)
            case [b"refused", standing, code]:
                return Refused(_standing(standing), code.decode())
            case [b"repeated", standing, text, cost, uncollected, answer]:
                record = replace(records.decode_record(text), cost=int(cost), uncollected=int(uncollected))
                return ReplayedAnswer(_standing(standing), record, answer)
        raise LostReservationError(draft.task_id)

    def _knock(self, wallet: Wallet) -> None:
        """Lets one take at a time look whether the store does again what it is asked: each that it may have
        done is one to be undone later.

        Raises:
            PomeloError: store_unavailable.
        """
        until = self._shut.get(wallet)
        if until is not None:
            now = asyncio.get_running_loop().time()
            if now < until:
                raise PomeloError("store_unavailable")
            self._shut[wallet] = now + self._link.timing.limit

    @one_call
    async def _settle(self, settlement: Settlement) -> Settled:
        record, answer = settlement.record, settlement.answer
        of = names(record.wallet)
        mark = of.mark(record.task_id)
        text = records.encode_record(record)
        digest = hashlib.blake2b(text, digest_size=8).hexdigest()

        async def run(key: str) -> Any:
            return await self._link.run(
                SETTLE,
                [of.wallet, of.holds, of.drafts, mark, of.usage, of.answer(key[1:]) if key else mark],
                [
                    record.task_id,
                    record.cost,
                    settlement.tokens,
                    record.model,
                    text,
                    digest,
                    "" if answer is None else "1",
                    answer or b"",
                    key,
                    self._span,
                    self._remember,
                    round(self._link.timing.replay),
                ],
            )

        reply = await run(self._keys.get(record.task_id, ""))
        if reply[0] == b"key":
            reply = await run(reply[1].decode())
        self._keys.pop(record.task_id, None)
        self._shut.pop(record.wallet, None)
        self._usage.expect(record.wallet)
        if reply[0] == b"settled" and reply[4].decode() == digest:
            kept = replace(record, cost=int(reply[2]), uncollected=int(reply[3]))
            return Settled(_standing(reply[1]), kept)
        # It ended otherwise, or so long ago that its mark is gone.
        first = await self._usage.get(record.wallet, record.task_id)
        if first is None or first.source == RECOVERED:
            raise LostReservationError(record.task_id)
        return Settled(await self.limit_status(record.wallet, record.model), first)

    @one_call
    async def _void(self, wallet: Wallet, task_id: str, refund: bool, call: str = "") -> None:
        of = names(wallet)
        mark = of.mark(task_id)

        async def run(key: str) -> Any:
            return await self._link.run(
                VOID,
                [of.wallet, of.holds, of.drafts, mark, of.answer(key[1:]) if key else mark],
                [task_id, "1" if refund else "", key, self._span, call, self._remember],
            )

        reply = await run(self._keys.get(task_id, ""))
        if reply[0] == b"key":
            await run(reply[1].decode())
        self._keys.pop(task_id, None)
        self._shut.pop(wallet, None)


def _limit(limit: int | None) -> Part:
    return "" if limit is None else limit


def _standing(reply: Any) -> LimitStatus:
    available, requests, requests_left, slots, tokens, tokens_left = reply
    return LimitStatus(available, requests, requests_left / 1e6, slots, tokens, tokens_left / 1e6)
