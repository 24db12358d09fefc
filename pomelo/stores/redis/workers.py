"""The processes that may have reservations, and the recovery of the tasks of dead ones.

Every open store is a worker that sends heartbeats: a count in Redis increases. Each worker watches the counts
of the others by its own monotonic clock, and marks a worker dead whose count has not changed for
`dead_after`. No two clocks are compared, so a clock that is changed ends nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

from pomelo.errors import PomeloError
from pomelo.ids import new_id
from pomelo.runtime.process import periodically, stop
from pomelo.stores.accounts import Wallet
from pomelo.stores.fleet import MAX_CLOCK_DIFFERENCE, Process
from pomelo.stores.redis.connection import Connection, RefusedError
from pomelo.stores.redis.key_names import PROCESSES, WORKERS, member, names
from pomelo.stores.redis.scripts import CLOCK, HEARTBEAT, MARK_DEAD, RECOVER
from pomelo.stores.redis.wallet_index import StoredReservation, WalletIndex

log = logging.getLogger("pomelo.stores")

_MAX_SILENCE = 0.6
"""The part of `dead_after` that a worker may be without a heartbeat and still make reservations."""

_BATCH = 64
"""Tasks that are recovered concurrently."""

_FULL_CHECK = 10
"""Every so many rounds of watching, one process searches all reservations for unknown workers."""


class Worker:
    """This process among all workers; one per open store."""

    def __init__(
        self, connection: Connection, wallet_index: WalletIndex, monotonic: Callable[[], float]
    ) -> None:
        self._connection = connection
        self._wallet_index = wallet_index
        self._timing = connection.timing
        self._monotonic = monotonic
        self.id = new_id("own_")
        """Identifies this worker's reservations. It is replaced after this process was marked dead."""
        self._process: Process | None = None
        """What the other processes see of this one."""
        self._clock_is_wrong = False
        self._rounds = 0
        self._last_heartbeat = 0.0
        self._has_sent = False
        """Whether a heartbeat with this id was sent."""
        self._failing = False
        """Whether the last heartbeat failed."""
        self._counts: dict[str, tuple[bytes, float]] = {}
        """The heartbeats of each worker, and since when their count has not changed."""
        self._stuck: set[str] = set()
        """The dead workers that have a task that can't be ended."""
        self._last_sign = 0.0
        """When this process last knew that it and the server work."""
        self._resumed = 0.0
        """When they worked again after a pause, in which nobody was watched or could send heartbeats."""
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Starts to send heartbeats and to watch the other workers. Recovers the tasks of known dead ones.

        Raises:
            PomeloError: store_unavailable.
        """
        with self._connection.one_deadline(self._timing.open):
            await self._send_heartbeat()
        interval, unexpected = self._timing.heartbeat, self._connection.unexpected
        # Heartbeats don't wait for a search, which takes long if there are very many wallets.
        beat = periodically(
            self._send_heartbeat, interval, "The heartbeat of this process failed", unexpected
        )
        self._tasks.append(asyncio.create_task(beat))
        try:
            await self._search_first()
        except BaseException:
            await self.stop()
            raise
        watch = periodically(self._watch, interval, "Watching the other processes failed", unexpected)
        self._tasks.append(asyncio.create_task(watch))

    async def _search_first(self) -> None:
        """Finds the workers that have died; tries again for up to `Timing.open` while the server is busy."""
        deadline = self._monotonic() + self._timing.open
        while True:
            try:
                await self._register_unknown_workers()
                with suppress(RefusedError):  # of a task that can't be ended, which must stop nobody else
                    await self._check_workers()
                return
            except RefusedError:
                raise
            except PomeloError:
                if self._monotonic() >= deadline:
                    raise
                await asyncio.sleep(self._timing.attempt_timeout)

    @property
    def is_live(self) -> bool:
        """Whether new reservations may have its id. After a long silence, the worker may have been marked
        dead, and a new reservation must not be recovered along with the old ones."""
        return self._monotonic() - self._last_heartbeat <= self._timing.dead_after * _MAX_SILENCE

    async def ensure_live(self) -> None:
        """Sends a heartbeat if it is not live. It may have another id afterwards.

        Raises:
            PomeloError: store_unavailable.
        """
        if not self.is_live:
            await self._send_heartbeat()

    async def check(self) -> None:
        """Sends a heartbeat if the last one failed: the server may be readable and refuse what writes.

        Raises:
            PomeloError: store_unavailable.
        """
        if self._failing:
            await self._send_heartbeat()

    async def register(self, process: Process) -> None:
        """Shows this process to the others until it ends. Its clock is measured from time to time.

        Raises:
            PomeloError: store_unavailable.
        """
        self._process = process
        was_wrong, self._clock_is_wrong = self._clock_is_wrong, abs(process.clock) > MAX_CLOCK_DIFFERENCE
        if self._clock_is_wrong and not was_wrong:
            log.warning(
                "The clock of this machine is %+.1f s from that of Redis. Synchronise the clocks (NTP)",
                process.clock,
            )
        await self._connection.send("HSET", PROCESSES, self.id, process.encode())

    async def stop(self) -> None:
        """Stops heartbeats and watching, and nothing else: as if the process had died."""
        for task in self._tasks:
            await stop(task)

    async def close(self, wallets: Iterable[Wallet]) -> None:
        """Stops, and recovers the tasks that this worker has left in these wallets."""
        await self.stop()
        try:
            await self._connection.send("HSET", WORKERS, self.id, "dead")
            await self._recover_all({self.id}, await self._wallet_index.reservations(wallets))
        except PomeloError:
            pass  # another process recovers them, or the next one that starts
        except Exception as error:
            self._connection.unexpected.log("The tasks of this process could not be recovered", error)

    async def recover(self, wallet: Wallet, task_id: str) -> None:
        """Recovers a task of this worker as if it had died. Without a reservation, does nothing.

        Raises:
            PomeloError: store_unavailable.
        """
        reservation = await self._wallet_index.reservation(wallet, task_id)
        if reservation is not None and reservation.worker == self.id:
            await self._recover(reservation)

    async def _watch(self) -> None:
        if self._failing:
            return  # the server may refuse the heartbeats of all
        self._rounds += 1
        if self._rounds % _FULL_CHECK == 0:
            if self._process is not None:  # its id may be new, and the server may have lost its data
                clock = await clock_ahead(self._connection)  # meanwhile, the process may have been replaced
                await self.register(replace(self._process, clock=clock))
            await self._wallet_index.add_again()
            interval = (_FULL_CHECK - 1) * self._timing.heartbeat
            if await self._wallet_index.take_turn("reservations", interval):
                await self._register_unknown_workers()
        await self._check_workers()

    async def _send_heartbeat(self) -> None:
        at, known_id = self._monotonic(), self.id
        # A process that recovers tasks removes their worker at the end; others may still recover them. A
        # server that has lost its data does not list it either, but mostly while the worker is live.
        was_listed = "1" if self._has_sent and not self.is_live else ""
        try:
            if not await self._connection.run(HEARTBEAT, [WORKERS], [known_id, was_listed]):
                if self.id == known_id:  # another heartbeat may have found it, too
                    log.warning(
                        "This process was marked dead, and its tasks were recovered by another process"
                    )
                    self.id, self._has_sent = new_id("own_"), False
                await self._connection.run(HEARTBEAT, [WORKERS], [self.id, ""])
        except PomeloError:
            self._failing = True
            raise
        self._last_heartbeat, self._has_sent, self._failing = at, True, False
        self._note_sign()

    async def _register_unknown_workers(self) -> None:
        """Adds the workers that only their reservations name: their counts will not change."""
        known = {name.decode() for name in await self._connection.send("HGETALL", WORKERS)}
        for worker in {each.worker for each in await self._wallet_index.reservations()} - known:
            await self._connection.send("HSETNX", WORKERS, worker, 1)

    async def _check_workers(self) -> None:
        counts = await self._connection.send("HGETALL", WORKERS)
        now = self._note_sign()
        dead = set()
        latest = {}
        for name, count in counts.items():
            worker = name.decode()
            if count == b"dead":
                dead.add(worker)
                continue
            before = self._counts.get(worker)
            since = now if before is None or before[0] != count else max(before[1], self._resumed)
            latest[worker] = (count, since)
            silent = now - since >= self._timing.dead_after and worker != self.id
            if silent and await self._connection.run(MARK_DEAD, [WORKERS], [worker, count]):
                dead.add(worker)
        self._counts = latest
        # The search of all wallets takes long: it is not repeated in each round until an operator has helped.
        if dead - self._stuck or (dead and self._rounds % _FULL_CHECK == 0):
            await self._recover_all(dead, await self._wallet_index.reservations())

    def _note_sign(self) -> float:
        """Notes that this process and the server work, and returns the time. Heartbeats are signs, too,
        because a check may wait for a search of very many wallets."""
        now = self._monotonic()
        if now - self._last_sign > 3 * self._timing.heartbeat + self._timing.timeout:
            self._resumed = now
        self._last_sign = now
        return now

    async def _recover_all(self, workers: set[str], reservations: Iterable[StoredReservation]) -> None:
        """Recovers the tasks of these workers, each in one script, and then removes the workers."""
        recovered = 0
        failed: RefusedError | None = None
        orphans = [each for each in reservations if each.worker in workers]
        for some in (orphans[at : at + _BATCH] for at in range(0, len(orphans), _BATCH)):
            results = await asyncio.gather(*map(self._recover, some), return_exceptions=True)
            for each, result in zip(some, results, strict=True):
                if isinstance(result, RefusedError):
                    failed = result  # the others must not wait until an operator has repaired this one
                    self._connection.unexpected.log(f"A task of {member(each.wallet)} can't be ended", result)
                elif isinstance(result, BaseException):
                    raise result
                else:
                    recovered += result
        if recovered:
            log.warning("%d tasks of processes that ended were recovered", recovered)
        self._stuck = set() if failed is None else workers
        if failed is not None:
            raise failed
        for worker in workers:
            await self._connection.send("HDEL", PROCESSES, worker)
            await self._connection.send("HDEL", WORKERS, worker)

    async def _recover(self, reservation: StoredReservation) -> bool:
        """Recovers a task. False: another process has done it, or it has ended."""
        keys = names(reservation.wallet)
        reply = await self._connection.run(
            RECOVER,
            [*keys.of_task(reservation.task_id, reservation.key), keys.usage],
            [reservation.task_id, reservation.worker, reservation.key, round(self._timing.tombstone_ttl)],
        )
        return bool(reply[0] == b"recovered")


async def clock_ahead(connection: Connection) -> float:
    """As `pomelo.stores.fleet.Fleet.clock_ahead`."""
    before = time.time()
    seconds, micros = await connection.run(CLOCK, [PROCESSES], [])
    return (before + time.time()) / 2 - int(seconds) - int(micros) / 1e6
