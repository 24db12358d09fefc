"""Delivers alerts to the operator's URLs, in the background.

An alert is tried five times within about 13 minutes. What is not delivered by then, or when the process ends,
is lost: the log has the same events.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp
from yarl import URL

from pomelo.alerts.alert import Alert, signed_headers

TIMEOUT = 10.0
"""Seconds that a receiver has to answer."""

WAITS = (5.0, 30.0, 120.0, 600.0)
"""Seconds before each repetition, up to a fifth longer or shorter."""

MAX_PENDING = 1_000
"""Alerts and receivers that may wait for their delivery."""

log = logging.getLogger("pomelo.alerts")


class Webhooks:
    """The receivers of alerts. `keys` sign each message: while one is replaced, the former one does, too."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        keys: Sequence[bytes],
        *,
        waits: Sequence[float] = WAITS,
    ) -> None:
        self.urls = urls
        self._session = session
        self._keys = keys
        self._waits = waits
        self._pending: set[asyncio.Task[None]] = set()

    def send(self, alert: Alert) -> None:
        """Starts to deliver an alert to all receivers."""
        for url in self.urls:
            if len(self._pending) >= MAX_PENDING:
                log.error("The alert %s (%s) was dropped: too many wait for delivery", alert.id, alert.type)
                return
            task = asyncio.create_task(self._deliver(alert, url))
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)

    async def close(self) -> None:
        """Drops what was not delivered."""
        if self._pending:
            log.warning("Alerts that this process drops, because it ends: %d", len(self._pending))
        pending = [*self._pending]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    async def _deliver(self, alert: Alert, url: str) -> None:
        name = f"The alert {alert.id} ({alert.type})"
        for wait in self._waits:
            failure = await self.post(alert, url)
            if not failure:
                return
            wait *= random.uniform(0.8, 1.2)  # noqa: S311 (not for a secret)
            log.warning("%s was not delivered: %s. Next attempt in %.0f s", name, failure, wait)
            await asyncio.sleep(wait)
        failure = await self.post(alert, url)
        if failure:
            log.error("%s was given up after %d attempts: %s", name, len(self._waits) + 1, failure)

    async def post(self, alert: Alert, url: str) -> str:
        """Sends an alert to one receiver, once. Returns why it was not delivered, empty if it was."""
        body = alert.body()
        headers = signed_headers(alert, body, self._keys, int(time.time()))
        receiver = origin(url)
        try:
            # Not redirected: the request would leave the host that the operator has named.
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                if 200 <= response.status < 300:
                    return ""
                return f"{receiver} answered {response.status}"
        except TimeoutError:
            return f"{receiver} did not answer within {TIMEOUT:g} s"
        except aiohttp.ClientSSLError:
            return f"TLS with {receiver} failed: its certificate has to be valid"
        except (aiohttp.ClientError, OSError, ValueError):
            return f"{receiver} can't be reached"


@asynccontextmanager
async def open_webhooks(urls: Sequence[str], keys: Sequence[bytes]) -> AsyncIterator[Webhooks]:
    """Opens the receivers. Leaving drops what was not delivered."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=16, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT),
    )
    async with session:
        webhooks = Webhooks(session, urls, keys)
        try:
            yield webhooks
        finally:
            await webhooks.close()


def origin(url: str) -> str:
    """What a log may show of a URL, whose path may be a secret."""
    return str(URL(url).origin())
