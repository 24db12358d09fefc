"""Receives, checks and parses serialized messages."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from google.protobuf.message import DecodeError

from pomelo.errors import PomeloError
from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.protobuf.unknown_fields import check_no_unknown_fields, check_outer_fields
from pomelo.runtime.process import shielded
from pomelo.server import field_limit

_LABEL = "the request"


def receive(context: Any) -> Coroutine[Any, Any, Any]:
    """Receives the next message of a call of grpc.aio, whose read continues if the caller is cancelled.

    If the read itself were cancelled, grpc.aio would never free the message that it may have received.
    """
    return shielded(asyncio.get_running_loop().create_task(context.read()))


def check_size(data: bytes, limit: int) -> bytes:
    """Returns a message of at most `limit` bytes.

    Raises:
        PomeloError: payload_too_large.
    """
    if len(data) > limit:
        raise too_large("message", limit)
    return data


def too_large(subject: str, limit: int) -> PomeloError:
    """Returns the error for a message or metadata (`subject`) of more than `limit` bytes."""
    message = f"The {subject} is larger than {limit:,} bytes. Send less"
    return PomeloError("payload_too_large", message, values={"maxBytes": limit})


def parse(data: bytes, message_type: Any) -> Any:
    """Parses a message.

    Raises:
        PomeloError: invalid_body, invalid_parameter.
    """
    field_limit.check(data, message_type.DESCRIPTOR)
    try:
        return message_type.FromString(data)
    except DecodeError:
        name = message_type.DESCRIPTOR.full_name
        message = f"The message can't be decoded. Send a {name}"
        raise PomeloError("invalid_body", message, values={"messageType": name}) from None


def check_request(request: Any) -> Any:
    """Returns a request without unknown fields.

    Raises:
        PomeloError: invalid_parameter.
    """
    # The model of a task is checked before the fields of its spec. A chunk has no fields in it.
    is_task = isinstance(request, (RunTaskRequest, StreamTaskRequest))
    if is_task or (isinstance(request, UploadMediaRequest) and not request.HasField("header")):
        check_outer_fields(request, _LABEL)
    else:
        check_no_unknown_fields(request, request.ByteSize(), _LABEL)
    return request
