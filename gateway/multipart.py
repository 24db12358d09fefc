"""A form (multipart/form-data), read part by part as it arrives; sound goes straight to the media store.

Called by `gateway.task`. Nothing here holds a whole upload.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from aiohttp import BodyPartReader, MultipartReader
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import StreamReader
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.body import HEARS
from gateway.fields import KNOWN, unknown
from gateway.incoming import Incoming, too_large
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_pb2 import Media
from pomelo.service import MediaService

MAX_PARTS = 32
MAX_PART_HEADERS = 16
PIECE = 64 * 1024
"""Bytes of a part that are read at once; aiohttp's reader holds some four times as many for each upload."""

_DISPOSITION = re.compile(r"\s*form-data\s*(?=;|$)", re.IGNORECASE)
_PARAMETER = re.compile(r';\s*([\w!#$&+.^`|~-]+\*?)\s*=\s*("(?:[^"\\]|\\.)*"|[^;"\s]*)', re.ASCII)
_MEDIA_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+(?:\s*;\s*[\w.+-]+=[\w.+-]+)*", re.ASCII)
_PLAIN = frozenset({"", "7bit", "8bit", "binary"})
_BROKEN = (ValueError, RuntimeError, AssertionError, LookupError, HttpProcessingError)


@dataclass(slots=True)
class Form:
    """What a form holds: its texts by field, and its sound once stored."""

    texts: dict[str, str] = field(default_factory=dict)
    audio: Media | None = None


class _Parts(MultipartReader):
    """aiohttp's reader, with a part's headers read here: aiohttp's reading of them warns, once for every
    new malformed header, and never forgets what it warned of."""

    name = ""
    filename: str | None = None
    content_type = ""

    async def fetch_next_part(self) -> MultipartReader | BodyPartReader:
        part = await super().fetch_next_part()
        headers = part.headers
        if not isinstance(part, BodyPartReader):
            raise ValueError("a form in a form")
        if headers.get("Content-Transfer-Encoding", "").strip().lower() not in _PLAIN:
            raise ValueError("an encoded part")
        disposition = headers.get("Content-Disposition", "")
        start = _DISPOSITION.match(disposition)
        if start is None:
            raise ValueError("no form-data")
        given = {
            key.lower(): value[1:-1] if value.startswith('"') else value
            for key, value in _PARAMETER.findall(disposition, start.end())
        }
        if "name" not in given:
            raise ValueError("no name")
        self.name = given["name"]
        self.filename = given.get("filename", given.get("filename*"))
        self.content_type = headers.get("Content-Type", "").strip().lower()
        part.headers = CIMultiDictProxy(CIMultiDict())
        return part


async def read_form(
    form: Form,
    content_type: str,
    incoming: Incoming,
    *,
    call: Call,
    media: MediaService,
    kind_of: Callable[[str], Awaitable[int]],
    text_limit: int,
    upload_limit: int,
) -> None:
    """Fills `form` from a body, part by part; what came before a failure stays in it.

    A part `audio` with a file name or a media type is a file: it is stored by `media` as it comes, unless the
    model came before it and, as `kind_of` tells (which checks the key), has no use for sound.
    `text_limit` is the most bytes of all texts together, `upload_limit` of a file.

    Raises:
        PomeloError: invalid_body, invalid_parameter, payload_too_large; what `media` and `kind_of` raise.
    """
    try:
        parts = _Parts(
            {"Content-Type": content_type},
            cast(StreamReader, incoming),
            max_headers=MAX_PART_HEADERS,
        )
    except _BROKEN as error:
        raise _malformed() from error
    count = text_size = 0
    while (part := await _guarded(parts.next())) is not None:
        count += 1
        if count > MAX_PARTS:
            raise PomeloError("invalid_body", f"The form has more than {MAX_PARTS} parts")
        name = parts.name
        if name not in KNOWN:
            raise unknown(name)
        if name in form.texts or (name == "audio" and form.audio is not None):
            raise invalid(name, "given once")
        if name == "audio" and (parts.filename is not None or parts.content_type):
            form.audio = await _take_file(
                part, parts.content_type, form.texts.get("model"), call, media, kind_of, upload_limit
            )
            continue
        pieces = []
        while not part.at_eof():
            piece = await _guarded(part.read_chunk(PIECE))
            text_size += len(piece)
            if text_size > text_limit:
                raise too_large("The form without its file", text_limit)
            pieces.append(piece)
        try:
            form.texts[name] = b"".join(pieces).decode()
        except UnicodeDecodeError:
            raise invalid(name, "UTF-8 text") from None
    if not count:
        raise PomeloError("invalid_body", "The form is empty. Send at least a part named model")


async def _take_file(
    part: BodyPartReader,
    content_type: str,
    model: str | None,
    call: Call,
    media: MediaService,
    kind_of: Callable[[str], Awaitable[int]],
    limit: int,
) -> Media:
    async with aclosing(_pieces(part, limit)) as pieces:
        if model is not None and await kind_of(model) not in HEARS:
            async for _ in pieces:
                pass
            return Media()
        first = await anext(pieces, None)
        if first is None:
            return Media()  # an empty file: nothing to a model that has no use for it
        if content_type == "application/octet-stream" or not _MEDIA_TYPE.fullmatch(content_type):
            content_type = ""
        return await media.upload_media(content_type, _joined(first, pieces), call)


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


async def _pieces(part: BodyPartReader, limit: int) -> AsyncGenerator[bytes, None]:
    size = 0
    while not part.at_eof():
        piece = await _guarded(part.read_chunk(PIECE))
        size += len(piece)
        if size > limit:
            raise too_large("The file", limit)
        if piece:
            yield piece


async def _guarded(step: Awaitable[Any]) -> Any:
    try:
        return await step
    except _BROKEN as error:
        raise _malformed() from error


def _malformed() -> PomeloError:
    return PomeloError(
        "invalid_body", "The form is malformed. Send multipart/form-data with a boundary, to its end"
    )
