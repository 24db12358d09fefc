"""Serializes a response of one message without copying the message into it: copying 64 KiB of audio takes a
hundred times as long as serializing it."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import Message

_LENGTH_DELIMITED = 2
_SHORT = [bytes((size,)) for size in range(0x80)]
"""The encodings of lengths that take one byte, as those of most events do."""


def envelope(response_type: type[Message]) -> Callable[[Message], bytes]:
    """Returns a function that serializes a response of this type from the value of its only field."""
    (field,) = response_type.DESCRIPTOR.fields
    tag = bytes((field.number << 3 | _LENGTH_DELIMITED,))

    def serialize(message: Message) -> bytes:
        data = message.SerializeToString()
        size = len(data)
        return tag + (_SHORT[size] if size < len(_SHORT) else _varint(size)) + data

    return serialize


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
