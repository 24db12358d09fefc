"""The ledger role: decides in memory, and has the journal write what must outlive the process.

No other process uses the file, so the wallets in use and all running tasks are in memory. The file has what
is charged, the counts of windows, the answers to Idempotency-Keys, and the tasks whose progress was noted.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from pomelo.errors import PomeloError
from pomelo.runtime.process import fail, resolve
from pomelo.stores.accounts import Balance, Wallet
from pomelo.stores.ledger import (
    Budget,
    BudgetUse,
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
)
from pomelo.stores.sqlite.journal import End, EndedBeforeError
from pomelo.stores.sqlite.stored import StoredAnswer, find_answer, read_wallet, recovered, replay, write_notes
from pomelo.stores.sqlite.usage import find_record, wallet_states
from pomelo.stores.sqlite.wallets import LoadedWallet, Reservation, WalletRow
from pomelo.stores.sqlite.writer import Writer, nothing
from pomelo.stores.usage import RECOVERED, UsageRecord, WalletState

MAX_WALLETS = 10_000
"""Wallets in memory, besides those in use: about a kilobyte each."""

MAX_ENDED = 10_000
"""Ended tasks whose ids are remembered. An older one that was reserved again could not be settled again."""

STATES = 250
"""Wallets in one page of their states, which commits wait for: about a millisecond."""


class Ledger:
    """The running tasks of the process, and their wallets. Use it in the writer's event loop only."""

    def __init__(self, writer: Writer, clock: Callable[[], float]) -> None:
        self._writer = writer
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[str, Reservation] = {}
        """By task id."""
        self._wallets: OrderedDict[tuple[str, bool], LoadedWallet] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()

    # --- reserving

    def reserve(self, request: ReserveRequest) -> Awaitable[Reserved | Refused | ReplayedAnswer]:
        draft = request.draft
        return self.with_wallet(draft.account, draft.live, partial(self._reserve, request))

    def _reserve(
        self,
        request: ReserveRequest,
        wallet: LoadedWallet,
        future: asyncio.Future[Any],
        *,
        last: bool = False,
        answer: StoredAnswer | None = None,
    ) -> None:
        task_id, key, now = request.draft.task_id, request.idempotency_key, self._clock()
        is_new = task_id not in self._tasks
        outcome = self._decide(request, wallet, now, answer, last)
        if outcome is None:
            read = nothing if key is None else partial(find_answer, wallet=wallet, key=key.key, now=now)

            def decide(found: StoredAnswer | None, error: Exception | None) -> None:
                wallet.deciding -= 1
                if error is not None:
                    fail(future, error)
                else:
                    again = partial(self._reserve, request, wallet, future, last=True, answer=found)
                    self._writer.act(again, future)

            wallet.deciding += 1
            self._writer.queue(read, decide, reads=True)
        elif isinstance(outcome, Reserved) and is_new and self._writer.failing:
            # No provider is called for a task that could not be settled: the counts must be written first.
            confirm = partial(self._confirm, self._tasks[task_id], outcome, future)
            self._writer.queue(nothing, confirm, reads=False)
        else:
            resolve(future, outcome)

    def _decide(
        self,
        request: ReserveRequest,
        wallet: LoadedWallet,
        now: float,
        answer: StoredAnswer | None,
        last: bool,
    ) -> Reserved | Refused | ReplayedAnswer | None:
        """Decides a request. None: an end that is being written, or an answer in the file, can change the
        decision. It must be made again after them: `last`, with the `answer`."""
        task_id, key, counters = request.draft.task_id, request.idempotency_key, request.counters
        if (task := self._tasks.get(task_id)) is not None:
            if task.wallet is not wallet:
                raise PomeloError("store_unavailable")
            if task.ending and not last:
                return None
            return Reserved(wallet.limit_status(counters, now), task.amount)
        if key is not None:
            holder = wallet.keys.get(key.key)
            if not last and (holder is None or holder.ending):
                return None
            status = wallet.limit_status(counters, now)
            if (known := replay(key, holder, answer, status)) is not None:
                return known
        if task_id in self._ended:
            raise LostReservationError(task_id)
        reserved = wallet.reserve(request, now)
        if isinstance(reserved, Refused):
            return None if wallet.ending and not last else reserved
        if not wallet.known:
            raise PomeloError("store_unavailable")
        self._tasks[task_id] = reserved
        self._writer.counts_changed(wallet)
        return Reserved(wallet.limit_status(counters, now), reserved.amount)

    def _confirm(
        self,
        task: Reservation,
        reserved: Reserved,
        future: asyncio.Future[Any],
        _: Any,
        error: Exception | None,
    ) -> None:
        """Receives whether the counts of a reservation were written; without that, it is not made."""
        if error is None:
            resolve(future, reserved)
        else:
            self._void(task.task_id, True, task.wallet, self._loop.create_future())
            fail(future, error)

    # --- ending

    def settle(self, settlement: Settlement) -> Awaitable[Settled]:
        record = settlement.record
        return self.with_wallet(record.account, record.live, partial(self._settle, settlement))

    def _settle(self, settlement: Settlement, wallet: LoadedWallet, future: asyncio.Future[Any]) -> None:
        record, counters = settlement.record, settlement.counters

        def settled(record: UsageRecord | None) -> Settled:
            if record is None or record.source == RECOVERED:
                raise LostReservationError(settlement.record.task_id)
            return Settled(wallet.limit_status(counters, self._clock()), record)

        task = self._task(record.task_id, wallet)
        if task is None:
            read = partial(find_record, task_id=record.task_id)
            self._writer.then(lambda first: resolve(future, settled(first)), future, read)
        elif task.ending:
            self._writer.then(lambda _: self._settle(settlement, wallet, future), future)
        else:
            now = self._clock()
            task.recount({counter.name: counter.amount for counter in counters}, now)
            answer = None if task.key is None else settlement.answer
            self._end(task, now, task.charge(record), answer, settled, future)

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        return self.with_wallet(wallet.account, wallet.live, partial(self._void, task_id, refund))

    def _void(self, task_id: str, refund: bool, wallet: LoadedWallet, future: asyncio.Future[Any]) -> None:
        task = self._task(task_id, wallet)
        if task is None:
            resolve(future, None)
        elif task.ending:
            self._writer.then(lambda _: self._void(task_id, refund, wallet, future), future)
        else:
            now = self._clock()
            task.recount(None if refund else {}, now)
            if task.stored:
                self._end(task, now, None, None, nothing, future)
            else:
                self._release(task, now)
                self._writer.counts_changed(wallet)
                resolve(future, None)

    def recover(self, wallet: Wallet, task_id: str) -> Awaitable[None]:
        return self.with_wallet(wallet.account, wallet.live, partial(self._recover, task_id))

    def _recover(self, task_id: str, wallet: LoadedWallet, future: asyncio.Future[Any]) -> None:
        task = self._task(task_id, wallet)
        if task is not None and task.ending:
            self._writer.then(lambda _: self._recover(task_id, wallet, future), future)
        elif task is None or not task.record.cost:
            self._void(task_id, False, wallet, future)
        else:
            now = self._clock()
            self._end(task, now, task.charge(recovered(task.record, now)), None, nothing, future)

    def _end(
        self,
        task: Reservation,
        now: float,
        record: UsageRecord | None,
        answer: bytes | None,
        result: Callable[[UsageRecord | None], Any],
        future: asyncio.Future[Any],
    ) -> None:
        """Writes the end of a task at `now`. `result` maps the record that it has then to what the future
        returns."""
        wallet = task.wallet

        def done(_: Any, error: Exception | None) -> None:
            task.ending = False
            wallet.ending -= 1
            if error is None or isinstance(error, EndedBeforeError):
                stored = record
                if error is not None:
                    # The file has it, memory perhaps not: until the amounts are read again, it counts.
                    stored, wallet.loaded = error.record, False
                if stored is not None:
                    wallet.spent += stored.cost
                    if task.budget is not None:
                        task.budget.spent += stored.cost
                    self._ended[task.task_id] = None
                    if len(self._ended) > MAX_ENDED:
                        self._ended.popitem(last=False)
                self._release(task, self._clock())
                self._writer.act(lambda: resolve(future, result(stored)), future)
            else:
                task.undo()
                task.stored = task.unsure = True
                fail(future, error)

        task.ending = True
        wallet.ending += 1
        self._writer.end(End(task, done, record, answer, now), self._tasks)

    def _release(self, task: Reservation, now: float) -> None:
        task.release(now)
        del self._tasks[task.task_id]

    # --- while tasks run

    async def note(self, records: Sequence[UsageRecord]) -> list[str]:
        noted = tuple(records)

        def found() -> list[Reservation | None]:
            wallets = self._wallets
            return [self._task(each.task_id, wallets.get((each.account, each.live))) for each in noted]

        while any(task.ending for task in found() if task is not None):
            await self._writer.do(nothing, reads=True)
        tasks = found()
        running = [(task, record) for task, record in zip(tasks, noted, strict=True) if task is not None]
        for task, _ in running:
            task.stored = True

        def then(_: None) -> list[str]:
            for task, record in running:
                task.record = record
            return [record.task_id for task, record in zip(tasks, noted, strict=True) if task is None]

        return await self._writer.do_then(partial(write_notes, noted=running), then, reads=not running)

    async def limit_status(self, wallet: Wallet, counters: Sequence[Counter] = ()) -> LimitStatus:
        def read(state: LoadedWallet, future: asyncio.Future[Any]) -> None:
            resolve(future, state.limit_status(counters, self._clock()))

        await asyncio.sleep(0)  # A caller may poll it.
        status: LimitStatus = await self.with_wallet(wallet.account, wallet.live, read)
        return status

    async def budget_use(self, wallet: Wallet, budgets: Sequence[Budget]) -> list[BudgetUse]:
        def read(state: LoadedWallet, future: asyncio.Future[Any]) -> None:
            found = [state.find_budget(budget.name, budget.start) for budget in budgets]
            resolve(future, [BudgetUse(budget.spent + budget.held, budget.start) for budget in found])

        used: list[BudgetUse] = await self.with_wallet(wallet.account, wallet.live, read)
        return used

    # --- what running tasks add to what the file has

    async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
        """All of them, in order of task id. Every one is this process's `own`: no other uses the file."""

        def then(_: None) -> list[OpenReservation]:
            tasks = sorted(self._tasks.items())
            return [OpenReservation(task.record, task.amount, own=True) for _, task in tasks]

        # After what is being written: a task whose record can be read has no reservation.
        return await self._writer.do_then(nothing, then, reads=True)

    async def wallet_states(self, after: Wallet | None) -> list[WalletState]:
        """The states of a page of wallets, in order of account and mode, starting after `after`."""

        def then(page: list[WalletState]) -> list[WalletState]:
            reserved: dict[tuple[str, bool], int] = {}
            for task in self._tasks.values():
                key = task.wallet.account, task.wallet.live
                reserved[key] = reserved.get(key, 0) + task.amount
            return [
                replace(
                    state,
                    balance=self.add_held(state.wallet, state.balance),
                    reservations_sum=reserved.get((state.wallet.account, state.wallet.live), 0),
                )
                for state in page
            ]

        if after is None:
            # A change writes new wallets too, if the disk allows it.
            with suppress(PomeloError):
                await self._writer.do(nothing)
        read = partial(wallet_states, after=after, limit=STATES)
        return await self._writer.do_then(read, then, reads=True)

    def add_held(self, wallet: Wallet, balance: Balance) -> Balance:
        """A balance of the file, with what running tasks have reserved."""
        state = self._wallets.get((wallet.account, wallet.live))
        held = 0 if state is None else state.held
        return replace(balance, held=balance.held + held)

    # --- wallets

    def _task(self, task_id: str, wallet: LoadedWallet | None) -> Reservation | None:
        """The running task of a wallet."""
        task = self._tasks.get(task_id)
        return task if task is not None and task.wallet is wallet else None

    def with_wallet(
        self, account: str, live: bool, act: Callable[[LoadedWallet, asyncio.Future[Any]], None]
    ) -> asyncio.Future[Any]:
        """Calls `act` with the wallet, immediately if it is in memory. `act` resolves the future."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._writer.closed:
            fail(future, PomeloError("store_unavailable"))
            return future
        wallet = self._wallets.get((account, live)) or self._add_wallet(account, live)
        if wallet.loaded and not wallet.waiting:
            self._writer.act(partial(act, wallet, future), future)
            return future
        if not wallet.loaded and not wallet.waiting:
            self._writer.queue(
                partial(read_wallet, account=account, live=live), partial(self._loaded, wallet), reads=True
            )
        wallet.waiting += 1

        def resume(_: Any, error: Exception | None) -> None:
            wallet.waiting -= 1
            if wallet.loaded:
                self._writer.act(partial(act, wallet, future), future)
            else:
                fail(future, error or PomeloError("store_unavailable"))

        self._writer.queue(nothing, resume, reads=True)
        return future

    def _add_wallet(self, account: str, live: bool) -> LoadedWallet:
        for _ in range(8):
            if len(self._wallets) < MAX_WALLETS:
                break
            key, oldest = self._wallets.popitem(last=False)
            if oldest.in_use or not self._writer.is_written(oldest):
                self._wallets[key] = oldest
        wallet = self._wallets[account, live] = LoadedWallet(account, live)
        return wallet

    def _loaded(self, wallet: LoadedWallet, row: WalletRow, error: Exception | None) -> None:
        if error is not None:
            return
        try:
            wallet.load(row, self._clock())
        except Exception as unreadable:
            self._writer.translate(unreadable)  # logs it; whoever waits finds that it is not loaded
            return
        if not wallet.known:  # it may be created
            del self._wallets[wallet.account, wallet.live]
