"""Asking a vendor about a task that it has taken, until it is done.

Providers whose vendors work in the background walk `polled`. It knows no vendor and no state of a task; when
to stop is its reader's decision.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

from yarl import URL

from pomelo.errors import PomeloError, Replay
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorMapping, from_connect_error

PATIENCE = 30.0
"""Seconds that one question may take."""

GLITCHES = 3
"""Questions in a row that may fail."""

UNKNOWN: Final = object()
"""In place of an answer: the vendor does not know the task."""

_PASSING = frozenset(("provider_unavailable", "provider_failed", "deadline_exceeded"))


async def polled(
    http: Http,
    url: URL,
    headers: Mapping[str, str],
    dialect: ErrorMapping,
    *,
    interval: float,
    patience: float = PATIENCE,
) -> AsyncGenerator[Any, None]:
    """The answers to a GET of `url`, again and again, as parsed JSON; UNKNOWN where the dialect's meaning of
    an error is `not_found`.

    The first comes `interval` seconds after the start, later ones up to twice as far apart. The work goes
    on meanwhile and may be paid for, so GLITCHES failures in a row are passed over, with growing waits or
    those that the vendor asks for; a refusal is not. A poll that got no connection is retried
    later. Closing it closes the connection immediately.

    Raises:
        PomeloError: by the map.
    """
    wait = interval
    failed = 0
    while True:
        await asyncio.sleep(wait)
        try:
            async with asyncio.timeout(patience):
                answer = await http.whole(url, headers, None, dialect)
        except PomeloError as error:
            failure = error
        except TimeoutError as error:
            failure = from_connect_error(error, dialect)
        else:
            failed = 0
            wait = min(max(wait, interval) * 1.25, interval * 2)
            yield answer
            continue
        if failure.code == "not_found":
            yield UNKNOWN
            continue
        if failure.code == "overloaded":
            continue
        failed += 1
        if failed > GLITCHES or failure.code not in _PASSING or failure.replay == Replay.ELSEWHERE:
            raise failure
        wait = failure.wait or interval * (1 << failed)
