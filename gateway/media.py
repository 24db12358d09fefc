"""Downloads of media files, by signed link or with a key; and the links themselves."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import AsyncIterator

from gateway.errors import error_body
from gateway.request import Request
from gateway.responses import Response, ResponseStream, response_headers
from gateway.state import Gateway
from gateway.types.base import Link
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_pb2 import Media
from pomelo.network.origin import network

_SEND_BUFFER = 256 * 1024
"""Bytes of a download by a signed link that the kernel may buffer."""

_SECURITY_POLICY = "default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'"
"""Allows nothing but what a browser's own page shows of the file when its link is opened in a tab."""

_ID = re.compile(r"[\w.-]{1,200}", re.ASCII)
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)

_BEYOND = 10**18
"""An offset beyond the end of every file."""


def public_links(public_url: str) -> Link:
    """Returns a function that moves media links to `public_url`; if it is empty, links stay as they are."""
    base = public_url.rstrip("/")
    if not base:
        return str

    def link(url: str) -> str:
        at = url.rfind("/media/")  # the base may contain it too, an id or a signature can't
        return url if at < 0 else base + url[at:]

    return link


def requested_range(header: str | None) -> tuple[int, int | None] | None:
    """Returns the offset of a `Range` header, negative if it counts from the end of the file, and the end
    (exclusive), None if that is the end of the file.

    None: the complete file is to be sent, because there is no range, several, or an invalid one.
    """
    match = _RANGE.fullmatch(header) if header is not None else None
    if match is None:
        return None
    first, last = match.groups()
    if not first:
        return (-int(last) or _BEYOND, None) if last else None
    if last and int(last) < int(first):
        return None
    return int(first), int(last) + 1 if last else None


def byte_range(requested: tuple[int, int | None], size: int) -> tuple[int, int]:
    """Returns the start and the end (exclusive) of a requested range of a file of `size` bytes; both are the
    same if no byte of the file is in it."""
    offset, end = requested
    start = max(size + offset, 0) if offset < 0 else min(offset, size)
    return start, size if end is None else min(end, size)


async def get_media(gateway: Gateway, request: Request, call: Call) -> Response | None:
    """Sends a media file, or the part of it that a `Range` header selects; or returns 304 or 416.

    Raises:
        PomeloError: invalid_api_key, not_found, overloaded, store_unavailable; after the first
            byte, what interrupted the download.
    """
    media_id = request.path_value
    if not _ID.fullmatch(media_id):
        raise PomeloError("not_found")
    query = request.url.raw_query_string
    ticket = gateway.downloads.enter(network(call.address)) if query else await gateway.admit(request, call)
    try:
        return await _send(gateway, request, call, media_id, query)
    finally:
        ticket.close()


def _limit_send_buffer(request: Request) -> None:
    """Keeps the kernel from buffering megabytes for a client without a key that may not read them."""
    transport = request.connection.transport
    peer = transport.get_extra_info("socket") if transport is not None else None
    if peer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


def _cache_control(request: Request, media: Media) -> str:
    """Returns the header that lets the caller keep the file until its link expires; or, if it was requested
    with a key, until the file does."""
    expires = request.url.query.get("exp", "")
    until = int(expires) if expires.isdecimal() else media.expire_time.seconds
    return f"private, max-age={max(0, until - int(time.time()))}"


async def _send(gateway: Gateway, request: Request, call: Call, media_id: str, query: str) -> Response | None:
    """Sends the file; returns a response without it."""
    tag = f'"{media_id}"'  # a file never changes
    usable = request.headers.get("If-Range", tag) == tag
    requested = requested_range(request.headers.get("Range")) if usable else None
    offset = 0 if requested is None else requested[0]
    async with gateway.services.media.download_media(media_id, query, call, offset) as (media, chunks):
        if query:
            request.connection.trust(("link", network(call.address)))
            _limit_send_buffer(request)
        size = media.size_bytes
        headers = response_headers(
            call,
            ETag=tag,
            Cache_Control=_cache_control(request, media),
            Content_Security_Policy=_SECURITY_POLICY,
            Cross_Origin_Resource_Policy="cross-origin",  # pages that are isolated embed nothing without it
        )
        cached = request.headers.get("If-None-Match", "")
        if tag in cached or cached == "*":
            return Response(headers, status=304)
        start, end = (0, size) if requested is None else byte_range(requested, size)
        if start == end:
            error = invalid("Range", f"within the {size} bytes of the file")
            headers = response_headers(call, Content_Type="application/json", Content_Range=f"bytes */{size}")
            return Response(headers, error_body(error), 416)
        headers |= {
            "Content-Type": media.content_type,
            "Content-Length": str(end - start),
            "Content-Disposition": f'inline; filename="{media_id}"',
            "Accept-Ranges": "bytes",
        }
        if requested is not None:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        response = ResponseStream(request, headers, 200 if requested is None else 206)
        response.push(b"")
        if request.method != "HEAD":
            await _push(response, chunks, end - start)
        await response.finish()
        return None


async def send_file(
    gateway: Gateway, request: Request, call: Call, media_id: str, headers: dict[str, str]
) -> None:
    """Sends a file of the caller as the complete response, with `headers`.

    Raises:
        PomeloError: not_found, overloaded, store_unavailable; after the first byte, what interrupted the
            download.
    """
    async with gateway.services.media.download_media(media_id, "", call) as (media, chunks):
        response = ResponseStream(request, {**headers, "Content-Length": str(media.size_bytes)})
        await _push(response, chunks, media.size_bytes)
        await response.finish()


async def _push(response: ResponseStream, chunks: AsyncIterator[bytes], size: int) -> None:
    """Sends the next `size` bytes.

    Raises:
        PomeloError: provider_unavailable: there are fewer.
    """
    async for chunk in chunks:
        if response.push(chunk[:size]):
            await response.drain()
        size -= len(chunk)
        if size <= 0:
            return
    raise PomeloError("provider_unavailable")
