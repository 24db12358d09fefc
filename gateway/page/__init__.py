"""The page at `/` for developers with a key. Its files are static: their scripts call the REST API."""

from __future__ import annotations

import asyncio

from gateway.page.files import PAGE_HEADERS, page_files
from gateway.request import Request
from gateway.responses import Response, response_headers
from gateway.state import Gateway
from pomelo.call import Call
from pomelo.errors import PomeloError


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
    if not page_files.cache_info().currsize:
        await asyncio.to_thread(page_files)
    file = page_files().get(name)
    if file is None:
        raise PomeloError("not_found")
    headers = {**response_headers(call), **PAGE_HEADERS, "ETag": file.tag}
    if file.tag in request.headers.get("If-None-Match", ""):
        return Response(headers, status=304)
    headers["Content-Type"] = file.content_type
    if "gzip" in request.headers.get("Accept-Encoding", ""):
        headers["Content-Encoding"] = "gzip"
        return Response(headers, file.compressed)
    return Response(headers, file.data)
