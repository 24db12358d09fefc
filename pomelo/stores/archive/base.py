"""The interface of an archive: where usage records are kept after they have left Redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pomelo.stores.usage import UsageRecord, UsageReports


class Archive(UsageReports, Protocol):
    """Stores one usage record per task."""

    async def add(self, records: Sequence[UsageRecord]) -> None:
        """Adds records in their order, except those of tasks that already have one. They are durable when
        this returns."""
        ...

    async def get(self, task_id: str) -> UsageRecord | None:
        """The record of a task, or None."""
        ...
