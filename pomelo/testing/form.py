"""Forms that come in: read as a stream, so that an upload of any size is counted and hashed but never held.

The server reads with it, wires check what it found.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from aiohttp import BodyPartReader, web

_TEXT_MOST = 1024 * 1024
_PIECE = 256 * 1024
_HEAD = 64


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a form. `text` is the value of a field; None for a file, which has a `filename`.

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
    """The parts in the order in which they came.

    Raises:
        ValueError: it is no form.
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
    most = _HEAD if part.filename is not None else _TEXT_MOST
    while piece := await part.read_chunk(_PIECE):
        digest.update(piece)
        size += len(piece)
        if len(kept) < most:
            kept += piece[: most - len(kept)]
    return Part(
        name=name,
        filename=part.filename,
        content_type=part.headers.get("Content-Type", ""),
        text=kept.decode() if part.filename is None else None,
        size=size,
        sha256=digest.hexdigest(),
        head=kept[:_HEAD],
    )
