"""The errors of requests that aiohttp's parser refuses."""

from __future__ import annotations

import re

from aiohttp import hdrs
from aiohttp.http_exceptions import BadHttpMethod, HttpProcessingError

from gateway.responses import METHODS
from pomelo.errors import PomeloError, invalid

UNREADABLE = "The HTTP request can't be read. Check its request line, headers and framing"

_DUPLICATE_CONTENT_TYPE = "Duplicate 'Content-Type' header"
"""The error text of aiohttp, whose parser refuses such a request."""

_REQUEST_LINE = re.compile(rb"([\w!#$%&'*+.^`|~-]+) [!-~]+ HTTP/1\.[01]\r\n")


def unreadable_error(cause: HttpProcessingError, data: bytes) -> PomeloError:
    """Returns the error for a request that the parser refused because of `cause`. `data` are the bytes with
    which the error came; they may begin with an earlier request."""
    if _DUPLICATE_CONTENT_TYPE in str(cause):
        return invalid("Content-Type", "given once")
    if isinstance(cause, BadHttpMethod):
        line = _REQUEST_LINE.match(data)
        if line is not None and line[1].decode() not in hdrs.METH_ALL:
            return PomeloError(
                "method_not_allowed", f"The HTTP method is unknown. Use one of {METHODS}, in capital letters"
            )
    return PomeloError("invalid_body", UNREADABLE)
