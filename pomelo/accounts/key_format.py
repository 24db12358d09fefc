"""The format of an API key: `pml_live_` or `pml_test_`, an id of 12 characters, `_`, a secret of 32
characters (190 bits) and a checksum of 6."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Callable

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

_LIVE = "pml_live_"
_TEST = "pml_test_"
_PREFIX = 9
_ID = 12
_SECRET = 32
_CHECKSUM = 6
_LENGTH = _PREFIX + _ID + 1 + _SECRET + _CHECKSUM
_CHARACTERS = frozenset(ALPHABET)

ID = slice(_PREFIX, _PREFIX + _ID)
"""Where a key has its id."""


def make_key(live: bool, choose: Callable[[str], str] = secrets.choice) -> tuple[str, str]:
    """Makes a key; returns it and its id. `choose` picks a random character."""
    key_id = "".join([choose(ALPHABET) for _ in range(_ID)])
    secret = "".join([choose(ALPHABET) for _ in range(_SECRET)])
    body = f"{_LIVE if live else _TEST}{key_id}_{secret}"
    return body + _checksum(body), key_id


def parse(key: str) -> str | None:
    """The id of a key, or None if its format or its checksum is wrong. Does not query the store."""
    if len(key) != _LENGTH or not key.startswith((_LIVE, _TEST)):
        return None
    key_id, underscore, rest = key[ID], key[ID.stop], key[ID.stop + 1 :]
    if underscore != "_" or not _CHARACTERS.issuperset(key_id) or not _CHARACTERS.issuperset(rest):
        return None
    return key_id if rest.endswith(_checksum(key[:-_CHECKSUM])) else None


def _checksum(body: str) -> str:
    rest = zlib.crc32(body.encode())
    digits = []
    for _ in range(_CHECKSUM):
        rest, digit = divmod(rest, 62)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))
