"""Pages of the operator's lists: how many entries one has, and what its token says.

A page is limited in entries and in bytes, so that every client accepts the message. The callers
define what a list contains and in which order.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message
from pydantic_core import from_json, to_json

from pomelo.errors import PomeloError, invalid

PAGE_SIZE = 100
"""Entries in a page by default."""

MAX_PAGE_SIZE = 1_000
"""The most entries in a page; a larger page_size is reduced to it (AIP-158)."""

MAX_PAGE_BYTES = 1024 * 1024
"""The most bytes in a page, unless its first entry alone is larger."""


def page_size(asked: int) -> int:
    """How many entries a page has at most.

    Raises:
        PomeloError: invalid_parameter.
    """
    if asked < 0:
        raise invalid("page_size", "0 (the default) or more")
    return min(asked or PAGE_SIZE, MAX_PAGE_SIZE)


def fitting(entries: Sequence[Message]) -> int:
    """How many of these entries fit into a page: at least one, unless there are none."""
    size = 0
    for count, entry in enumerate(entries):
        size += entry.ByteSize()
        if count and size > MAX_PAGE_BYTES:
            return count
    return len(entries)


def make_token(what: str, *place: Any) -> str:
    """The token of the page that begins after `place`; `what` identifies the list and its
    filters."""
    return base64.urlsafe_b64encode(to_json([what, *place])).rstrip(b"=").decode()


def read_token(token: str, what: str, *kinds: type) -> list[Any]:
    """The place that `make_token` encoded for the same list; its values have the types `kinds`.

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
