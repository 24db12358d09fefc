"""Errors as REST callers see them: the body, the headers, and the guard around every route.

The one table of errors is `pomelo.errors`; nothing here decides what is an error.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable

from aiohttp import web
from pydantic_core import to_json

from gateway.reply import cut, json_reply
from pomelo.call import Call
from pomelo.errors import RETRY_AFTER, PomeloError
from pomelo.logs import format_trace
from pomelo.process import is_cancelled, uncancel

CALL = web.RequestKey("call", Call)
"""Where the guard keeps a request's `Call`."""

log = logging.getLogger("pomelo.gateway")


def body(error: PomeloError) -> bytes:
    """The error body: message, type and code, and nothing else."""
    # A name that the caller chose may hold what can't be written as UTF-8.
    message = error.message.encode("utf-8", "replace").decode()
    return to_json({"error": {"message": message, "type": error.row.type, "code": error.code}})


def problem(error: PomeloError, call: Call) -> web.Response:
    """The answer for an error, with what the call gives back and, where it applies, Retry-After."""
    response = json_reply(call, body(error), error.row.http)
    if error.retry_after is not None and error.row.http in RETRY_AFTER:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def unexpected(call: Call) -> PomeloError:
    """Logs the exception being handled, once, under the request id; what the caller gets instead of it."""
    error = sys.exception()
    log.error("request %s failed unexpectedly\n%s", call.request_id, format_trace(error) if error else "")
    return PomeloError("internal_error")


@web.middleware
async def guard(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Makes the request's `Call`, and an error body of whatever goes wrong.

    What goes wrong once an answer has begun breaks the connection: it can't be told any more.
    """
    headers = request.headers
    given = [name for name, _ in headers.items()] if len(set(headers)) < len(headers) else ()
    call = request[CALL] = Call.from_headers(
        headers.get, protocol="rest", address=request.remote or "", names=given
    )
    try:
        return await handler(request)
    except PomeloError as error:
        if request.writer.output_size:
            raise cut(request) from None
        return problem(error, call)
    except web.HTTPMethodNotAllowed as refusal:
        allowed = ", ".join(sorted(refusal.allowed_methods))
        response = problem(
            PomeloError("method_not_allowed", f"The path does not take this method. Use {allowed}"), call
        )
        response.headers["Allow"] = allowed
        return response
    except web.HTTPException:
        return problem(PomeloError("not_found"), call)
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and is_cancelled():
            if _is_closing(request):
                raise
            uncancel()  # something within the request cancelled it, while its caller waits
        if isinstance(error, ConnectionError) and _is_closing(request):
            raise  # The caller has left, or was cut off; there is nobody to answer.
        fault = unexpected(call)
        if request.writer.output_size:
            raise cut(request) from None
        return problem(fault, call)
    finally:
        call.end()


def _is_closing(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()
