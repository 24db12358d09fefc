"""The parts of a multipart/form-data body (RFC 7578), read as they arrive.

Every byte is scanned a bounded number of times, whatever the body contains and however it is split
into pieces, and no more than two pieces are buffered. `multipart` assembles the form from the
parts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from pomelo.errors import PomeloError

PIECE = 64 * 1024
"""The default size, in bytes, of the pieces of a part; the last piece may be smaller."""

MAX_PARTS = 32
MAX_PART_HEADERS = 16
MAX_PART_HEAD = 8 * 1024
"""Bytes of a part's headers together."""

MAX_AROUND = 1024
"""Bytes before the first part, and after the last."""

_BOUNDARY = re.compile(
    r""";\s*boundary=(?:"([!#-\[\]-~ ]{0,69}[!#-\[\]-~])"|([!#-:<-\[\]-~]{1,70}))\s*(?:;|$)""", re.IGNORECASE
)
_DISPOSITION = re.compile(r"\s*form-data\s*(?=;|$)", re.IGNORECASE)
_PARAMETER = re.compile(r';\s*([\w!#$&+.^`|~-]+\*?)\s*=\s*("(?:[^"\\]|\\.)*"|[^;"\s]*)', re.ASCII)
_HEADER = re.compile(r"([\w!#$%&'*+.^`|~-]+):[ \t]*(.*)", re.ASCII)
_PLAIN = frozenset({"", "7bit", "8bit", "binary"})


class Source(Protocol):
    """The source of a body's bytes."""

    async def piece(self) -> bytes:
        """Returns the next bytes, as many as have arrived; empty at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """The headers of a part. If absent, `filename` is None and `content_type` is empty."""

    name: str
    filename: str | None
    content_type: str


class FormParts:
    """Reads the parts of a body with `content_type`, one after the other.

    Raises:
        PomeloError: invalid_body: there is no usable boundary.
    """

    __slots__ = ("_buffer", "_count", "_found", "_inside", "_mark", "_searched", "_source")

    def __init__(self, content_type: str, source: Source) -> None:
        match = _BOUNDARY.search(content_type)
        if match is None:
            raise malformed()
        self._mark = b"\r\n--" + (match[1] or match[2]).encode()
        # A line end before the body, so that the first boundary looks like every other.
        self._buffer = bytearray(b"\r\n")
        self._source = source
        self._searched = 0
        self._found = -1
        self._inside = False
        self._count = 0

    async def next(self) -> Part | None:
        """Returns the next part, None after the last. Skips the unread rest of the previous part.

        Raises:
            PomeloError: invalid_body; what the source raises.
        """
        if self._inside:
            while await self.read():
                pass
        elif self._count == 0:
            await self._skip_to_first()
        buffer = self._buffer
        while len(buffer) < 2:
            await self._more()
        if buffer.startswith(b"--"):
            await self._end()
            return None
        self._count += 1
        if self._count > MAX_PARTS:
            raise PomeloError("invalid_body", f"The form has more than {MAX_PARTS} parts")
        part = _read_head(await self._head())
        self._inside = True
        return part

    async def read(self, most: int = PIECE) -> bytes:
        """Returns the next bytes of the part: `most`, or fewer if the part ends; empty at its end.

        Raises:
            PomeloError: invalid_body: the body ends within the part; what the source raises.
        """
        if not self._inside:
            return b""
        buffer, mark = self._buffer, self._mark
        while self._found < 0:
            self._found = buffer.find(mark, self._searched)
            if self._found < 0:
                # The last bytes may be the beginning of a boundary.
                self._searched = max(0, len(buffer) - len(mark) + 1)
                if self._searched >= most:
                    return self._take(most)
                await self._more()
        if self._found > 0:
            return self._take(min(self._found, most))
        del buffer[: len(mark)]
        self._forget()
        return b""

    def _take(self, size: int) -> bytes:
        with memoryview(self._buffer) as view:
            data = bytes(view[:size])
        del self._buffer[:size]
        self._searched -= min(size, self._searched)
        if self._found >= 0:
            self._found -= size
        return data

    def _forget(self) -> None:
        self._inside = False
        self._searched, self._found = 0, -1

    async def _more(self) -> None:
        data = await self._source.piece()
        if not data:
            raise malformed()
        self._buffer += data

    async def _skip_to_first(self) -> None:
        buffer, mark = self._buffer, self._mark
        while (at := buffer.find(mark, 0, MAX_AROUND + len(mark))) < 0:
            if len(buffer) >= MAX_AROUND + len(mark):
                raise malformed()
            await self._more()
        del buffer[: at + len(mark)]

    async def _head(self) -> bytes:
        """Returns the headers of the next part, preceded by the rest of the boundary's line."""
        buffer = self._buffer
        searched = 0
        while (at := buffer.find(b"\r\n\r\n", searched, MAX_PART_HEAD)) < 0:
            if len(buffer) >= MAX_PART_HEAD:
                raise malformed()
            searched = max(0, len(buffer) - 3)
            await self._more()
        head = bytes(buffer[:at])
        del buffer[: at + 4]
        return head

    async def _end(self) -> None:
        size = len(self._buffer) - 2  # without the dashes that mark the end
        self._buffer.clear()
        while size <= MAX_AROUND:
            data = await self._source.piece()
            if not data:
                return
            size += len(data)
        raise malformed()


def _read_head(head: bytes) -> Part:
    padding, *lines = head.split(b"\r\n", MAX_PART_HEADERS + 1)
    if padding.strip(b" \t") or len(lines) > MAX_PART_HEADERS:
        raise malformed()
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line.decode("utf-8", "surrogateescape"))
        if match is None:
            raise malformed()
        headers.setdefault(match[1].lower(), match[2].strip())
    if headers.get("content-transfer-encoding", "").lower() not in _PLAIN:
        raise malformed()
    content_type = headers.get("content-type", "").lower()
    if content_type.startswith("multipart/"):
        raise malformed()
    disposition = headers.get("content-disposition", "")
    start = _DISPOSITION.match(disposition)
    if start is None:
        raise malformed()
    given = {
        key.lower(): value[1:-1] if value.startswith('"') else value
        for key, value in _PARAMETER.findall(disposition, start.end())
    }
    if "name" not in given:
        raise malformed()
    return Part(given["name"], given.get("filename", given.get("filename*")), content_type)


def malformed() -> PomeloError:
    """The error for a malformed form."""
    return PomeloError(
        "invalid_body", "The form is malformed. Send multipart/form-data with a boundary, to its end"
    )
