"""Pages of lists: their sizes and page tokens.

A page is limited in entries and in bytes, so that every client accepts the message.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message
from pydantic_core import from_json, to_json

from pomelo.errors import PomeloError, invalid

_Entry = TypeVar("_Entry", bound=Message)

PAGE_SIZE = 100
"""Entries in a page by default."""

MAX_PAGE_SIZE = 1_000
"""The maximum number of entries in a page; a larger page_size is reduced to it (AIP-158)."""

MAX_PAGE_BYTES = 1024 * 1024
"""The maximum size of a page by default, unless its first entry alone is larger."""

_STANDARD = str.maketrans("-_+/", "+/!!")
"""From base64 for URLs to standard base64. Python's decoders for URLs accept the characters of both."""


def page_size(requested: int, default: int = PAGE_SIZE, maximum: int = MAX_PAGE_SIZE) -> int:
    """The maximum number of entries in a page; `requested` is the request's page_size.

    Raises:
        PomeloError: invalid_parameter.
    """
    if requested < 0:
        raise invalid("page_size", "0 (the default) or more")
    return min(requested or default, maximum)


def fitting(entries: Sequence[Message], max_bytes: int = MAX_PAGE_BYTES) -> int:
    """How many of these entries fit into a page: at least one, unless `entries` is empty."""
    size = 0
    for count, entry in enumerate(entries):
        size += entry.ByteSize()
        if count and size > max_bytes:
            return count
    return len(entries)


def first_page(
    entries: Sequence[_Entry], size: int, list_name: str, position: Callable[[int], Sequence[Any]]
) -> tuple[Sequence[_Entry], str]:
    """The entries of a page of at most `size`, and the token of the next page (empty: there is no more).
    `position` returns that of the entry with this index."""
    count = min(size, fitting(entries))
    if count == len(entries):
        return entries, ""
    return entries[:count], make_token(list_name, *position(count - 1))


def make_token(list_name: str, *position: Any) -> str:
    """The token of the page that begins after `position`; `list_name` identifies the list and its filters."""
    return encode(to_json([list_name, *position]))


def read_token(token: str, list_name: str, *types: type) -> Any:
    """The position that `make_token` encoded for the same list, a tuple of these types; None without a token.

    Raises:
        PomeloError: invalid_parameter.
    """
    if not token:
        return None
    try:
        match from_json(decode(token)):
            case [name, *position] if name == list_name and [type(value) for value in position] == list(
                types
            ):
                return tuple(position)
    except ValueError:
        pass
    raise wrong_token()


def encode(data: bytes) -> str:
    """A page token of these bytes."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(token: str) -> bytes:
    """The bytes of a page token.

    Raises:
        PomeloError: invalid_parameter.
    """
    try:
        return base64.b64decode(token.translate(_STANDARD) + "=" * (-len(token) % 4), validate=True)
    except ValueError:
        raise wrong_token() from None


def wrong_token() -> PomeloError:
    """The error for a page token that the list did not return."""
    return invalid("page_token", "the next_page_token of the previous page, sent with the same filters")
