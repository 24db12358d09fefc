"""The API reference at /docs: Swagger UI, which shows /openapi.json.

`files` has the files of swagger-ui-dist 5.35.0 as they were published, with their licences, and a page of our
own. To update Swagger UI, copy the files of the same names from the npm package.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from gateway.request import Request
from gateway.responses import Response, response_headers
from gateway.state import Gateway
from pomelo.call import Call
from pomelo.errors import PomeloError

_FOLDER = Path(__file__).with_name("files")

_CONTENT_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}

_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Allows nothing from another host, and no inline script or style. `blob:` are images and audio in responses,
`data:` the icons in Swagger UI's style sheet."""


class _File(NamedTuple):
    """A file, and its bytes as gzip. `tag` is its ETag, a weak one because both have it."""

    content_type: str
    data: bytes
    compressed: bytes
    tag: str


async def get_reference(gateway: Gateway, request: Request, call: Call) -> Response:
    """Returns the page. Raises as `get_reference_file`."""
    return await _respond(request, call, "index.html")


async def get_reference_file(gateway: Gateway, request: Request, call: Call) -> Response:
    """Returns a file of the page, compressed if the client takes that; 304 if the client has it.

    Raises:
        PomeloError: not_found.
    """
    return await _respond(request, call, request.path_value)


async def _respond(request: Request, call: Call, name: str) -> Response:
    if not _files.cache_info().currsize:
        await asyncio.to_thread(_files)
    file = _files().get(name)
    if file is None:
        raise PomeloError("not_found")
    headers = response_headers(
        call,
        ETag=file.tag,
        Cache_Control="private, no-cache",  # the browser asks each time whether its copy is current
        Content_Security_Policy=_SECURITY_POLICY,
        Referrer_Policy="no-referrer",
        Vary="Accept-Encoding",
    )
    if file.tag in request.headers.get("If-None-Match", ""):
        return Response(headers, status=304)
    headers["Content-Type"] = file.content_type
    if "gzip" in request.headers.get("Accept-Encoding", ""):
        headers["Content-Encoding"] = "gzip"
        return Response(headers, file.compressed)
    return Response(headers, file.data)


@cache
def _files() -> Mapping[str, _File]:
    """Reads the files, on the first request for one of them; returns them by name."""
    return {path.name: _read(path) for path in _FOLDER.iterdir() if path.suffix in _CONTENT_TYPES}


def _read(path: Path) -> _File:
    data = path.read_bytes()
    tag = f'W/"{hashlib.sha256(data).hexdigest()[:32]}"'
    return _File(_CONTENT_TYPES[path.suffix], data, gzip.compress(data, 6), tag)
