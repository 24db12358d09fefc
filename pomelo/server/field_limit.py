"""Limits the number of fields of a serialized message, before it is parsed.

A field of two bytes becomes an object of fifty: parsing 9 MiB of empty messages takes hundreds of megabytes
and blocks the event loop for half a second. Counting stops at the limit, so it takes a few milliseconds at
most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from pomelo.errors import PomeloError

MAX_FIELDS = 60_000
"""Maximum number of fields of a message, including nested ones: more than the longest conversation has."""

SMALL_MESSAGE = 64 * 1024
"""Bytes of a message up to which its fields need not be counted."""

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
    """Refuses a message that has too many fields. Malformed bytes are left to the parser.

    Raises:
        PomeloError: invalid_parameter, with the field that is repeated too often; invalid_body.
    """
    if len(data) <= SMALL_MESSAGE:
        return
    name = excess_field(data, message, MAX_FIELDS)
    if name is None:
        return
    if not name:
        raise PomeloError(
            "invalid_body",
            f"The message has more than {MAX_FIELDS:,} fields. Send fewer",
            values={"maxFields": MAX_FIELDS},
        )
    raise PomeloError(
        "invalid_parameter",
        f"Too many {name}: a message may have {MAX_FIELDS:,} fields in all. Send fewer",
        field=name,
        values={"maxFields": MAX_FIELDS},
    )


@dataclass(frozen=True, slots=True)
class _Field:
    """What counting needs to know about a field. `name` is empty unless it is repeated; `width` is the bytes
    of one packed value, 0 for varints, None if its values can't be packed."""

    name: str
    child: Descriptor | None
    width: int | None


@cache
def _fields(message: Descriptor) -> Mapping[int, _Field]:
    """Returns the fields of a message by their numbers, except single scalar ones."""
    fields = {}
    for field in message.fields:
        packable = field.is_repeated and field.cpp_type not in (
            FieldDescriptor.CPPTYPE_STRING,
            FieldDescriptor.CPPTYPE_MESSAGE,
        )
        if field.is_repeated or field.message_type is not None:
            fields[field.number] = _Field(
                field.name if field.is_repeated else "",
                field.message_type,
                _FIXED_WIDTHS.get(field.type, 0) if packable else None,
            )
    return fields


def excess_field(data: bytes, message: Descriptor, max_fields: int) -> str | None:
    """Returns the name of the repeated field that exceeds `max_fields`, empty if it is not a repeated one.
    Returns None if `data` has at most `max_fields` fields or is malformed before it has more.

    It scans the bytes in the order of a parser, so the parser never parses bytes that were not counted.
    """
    try:
        return _scan(data, message, max_fields)
    except IndexError:
        return None  # the bytes end inside a field


def _scan(data: bytes, message: Descriptor, remaining: int) -> str | None:
    position, end = 0, len(data)
    fields, name = _fields(message), ""
    groups = 0  # depth of nested groups; no field in the contract is a group, so their fields are unknown
    parents: list[tuple[int, Mapping[int, _Field], str]] = []
    while True:
        if position >= end:
            if position > end or groups or not parents:
                return None
            end, fields, name = parents.pop()
            continue
        tag = data[position]
        position += 1
        if tag >= 0x80:
            tag, position = _varint(data, position - 1)
        field = None if groups else fields.get(tag >> 3)
        remaining -= 1
        if remaining < 0:
            return (field.name if field is not None else "") or name
        match tag & 7:
            case 2:
                size = data[position]
                position += 1
                if size >= 0x80:
                    size, position = _varint(data, position - 1)
                if size > end - position:
                    return None
                if field is None:
                    position += size
                elif field.child is not None:
                    parents.append((end, fields, name))
                    end, fields, name = position + size, _fields(field.child), field.name or name
                else:
                    if field.width is not None:
                        remaining -= _packed(data[position : position + size], field.width)
                        if remaining < 0:
                            return field.name
                    position += size
            case 0:
                _, position = _varint(data, position)
            case 1:
                position += 8
            case 5:
                position += 4
            case 3:
                groups += 1
            case 4 if groups:
                groups -= 1
            case _:
                return None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns a number and the position after it.

    Raises:
        IndexError: the number is truncated or too long.
    """
    value = shift = 0
    for index in range(position, position + _VARINT_BYTES):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    raise IndexError


def _packed(values: bytes, width: int) -> int:
    return len(values) // width if width else len(values.translate(None, _HIGH_BYTES))
