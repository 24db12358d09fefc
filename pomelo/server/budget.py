"""Counts the fields of a serialized message before it is parsed.

A field of two bytes becomes an object of fifty: 9 MiB of empty messages take hundreds of megabytes and half a
second of the event loop to parse. Counting stops at the budget, so it takes a few milliseconds at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from pomelo.errors import PomeloError

MAX_FIELDS = 60_000
"""Fields of a message, including all nested ones: more than the longest conversation has."""

SMALL = 64 * 1024
"""Bytes of a message that may be parsed without being counted."""

_VARINT_BYTES = 10
_HIGH_BYTES = bytes(range(0x80, 0x100))
_FIXED_WIDTHS = {
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_SFIXED32: 4,
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_SFIXED64: 8,
    FieldDescriptor.TYPE_DOUBLE: 8,
}


def check(data: bytes, message: Descriptor) -> None:
    """Refuses a message that has too many fields; malformed bytes are left to the parser.

    Raises:
        PomeloError: invalid_parameter, which names the field that is repeated too often; invalid_body.
    """
    if len(data) <= SMALL:
        return
    name = excess(data, message, MAX_FIELDS)
    if name is None:
        return
    if not name:
        raise PomeloError("invalid_body", f"The message has more than {MAX_FIELDS:,} fields. Send fewer")
    raise PomeloError(
        "invalid_parameter",
        f"Too many {name}: a message may have {MAX_FIELDS:,} fields in all. Send fewer",
        field=name,
    )


@dataclass(frozen=True, slots=True)
class _Field:
    """What the count needs of a field. `name` is empty unless it is repeated; `width` is the bytes of one
    packed value, 0 for varints, None where nothing is packed."""

    name: str
    child: Descriptor | None
    width: int | None


@cache
def _fields(message: Descriptor) -> Mapping[int, _Field]:
    """The fields of a message by their numbers, without those that are one scalar value."""
    found = {}
    for field in message.fields:
        packable = field.is_repeated and field.cpp_type not in (
            FieldDescriptor.CPPTYPE_STRING,
            FieldDescriptor.CPPTYPE_MESSAGE,
        )
        if field.is_repeated or field.message_type is not None:
            found[field.number] = _Field(
                field.name if field.is_repeated else "",
                field.message_type,
                _FIXED_WIDTHS.get(field.type, 0) if packable else None,
            )
    return found


def excess(data: bytes, message: Descriptor, most: int) -> str | None:
    """None where `data` has at most `most` fields, or is malformed before it has more. Otherwise the name of
    the repeated field in which the budget ends; empty if it does not end in a repeated field.

    Goes through the bytes in the same order as a parser, so bytes that it has not counted are never parsed.
    """
    try:
        return _excess(data, message, most)
    except IndexError:
        return None  # the bytes end inside a field


def _excess(data: bytes, message: Descriptor, left: int) -> str | None:
    at, end = 0, len(data)
    fields, name = _fields(message), ""
    groups = 0  # nested groups, which no message of ours has: what is inside them is not ours either
    parents: list[tuple[int, Mapping[int, _Field], str]] = []
    while True:
        if at >= end:
            if at > end or groups or not parents:
                return None
            end, fields, name = parents.pop()
            continue
        tag = data[at]
        at += 1
        if tag >= 0x80:
            tag, at = _varint(data, at - 1)
        field = None if groups else fields.get(tag >> 3)
        left -= 1
        if left < 0:
            return (field.name if field is not None else "") or name
        match tag & 7:
            case 2:
                size = data[at]
                at += 1
                if size >= 0x80:
                    size, at = _varint(data, at - 1)
                if size > end - at:
                    return None
                if field is None:
                    at += size
                elif field.child is not None:
                    parents.append((end, fields, name))
                    end, fields, name = at + size, _fields(field.child), field.name or name
                else:
                    if field.width is not None:
                        left -= _packed(data[at : at + size], field.width)
                        if left < 0:
                            return field.name
                    at += size
            case 0:
                _, at = _varint(data, at)
            case 1:
                at += 8
            case 5:
                at += 4
            case 3:
                groups += 1
            case 4 if groups:
                groups -= 1
            case _:
                return None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends.

    Raises:
        IndexError: the bytes end before it does, or it is longer than any number is.
    """
    value = shift = 0
    for index in range(at, at + _VARINT_BYTES):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    raise IndexError


def _packed(values: bytes, width: int) -> int:
    """How many values are packed in so many bytes."""
    return len(values) // width if width else len(values.translate(None, _HIGH_BYTES))
