"""Fields of a request that the server does not know: where they are looked for when it arrives."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message

from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.server.messages import check_request
from tests.unit.refusals import refused

UNKNOWN = b"\xf8\x3f\x01"
"""Field 1023, with the number 1."""


@pytest.mark.parametrize(
    "request_",
    [
        UploadMediaRequest(header=UploadMediaHeader.FromString(UNKNOWN)),
        *[UploadMediaRequest.FromString(UNKNOWN), RunTaskRequest.FromString(UNKNOWN)],
        *[StreamTaskRequest.FromString(UNKNOWN), Usage.FromString(UNKNOWN)],
    ],
    ids=["in the header of an upload", "of an upload", "of a task", "of a stream", "of another request"],
)
def test_a_request_with_an_unknown_field_is_refused(request_: Message) -> None:
    with refused("invalid_parameter", match="Unknown field 1023"):
        check_request(request_)


def test_the_fields_of_a_task_are_not_checked_before_its_model() -> None:
    check_request(RunTaskRequest(spec=TaskSpec.FromString(UNKNOWN)))
