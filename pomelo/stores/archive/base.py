"""The interface of an archive: where usage records are kept after they have left Redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pomelo.stores.usage import Grouping, UsageQuery, UsageRecord, UsageTotal


class Archive(Protocol):
    """Stores one usage record per task. Every method raises PomeloError store_unavailable if the archive
    can't be reached."""

    async def add(self, records: Sequence[UsageRecord]) -> None:
        """Adds records in their order, except those of tasks that already have one. They are durable when
        this returns."""
        ...

    async def get(self, task_id: str) -> UsageRecord | None:
        """The record of a task, or None."""
        ...

    async def list_usage(self, query: UsageQuery, limit: int, after: str) -> tuple[list[UsageRecord], str]:
        """Up to `limit` records, newest first, and the value of `after` for the next page (empty: none).

        Raises:
            ValueError: `after` is not a value that an earlier call returned.
        """
        ...

    async def sum_usage(
        self,
        query: UsageQuery,
        by: Sequence[Grouping],
        *,
        limit: int | None = None,
        after: tuple[str, ...] | None = None,
    ) -> list[UsageTotal]:
        """Sums by groupings, as `UsageStore.sum_usage`.

        Raises:
            ValueError: as `UsageStore.sum_usage` does.
        """
        ...

    async def damage(self) -> list[tuple[str, str]]:
        """Pairs of a file name and a finding, if the archive is a file and damaged."""
        ...
