"""Response headers, JSON responses, and the reset that marks a response as incomplete."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

from aiohttp import web
from multidict import CIMultiDict

from pomelo.call import Call

SAFE_HEADERS: Mapping[str, str] = {
    "Server": "pomelo",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",
}
"""The headers for browsers and caches that every response has, unless its route replaces them."""

_JSON_HEADERS = {**SAFE_HEADERS, "Content-Type": "application/json"}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def response_headers(call: Call, **extra: str) -> CIMultiDict[str]:
    """Returns `SAFE_HEADERS`, the call's own headers, then `extra` (`_` stands for `-`)."""
    headers = CIMultiDict(SAFE_HEADERS)
    headers.update(call.response_headers)
    for name, value in extra.items():
        headers[name.replace("_", "-")] = value
    return headers


def json_response(call: Call, body: bytes, status: int = 200) -> web.Response:
    """Returns a response whose body is the JSON text `body`."""
    headers = CIMultiDict(_JSON_HEADERS)
    headers.update(call.response_headers)
    return web.Response(body=body, status=status, headers=headers)


def reset_connection(request: web.BaseRequest) -> ConnectionResetError:
    """Resets the connection so that the truncated response can't look complete. Returns the exception to
    raise.

    Without a reset, a response that ends with the connection (HTTP/1.0) would look complete.
    """
    transport = request.transport
    if transport is not None:
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        transport.abort()
    return ConnectionResetError("the response was truncated")
