"""Cross-origin resource sharing (CORS): lets scripts of allowed origins read responses in browsers.

Credentials in the sense of CORS are not used: scripts set the API key in `Authorization` themselves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from aiohttp import hdrs

from gateway.openapi.schema import RESPONSE_HEADERS
from gateway.request import Request
from gateway.responses import METHODS, SAFE_HEADERS, Response
from pomelo.ids import new_id

_MAX_AGE = 7200
"""Seconds for which a browser may keep the response to a preflight request; Chromium's maximum."""

_ALLOWED_HEADERS = (
    "Authorization",
    "Content-Type",
    "Accept",
    "Idempotency-Key",
    "X-Request-Id",
    "X-Request-Timeout",
    "Prefer",
    # Tracing in a browser sends all three, though only the first is read.
    "traceparent",
    "tracestate",
    "baggage",
    "Range",
    "If-None-Match",
    "If-Range",
    # Clients for server-sent events send it when they repeat a request.
    "Last-Event-ID",
    # OpenAI's SDK for JavaScript sends these: User-Agent if the browser lets it, as Firefox does, and
    # X-Stainless-Helper-Method for helpers such as `stream` and `parse`, the others on every request.
    "OpenAI-Organization",
    "OpenAI-Project",
    "User-Agent",
    "X-Stainless-Arch",
    "X-Stainless-Helper-Method",
    "X-Stainless-Lang",
    "X-Stainless-OS",
    "X-Stainless-Package-Version",
    "X-Stainless-Retry-Count",
    "X-Stainless-Runtime",
    "X-Stainless-Runtime-Version",
    "X-Stainless-Timeout",
)

_EXPOSED_HEADERS = (*RESPONSE_HEADERS, "X-Should-Retry", "Allow", "Accept-Ranges", "Content-Range", "ETag")
"""Listed by name because older browsers do not support `*`."""

_EXPOSE: Mapping[str, str] = {hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: ", ".join(_EXPOSED_HEADERS)}
_PREFLIGHT: Mapping[str, str] = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: METHODS,
    hdrs.ACCESS_CONTROL_ALLOW_HEADERS: ", ".join(_ALLOWED_HEADERS),
    hdrs.ACCESS_CONTROL_MAX_AGE: str(_MAX_AGE),
}

_ORIGIN = re.compile(rb"\r\norigin:([^\r\n]{1,300})\r\n", re.IGNORECASE)


def is_preflight(request: Request) -> bool:
    """Returns whether the request is a CORS preflight."""
    return request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers


class Cors:
    """The CORS headers of responses. `origins` are the allowed origins as browsers write them, or only `*`
    for all origins."""

    def __init__(self, origins: Collection[str]) -> None:
        if "*" in origins:
            # The same for every origin, so that responses can be cached regardless of it.
            self._default: Mapping[str, str] = {hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: "*", **_EXPOSE}
            self._allowed: Mapping[str, Mapping[str, str]] = {}
        else:
            # Also without an allowed origin: a cache must not return such a response to an allowed one.
            self._default = {hdrs.VARY: hdrs.ORIGIN}
            self._allowed = {
                origin: {hdrs.VARY: hdrs.ORIGIN, hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin, **_EXPOSE}
                for origin in origins
            }

    def headers(self, origin: str | None) -> Mapping[str, str]:
        """Returns the headers of a response to a request with this `Origin` header (None: without one)."""
        return self._allowed.get(origin, self._default) if origin is not None else self._default

    def unparsed_headers(self, head: bytes) -> Mapping[str, str]:
        """Returns the headers of a response to an unparsed request; `head` are its first bytes."""
        match = _ORIGIN.search(head)
        return self.headers(match[1].strip().decode("latin-1") if match is not None else None)

    def preflight(self, request: Request) -> Response:
        """Returns the response to a preflight request, which has no key. All paths get the same one, so that
        a script can read the 404 of a path that does not exist."""
        headers = {**SAFE_HEADERS, "X-Request-Id": new_id("req_")}
        if hdrs.ACCESS_CONTROL_ALLOW_ORIGIN in self.headers(request.headers.get(hdrs.ORIGIN)):
            headers.update(_PREFLIGHT)
        return Response(headers, status=204)
