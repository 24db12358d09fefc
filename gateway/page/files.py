"""The files of the pages, and the headers with which browsers get them."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent / "static"

_CONTENT_TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

PAGE_HEADERS: Mapping[str, str] = {
    "Cache-Control": "private, no-cache",  # the browser asks each time whether its copy is current
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""A page may load nothing of another host, and nothing inline."""


class File(NamedTuple):
    """A file, and its bytes as gzip. `tag` is its ETag, a weak one because it is that of both."""

    content_type: str
    data: bytes
    compressed: bytes
    tag: str


@cache
def page_files() -> Mapping[str, File]:
    """Returns the files of the page for developers, by name."""
    return {**_read(_FOLDER), **_read(_FOLDER / "vendor")}


@cache
def operator_files() -> Mapping[str, File]:
    """Returns the files of the operator's page, by name."""
    return {**_read(_FOLDER), **_read(_FOLDER / "operator")}


def _read(folder: Path) -> dict[str, File]:
    return {path.name: _read_file(path) for path in folder.iterdir() if path.suffix in _CONTENT_TYPES}


def _read_file(path: Path) -> File:
    data = path.read_bytes()
    tag = f'W/"{hashlib.sha256(data).hexdigest()[:32]}"'
    return File(_CONTENT_TYPES[path.suffix], data, gzip.compress(data), tag)
