"""Error responses of the REST API, and the middleware that turns exceptions into them.

`pomelo.errors` has the table of errors and their HTTP statuses.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from aiohttp import web
from multidict import CIMultiDict
from pydantic_core import to_json

from gateway.responses import SAFE_HEADERS, json_response, reset_connection
from pomelo.call import Call
from pomelo.errors import RETRY_AFTER, PomeloError
from pomelo.ids import new_id
from pomelo.logs import format_trace
from pomelo.process import is_cancelled, uncancel

CALL = web.RequestKey("call", Call)
"""The key of a request's `Call`, which `error_middleware` creates."""

log = logging.getLogger("pomelo.gateway")


def error_body(error: PomeloError) -> bytes:
    """Returns the JSON error body: message, type and code."""
    # A field name from the caller may contain characters that can't be encoded as UTF-8.
    message = error.message.encode("utf-8", "replace").decode()
    return to_json({"error": {"message": message, "type": error.row.type, "code": error.code}})


def error_response(error: PomeloError, call: Call) -> web.Response:
    """Returns the response for an error, with the call's headers and, for retryable errors, Retry-After."""
    response = json_response(call, error_body(error), error.row.http)
    if error.retry_after is not None and error.row.http in RETRY_AFTER:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def unrouted_headers(error: PomeloError, extra: Mapping[str, str]) -> CIMultiDict[str]:
    """Returns the headers of an error response that no route sends, ending with `extra`."""
    headers = CIMultiDict(SAFE_HEADERS)
    headers["Content-Type"] = "application/json"
    headers["X-Request-Id"] = new_id("req_")
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    headers.update(extra)
    return headers


def raw_error_response(error: PomeloError, extra: Mapping[str, str]) -> bytes:
    """Returns a complete HTTP/1.1 error response as bytes, which closes the connection. `extra` are
    additional headers."""
    body = error_body(error)
    status = HTTPStatus(error.row.http)
    headers = unrouted_headers(error, extra)
    headers["Content-Length"] = str(len(body))
    headers["Connection"] = "close"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n{lines}\r\n".encode() + body


def log_unexpected(call: Call) -> PomeloError:
    """Logs the exception that is being handled, with the request id. Returns the error to report instead."""
    error = sys.exception()
    log.error("request %s failed unexpectedly\n%s", call.request_id, format_trace(error) if error else "")
    return PomeloError("internal_error")


@web.middleware
async def error_middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Creates the request's `Call`, and turns every exception of `handler` into an error response.

    Once a response has begun, its status can't change: the connection is reset instead.

    Raises:
        ConnectionError: the response was truncated, or the client has left.
        asyncio.CancelledError: the request was cancelled because the client has left.
    """
    headers = request.headers
    names = [name for name, _ in headers.items()] if len(set(headers)) < len(headers) else ()
    call = request[CALL] = Call.from_headers(
        headers.get, protocol="rest", address=request.remote or "", names=names
    )
    try:
        return await handler(request)
    except PomeloError as error:
        if request.writer.output_size:
            raise reset_connection(request) from None
        return error_response(error, call)
    except web.HTTPMethodNotAllowed as refusal:
        allowed = ", ".join(sorted(refusal.allowed_methods))
        response = error_response(
            PomeloError("method_not_allowed", f"The path does not take this method. Use {allowed}"), call
        )
        response.headers["Allow"] = allowed
        return response
    except web.HTTPException:
        return error_response(PomeloError("not_found"), call)
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and is_cancelled():
            if is_closing(request):
                raise
            uncancel()  # something within the request cancelled it, and the client still waits
        if isinstance(error, ConnectionError) and is_closing(request):
            raise
        internal_error = log_unexpected(call)
        if request.writer.output_size:
            raise reset_connection(request) from None
        return error_response(internal_error, call)
    finally:
        call.end()


def is_closing(request: web.Request) -> bool:
    """Returns whether the client has left or its connection was reset."""
    return request.transport is None or request.transport.is_closing()
