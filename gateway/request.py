"""One HTTP request, as its handler sees it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from aiohttp import HttpVersion10, HttpVersion11, hdrs
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import RawRequestMessage
from aiohttp.streams import StreamReader
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from gateway.responses import HSTS, encode_head
from pomelo.network.origin import caller_address

if TYPE_CHECKING:
    from gateway.connections.connection import Connection

NO_REQUEST = RawRequestMessage(
    *("UNKNOWN", "/", HttpVersion10, CIMultiDictProxy(CIMultiDict()), (), True, None, False, False, URL("/"))
)
"""What is responded to if a request can't be parsed."""

_WEIGHT = re.compile(r";\s*q=(0(?:\.[0-9]*)?)\s*(?:;|$)", re.IGNORECASE)


def weight(item: str) -> float:
    """Returns how much the client prefers an item of `Accept` or `Accept-Encoding` (RFC 9110, 12.4.2): from 0
    (not accepted) to 1 (the default)."""
    found = _WEIGHT.search(item)
    return float(found[1]) if found else 1.0


class Request:
    """A request that arrived on `connection`. `target` is its path and query as sent; `headers` are found by
    name in any case; `content` are the bytes of its body.

    `path_value` is the decoded part of the path that its route leaves open. `keep_alive` is whether the
    connection may carry another request, `answered` whether part of a response was sent, `open_ended` whether
    a response is being sent that ends with the connection. If `expects_continue`, the client may wait for an
    interim response before it sends the body.
    """

    __slots__ = (
        "_chunked", "_url", "answered", "connection", "content", "expects_continue", "headers", "keep_alive",
        "method", "open_ended", "path_value", "target", "version",
    )  # fmt: skip

    def __init__(self, connection: Connection, message: RawRequestMessage, content: StreamReader) -> None:
        self.connection = connection
        self.content = content
        self.headers = message.headers
        self.method = message.method
        self.target = message.path
        self.version = message.version
        self.keep_alive = not message.should_close and not (message.upgrade and _loses_place(message))
        if message.chunked and message.version == HttpVersion10:
            # A proxy may take the chunks for the next request (RFC 9112, section 6.1).
            self.keep_alive = False
        self.expects_continue = "Expect" in message.headers and message.version >= HttpVersion11
        self._chunked = message.chunked
        self.path_value = ""
        self.answered = self.open_ended = False
        self._url = message.url

    @property
    def url(self) -> URL:
        """The target, without scheme and host if it has them."""
        return self._url.relative() if self._url.absolute else self._url

    @property
    def address(self) -> str:
        """The IP address of the client, as the operator's proxies report it if it came through them."""
        connection = self.connection
        if not connection.proxies:
            return connection.address
        forwarded = ",".join(self.headers.getall(hdrs.X_FORWARDED_FOR, ()))
        return caller_address(connection.address, forwarded, connection.proxies)

    @property
    def is_closing(self) -> bool:
        """Whether the client has left or its connection was reset."""
        transport = self.connection.transport
        return transport is None or transport.is_closing()

    def encode_head(self, status: int, headers: dict[str, str]) -> bytes:
        """Returns the head of the response: `headers`, to which those are added that depend on the request.

        Raises:
            ValueError: a header contains a control character.
        """
        headers["Date"] = rfc822_formatted_time()
        connection = self.connection
        if connection.readiness.draining:
            # A retry on the same connection would not reach another server.
            self.keep_alive = False
        elif self._chunked and not connection.ends_with_last_chunk():
            # aiohttp's parser would take its last trailer for the first header of the next request, which
            # behind a proxy may be that of another caller.
            self.keep_alive = False
        elif self.expects_continue and not self.content.is_eof():
            # The client may never send the body, and the next request would be taken for it.
            self.keep_alive = False
        if self.keep_alive:
            if self.version == HttpVersion10:
                headers["Connection"] = "keep-alive"
        elif self.version == HttpVersion11:
            headers["Connection"] = "close"
        if connection.has_tls:
            headers.update(HSTS)
        if connection.cors is not None:
            vary = headers.get("Vary")
            headers.update(connection.cors.headers(self.headers.get(hdrs.ORIGIN)))
            if vary is not None and vary != headers["Vary"]:
                headers["Vary"] = f"{vary}, {headers['Vary']}"
        return encode_head(self.version, status, headers)


def _loses_place(message: RawRequestMessage) -> bool:
    """Returns whether the parser may not know where the next request begins, after one that asks for
    another protocol. Of those, aiohttp's parser reads on correctly only after websocket."""
    protocol = message.headers.get(hdrs.UPGRADE, "")
    return message.method == hdrs.METH_CONNECT or not protocol.isascii() or protocol.lower() != "websocket"
