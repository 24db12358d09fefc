"""The services of a channel, and the requests of lists."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pomelo.gen.v1.account_service_pb2 import ListUsageRequest, UsageFilter
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub


class Stubs:
    """The stubs of all services."""

    def __init__(self, channel: Any) -> None:
        self.tasks = TaskServiceStub(channel)
        self.models = ModelServiceStub(channel)
        self.media = MediaServiceStub(channel)
        self.accounts = AccountServiceStub(channel)


def usage_request(
    start: datetime | None, end: datetime | None, model: str, key_id: str, failed: bool
) -> ListUsageRequest:
    """Returns the request of the first page of usage records.

    Raises:
        ValueError: a time has no time zone.
    """
    wanted = UsageFilter(model=model, key_id=key_id, failed=failed)
    for time, target in ((start, wanted.start_time), (end, wanted.end_time)):
        if time is not None:
            if time.tzinfo is None:
                raise ValueError("start and end need a time zone, such as datetime.UTC")
            target.FromDatetime(time)
    return ListUsageRequest(filter=wanted, page_size=1000)
