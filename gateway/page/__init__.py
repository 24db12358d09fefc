"""The page at `/` for developers with a key. Its files are static: their scripts call the REST API."""

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

_FOLDER = Path(__file__).parent / "files"

_CONTENT_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Allows nothing of another host, and nothing inline."""


class _File(NamedTuple):
    """A file, and its bytes as gzip. `tag` is its ETag, a weak one because it is that of both."""

    content_type: str
    data: bytes
    compressed: bytes
    tag: str


async def get_page(gateway: Gateway, request: Request, call: Call) -> Response:
    """Returns the page. Raises as `get_page_file`."""
    return await _respond(gateway, request, call, "index.html")


async def get_page_file(gateway: Gateway, request: Request, call: Call) -> Response:
    """Returns a file of the page: a script, a style sheet or an icon; 304 if the browser has it.

    Raises:
        PomeloError: not_found.
    """
    return await _respond(gateway, request, call, request.path_value)


async def _respond(gateway: Gateway, request: Request, call: Call, name: str) -> Response:
    if not gateway.options.page:
        raise PomeloError("not_found")
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
        Permissions_Policy="microphone=(self), camera=(), geolocation=()",
        Referrer_Policy="no-referrer",
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
    """Reads the files of the page, on its first request; returns them by name, whatever their folder."""
    return {path.name: _read(path) for path in _FOLDER.rglob("*") if path.suffix in _CONTENT_TYPES}


def _read(path: Path) -> _File:
    data = path.read_bytes()
    tag = f'W/"{hashlib.sha256(data).hexdigest()[:32]}"'
    return _File(_CONTENT_TYPES[path.suffix], data, gzip.compress(data), tag)
