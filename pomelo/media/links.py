"""Ids and signed links of media files: who owns a file, and who may download it without a key."""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import re
from collections.abc import Sequence

from pomelo.errors import PomeloError
from pomelo.ids import id_time, new_id
from pomelo.secrets import derive_keys

_OWNER_TAG_SIZE = 10
_STEM = re.compile(r"(?:media_|\.part_)([0-9a-z]{26})([0-9a-z]{16})")
_QUERY = re.compile(r"exp=([0-9]{1,12})&sig=([A-Za-z0-9_-]{43})")


class MediaIds:
    """Creates ids that contain their owner's tag, so that no index of owners is needed.

    The tag is encrypted: ids do not reveal that they have the same owner. Only Pomelo creates files, so an
    altered id names no file.

    Files that were made under a `previous` root secret still have their owner, but `tag_of` can't read their
    tag: until they expire, the quota counts them as those of an unknown owner.
    """

    def __init__(self, secret: bytes, previous: Sequence[bytes] = ()) -> None:
        self._key, *self._previous = derive_keys((secret, *previous), "media owner")

    def owner_tag(self, owner: str) -> bytes:
        """A short hash that identifies an owner."""
        return _owner_tag(self._key, owner)

    def new_stem(self, owner_tag: bytes) -> str:
        """The part of a new file's name between its prefix and its extension."""
        unique = new_id("")
        return unique + _encrypt(self._key, unique, owner_tag)

    def is_owner(self, unique: str, encrypted: str, owner: str) -> bool:
        """Whether a stem, given as its two parts, is one of `owner`'s."""
        return any(
            hmac.compare_digest(encrypted, _encrypt(key, unique, _owner_tag(key, owner)))
            for key in (self._key, *self._previous)
        )

    def tag_of(self, name: str) -> bytes:
        """The owner's tag in the name of a file; empty if it has none."""
        match = _STEM.match(name)
        try:
            if match is not None:
                return _mask(self._key, match[1], base64.b32decode(match[2].upper()))
        except ValueError:
            pass
        return b""

    def created(self, name: str) -> float:
        """The Unix time in seconds at which a file's id was made; infinite for other names."""
        match = _STEM.match(name)
        return id_time(match[1]) if match is not None else math.inf


def _owner_tag(key: bytes, owner: str) -> bytes:
    return hmac.digest(key, f"owner {owner}".encode(), hashlib.sha256)[:_OWNER_TAG_SIZE]


def _encrypt(key: bytes, unique: str, tag: bytes) -> str:
    return base64.b32encode(_mask(key, unique, tag)).decode().lower()


def _mask(key: bytes, unique: str, tag: bytes) -> bytes:
    mask = hmac.digest(key, f"id {unique}".encode(), hashlib.sha256)
    return bytes(a ^ b for a, b in zip(tag, mask[:_OWNER_TAG_SIZE], strict=True))


class LinkSigner:
    """Signs links to media files, and checks them, also those signed under a `previous` root secret. Times
    are Unix time in seconds."""

    def __init__(self, secret: bytes, previous: Sequence[bytes] = ()) -> None:
        self._key, *self._previous = derive_keys((secret, *previous), "media link")

    def path(self, media_id: str, expires: float) -> str:
        """The path and query string of a link that is valid until `expires`."""
        until = str(int(expires))
        return f"/media/{media_id}?exp={until}&sig={_sign(self._key, media_id, until)}"

    def check(self, media_id: str, query: str, now: float) -> None:
        """Checks the query string of a link.

        Raises:
            PomeloError: not_found.
        """
        match = _QUERY.fullmatch(query)
        if (
            match is None
            or int(match[1]) < now
            or not any(
                hmac.compare_digest(match[2], _sign(key, media_id, match[1]))
                for key in (self._key, *self._previous)
            )
        ):
            raise PomeloError("not_found", "The link is wrong or has expired")


def _sign(key: bytes, media_id: str, until: str) -> str:
    tag = hmac.digest(key, f"{media_id} {until}".encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(tag).decode().rstrip("=")
