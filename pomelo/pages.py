"""Pages of the operator's lists: how many entries one has, and what its token says.

A page ends where its entries or its bytes do, so that every answer is a message that any client takes. What a
list is of, and in which order, is for those to say who read it.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message
from pydantic_core import from_json, to_json

from pomelo.errors import PomeloError, invalid

PAGE_SIZE = 100
"""Entries of a page where none is asked for."""

MAX_PAGE_SIZE = 1_000
"""The most entries of a page; who asks for more gets so many (AIP-158)."""

MAX_PAGE_BYTES = 1024 * 1024
"""A page takes no more entries once it has so many bytes."""


def page_size(asked: int) -> int:
    """How many entries a page has at most.

    Raises:
        PomeloError: invalid_parameter.
    """
    if asked < 0:
        raise invalid("page_size", "0 (the default) or more")
    return min(asked or PAGE_SIZE, MAX_PAGE_SIZE)


def fitting(entries: Sequence[Message]) -> int:
    """How many of these entries fit into a page: at least one, if there is one."""
    size = 0
    for count, entry in enumerate(entries):
        size += entry.ByteSize()
        if count and size > MAX_PAGE_BYTES:
            return count
    return len(entries)


def make_token(what: str, *place: Any) -> str:
    """The token of the page that begins after `place`; `what` is the list, with its filters."""
    return base64.urlsafe_b64encode(to_json([what, *place])).rstrip(b"=").decode()


def read_token(token: str, what: str, *kinds: type) -> list[Any]:
    """The place that `make_token` was given for the same list, of values of these types.

    Raises:
        PomeloError: invalid_parameter.
    """
    try:
        found = from_json(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
        if isinstance(found, list) and found[0] == what and [type(part) for part in found[1:]] == list(kinds):
            return found[1:]
    except (ValueError, binascii.Error, IndexError):
        pass
    raise wrong_token()


def wrong_token() -> PomeloError:
    """The error for a page token that is not the one of the page before."""
    return invalid("page_token", "the next_page_token of the page before, asked for with the same filters")
