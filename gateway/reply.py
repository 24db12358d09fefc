"""Answers: the headers that each one bears, and the shortest way to a JSON answer.

Called by every route and by `problems`. Knows nothing of what is in a body.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

from aiohttp import web
from multidict import CIMultiDict

from pomelo.call import Call

SAFE: Mapping[str, str] = {
    "Server": "pomelo",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",
}
"""What every answer says to browsers and caches, unless the route knows better."""

_JSON = {**SAFE, "Content-Type": "application/json"}
_RESET = struct.pack("ii", 1, 0)


def headers(call: Call, **own: str) -> CIMultiDict[str]:
    """The headers of an answer: the safe ones, what the call gives back, then `own` (`_` stands for `-`)."""
    made = CIMultiDict(SAFE)
    made.update(call.response_headers)
    for name, value in own.items():
        made[name.replace("_", "-")] = value
    return made


def json_reply(call: Call, body: bytes, status: int = 200) -> web.Response:
    """A JSON answer of bytes that are JSON already."""
    made = CIMultiDict(_JSON)
    made.update(call.response_headers)
    return web.Response(body=body, status=status, headers=made)


def cut(request: web.BaseRequest) -> ConnectionResetError:
    """Breaks the connection so that what was sent can't look complete; raise what it returns.

    The peer gets a reset: without one, an answer that ends with the connection (HTTP/1.0) would look whole.
    """
    transport = request.transport
    if transport is not None:
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        transport.abort()
    return ConnectionResetError("the answer was cut")
