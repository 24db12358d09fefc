"""Checks and parses serialized messages."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from pomelo.errors import PomeloError
from pomelo.server import field_limit


def check_size(data: bytes, limit: int = field_limit.SMALL_MESSAGE) -> bytes:
    """Returns a message of at most `limit` bytes.

    Raises:
        PomeloError: payload_too_large.
    """
    if len(data) > limit:
        raise PomeloError(
            "payload_too_large",
            f"The message is larger than {limit:,} bytes. Send less",
            values={"maxBytes": limit},
        )
    return data


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
