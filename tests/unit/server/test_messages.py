"""How messages are received, and where fields that the server does not know are looked for."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf.message import Message

from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.server.messages import check_request, receive
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


async def test_a_read_continues_if_its_call_ends() -> None:
    """grpc.aio frees what it has received only at the end of the read."""
    arrived = asyncio.Event()
    received = []

    class Context:
        async def read(self) -> bytes:
            await arrived.wait()
            received.append(b"message")
            return b"message"

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await receive(Context())
    arrived.set()
    assert await receive(Context()) == b"message"
    assert received == [b"message"] * 2
