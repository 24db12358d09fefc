"""Reads usage records and their sums in pages. Page tokens are signed, so a caller can't make one up.

Nothing here checks who may read what.
"""

from __future__ import annotations

import hmac
from dataclasses import fields
from typing import Any

from google.protobuf.message import Message

from pomelo import times
from pomelo.accounts import pages
from pomelo.errors import invalid
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.secrets import derive_key
from pomelo.stores.usage import Dimension, UsageQuery, UsageRecord, UsageStore, UsageTotal

PAGE_SIZE = 100
"""Records in a page by default."""

MAX_PAGE_SIZE = 1_000
"""The largest number of records or sums that a request can ask for in a page."""

SUMS_PAGE_SIZE = 10_000
"""Sums in a page by default: as many as fit into a message of 4 MiB, more than most accounts have."""

_SIGNATURE_BYTES = 16
"""The length of a page token's signature."""

_GROUPS: dict[int, Dimension] = {
    pb.USAGE_GROUP_MODEL: "model",
    pb.USAGE_GROUP_KEY: "key",
    pb.USAGE_GROUP_DAY: "day",
    pb.USAGE_GROUP_ACCOUNT: "account",
}

_SOURCES = {
    "provider": pb.USAGE_SOURCE_PROVIDER,
    "estimated": pb.USAGE_SOURCE_ESTIMATED,
    "recovered": pb.USAGE_SOURCE_RECOVERED,
}


def _equal_names(row: type, message: type[Message], *excluded: str) -> list[str]:
    names = {field.name for field in fields(row)}.difference(excluded)
    return [name for name in message.DESCRIPTOR.fields_by_name if name in names]


_RECORD_FIELDS = _equal_names(UsageRecord, pb.UsageRecord, "task_type", "source")
_TOTAL_FIELDS = _equal_names(UsageTotal, pb.UsageTotal)
"""The fields of a message that have the same names and values in the store's rows."""


class UsageReader:
    """Reads usage records and their sums. Page tokens are valid in every process with the same
    `root_secret`."""

    def __init__(self, store: UsageStore, root_secret: bytes) -> None:
        self._store = store
        self._signing_key = derive_key(root_secret, "usage-page")

    async def list(
        self, request: pb.ListUsageRequest, account: str | None, live: bool | None
    ) -> pb.ListUsageResponse:
        """The records or sums that `request` selects: of one account or all (None), in one mode or both.

        Raises:
            PomeloError: invalid_parameter, store_unavailable.
        """
        query = UsageQuery(
            account=account,
            live=live,
            model=request.model or None,
            key_id=request.key_id or None,
            since=read_time(request, "from_time"),
            until=read_time(request, "to_time"),
        )
        if not 0 <= request.page_size <= MAX_PAGE_SIZE:
            raise invalid("page_size", f"1 to {MAX_PAGE_SIZE:,}")
        if request.group_by == pb.USAGE_GROUP_UNSPECIFIED:
            return await self._page(query, request.page_size or PAGE_SIZE, request.page_token)
        by = _GROUPS.get(request.group_by)
        if by is None:
            raise invalid("group_by", "model, key, day or account")
        return await self._sums(query, by, request.page_size or SUMS_PAGE_SIZE, request.page_token)

    async def _sums(self, query: UsageQuery, by: Dimension, size: int, token: str) -> pb.ListUsageResponse:
        after = (self._read_token(token, query, by),) if token else None
        totals = await self._store.sum_usage(query, (by,), limit=size + 1, after=after)
        more = len(totals) > size
        return pb.ListUsageResponse(
            totals=[_total(row) for row in totals[:size]],
            next_page_token=self._make_token(totals[size - 1].groups[0], query, by) if more else "",
        )

    async def _page(self, query: UsageQuery, size: int, token: str) -> pb.ListUsageResponse:
        after = self._read_token(token, query) if token else ""
        try:
            records, next_after = await self._store.list_usage(query, limit=size, after=after)
        except ValueError as error:
            raise pages.wrong_token() from error
        return pb.ListUsageResponse(
            records=[_record(record) for record in records],
            next_page_token=self._make_token(next_after, query) if next_after else "",
        )

    def _make_token(self, after: str, query: UsageQuery, by: str = "") -> str:
        """A token that is valid for this query only."""
        position = after.encode()
        return pages.encode(self._sign(position, query, by) + position)

    def _read_token(self, token: str, query: UsageQuery, by: str = "") -> str:
        data = pages.decode(token)
        signature, position = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(position, query, by)):
            raise pages.wrong_token()
        return position.decode()

    def _sign(self, position: bytes, query: UsageQuery, by: str) -> bytes:
        text = repr(query) + (f" by {by}" if by else "")
        return hmac.digest(self._signing_key, text.encode() + b"\0" + position, "sha256")[:_SIGNATURE_BYTES]


def _record(record: UsageRecord) -> pb.UsageRecord:
    return pb.UsageRecord(
        **{name: getattr(record, name) for name in _RECORD_FIELDS},
        id=record.task_id,
        task_type=_task_type(record.task_type),
        audio_seconds=record.audio_ms / 1000,
        cost_micros=record.cost,
        source=_SOURCES.get(record.source, pb.USAGE_SOURCE_UNSPECIFIED),
        time=times.to_timestamp(record.at),
        provider_cost_micros=record.provider_micros,
    )


def _total(row: UsageTotal) -> pb.UsageTotal:
    equal = {name: getattr(row, name) for name in _TOTAL_FIELDS}
    return pb.UsageTotal(
        **equal, group=row.groups[0], audio_seconds=row.audio_ms / 1000, cost_micros=row.cost
    )


def _task_type(name: str) -> Any:
    value = TaskType.DESCRIPTOR.values_by_name.get(f"TASK_TYPE_{name.upper().replace('-', '_')}")
    return value.number if value is not None else TaskType.TASK_TYPE_UNSPECIFIED


def read_time(request: Any, name: str) -> float | None:
    """The Unix seconds of a time of a request; None if it has none.

    Raises:
        PomeloError: invalid_parameter.
    """
    if not request.HasField(name):
        return None
    try:
        return times.from_timestamp(getattr(request, name))
    except ValueError as error:
        raise invalid(name, str(error)) from None
