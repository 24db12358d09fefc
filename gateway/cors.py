"""Cross-origin resource sharing (CORS): lets scripts of allowed origins in browsers read answers.

Made by `gateway.app` where origins are allowed; without any, no answer has a CORS header. There are
no credentials in the sense of CORS: a key comes in `Authorization`, which a script sets itself.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Mapping

from aiohttp import hdrs, web
from multidict import CIMultiDict

from gateway.described_headers import HEADERS
from gateway.reply import SAFE

_MAX_AGE = 7200
"""Seconds for which a browser may keep the answer to a preflight request; Chromium's maximum."""

_ALLOWED_HEADERS = (
    "Authorization",
    "Content-Type",
    "Accept",
    "Idempotency-Key",
    "X-Request-Id",
    "X-Request-Timeout",
    "Prefer",
    "traceparent",
    "Range",
)

_EXPOSED_HEADERS = (
    *HEADERS,
    "Accept-Ranges",
    "Content-Range",
)
"""By name: older browsers do not take `*`."""

_EXPOSE: Mapping[str, str] = {hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: ", ".join(_EXPOSED_HEADERS)}
_PREFLIGHT: Mapping[str, str] = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, HEAD, POST",
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: ", ".join(_ALLOWED_HEADERS),
    hdrs.ACCESS_CONTROL_MAX_AGE: str(_MAX_AGE),
}

_ORIGIN = re.compile(rb"\r\norigin:([^\r\n]{1,300})\r\n", re.IGNORECASE)


def is_preflight(request: web.BaseRequest) -> bool:
    """Whether a browser asks if it may send another request."""
    return request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers


class Cors:
    """The CORS headers of answers. `origins` are the allowed ones, as browsers write them, or `*` alone for
    all of them."""

    def __init__(self, origins: Collection[str]) -> None:
        if "*" in origins:
            # The same for each origin, so that caches need not tell them apart.
            self._others: Mapping[str, str] = {hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: "*", **_EXPOSE}
            self._allowed: Mapping[str, Mapping[str, str]] = {}
        else:
            # Also on answers to other origins and to none: a cache must not return them to an allowed one.
            self._others = {hdrs.VARY: hdrs.ORIGIN}
            self._allowed = {
                origin: {hdrs.VARY: hdrs.ORIGIN, hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin, **_EXPOSE}
                for origin in origins
            }

    def headers(self, origin: str | None) -> Mapping[str, str]:
        """The headers of an answer to a request with this `Origin`; None: it has none."""
        return self._allowed.get(origin, self._others) if origin is not None else self._others

    def unparsed_headers(self, head: bytes) -> Mapping[str, str]:
        """The headers of an answer to a request that is refused unparsed; `head` are its first bytes."""
        found = _ORIGIN.search(head)
        return self.headers(found[1].strip().decode("latin-1") if found is not None else None)

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Adds the headers to any answer that comes from a route, the router or a middleware; a signal
        handler of aiohttp."""
        response.headers.update(self.headers(request.headers.get(hdrs.ORIGIN)))

    @web.middleware
    async def preflight(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answers preflight requests, which have no key. Any path gets the same answer, so that a script can
        read the 404 of a path that does not exist."""
        if not is_preflight(request):
            return await handler(request)
        headers = CIMultiDict(SAFE)
        if hdrs.ACCESS_CONTROL_ALLOW_ORIGIN in self.headers(request.headers.get(hdrs.ORIGIN)):
            headers.update(_PREFLIGHT)
        return web.Response(status=204, headers=headers)
