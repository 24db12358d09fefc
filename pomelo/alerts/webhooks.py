"""Delivers alerts to the operator's URLs, in the background.

An alert is tried five times within about 13 minutes, and a last time when the process ends. What is not
delivered by then is lost: the log has the same events.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import aiohttp
from yarl import URL

from pomelo.alerts.alert import Alert, signed_headers

TIMEOUT = 10.0
"""Seconds that a receiver has to answer."""

WAITS = (5.0, 30.0, 120.0, 600.0)
"""Seconds before each repetition, up to a fifth longer or shorter."""

MAX_PENDING = 1_000
"""Alerts that may wait for their delivery to one receiver."""

MAX_REQUESTS = 16
"""Requests to one receiver at a time."""

CLOSING_TIMEOUT = 3.0
"""Seconds for the last attempts when the process ends."""

log = logging.getLogger("pomelo.alerts")


class _Receiver:
    """One URL, with limits of its own: a receiver that is slow delays only its own alerts."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests = asyncio.Semaphore(MAX_REQUESTS)
        self.pending: set[asyncio.Task[bool]] = set()


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
        self._receivers = [_Receiver(url) for url in urls]
        self._session = session
        self._keys = keys
        self._waits = waits
        self._closing = asyncio.Event()

    def send(self, alert: Alert) -> None:
        """Starts to deliver an alert to all receivers."""
        for receiver in self._receivers:
            if len(receiver.pending) < MAX_PENDING:
                task = asyncio.create_task(self._deliver(alert, receiver))
                receiver.pending.add(task)
                task.add_done_callback(receiver.pending.discard)
            else:
                log.error(
                    "The alert %s (%s) was dropped: too many wait for delivery to %s",
                    *(alert.id, alert.type, origin(receiver.url)),
                )

    async def close(self) -> None:
        """Makes a last attempt to deliver each alert that waits, for a few seconds, and drops the rest."""
        pending = [task for receiver in self._receivers for task in receiver.pending]
        self._closing.set()
        dropped = len(pending)
        try:
            if pending:
                done, _ = await asyncio.wait(pending, timeout=CLOSING_TIMEOUT)
                dropped -= sum(task.result() for task in done)
        finally:
            if dropped:
                log.warning("Alerts that this process drops, because it ends: %d", dropped)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _deliver(self, alert: Alert, receiver: _Receiver) -> bool:
        """Whether the receiver has the alert."""
        name, attempts = f"The alert {alert.id} ({alert.type})", 0
        while True:
            is_last = self._closing.is_set() or attempts == len(self._waits)
            async with receiver.requests:
                failure = await self.post(alert, receiver.url)
            if not failure:
                return True
            attempts += 1
            if is_last:
                log.error("%s was given up after %d attempts: %s", name, attempts, failure)
                return False
            wait = self._waits[attempts - 1] * random.uniform(0.8, 1.2)  # noqa: S311 (not for a secret)
            log.warning("%s was not delivered: %s. Next attempt in %.0f s", name, failure, wait)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), wait)

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
    """Opens the receivers. Leaving closes them."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
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
