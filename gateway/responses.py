"""Responses: complete ones and those that are sent piece by piece, and the reset of an incomplete one."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11

from pomelo.call import Call

if TYPE_CHECKING:
    from gateway.request import Request

SAFE_HEADERS: Mapping[str, str] = {
    "Server": "pomelo",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",
}
"""The headers for browsers and caches that every response has, unless its route replaces them."""

METHODS = "GET, HEAD, POST"
"""The methods that one path or another takes."""

HSTS = {"Strict-Transport-Security": "max-age=31536000"}
"""Makes browsers use only TLS for this host, for a year. Only responses over TLS may have it."""

_JSON_HEADERS = {**SAFE_HEADERS, "Content-Type": "application/json"}
_PHRASES = {status.value: status.phrase for status in HTTPStatus} | {
    # Python 3.13 renamed them, but a response is the same on every Python.
    413: "Request Entity Too Large",
    414: "Request-URI Too Long",
    416: "Requested Range Not Satisfiable",
    422: "Unprocessable Entity",
}
_WITHOUT_BODY = frozenset({HTTPStatus.NO_CONTENT.value, HTTPStatus.NOT_MODIFIED.value})
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

_JOINED = 64 * 1024
"""Bytes of a body up to which it is copied into one write with the head."""

_MAX_UNDRAINED = 64 * 1024
"""Bytes of a streamed response that may be written before the client has read what came before them."""


@dataclass(slots=True, eq=False)
class Response:
    """A complete response. Its `headers` are in the order in which they are sent. `on_end` is called when the
    client has read it or has left."""

    headers: dict[str, str]
    body: bytes = b""
    status: int = 200
    on_end: Callable[[], None] | None = None

    def encode(self, request: Request) -> tuple[bytes, ...]:
        """Returns the bytes of the response to `request`, in one or two writes.

        Raises:
            ValueError: a header contains a control character.
        """
        headers, body = self.headers, self.body
        if self.status not in _WITHOUT_BODY:
            headers["Content-Length"] = str(len(body))
        head = request.encode_head(self.status, headers)
        if request.method == "HEAD":
            return (head,)
        return (head + body,) if len(body) <= _JOINED else (head, body)


class ResponseStream:
    """The response to `request` whose body is sent piece by piece. Its head is sent with the first piece.

    Without a Content-Length the body is sent in chunks, or to a client of HTTP/1.0 until the connection
    closes.
    """

    __slots__ = ("_chunked", "_connection", "_head", "_request", "_undrained")

    def __init__(self, request: Request, headers: dict[str, str], status: int = 200) -> None:
        self._chunked = False
        if "Content-Length" not in headers:
            self._chunked = request.version >= HttpVersion11
            if self._chunked:
                headers["Transfer-Encoding"] = "chunked"
            else:
                request.keep_alive = False
                request.open_ended = True
        self._request = request
        self._connection = request.connection
        self._head = request.encode_head(status, headers)
        self._undrained = 0

    def push(self, data: bytes) -> bool:
        """Sends the next bytes, possibly none. Returns whether the caller must `drain` before it sends more.

        Raises:
            ConnectionError: the client has left.
        """
        if self._chunked and data:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head:
            data = self._head + data
            self._head = b""
            self._request.answered = True
        if data:
            self._connection.write(data)
            self._undrained += len(data)
        return self._undrained > _MAX_UNDRAINED

    async def drain(self) -> None:
        """Waits until the client has read everything.

        Raises:
            ConnectionError: the client has left.
        """
        self._undrained = 0
        await self._connection.drain()

    async def finish(self, data: bytes = b"") -> None:
        """Sends the last bytes, possibly none, and waits until the client has read everything. Raises as
        `push`."""
        if self._chunked:
            end = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
            self._chunked = False
            data = end
        if self._connection.tcp is None:
            self.push(data)
        else:
            self.push(b"")  # the head, if it was not sent
            await self._connection.write_slices(data)
        await self.drain()


def encode_head(version: tuple[int, int], status: int, headers: Mapping[str, str]) -> bytes:
    """Returns the status line and the headers of a response.

    Raises:
        ValueError: a header contains a control character.
    """
    values = "".join(headers.values())
    if not values.isprintable() and _CONTROL_CHARACTERS.search(values):
        raise ValueError("a response header contains a control character")
    lines = "\r\n".join(map(": ".join, headers.items()))
    return f"HTTP/{version[0]}.{version[1]} {status} {_PHRASES[status]}\r\n{lines}\r\n\r\n".encode()


def response_headers(call: Call, **extra: str) -> dict[str, str]:
    """Returns `SAFE_HEADERS`, the call's own headers, then `extra` (`_` stands for `-`)."""
    headers = {**SAFE_HEADERS, **call.response_headers}
    for name, value in extra.items():
        headers[name.replace("_", "-")] = value
    return headers


def json_response(call: Call, body: bytes, status: int = 200) -> Response:
    """Returns a response whose body is the JSON text `body`."""
    return Response({**_JSON_HEADERS, **call.response_headers}, body, status)


def reset_connection(request: Request) -> ConnectionResetError:
    """Resets the connection so that the truncated response can't look complete. Returns the exception to
    raise.

    Without a reset, a response that ends with the connection (HTTP/1.0) would look complete.
    """
    if request.connection.transport is not None:
        reset(request.connection.transport)
    return ConnectionResetError("the response was truncated")


def reset(transport: asyncio.WriteTransport) -> None:
    """Resets a connection; what the kernel has yet to send is dropped too."""
    peer = transport.get_extra_info("socket")
    if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    transport.abort()
