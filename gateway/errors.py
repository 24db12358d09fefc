"""Error responses of the REST API.

`pomelo.errors` has the table of errors and their HTTP statuses. On the paths under /v1 the status decides
which exception OpenAI's SDKs raise, the header `X-Should-Retry` whether they try again.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11
from pydantic_core import to_json

from gateway.responses import METHODS, SAFE_HEADERS, Response, encode_head, json_response
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.ids import new_id
from pomelo.runtime.logs import format_trace

if TYPE_CHECKING:
    from gateway.request import Request

CHALLENGE = "Bearer"
"""How a caller authenticates: a response with the status 401 must say it (RFC 9110, section 11.6.1)."""

log = logging.getLogger("pomelo.gateway")


def error_body(error: PomeloError, request: Request | None = None) -> bytes:
    """Returns the JSON error body, of `error_members`."""
    return to_json({"error": error_members(error, request)})


def error_members(error: PomeloError, request: Request | None) -> dict[str, str | None]:
    """Returns the members of an error: message, type, code; for a request of a path under /v1, `param` too.
    None: the request can't be read."""
    # A field name from the caller may contain characters that can't be encoded as UTF-8.
    parameter: dict[str, str | None] = {}
    if request is not None and _is_openai(request):
        parameter["param"] = None if error.field is None else _encodable(error.field)
    return {"message": _encodable(error.message), "type": error.row.type, **parameter, "code": error.code}


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def rename_field(error: PomeloError, caller_name: Callable[[str], str]) -> PomeloError:
    """Returns an error with the name by which the caller knows its field. An error without a field, and one
    whose field has no other name, are returned themselves."""
    field = error.field
    if field is None or (name := caller_name(field)) == field:
        return error
    message = re.sub(rf"(?<!\w){re.escape(field)}(?!\w)", lambda _: name, error.message, count=1)
    return PomeloError(
        error.row,
        message,
        field=name,
        retry_after=error.retry_after,
        values=error.values,
        repeatable=error.repeatable,
    )


def error_response(error: PomeloError, call: Call, request: Request) -> Response:
    """Returns the response for an error, with the call's headers and, as they apply, Retry-After and
    WWW-Authenticate."""
    response = json_response(call, error_body(error, request), error.row.http)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    if error.row.http == 401:
        response.headers["WWW-Authenticate"] = CHALLENGE
    if _is_openai(request):
        # Without it, SDKs retry every 5xx, 409 and 429.
        retry = error.retry_after is not None and error.repeatable
        response.headers["X-Should-Retry"] = "true" if retry else "false"
    return response


def _is_openai(request: Request) -> bool:
    """Whether the request is for a path of the OpenAI-compatible API, known or not."""
    return request.url.path.startswith("/v1/")


def unrouted_headers(error: PomeloError, extra: Mapping[str, str]) -> dict[str, str]:
    """Returns the headers of an error response that no route sends, ending with `extra`."""
    headers = {**SAFE_HEADERS, "Content-Type": "application/json", "X-Request-Id": new_id("req_")}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.row.http == 401:
        headers["WWW-Authenticate"] = CHALLENGE
    if error.row.http == 405:
        headers["Allow"] = METHODS
    headers.update(extra)
    return headers


def raw_error_response(error: PomeloError, extra: Mapping[str, str], request: Request | None = None) -> bytes:
    """Returns a complete HTTP/1.1 error response as bytes, which closes the connection. `extra` are
    additional headers. `request` is None if it can't be read."""
    body = error_body(error, request)
    headers = unrouted_headers(error, extra) | {"Content-Length": str(len(body)), "Connection": "close"}
    return encode_head(HttpVersion11, error.row.http, headers) + body


def log_unexpected(call: Call) -> PomeloError:
    """Logs the exception that is being handled, with the request id. Returns the error to report instead."""
    error = sys.exception()
    log.error("request %s failed unexpectedly\n%s", call.request_id, format_trace(error) if error else "")
    return PomeloError("internal_error")
