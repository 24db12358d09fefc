"""Refuses fields that this version does not know: ignoring one, such as a limit of cost, may cost money."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from pomelo.errors import PomeloError

_COPIED = 256 * 1024
"""Bytes up to which a message is compared with a copy. For many small messages, that takes a tenth of the
time of a search; a search copies no large texts and media."""


def check_no_unknown_fields(message: Message, size: int, label: str) -> None:
    """Refuses a message, of `size` bytes, with a field at any depth that its type does not have. The error
    calls the message `label`.

    Raises:
        PomeloError: invalid_parameter, with the path of the message that contains it.
    """
    if not size:
        return
    if size <= _COPIED:
        known = type(message)()
        known.CopyFrom(message)
        known.DiscardUnknownFields()
        if known.ByteSize() == size:
            return
    for path, number in _unknown_fields(message, ""):
        raise _refusal(number, path, label)


def check_outer_fields(message: Message, label: str) -> None:
    """As `check_no_unknown_fields`, but not of the messages in it.

    Raises:
        PomeloError: invalid_parameter.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise _refusal(unknown[0].field_number, "", label)


def _refusal(number: int, path: str, label: str) -> PomeloError:
    return PomeloError(
        "invalid_parameter",
        f"Unknown field {number} of {path or label}: this server does not have it. "
        "Leave it out, or use the server's version of the contract",
        field=path or None,
        values={"fieldNumber": number},
    )


def _unknown_fields(message: Message, path: str) -> Iterator[tuple[str, int]]:
    """The path and the number of each unknown field."""
    unknown = UnknownFieldSet(message)
    for index in range(len(unknown)):
        yield path, unknown[index].field_number
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        name = f"{path}.{field.name}" if path else field.name
        for index, each in enumerate(value if field.is_repeated else (value,)):
            yield from _unknown_fields(each, f"{name}[{index}]" if field.is_repeated else name)
