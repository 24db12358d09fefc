"""Reads usage records and their sums in pages. Page tokens are signed, so a caller can't make one up.

Nothing here checks who may read what.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, cast

from google.protobuf.message import Message
from pydantic_core import from_json, to_json

from pomelo.accounts import pages
from pomelo.accounts.modes import to_mode
from pomelo.errors import invalid, missing
from pomelo.fields import MAX_METADATA_VALUE, MAX_USER_CHARACTERS
from pomelo.gen.admin.v1 import admin_service_pb2 as admin_pb
from pomelo.gen.v1 import account_service_pb2 as pb
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.protobuf import times
from pomelo.protobuf.enums import enum_names
from pomelo.secrets import derive_keys
from pomelo.stores.usage import (
    MAX_GROUPINGS,
    Dimension,
    Grouping,
    MetadataKey,
    UsageQuery,
    UsageRecord,
    UsageStore,
    UsageTotal,
    decode_metadata,
)

MAX_SUMS = 10_000
"""The maximum number of sums in a page, and their number by default: more than most accounts have."""

_MANY_SUMS = 1_000
"""Sums above which their messages are made in a thread: those of the largest page take 50 ms."""

_MAX_SUMS_BYTES = 3 * 1024 * 1024
"""The maximum size of a page of sums: a gRPC client takes 4 MiB by default."""

_RECORDS_STEP = 100
"""The records that are read at a time: with their metadata each may have 60 kB."""

_MAX_GROUPS_BYTES = 8 * 1024 * 1024
"""The maximum size of the groups of a page of sums while it is computed."""

_SIGNATURE_BYTES = 16
"""The length of a page token's signature."""

_DIMENSIONS = enum_names(pb.UsageDimension.DESCRIPTOR)
_OPERATOR_DIMENSIONS = enum_names(admin_pb.OperatorDimension.DESCRIPTOR)
_SOURCES = {name: source for source, name in enum_names(pb.UsageSource.DESCRIPTOR).items()}


def _equal_names(row: type, message: type[Message], *excluded: str) -> list[str]:
    names = {field.name for field in fields(row)}.difference(excluded)
    return [name for name in message.DESCRIPTOR.fields_by_name if name in names]


_RECORD_FIELDS = _equal_names(UsageRecord, pb.UsageRecord, "task_type", "source", "metadata")
_COUNTS = _equal_names(UsageRecord, Usage)
"""The fields of a message that have the same names and values in the store's rows."""

_read_counts = attrgetter(*_COUNTS)


class UsageReader:
    """Reads usage records and their sums. Page tokens are valid in every process with the same
    `root_secret`, and in those that have it among their `previous` ones."""

    def __init__(self, store: UsageStore, root_secret: bytes, previous: Sequence[bytes] = ()) -> None:
        self._store = store
        self._signing_key, *self._previous = derive_keys((root_secret, *previous), "usage-page")

    async def list_records(
        self, query: UsageQuery, page_size: int, page_token: str
    ) -> tuple[list[pb.UsageRecord], str]:
        """A page of records, newest first, and the token of the next page (empty: this was the last).

        Raises:
            PomeloError: invalid_parameter, store_unavailable.
        """
        size = pages.page_size(page_size)
        after = self._read_token(page_token, repr(query)).decode() if page_token else ""
        records: list[pb.UsageRecord] = []
        limit = _RECORDS_STEP
        while True:
            try:
                found, next_after = await self._store.list_usage(
                    query, limit=min(size - len(records), limit), after=after
                )
            except ValueError as error:
                raise pages.wrong_token() from error
            more = [_record(record) for record in found]
            count = pages.fitting([*records, *more]) - len(records)
            if 0 < count < len(more):  # read them again: the store knows where the next page begins
                size, limit = len(records) + count, count
                continue
            if count == len(more):
                records += more
                after = next_after
            if count < len(more) or len(records) == size or not after:
                return records, self._make_token(after.encode(), repr(query)) if after else ""

    async def sum_records(
        self, query: UsageQuery, by: Sequence[Grouping], page_size: int, page_token: str
    ) -> tuple[list[pb.UsageSum], str]:
        """A page of sums, in order of their groups, and the token of the next page (empty: this was the
        last).

        Raises:
            PomeloError: invalid_parameter, store_unavailable.
        """
        size = pages.page_size(page_size, MAX_SUMS, MAX_SUMS)
        size = min(size, _MAX_GROUPS_BYTES // (sum(map(_max_group_bytes, by)) or 1))
        list_name = f"{query} by {by}"
        after = tuple(from_json(self._read_token(page_token, list_name))) if page_token else None
        totals = await self._store.sum_usage(query, by, limit=size + 1, after=after)

        def fill_page() -> tuple[list[pb.UsageSum], int]:
            sums = [_sum(row) for row in totals]
            return sums, min(size, pages.fitting(sums, _MAX_SUMS_BYTES))

        sums, count = await asyncio.to_thread(fill_page) if len(totals) > _MANY_SUMS else fill_page()
        more = count < len(sums)
        return sums[:count], self._make_token(to_json(totals[count - 1].groups), list_name) if more else ""

    def _make_token(self, position: bytes, list_name: str) -> str:
        """A token that is valid for this list only."""
        return pages.encode(_sign(self._signing_key, position, list_name) + position)

    def _read_token(self, token: str, list_name: str) -> bytes:
        data = pages.decode(token)
        signature, position = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        for key in (self._signing_key, *self._previous):
            if hmac.compare_digest(signature, _sign(key, position, list_name)):
                return position
        raise pages.wrong_token()


def _sign(key: bytes, position: bytes, list_name: str) -> bytes:
    return hmac.digest(key, list_name.encode() + b"\0" + position, "sha256")[:_SIGNATURE_BYTES]


def _max_group_bytes(grouping: Grouping) -> int:
    """The maximum size of a group. The values of other dimensions are not the caller's own, and short."""
    if isinstance(grouping, MetadataKey):
        return 4 * MAX_METADATA_VALUE
    return 4 * MAX_USER_CHARACTERS if grouping == "user" else 64


def _record(record: UsageRecord) -> pb.UsageRecord:
    return pb.UsageRecord(
        **{name: getattr(record, name) for name in _RECORD_FIELDS},
        id=record.task_id,
        account_id=record.account,
        protocol=record.wire,
        mode=to_mode(record.live),
        task_type=_task_type(record.task_type),
        metadata=decode_metadata(record.metadata),
        usage=_usage(record),
        source=_SOURCES.get(record.source, pb.USAGE_SOURCE_UNSPECIFIED),
        end_time=times.to_timestamp(record.at),
        cost_micros=record.cost,
        provider_cost_micros=record.provider_micros or None,
    )


def _sum(row: UsageTotal) -> pb.UsageSum:
    return pb.UsageSum(
        groups=row.groups,
        tasks=row.tasks,
        usage=_usage(row),
        output_bytes=row.output_bytes,
        cost_micros=row.cost,
    )


def _usage(row: UsageRecord | UsageTotal) -> Usage:
    usage = Usage()
    write_counts(usage, row)
    return usage


def write_counts(usage: Usage, row: UsageRecord | UsageTotal) -> None:
    """Sets what a record or a sum has counted in an empty message."""
    for name, count in zip(_COUNTS, _read_counts(row), strict=True):
        if count:
            setattr(usage, name, count)
    if row.audio_ms:
        usage.audio_seconds = row.audio_ms / 1000


def _task_type(name: str) -> Any:
    value = TaskType.DESCRIPTOR.values_by_name.get(f"TASK_TYPE_{name.upper().replace('-', '_')}")
    return value.number if value is not None else TaskType.TASK_TYPE_UNSPECIFIED


# --- requests


def read_filter(usage_filter: pb.UsageFilter, account: str | None, live: bool | None) -> UsageQuery:
    """The query for the records that a request selects: of one account or all (None), in one mode or both.

    Raises:
        PomeloError: invalid_parameter.
    """
    since = read_time(usage_filter, "start_time", "filter.")
    until = read_time(usage_filter, "end_time", "filter.")
    if since is not None and until is not None and until < since:
        raise invalid("filter.end_time", "the start of the period or later")
    for name in ("model", "key_id"):
        if "\0" in getattr(usage_filter, name):  # with which Postgres compares nothing
            raise invalid(f"filter.{name}", "text without NUL")
    return UsageQuery(
        account=account,
        live=live,
        model=usage_filter.model or None,
        key_id=usage_filter.key_id or None,
        since=since,
        until=until,
        failed=usage_filter.failed,
    )


def read_groupings(group_by: Iterable[pb.UsageGrouping | admin_pb.UsageGrouping]) -> tuple[Grouping, ...]:
    """The groupings of a request.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    by = tuple([_grouping(grouping) for grouping in group_by])
    if len(set(by)) < len(by):
        raise invalid("group_by", "properties that differ from each other")
    if len(by) > MAX_GROUPINGS:
        raise invalid("group_by", f"up to {MAX_GROUPINGS} properties")
    return by


def _grouping(grouping: pb.UsageGrouping | admin_pb.UsageGrouping) -> Grouping:
    match grouping.WhichOneof("by"):
        case None:
            raise missing("group_by")
        case "metadata_key":
            try:
                if grouping.metadata_key:
                    return MetadataKey(grouping.metadata_key)
            except ValueError:
                pass
            raise invalid("group_by", "a metadata_key of at least one character, without NUL")
        case "dimension":
            found = _DIMENSIONS.get(grouping.dimension)
        case _:
            assert isinstance(grouping, admin_pb.UsageGrouping)
            found = _OPERATOR_DIMENSIONS.get(grouping.operator_dimension)
    if found is None:
        raise invalid("group_by", "a known dimension")
    return cast(Dimension, found)


def read_time(request: Any, name: str, path: str = "") -> float | None:
    """The Unix seconds of the time `name` of a request or of its message at `path`; None if it has none.

    Raises:
        PomeloError: invalid_parameter.
    """
    if not request.HasField(name):
        return None
    try:
        return times.from_timestamp(getattr(request, name))
    except ValueError as error:
        raise invalid(path + name, str(error)) from None
