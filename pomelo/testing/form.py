"""Reads multipart forms as a stream, so that an upload of any size is counted and hashed but never stored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from aiohttp import BodyPartReader, web

_MAX_TEXT_BYTES = 1024 * 1024
_CHUNK_BYTES = 256 * 1024
_HEAD_BYTES = 64


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a form. `text` is the value of a field; None for a file, which has a `filename`.

    `size` is in bytes, `sha256` in hexadecimal digits; `head` has the first bytes.
    """

    name: str
    filename: str | None
    content_type: str
    text: str | None
    size: int
    sha256: str
    head: bytes


async def read_form(request: web.Request) -> tuple[Part, ...]:
    """Return the parts in their order.

    Raises:
        ValueError: the request is not a form.
    """
    reader = await request.multipart()
    parts: list[Part] = []
    while True:
        part = await reader.next()
        if part is None:
            return tuple(parts)
        if not isinstance(part, BodyPartReader) or not part.name:
            raise ValueError("a part without a name")
        parts.append(await _read(part, part.name))


async def _read(part: BodyPartReader, name: str) -> Part:
    digest = hashlib.sha256()
    size = 0
    kept = b""
    max_kept = _HEAD_BYTES if part.filename is not None else _MAX_TEXT_BYTES
    while chunk := await part.read_chunk(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
        if len(kept) < max_kept:
            kept += chunk[: max_kept - len(kept)]
    return Part(
        name=name,
        filename=part.filename,
        content_type=part.headers.get("Content-Type", ""),
        text=kept.decode() if part.filename is None else None,
        size=size,
        sha256=digest.hexdigest(),
        head=kept[:_HEAD_BYTES],
    )
