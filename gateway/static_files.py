"""The static files of the pages, and the headers with which browsers get them."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gateway.request import Request, weight
from gateway.responses import Response, response_headers
from pomelo.call import Call
from pomelo.errors import PomeloError

_CONTENT_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}

PAGE_HEADERS: Mapping[str, str] = {
    "Cache-Control": "private, no-cache",  # the browser asks each time whether its copy is current
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}
"""A page may load nothing of another host, and nothing inline. `blob:` are images and audio in responses,
`data:` the icons in style sheets."""


class File(NamedTuple):
    """A file, and its bytes as gzip. `tag` is its ETag, a weak one because it is that of both."""

    content_type: str
    data: bytes
    compressed: bytes
    tag: str


class StaticFiles:
    """The files in `folders` by name, read on the first request for one of them."""

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self._files: Mapping[str, File] | None = None

    async def find(self, name: str) -> File | None:
        """Returns the file of this name, None if it does not exist."""
        if self._files is None:
            self._files = await asyncio.to_thread(self._read)
        return self._files.get(name)

    def _read(self) -> Mapping[str, File]:
        paths = (path for folder in self._folders for path in folder.iterdir())
        return {path.name: _read_file(path) for path in paths if path.suffix in _CONTENT_TYPES}


async def respond_with_file(files: StaticFiles, request: Request, call: Call) -> Response:
    """Returns the file that the path names, the page itself if it names none, compressed if the client takes
    that; 304 if the client has it.

    Raises:
        PomeloError: not_found.
    """
    file = await files.find(request.path_value or "index.html")
    if file is None:
        raise PomeloError("not_found")
    headers = {**response_headers(call), **PAGE_HEADERS, "ETag": file.tag}
    if file.tag in request.headers.get("If-None-Match", ""):
        return Response(headers, status=304)
    headers["Content-Type"] = file.content_type
    if _accepts_gzip(request.headers.get("Accept-Encoding", "")):
        headers["Content-Encoding"] = "gzip"
        return Response(headers, file.compressed)
    return Response(headers, file.data)


def _accepts_gzip(accept_encoding: str) -> bool:
    for item in accept_encoding.split(","):
        if item.split(";", 1)[0].strip().lower() in ("gzip", "x-gzip"):
            return weight(item) > 0
    return False


def _read_file(path: Path) -> File:
    data = path.read_bytes()
    tag = f'W/"{hashlib.sha256(data).hexdigest()[:32]}"'
    return File(_CONTENT_TYPES[path.suffix], data, gzip.compress(data), tag)
