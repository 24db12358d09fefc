"""Who may have holds, who of them lives, and the end of those who don't.

Every opened store is an owner that beats: a count in Redis goes up. Each watches the counts of the others by
its own monotonic clock, and takes one for dead that it has seen standing still all the time. No clock is
compared with another, so none that jumps ends anything.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from pomelo.errors import PomeloError
from pomelo.ids import new_id
from pomelo.process import periodically
from pomelo.stores.ledger import Wallet
from pomelo.stores.redis.connection import Link, RefusedError
from pomelo.stores.redis.key_names import OWNERS, names
from pomelo.stores.redis.scripts import BEAT, BURY, RECOVER
from pomelo.stores.redis.wallet_index import Held, WalletIndex

log = logging.getLogger("pomelo.stores")

_FRESH = 0.6
"""What part of the time until it is taken for dead an owner may go without a beat and still take."""

_ROUND = 10
"""After so many beats all holds are looked at for those whose owner is unknown."""


class Worker:
    """This process among all owners; made for each opened store."""

    def __init__(
        self, link: Link, places: WalletIndex, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._link = link
        self._places = places
        self._timing = link.timing
        self._monotonic = monotonic
        self.id = new_id("own_")
        """The id of this owner's holds. It is replaced after this process was taken for dead."""
        self._rounds = 0
        self._beaten = 0.0
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._looked = 0.0
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begins to beat and to watch; ends what is known to be dead.

        Raises:
            PomeloError: store_unavailable.
        """
        await self._beat()
        await self._adopt()
        await self._look()
        self._task = asyncio.create_task(
            periodically(
                self._round, self._timing.beat, "Watching the other processes failed", self._link.unexpected
            )
        )

    async def current(self) -> str:
        """The owner's id. One that has not beaten for long beats first: it may have been taken for dead, and
        what it takes now must not be ended along with what it took before.

        Raises:
            PomeloError: store_unavailable.
        """
        if self._monotonic() - self._beaten > self._timing.dead * _FRESH:
            await self._beat()
        return self.id

    async def stop(self) -> None:
        """Ends beating and watching, and nothing else: as if the process had died."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def close(self) -> None:
        """Stops, and ends what this owner still holds."""
        await self.stop()
        try:
            await self._link.send("HSET", OWNERS, self.id, "dead")
            await self._end({self.id})
        except PomeloError:
            pass  # Another process ends the tasks, or the next one that starts.
        except Exception as error:
            self._link.unexpected.log("What this process held could not be ended", error)

    async def recover(self, wallet: Wallet, task_id: str) -> None:
        """Ends a task of this owner as if the owner had died. Without a hold, does nothing.

        Raises:
            PomeloError: store_unavailable.
        """
        held = await self._places.hold(wallet, task_id)
        if held is not None and held.owner == self.id:
            await self._recover(held)

    async def _round(self) -> None:
        self._rounds += 1
        await self._beat()
        if self._rounds % _ROUND == 0:
            await self._places.note_again()
            await self._adopt()
        await self._look()

    async def _beat(self) -> None:
        at = self._monotonic()
        if not await self._link.run(BEAT, [OWNERS], [self.id]):
            log.warning("This process was taken for dead; its tasks were ended")
            self.id = new_id("own_")
            await self._link.run(BEAT, [OWNERS], [self.id])
        self._beaten = at

    async def _adopt(self) -> None:
        """Makes owners of those that have holds and are unknown: they will be seen standing still."""
        owners = await self._link.send("HGETALL", OWNERS)
        known = {owner.decode() for owner in owners}
        for owner in {held.owner for held in await self._places.held()} - known:
            await self._link.send("HSETNX", OWNERS, owner, 1)

    async def _look(self) -> None:
        owners = await self._link.send("HGETALL", OWNERS)
        now = self._monotonic()
        # While this process or the server was stopped, nobody was seen and nobody could beat.
        blind = now - self._looked > 3 * self._timing.beat + self._timing.limit
        self._looked = now
        dead = set()
        seen = {}
        for name, count in owners.items():
            owner = name.decode()
            if count == b"dead":
                dead.add(owner)
                continue
            before = self._seen.get(owner)
            since = now if before is None or before[0] != count or blind else before[1]
            seen[owner] = (count, since)
            still = now - since >= self._timing.dead and owner != self.id
            if still and await self._link.run(BURY, [OWNERS], [owner, count]):
                dead.add(owner)
        self._seen = seen
        if dead:
            await self._end(dead)

    async def _end(self, owners: set[str]) -> None:
        """Ends all that these owners hold, one script for each, and then the owners."""
        orphans = [held for held in await self._places.held() if held.owner in owners]
        failed: RefusedError | None = None
        for orphan in orphans:
            await self.current()  # However many they are, this process must not be taken for dead meanwhile.
            try:
                await self._recover(orphan)
            except RefusedError as error:
                failed = error  # The others must not wait until that is mended.
        if orphans:
            log.warning("%d tasks of processes that ended were ended", len(orphans))
        if failed is not None:
            raise failed
        for owner in owners:
            await self._link.send("HDEL", OWNERS, owner)

    async def _recover(self, held: Held) -> None:
        of = names(held.wallet)
        mark = of.mark(held.task_id)
        answer = of.answer(held.key[1:]) if held.key else mark
        timing = self._timing
        await self._link.run(
            RECOVER,
            [of.wallet, of.holds, of.drafts, mark, of.usage, answer],
            [held.task_id, held.owner, held.key, round(timing.window * 1e6), round(timing.remember)],
        )
