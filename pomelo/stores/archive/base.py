"""The interface of an archive: where usage records are kept after they have left Redis."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from pomelo.stores.usage import UsageRecord, UsageReports

log = logging.getLogger("pomelo.stores")

_LOG_INTERVAL = 60.0
"""Seconds between two log lines while an archive fails."""


class Archive(UsageReports, Protocol):
    """Stores one usage record per task."""

    async def add(self, records: Sequence[UsageRecord]) -> None:
        """Adds records in their order, except those of tasks that already have one. They are durable when
        this returns."""
        ...

    async def get(self, task_id: str) -> UsageRecord | None:
        """The record of a task, or None."""
        ...


class FailureLog:
    """Logs that an archive fails, again from time to time while it does, and that it works again."""

    def __init__(self) -> None:
        self._since: float | None = None
        """When it began to fail."""
        self._logged = 0.0

    def failed(self, reason: str) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._logged < _LOG_INTERVAL:
            return
        self._logged = now
        log.warning("The archive of usage records fails: %s", reason)

    def worked(self) -> None:
        if self._since is not None:
            log.warning(
                "The archive of usage records works again after %.0f s", time.monotonic() - self._since
            )
            self._since = None
