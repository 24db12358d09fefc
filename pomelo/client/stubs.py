"""The services of a channel, and the requests of lists."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypedDict

from pomelo.client.messages import to_enum
from pomelo.gen.v1.account_service_pb2 import (
    ListUsageRequest,
    SumUsageRequest,
    UsageDimension,
    UsageFilter,
    UsageGrouping,
)
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub

_METADATA = "metadata."
"""Begins the grouping by a key of the tasks' metadata, as over REST."""


class Stubs:
    """The stubs of all services."""

    def __init__(self, channel: Any) -> None:
        self.tasks = TaskServiceStub(channel)
        self.models = ModelServiceStub(channel)
        self.media = MediaServiceStub(channel)
        self.accounts = AccountServiceStub(channel)


class UsageOptions(TypedDict, total=False):
    """Which usage records: those of tasks that ended from `start` until before `end`, of a `model`, of the
    key `key_id`. `failed`: those of tasks that failed, in place of those that were billed."""

    start: datetime | None
    end: datetime | None
    model: str
    key_id: str
    failed: bool


def list_usage_request(options: UsageOptions) -> ListUsageRequest:
    """Returns the request of the first page of usage records.

    Raises:
        ValueError: a time has no time zone; TypeError: a time is no datetime, or there is no such option.
    """
    return ListUsageRequest(filter=_filter(**options), page_size=1000)


def sum_usage_request(group_by: Sequence[str], options: UsageOptions) -> SumUsageRequest:
    """Returns the request of the first page of sums; the arguments of `list_usage_request`, and by what they
    are grouped.

    Raises:
        ValueError: a time has no time zone, or a property is unknown; TypeError: a time is no datetime, or
            there is no such option.
    """
    return SumUsageRequest(filter=_filter(**options), group_by=[_grouping(name) for name in group_by])


def _filter(
    start: datetime | None = None,
    end: datetime | None = None,
    model: str = "",
    key_id: str = "",
    failed: bool = False,
) -> UsageFilter:
    wanted = UsageFilter(model=model, key_id=key_id, failed=failed)
    for time, target in ((start, wanted.start_time), (end, wanted.end_time)):
        if time is not None:
            if not isinstance(time, datetime):
                raise TypeError(f"start and end are of datetime.datetime, not {type(time).__name__}")
            if time.tzinfo is None:
                raise ValueError("start and end need a time zone, such as datetime.UTC")
            target.FromDatetime(time)
    return wanted


def _grouping(name: str) -> UsageGrouping:
    if isinstance(name, str) and name.startswith(_METADATA):
        return UsageGrouping(metadata_key=name.removeprefix(_METADATA))
    return UsageGrouping(dimension=to_enum(UsageDimension, "group_by", name))
