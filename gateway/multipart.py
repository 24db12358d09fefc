"""A form (multipart/form-data), read part by part as it arrives; sound goes straight to the media store.

Called by `gateway.task`. Nothing here holds a whole upload.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from gateway.body import HEARS, TAKES_FILE
from gateway.charset import UTF_8, charset_of
from gateway.fields import INPUTS, JSON_TEXTS, KNOWN, unknown
from gateway.form_parts import PIECE, FormParts, Part
from gateway.incoming import Incoming, too_large
from gateway.json_scan import JsonScan
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_pb2 import Media
from pomelo.service import MediaService


@dataclass(slots=True)
class Form:
    """What a form holds: its texts by field, and its sound once stored."""

    texts: dict[str, str] = field(default_factory=dict)
    audio: Media | None = None


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

    A part `audio` with a file name, or a media type that is not text, is a file: it is stored by `media` as
    it comes. If the model came before it, `kind_of` returns its task type: text-to-speech drops the file,
    types without audio refuse it. In bytes, `text_limit` bounds all texts together, `upload_limit` a file.

    Raises:
        PomeloError: invalid_body, invalid_parameter, payload_too_large, overloaded; what `media` and
            `kind_of` raise.
    """
    parts = FormParts(content_type, incoming)
    text_size = 0
    while (part := await parts.next()) is not None:
        name = part.name
        if name not in KNOWN:
            raise unknown(name)
        if name in form.texts or (name == "audio" and form.audio is not None):
            raise invalid(name, "given once")
        if name == "audio" and _is_file(part):
            form.audio = await _take_file(
                parts, part, form.texts.get("model"), call, media, kind_of, upload_limit
            )
            continue
        scan = JsonScan() if name in JSON_TEXTS else None
        pieces = []
        while piece := await parts.read(min(PIECE, text_limit - text_size + 1)):
            text_size += len(piece)
            if text_size > text_limit:
                raise too_large("The form without its file", text_limit)
            incoming.hold(len(piece))
            if scan is not None:
                scan.feed(piece)
            pieces.append(piece)
        form.texts[name] = _decode(name, b"".join(pieces), part.content_type)
    if not form.texts and form.audio is None:
        raise PomeloError("invalid_body", "The form is empty. Send at least a part named model")


def _is_file(part: Part) -> bool:
    # Some HTTP libraries give every text the media type text/plain.
    return part.filename is not None or not (part.content_type or "text/").startswith("text/")


def _decode(name: str, data: bytes, content_type: str) -> str:
    # ASCII is the same in many charsets, and HTTP libraries name one that the text does not need.
    charset = charset_of(content_type)
    if charset in UTF_8 or (data.isascii() and b"\0" not in data):
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
    raise invalid(name, "UTF-8 text")


async def _take_file(
    parts: FormParts,
    part: Part,
    model: str | None,
    call: Call,
    media: MediaService,
    kind_of: Callable[[str], Awaitable[int]],
    limit: int,
) -> Media:
    async with aclosing(_pieces(parts, limit)) as pieces:
        kind = await kind_of(model) if model is not None else 0
        if kind in INPUTS and kind not in TAKES_FILE:
            raise unknown("audio", kind)
        if kind and kind not in HEARS:
            async for _ in pieces:
                pass
            return Media()
        first = await anext(pieces, None)
        if first is None:
            return Media()  # an empty file: nothing to a model that has no use for it
        # Bytes that are not UTF-8 can't be sent to a remote server.
        content_type = part.content_type.encode("ascii", "replace").decode()
        return await media.upload_media(content_type, _joined(first, pieces), call)


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


async def _pieces(parts: FormParts, limit: int) -> AsyncGenerator[bytes, None]:
    size = 0
    while piece := await parts.read():
        size += len(piece)
        if size > limit:
            raise too_large("The file", limit)
        yield piece
