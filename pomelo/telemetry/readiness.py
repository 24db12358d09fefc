"""Whether load balancers should send calls to this process, and why not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from pomelo.runtime.process import in_background

CHECK_INTERVAL = 1.0
"""Seconds between two checks."""

CHECK_TIMEOUT = 1.0
"""Seconds after which a check without a result counts as failed."""

FAILURES = 2
"""Failed checks in a row that make the process not ready: one slow answer must not move all its callers to
other servers, which have the same store. One success makes it ready again."""

REASONS: Mapping[str, str] = {
    "shutting_down": "the server is draining",
    "store_unavailable": "the store can't be reached or written",
    "server_unavailable": "the server of this gateway can't be reached, or is not ready itself",
}
"""Why a process is not ready, by the code of the error that callers would get."""


class Readiness:
    """Whether this process should get calls. `code` is why it should not yet; empty: it should.

    The state changes by `follow` and `drain`, on the event loop.
    """

    def __init__(self, code: str = "") -> None:
        self._code = code
        self.draining = False
        """Whether the process will never be ready again."""
        self._change: asyncio.Event | None = None

    @property
    def code(self) -> str:
        """The code of the error that callers would get, empty while the process is ready."""
        return "shutting_down" if self.draining else self._code

    def next_change(self) -> asyncio.Event:
        """Returns an event that the next change of `code` sets. Get it before you read the code."""
        if self._change is None:
            self._change = asyncio.Event()
        return self._change

    def drain(self) -> None:
        """Makes the process not ready, for ever. Idempotent."""
        if not self.draining:
            self.draining = True
            self._changed()

    @asynccontextmanager
    async def follow(
        self,
        check: Callable[[], Awaitable[object]],
        code: str,
        *,
        ready: bool = True,
        interval: float = CHECK_INTERVAL,
        within: float = CHECK_TIMEOUT,
    ) -> AsyncIterator[None]:
        """Makes the process ready, and then as ready as `check` says while the body runs. Without `ready`, a
        first check, which is awaited, decides how it begins. A check fails if it raises an exception or takes
        too long; then the process is not ready, with `code`."""
        failures = 0
        if not ready:
            try:
                await asyncio.wait_for(check(), within)
            except Exception:
                failures = FAILURES
        self._set(code if failures else "")
        async with in_background(self._follow(check, code, interval, within, failures)):
            yield

    async def _follow(
        self,
        check: Callable[[], Awaitable[object]],
        code: str,
        interval: float,
        within: float,
        failures: int,
    ) -> None:
        checking: asyncio.Future[object] | None = None
        try:
            while True:
                await asyncio.sleep(interval)
                # One that hangs is awaited further: a new one each second would pile up.
                checking = checking or asyncio.ensure_future(check())
                await asyncio.wait({checking}, timeout=within)
                if checking.done():
                    failed = checking.cancelled() or checking.exception() is not None
                    checking = None
                else:
                    failed = True
                failures = failures + 1 if failed else 0
                if failures == 0 or failures >= FAILURES:
                    self._set(code if failures else "")
        finally:
            if checking is not None:
                checking.cancel()

    def _set(self, code: str) -> None:
        if code != self._code:
            self._code = code
            self._changed()

    def _changed(self) -> None:
        change, self._change = self._change, None
        if change is not None:
            change.set()
