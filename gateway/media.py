"""Signed links: what tasks made, given out to whoever has the link.

A row of `gateway.routes`. Whether a link is good is for the media service to say.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from gateway.access import address_of, admit, trust
from gateway.reply import headers
from gateway.state import Gateway
from pomelo.call import Call
from pomelo.errors import PomeloError

_SEND_BUFFER = 256 * 1024
"""Bytes that the kernel may buffer of a download by a signed link."""

_ID = re.compile(r"[\w.-]{1,200}", re.ASCII)
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


def part_of(given: str | None, size: int) -> tuple[int, int] | None:
    """The first byte and the one after the last of a `Range`, or None where the whole is to be sent: no
    range, several, or none that can be served."""
    match = _RANGE.fullmatch(given) if given is not None else None
    if match is None:
        return None
    first, last = match.groups()
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
    elif last:
        start, end = max(size - int(last), 0), size
    else:
        return None
    return (start, end) if start < end else None


async def download(gateway: Gateway, request: web.Request, call: Call) -> web.StreamResponse:
    """Sends a medium, whole or the part that a `Range` asks for.

    Raises:
        PomeloError: invalid_api_key, not_found, overloaded, store_unavailable; after the first
            byte, what interrupted the download.
    """
    media_id = request.match_info["media_id"]
    if not _ID.fullmatch(media_id):
        raise PomeloError("not_found")
    query = request.rel_url.raw_query_string
    if not query:
        visit = await admit(gateway, request, call)
        try:
            return await _send(gateway, request, call, media_id, query)
        finally:
            visit.close()
    with _counted(gateway, request) as address:
        return await _send(gateway, request, call, media_id, query, address)


@contextmanager
def _counted(gateway: Gateway, request: web.Request) -> Iterator[str]:
    address = address_of(request)
    ticket = gateway.links.enter(address)
    try:
        yield address
    finally:
        ticket.close()


def _bound_send_buffer(request: web.Request) -> None:
    """Keeps the kernel from buffering megabytes for a caller without a key that may not read
    them."""
    peer = request.transport.get_extra_info("socket") if request.transport is not None else None
    if peer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


async def _send(
    gateway: Gateway, request: web.Request, call: Call, media_id: str, query: str, address: str = ""
) -> web.StreamResponse:
    async with gateway.services.media.download_media(media_id, query, call) as (media, chunks):
        if query:
            trust(request, ("link", address))
            _bound_send_buffer(request)
        size = media.size_bytes
        wanted = None if "If-Range" in request.headers else part_of(request.headers.get("Range"), size)
        start, end = wanted or (0, size)
        response = web.StreamResponse(
            status=200 if wanted is None else 206,
            headers=headers(
                call,
                Content_Type=media.content_type,
                Content_Length=str(end - start),
                Content_Disposition=f'inline; filename="{media_id}"',
                Content_Security_Policy="sandbox; default-src 'none'",
                Cache_Control="private",
                Accept_Ranges="bytes",
            ),
        )
        if wanted is not None:
            response.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        await response.prepare(request)
        if request.method != "HEAD":
            if start:
                chunks.skip(start)
            at = start
            async for chunk in chunks:
                await response.write(chunk[: end - at])
                at += len(chunk)
                if at >= end:
                    break
            if at < end:
                raise PomeloError("provider_unavailable")
        await response.write_eof()
        return response
