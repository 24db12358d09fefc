"""Reads forms (multipart/form-data) part by part as they arrive, storing the audio file on the way.

An upload is never buffered as a whole.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway.parsing.body import UTF_8, RequestBody, charset_of, too_large
from gateway.parsing.json import JsonScan
from gateway.request import Request
from gateway.state import Gateway
from gateway.types import FIELD_NAMES, FIELD_PARTS, JSON_FIELDS, TASK_FORMATS, check_task_type
from gateway.types.fields import renamed_field, shorten_name, unknown_field
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_pb2 import Media
from pomelo.service import Visit

READ_SIZE = 64 * 1024
"""The default size, in bytes, of one read from a part; the last one may be smaller."""

MAX_PARTS = 32
MAX_PART_HEADERS = 16
MAX_PART_HEADER_BYTES = 8 * 1024
"""Bytes of all headers of a part."""

MAX_PADDING = 1024
"""Bytes before the first part, and after the last."""

_BOUNDARY = re.compile(
    r""";\s*boundary=(?:"([!#-\[\]-~ ]{0,69}[!#-\[\]-~])"|([!#-:<-\[\]-~]{1,70}))\s*(?=;|$)""", re.IGNORECASE
)
_DISPOSITION = re.compile(r"\s*form-data\s*(?=;|$)", re.IGNORECASE)
_PARAMETER = re.compile(r';\s*([\w!#$&+.^`|~-]+\*?)\s*=\s*("(?:[^"\\]|\\.)*"|[^;"\s]*)', re.ASCII)
_HEADER = re.compile(r"([\w!#$%&'*+.^`|~-]+):[ \t]*(.*)", re.ASCII)
_UNENCODED = frozenset({"", "7bit", "8bit", "binary"})
_PART_HEADERS = frozenset({"content-disposition", "content-type", "content-transfer-encoding"})
"""The headers of a part that are read. They may not be repeated: a proxy may read a different one."""


class Source(Protocol):
    """The source of a body's bytes."""

    async def read_available(self) -> bytes:
        """Returns the next bytes, as many as have arrived; empty at the end."""


@dataclass(frozen=True, slots=True)
class Part:
    """The headers of a part. If absent, `filename` is None and `content_type` is empty."""

    name: str
    filename: str | None
    content_type: str


class FormParts:
    """Reads the parts of a multipart/form-data body (RFC 7578) with `content_type`, one after the other.

    Scans every byte a bounded number of times, whatever the body contains and however it is split, and
    buffers at most two of its pieces.

    Raises:
        PomeloError: invalid_body: there is no usable boundary, or more than one.
    """

    __slots__ = ("_buffer", "_count", "_delimiter", "_found", "_in_part", "_searched", "_source")

    def __init__(self, content_type: str, source: Source) -> None:
        boundaries = _BOUNDARY.findall(content_type)
        if not boundaries:
            raise PomeloError(
                "invalid_body", "Content-Type has no valid boundary of the form. Let your HTTP client set it"
            )
        if len(boundaries) > 1:
            raise _malformed()
        self._delimiter = b"\r\n--" + "".join(boundaries[0]).encode()
        # A line end before the body, so that the first boundary looks like every other.
        self._buffer = bytearray(b"\r\n")
        self._source = source
        self._searched = 0
        self._found = -1
        self._in_part = False
        self._count = 0

    async def next(self) -> Part | None:
        """Returns the next part, None after the last. Skips the unread rest of the previous part.

        Raises:
            PomeloError: invalid_body; what the source raises.
        """
        if self._in_part:
            while await self.read():
                pass
        elif self._count == 0:
            await self._skip_to_first()
        buffer = self._buffer
        while len(buffer) < 2:
            await self._fill_buffer()
        if buffer.startswith(b"--"):
            await self._skip_epilogue()
            return None
        self._count += 1
        if self._count > MAX_PARTS:
            raise PomeloError("invalid_body", f"The form has more than {MAX_PARTS} parts")
        part = _parse_part_headers(await self._read_part_headers())
        self._in_part = True
        return part

    async def read(self, max_size: int = READ_SIZE, *, arrived: bool = False) -> bytes:
        """Returns the next bytes of the part: `max_size`, or fewer if the part ends; empty at its end.
        `arrived`: returns more if more have arrived, so that they are passed on in fewer steps.

        Raises:
            PomeloError: invalid_body: the body ends within the part; what the source raises.
        """
        if not self._in_part:
            return b""
        buffer, delimiter = self._buffer, self._delimiter
        while self._found < 0:
            self._found = buffer.find(delimiter, self._searched)
            if self._found < 0:
                # The last bytes may be the beginning of a boundary.
                self._searched = max(0, len(buffer) - len(delimiter) + 1)
                if self._searched >= max_size:
                    return self._take(self._searched if arrived else max_size)
                await self._fill_buffer()
        if self._found > 0:
            return self._take(self._found if arrived else min(self._found, max_size))
        del buffer[: len(delimiter)]
        self._leave_part()
        return b""

    def _take(self, size: int) -> bytes:
        with memoryview(self._buffer) as view:
            data = bytes(view[:size])
        del self._buffer[:size]
        self._searched -= min(size, self._searched)
        if self._found >= 0:
            self._found -= size
        return data

    def _leave_part(self) -> None:
        self._in_part = False
        self._searched, self._found = 0, -1

    async def _fill_buffer(self) -> None:
        data = await self._source.read_available()
        if not data:
            raise _malformed()
        self._buffer += data

    async def _skip_to_first(self) -> None:
        buffer, delimiter = self._buffer, self._delimiter
        while (at := buffer.find(delimiter, 0, MAX_PADDING + len(delimiter))) < 0:
            if len(buffer) >= MAX_PADDING + len(delimiter):
                raise _malformed()
            await self._fill_buffer()
        if buffer.find(delimiter[2:], 0, at) >= 0:
            # A part whose boundary follows no line break, or a bare line feed, would be skipped unnoticed.
            raise _malformed()
        del buffer[: at + len(delimiter)]

    async def _read_part_headers(self) -> bytes:
        """Returns the headers of the next part, preceded by the rest of the boundary's line."""
        buffer = self._buffer
        searched = 0
        while (at := buffer.find(b"\r\n\r\n", searched, MAX_PART_HEADER_BYTES)) < 0:
            if len(buffer) >= MAX_PART_HEADER_BYTES:
                raise _malformed()
            searched = max(0, len(buffer) - 3)
            await self._fill_buffer()
        head = bytes(buffer[:at])
        del buffer[: at + 4]
        return head

    async def _skip_epilogue(self) -> None:
        size = len(self._buffer) - 2  # without the dashes that mark the end
        self._buffer.clear()
        while size <= MAX_PADDING:
            data = await self._source.read_available()
            if not data:
                return
            size += len(data)
        raise _malformed()


def _parse_part_headers(head: bytes) -> Part:
    padding, *lines = head.split(b"\r\n", MAX_PART_HEADERS + 1)
    if padding.strip(b" \t") or len(lines) > MAX_PART_HEADERS:
        raise _malformed()
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line.decode("utf-8", "surrogateescape"))
        if match is None:
            raise _malformed()
        name = match[1].lower()
        if name in headers and name in _PART_HEADERS:
            raise PomeloError(
                "invalid_body", f"A part of the form has two {name.title()} headers. Send each header once"
            )
        headers[name] = match[2].strip()
    if headers.get("content-transfer-encoding", "").lower() not in _UNENCODED:
        raise _malformed()
    content_type = headers.get("content-type", "").lower()
    if content_type.startswith("multipart/"):
        raise _malformed()
    disposition = headers.get("content-disposition", "")
    start = _DISPOSITION.match(disposition)
    if start is None:
        raise _malformed()
    found = _PARAMETER.findall(disposition, start.end())
    parameters = {key.lower(): value[1:-1] if value.startswith('"') else value for key, value in found}
    if "name" not in parameters or len(parameters) < len(found):
        raise _malformed()
    return Part(parameters["name"], parameters.get("filename", parameters.get("filename*")), content_type)


def _malformed() -> PomeloError:
    return PomeloError(
        "invalid_body", "The form is malformed. Send multipart/form-data with a boundary, to its end"
    )


@dataclass(frozen=True, slots=True)
class FormFields:
    """The fields that a form may have, by their names in it.

    `json` are those with JSON text, `lists` those that may be given several times, `split` those whose
    members may be parts, such as `NAME[member]`; `file` is the audio file. `renamed` are the fields of a task
    that have another name here. `parts` are the members of objects, such as `voice_settings.speed`, which
    errors may propose.
    """

    names: Collection[str]
    json: Collection[str] = ()
    lists: Collection[str] = ()
    split: Collection[str] = ()
    file: str = "audio"
    renamed: Mapping[str, str] = field(default_factory=dict)
    parts: Collection[str] = ()


TASK_FIELDS = FormFields(FIELD_NAMES, JSON_FIELDS, parts=FIELD_PARTS)
"""The fields of a form of `POST /api/v1/task`."""


@dataclass(slots=True)
class Form:
    """A form: its texts by name, lists of them for `fields.lists`, and its audio file once stored.

    `task_type` is the one that it must be for, 0 if its model decides.
    """

    fields: FormFields = TASK_FIELDS
    task_type: int = 0
    texts: dict[str, Any] = field(default_factory=dict)
    audio: Media | None = None


async def read_form(gateway: Gateway, request: Request, call: Call, visit: Visit, form: Form) -> None:
    """Reads a body into `form`, part by part; after a failure, `form` has what came before it.

    A part of the file's name with a file name or with a media type other than text is a file, which is stored
    as it arrives. If the model precedes it, text-to-speech drops the file, and types without audio refuse it.

    Raises:
        PomeloError: invalid_body, invalid_parameter, payload_too_large, overloaded; what storing the file
            and looking up the model raise.
    """
    options, fields = gateway.options, form.fields
    text_limit = options.json_limit
    body = RequestBody(request, call, visit, options.upload_limit + text_limit, options)
    parts = FormParts(request.headers["Content-Type"], body)
    text_size = 0
    scan = JsonScan()  # one for all fields, which are parsed together
    while (part := await parts.next()) is not None:
        name = part.name
        if name not in fields.names and name.partition("[")[0] not in fields.split:
            raise _unknown_part(part, fields)
        is_list = name in fields.lists
        if (name in form.texts and not is_list) or (name == fields.file and form.audio is not None):
            raise invalid(name, "given once")
        if name == fields.file and _is_file(part):
            form.audio = await _store_file(gateway, call, parts, part, form)
            continue
        is_json = name in fields.json
        if is_json:
            scan.begin_text()
        pieces = []
        while piece := await parts.read(min(READ_SIZE, text_limit - text_size + 1)):
            text_size += len(piece)
            if text_size > text_limit:
                raise too_large("The form without its file", text_limit)
            body.reserve_memory(len(piece))
            if is_json:
                scan.feed(piece)
            pieces.append(piece)
        text = _decode(name, b"".join(pieces), part.content_type, name == fields.file)
        if is_list:
            form.texts.setdefault(name, []).append(text)
        else:
            form.texts[name] = text
    if not form.texts and form.audio is None:
        raise PomeloError("invalid_body", "The form is empty. Send at least a part named model")


def _is_file(part: Part) -> bool:
    # Some HTTP libraries label every text field text/plain.
    return part.filename is not None or not (part.content_type or "text/").startswith("text/")


def _unknown_part(part: Part, fields: FormFields) -> PomeloError:
    name = part.name
    if name in fields.renamed:
        return renamed_field(name, fields.renamed[name])
    outer = re.split(r"[.[]", name, maxsplit=1)[0]
    if outer != name and outer in fields.json:  # HTTP libraries split objects and lists in this way
        return invalid(outer, f"one field with JSON text, not {shorten_name(name)}")
    if _is_file(part):
        return unknown_field(name, known=[fields.file], listed=[fields.file])
    names = [each for each in fields.names if each not in fields.renamed]
    return unknown_field(name, known=[*names, *fields.parts])


def _decode(name: str, data: bytes, content_type: str, is_file: bool) -> str:
    # HTTP libraries name charsets even for text that is plain ASCII, which most charsets share.
    charset = charset_of(content_type)
    if charset in UTF_8 or (data.isascii() and b"\0" not in data):
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
    expected = (
        "a file: the part needs a filename, or the media type of its bytes" if is_file else "UTF-8 text"
    )
    raise invalid(name, expected)


async def _store_file(gateway: Gateway, call: Call, parts: FormParts, part: Part, form: Form) -> Media:
    # Not from the cache, so that no file is accepted for a model that the key may not use.
    model = form.texts.get("model")
    task_type = await gateway.fetch_task_type(model, call) if model else 0
    if task_type and form.task_type:
        check_task_type(task_type, form.task_type)
    task_format = TASK_FORMATS.get(task_type)
    if task_format is not None and not task_format.accepts_audio_file:
        raise unknown_field(form.fields.file, task_format.name)
    first = await parts.read(arrived=True)
    pieces = _pieces(first, parts, gateway.options.upload_limit)
    if task_type and (task_format is None or not task_format.takes_audio):
        async for _ in pieces:
            pass
        return Media()
    if not first:
        return Media()  # an empty file counts as no audio: refused, or ignored by text-to-speech
    # Bytes that are not UTF-8 can't be sent to a remote server.
    content_type = part.content_type.encode("ascii", "replace").decode()
    return await gateway.services.media.upload_media(content_type, pieces, call)


async def _pieces(piece: bytes, parts: FormParts, limit: int) -> AsyncIterator[bytes]:
    """Yields `piece` and the rest of the part.

    Raises:
        PomeloError: payload_too_large: they have more than `limit` bytes.
    """
    size = 0
    while piece:
        size += len(piece)
        if size > limit:
            raise too_large("The file", limit)
        yield piece
        piece = await parts.read(arrived=True)
