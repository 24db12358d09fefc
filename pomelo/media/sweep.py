"""Deletes expired media in the background."""

from __future__ import annotations

import asyncio
import logging
import time

from pomelo.errors import PomeloError
from pomelo.media.store import MediaStore
from pomelo.runtime.logs import format_trace

MAX_SWEEP_SHARE = 0.05
"""Maximum share of the time that scans take: with very many media they are less frequent."""

log = logging.getLogger("pomelo.media")


async def sweep(media: MediaStore) -> None:
    """Deletes expired media and counts the others periodically, until it is cancelled."""
    duration = 0.0
    while True:
        await asyncio.sleep(max(media.refresh_interval, duration / MAX_SWEEP_SHARE))
        started = time.monotonic()
        try:
            await media.refresh()
        except PomeloError:  # the bucket has failed, and has logged it
            pass
        except Exception as error:  # a disk error may be gone at the next scan
            log.error("expired media were not deleted\n%s", format_trace(error))
        duration = time.monotonic() - started
