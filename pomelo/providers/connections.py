"""How many connections to a vendor's host may be in use, and a fair share of them for each account.

`pomelo.providers.http` takes a connection here before it sends anything, and gives it back when the answer is
read or left. A tenth of the connections is a reserve for accounts that have next to none. Of the others an
account may have at most SHARE times as many as stay free. So one account alone gets about four fifths of all,
several share them, and however much they take, there is room for the next account at once.

Calls that must wait are queued: first come, first served within an account, and in turn between accounts. The
wait is short and the queue bounded; after it the call is refused with `overloaded`, before anything was sent.

It knows neither HTTP nor a vendor.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from pomelo.errors import PomeloError, Replay

log = logging.getLogger("pomelo.providers")

LIMIT = 256
"""Connections to one host."""

MAX_WAIT = 2.0
"""Seconds that a call waits for one at the most."""

MAX_WAITING, MAX_ACCOUNT_WAITING = 1024, 256
"""Calls that may wait for a host, in all and of one account."""

SHARE = 8
"""An account may have so many times the connections that stay free beside the reserve."""

WARN_EVERY = 10.0
"""Seconds between two log lines about calls that wait or are refused."""


class _Host:
    """The connections to one host that are in use, and who waits for one."""

    __slots__ = ("in_use", "queues", "used", "waiting")

    def __init__(self) -> None:
        self.in_use = 0
        self.waiting = 0
        self.used: dict[str, int] = {}
        """By account."""
        self.queues: dict[str, deque[asyncio.Future[None]]] = {}
        """By account; the accounts are in the order in which it is their turn."""


class ConnectionLimiter:
    """The connections of one process, by host and account.

    `in_use` and `waiting` are what is so now; `waited` and `refused` count calls since the start.
    """

    def __init__(
        self,
        limit: int = LIMIT,
        *,
        max_wait: float = MAX_WAIT,
        max_waiting: int = MAX_WAITING,
        max_account_waiting: int = MAX_ACCOUNT_WAITING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self.in_use = 0
        self.waiting = 0
        self.waited = 0
        self.refused = 0
        self._max_wait = max_wait
        self._max_waiting = max_waiting
        self._max_account_waiting = max_account_waiting
        self._clock = clock
        self._reserve = max(1, limit // 10)
        self._few = max(1, self._reserve // 8)
        """Connections that an account may have out of the reserve; it lasts for eight accounts."""
        self._hosts: dict[str, _Host] = {}
        self._warn_at = -WARN_EVERY
        self._reported = (0, 0)

    async def acquire(self, host: str, account: str) -> None:
        """Takes a connection to `host` for a call of `account`, to be given back by `release`. A caller who
        leaves meanwhile leaves the queue at once.

        Raises:
            PomeloError: overloaded; none came free in time, or too many calls wait already. Another route may
                be asked.
        """
        found = self._hosts.get(host)
        if found is None:
            found = self._hosts[host] = _Host()
        if self._may(found, account):
            self._take(found, account)
            return
        queue = found.queues.get(account)
        if found.waiting >= self._max_waiting or (queue and len(queue) >= self._max_account_waiting):
            raise self._refusal(host, account)
        turn = asyncio.get_running_loop().create_future()
        found.queues.setdefault(account, deque()).append(turn)
        found.waiting += 1
        self.waiting += 1
        self.waited += 1
        self._warn(host, account)
        try:
            async with asyncio.timeout(self._max_wait):
                await turn
        except TimeoutError:
            if not _granted(turn):
                self._leave(found, account, turn)
                raise self._refusal(host, account) from None
        except asyncio.CancelledError:
            if _granted(turn):
                self.release(host, account)
            else:
                self._leave(found, account, turn)
            raise

    def release(self, host: str, account: str) -> None:
        """Gives a connection back, to the next whose turn it is."""
        found = self._hosts[host]
        self.in_use -= 1
        found.in_use -= 1
        found.used[account] -= 1
        if not found.used[account]:
            del found.used[account]
        if found.queues:
            self._grant(found)
        if not found.in_use and not found.queues:
            del self._hosts[host]

    def _may(self, host: _Host, account: str) -> bool:
        """Whether an account may have one more connection now."""
        free = self.limit - host.in_use
        used = host.used.get(account, 0)
        return free > 0 and (used < self._few or used < SHARE * (free - self._reserve))

    def _take(self, host: _Host, account: str) -> None:
        self.in_use += 1
        host.in_use += 1
        host.used[account] = host.used.get(account, 0) + 1

    def _grant(self, host: _Host) -> None:
        """Gives what is free to those who wait, one account after the other."""
        while (account := next((name for name in host.queues if self._may(host, name)), None)) is not None:
            queue = host.queues.pop(account)
            turn = queue.popleft()
            host.waiting -= 1
            self.waiting -= 1
            if queue:
                host.queues[account] = queue  # behind the others
            if not turn.done():  # else its caller has just left
                self._take(host, account)
                turn.set_result(None)

    def _leave(self, host: _Host, account: str, turn: "asyncio.Future[None]") -> None:
        queue = host.queues.get(account)
        if queue is None or turn not in queue:
            return
        queue.remove(turn)
        host.waiting -= 1
        self.waiting -= 1
        if not queue:
            del host.queues[account]

    def _refusal(self, host: str, account: str) -> PomeloError:
        self.refused += 1
        self._warn(host, account)
        error = PomeloError(
            "overloaded", "Too many calls to the provider at once. Retry later, or run fewer tasks at a time"
        )
        error.replay = Replay.ELSEWHERE
        return error

    def _warn(self, host: str, account: str) -> None:
        """Writes a log line, unless there was one a moment ago."""
        now = self._clock()
        if now < self._warn_at + WARN_EVERY:
            return
        waited, refused = self._reported
        found = self._hosts.get(host) or _Host()
        log.warning(
            "calls wait for a connection to %s: %d of %d in use, %d by account %s; %d waited and %d were "
            "refused since the last such line. Raise POMELO_UPSTREAM_CONNECTIONS, or lower the concurrent "
            "requests of plans",
            host, found.in_use, self.limit, found.used.get(account, 0), account,
            self.waited - waited, self.refused - refused,
        )  # fmt: skip
        self._warn_at = now
        self._reported = (self.waited, self.refused)


def _granted(turn: "asyncio.Future[None]") -> bool:
    return turn.done() and not turn.cancelled()
