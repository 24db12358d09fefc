"""Limits the connections to a vendor's host, and shares them fairly between accounts.

A connection is acquired before anything is sent, and released when the response was read or abandoned. A
tenth of the connections is a reserve for accounts that have almost none. Of the others, an account may have
at most SHARE times as many as stay free. So one account alone gets about four fifths of all, several accounts
share them, and a new account gets a connection immediately, whatever the others use.

Calls that must wait are queued: first in, first out within an account, in turn between accounts. The wait is
short and the queue bounded; after it the call is refused with `overloaded`, before anything was sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pomelo.providers.errors import RetryPolicy, UpstreamError

log = logging.getLogger("pomelo.providers")

LIMIT = 256
"""Connections to one host."""

MAX_WAIT = 2.0
"""The longest that a call waits for a connection, in seconds."""

MAX_WAITING, MAX_ACCOUNT_WAITING = 1024, 256
"""The most calls that may wait for a host, in total and of one account."""

SHARE = 8
"""The most connections of an account, as a multiple of those that stay free outside the reserve."""

WARN_EVERY = 10.0
"""Seconds between two log lines about calls that wait or are refused."""


class NoConnectionError(UpstreamError):
    """`overloaded`: no connection to a vendor became free, and nothing was sent."""


@dataclass(slots=True, eq=False)
class _Host:
    """The connections in use to one host, and the calls that wait for a connection."""

    in_use: int = 0
    waiting: int = 0
    used: dict[str, int] = field(default_factory=dict)
    """By account."""
    queues: dict[str, deque[asyncio.Future[None]]] = field(default_factory=dict)
    """By account, in the order in which the accounts are served."""


class ConnectionLimiter:
    """The connections of one process, by host and account.

    `in_use` and `waiting` are current numbers; `waited` and `refused` count calls since the start.
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
        """Connections of the reserve that one account may have; the reserve is enough for eight accounts."""
        self._hosts: dict[str, _Host] = {}
        self._warn_at = -WARN_EVERY
        self._reported = (0, 0)

    def try_acquire(self, host: str, account: str) -> bool:
        """Take a connection as `acquire` does, if one is free now; return whether that is so."""
        state = self._hosts.get(host)
        if state is None:
            state = self._hosts[host] = _Host()
        free = self._may_acquire(state, account)
        if free:
            self._take(state, account)
        return free

    async def acquire(self, host: str, account: str) -> None:
        """Take a connection to `host` for a call of `account`; return it with `release`. A call that is
        cancelled while it waits leaves the queue immediately.

        Raises:
            NoConnectionError: no connection became free in time, or too many calls wait already.
        """
        if self.try_acquire(host, account):
            return
        state = self._hosts[host]
        queue = state.queues.get(account)
        if state.waiting >= self._max_waiting or (queue and len(queue) >= self._max_account_waiting):
            raise self._refusal(host, account)
        turn = asyncio.get_running_loop().create_future()
        state.queues.setdefault(account, deque()).append(turn)
        state.waiting += 1
        self.waiting += 1
        self.waited += 1
        self._warn(host, account)
        try:
            async with asyncio.timeout(self._max_wait):
                await turn
        except TimeoutError:
            if not _granted(turn):
                self._leave_queue(state, account, turn)
                raise self._refusal(host, account) from None
        except asyncio.CancelledError:
            if _granted(turn):
                self.release(host, account)
            else:
                self._leave_queue(state, account, turn)
            raise

    def release(self, host: str, account: str) -> None:
        """Return a connection, and give it to the next call in turn."""
        state = self._hosts[host]
        self.in_use -= 1
        state.in_use -= 1
        state.used[account] -= 1
        if not state.used[account]:
            del state.used[account]
        if state.queues:
            self._grant(state)
        if not state.in_use and not state.queues:
            del self._hosts[host]

    def _may_acquire(self, host: _Host, account: str) -> bool:
        free = self.limit - host.in_use
        used = host.used.get(account, 0)
        return free > 0 and (used < self._few or used < SHARE * (free - self._reserve))

    def _take(self, host: _Host, account: str) -> None:
        self.in_use += 1
        host.in_use += 1
        host.used[account] = host.used.get(account, 0) + 1

    def _grant(self, host: _Host) -> None:
        """Give free connections to waiting calls, in turn between accounts."""
        while True:
            account = next((name for name in host.queues if self._may_acquire(host, name)), None)
            if account is None:
                return
            queue = host.queues.pop(account)
            turn = queue.popleft()
            host.waiting -= 1
            self.waiting -= 1
            if queue:
                host.queues[account] = queue  # after the other accounts
            if not turn.done():  # otherwise its call was just cancelled
                self._take(host, account)
                turn.set_result(None)

    def _leave_queue(self, host: _Host, account: str, turn: asyncio.Future[None]) -> None:
        queue = host.queues.get(account)
        if queue is None or turn not in queue:
            return
        queue.remove(turn)
        host.waiting -= 1
        self.waiting -= 1
        if not queue:
            del host.queues[account]

    def _refusal(self, host: str, account: str) -> NoConnectionError:
        self.refused += 1
        self._warn(host, account)
        message = "Too many concurrent calls to the provider. Retry later, or run fewer tasks at a time"
        reason = "no connection to the vendor was free"
        return NoConnectionError("overloaded", message, retry=RetryPolicy.NEXT_ROUTE, reason=reason)

    def _warn(self, host: str, account: str) -> None:
        """Log waiting and refused calls, at most once in WARN_EVERY seconds."""
        now = self._clock()
        if now < self._warn_at + WARN_EVERY:
            return
        waited, refused = self._reported
        state = self._hosts.get(host) or _Host()
        log.warning(
            "calls wait for a connection to %s: %d of %d in use, %d by account %s; %d waited and %d were "
            "refused since the last such line. Raise POMELO_UPSTREAM_CONNECTIONS, or lower the concurrent "
            "requests of plans",
            host, state.in_use, self.limit, state.used.get(account, 0), account,
            self.waited - waited, self.refused - refused,
        )  # fmt: skip
        self._warn_at = now
        self._reported = (self.waited, self.refused)


def _granted(turn: asyncio.Future[None]) -> bool:
    return turn.done() and not turn.cancelled()
