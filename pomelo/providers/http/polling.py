"""Polls a vendor for the state of a task that it has accepted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

from yarl import URL

from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorMapping, from_connect_error

POLL_TIMEOUT = 30.0
"""Seconds that one request may take."""

MAX_FAILURES = 3
"""Requests in a row that may fail."""

UNKNOWN: Final = "task not found"
"""The status of a task that the vendor does not know."""

_TRANSIENT = frozenset(("provider_unavailable", "provider_failed", "deadline_exceeded"))


async def poll(
    http: Http,
    url: URL,
    headers: Mapping[str, str],
    error_mapping: ErrorMapping,
    *,
    interval: float,
) -> AsyncGenerator[Any, None]:
    """GET `url` repeatedly and yield each response as parsed JSON, or `{"status": UNKNOWN}` for an error
    that `error_mapping` maps to `not_found`. Closing the generator closes the connection immediately.

    The first request is sent after `interval` seconds, later ones up to twice as far apart. The vendor works
    on the task meanwhile and may charge for it, so up to MAX_FAILURES failures in a row are retried, with
    growing waits or those that the vendor asks for; a refusal is not. A request that got no connection is
    retried without a limit.

    Raises:
        UpstreamError: by the error map.
    """
    wait = interval
    failed = 0
    while True:
        await asyncio.sleep(wait)
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                response = await http.request_json(url, headers, None, error_mapping)
        except UpstreamError as error:
            failure = error
        except TimeoutError as error:
            failure = from_connect_error(error, error_mapping)
        else:
            failed = 0
            wait = min(max(wait, interval) * 1.25, interval * 2)
            yield response
            continue
        if failure.code in ("not_found", "overloaded"):
            wait = min(wait, interval * 2)  # a wait that the vendor has asked for is over
        if failure.code == "not_found":
            yield {"status": UNKNOWN}
            continue
        if failure.code == "overloaded":
            continue
        failed += 1
        transient = failure.code in _TRANSIENT and failure.retry is not RetryPolicy.NEXT_ROUTE
        if failed > MAX_FAILURES or not transient:
            raise failure
        wait = failure.wait or interval * (1 << failed)
