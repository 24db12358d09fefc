"""The one map from what goes wrong upstream to the errors of the table.

A vendor adds only an `ErrorMapping`: how its error bodies are read, and what its own codes mean. No message
contains text of a vendor. What an operator needs is in the error's reason, `vendor_code` and note.

Outcome of the call                                       code                    Retry-After
--------------------------------------------------------  ----------------------  --------------------
name not resolved, connection refused                     provider_unavailable    5
no connection within `connect` seconds                    provider_unavailable    5
reset or closed before the response began                 provider_unavailable    5
invalid certificate, or no TLS                            provider_failed         -
no data for too long, before or within the response       deadline_exceeded       -
reset or closed within the response                       provider_failed         -
not HTTP, a redirect, a page, not JSON, another shape     provider_failed         -
invalid address of the vendor                             provider_failed         -
larger than the limits                                    provider_failed         -
a code that the vendor's mapping has, at any status       from the mapping        the vendor's, or 5
400 or 422 that names a field of the caller               invalid_parameter       -
413                                                       payload_too_large       -
401, 402, 403, 404, any other 4xx                         provider_failed         -
408, 409, 425, 429, 5xx                                   provider_unavailable    the vendor's, or 5
an error in place of the response, or within it           from the mapping, or    5
                                                          provider_failed         -

A vendor's Retry-After counts from 1 to 60 s. With `x-should-retry: false` the same route is not tried again;
"true" makes any other 4xx provider_unavailable. If a vendor refuses our own credentials, or our account is
out of money, the caller is not blamed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from math import ceil, isfinite
from typing import Any

from pomelo.providers.base import VENDOR_CALL, vendor_token
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.parsing import parse

MAX_RETRY_AFTER = 60
"""The longest wait in seconds that is passed on from a vendor."""

_TRUNCATED = "The provider's response was truncated. Retry"
_UNREACHABLE = "The provider can't be reached. Retry later"
_RETRYABLE = frozenset((408, 409, 425, 429))

_RETRIES: Mapping[str | None, RetryPolicy] = {
    "provider_unavailable": RetryPolicy.SAME_ROUTE,
    "provider_failed": RetryPolicy.NEXT_ROUTE,  # it concerns our key, account or model id
}
"""What the router may do about a refusal, by its code."""

_REASONS = {
    "content_policy_violation": "the vendor's content policy refused the input",
    "context_length_exceeded": "the input is longer than the model takes",
    "invalid_parameter": "the vendor refused a value of the request",
    "payload_too_large": "the request is larger than the vendor takes",
}
"""Why a vendor refused a request, by the code of our table."""

_STATUS_REASONS = {
    401: "the vendor refused your key",
    402: "your account at the vendor is out of money",
    403: "the vendor does not allow this to your key",
    404: "the vendor does not have the model or the path",
    408: "the vendor timed out",
    413: "the request is larger than the vendor takes",
    429: "the vendor's rate limit is reached",
    503: "the vendor is overloaded or down",
    504: "the vendor timed out",
    529: "the vendor is overloaded",
}


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """What a vendor reports in an error body: its codes, the most specific first, and the name of the request
    field at fault, if any, as callers know it. `reason` is for the operator's log, if the codes and the
    status don't say it."""

    codes: tuple[str, ...] = ()
    field: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ErrorMapping:
    """How a vendor reports failures.

    `read` reads a parsed error body of any shape and never raises. `meanings` maps a vendor's code to a code
    of our table. `replays` False: a request may be charged each time it is sent, so it is not sent a second
    time if the first may have reached the vendor. `statuses` maps HTTP statuses from 400 to codes of our
    table, for bodies without a code that is in `meanings`.
    """

    vendor: str
    read: Callable[[Any], ErrorBody]
    meanings: Mapping[str, str] = field(default_factory=dict)
    replays: bool = True
    statuses: Mapping[int, str] = field(default_factory=dict)


class TruncatedError(UpstreamError):
    """The response ended within its body, or stopped. A request that costs nothing can be sent again."""


class ConnectError(OSError):
    """There is no connection to the vendor, so nothing was sent. `reason` says why, for the operator."""

    reason = "the vendor can't be connected to"


class UnknownHostError(ConnectError):
    reason = "the vendor's host name has no address"


class ConnectTimeoutError(ConnectError):
    reason = "there was no connection to the vendor in time"


class SecureConnectionError(ConnectError):
    reason = "the vendor's certificate is invalid, or it does not speak TLS"


class DisconnectedError(OSError):
    """The connection ended before the response did, or the request could not be sent."""


class BrokenHeadError(OSError):
    """The connection ended within the head of the response, so the vendor has processed the request."""


class PrivateAddressError(ValueError):
    """A host name in a vendor's response has an address that is not public. It is not an OSError, which would
    be retried."""


class ProtocolError(ValueError):
    """What the vendor sent is not HTTP/1.1, or exceeds the limits."""


def from_connect_error(error: BaseException, mapping: ErrorMapping) -> UpstreamError:
    """Map a failure before the end of the response's head: one of the errors above, a TimeoutError or a
    ValueError."""
    if isinstance(error, BrokenHeadError):
        return truncated(error)
    code, message, retry = "provider_failed", "", RetryPolicy.NEVER
    match error:
        case TimeoutError():
            code, message = "deadline_exceeded", "The provider did not answer in time. Retry"
            reason = "the vendor did not answer in time"
        case SecureConnectionError():
            message, retry = "A secure connection to the provider can't be made", RetryPolicy.NEXT_ROUTE
            reason = error.reason
        case ProtocolError():
            reason = "the vendor's response is not HTTP, or exceeds the limits"
        case PrivateAddressError():
            reason = "the vendor's response has a link to an address that is not public"
        case ValueError():
            reason = "the vendor's base URL or your key can't be sent"
        case ConnectError():
            code, message, retry = "provider_unavailable", _UNREACHABLE, RetryPolicy.SAME_ROUTE
            reason = error.reason
        case _:
            code, message = "provider_unavailable", _UNREACHABLE
            retry = RetryPolicy.SAME_ROUTE if mapping.replays else RetryPolicy.NEVER
            reason = "the vendor closed the connection before it answered"
    return UpstreamError(code, message, retry=retry, note=type(error).__name__, reason=reason)


def truncated(error: BaseException) -> TruncatedError:
    """Map a failure within the response's body."""
    note = type(error).__name__
    if isinstance(error, TimeoutError):
        message, reason = "The provider stopped responding. Retry", "the vendor stopped sending its response"
        return TruncatedError("deadline_exceeded", message, note=note, reason=reason)
    return TruncatedError("provider_failed", _TRUNCATED, note=note, reason="the vendor's response broke off")


def incomplete_file(note: str) -> TruncatedError:
    """Return the error for a response that ended correctly, but with a part of a file; `note` as in
    `malformed_response`."""
    return TruncatedError(
        "provider_failed", _TRUNCATED, note=note, reason="the vendor sent only a part of a file"
    )


def malformed_response(note: str) -> UpstreamError:
    """Return the error for a response that can't be used; `note` says why, for operators."""
    return UpstreamError("provider_failed", note=note)


def refused(
    status: int, headers: Mapping[str, str], body: bytes, mapping: ErrorMapping, now: float
) -> UpstreamError:
    """Map a response whose status is 300 or above. `body` is what was read of it, `now` is Unix time."""
    error_body = ErrorBody()
    if status >= 400:
        with suppress(ValueError):
            error_body = mapping.read(parse(body))
    message = ""
    should_retry = headers.get("x-should-retry", "").strip().lower()
    code = _meaning(error_body, mapping)
    if code is None:
        if status in mapping.statuses:
            code = mapping.statuses[status]
        elif status >= 500 or status in _RETRYABLE:
            code = "provider_unavailable"
        elif status == 413:
            code, message = "payload_too_large", "The request is larger than the provider takes"
        elif status in (400, 422) and error_body.field and _is_callers(error_body.field):
            code = "invalid_parameter"
        elif status >= 400 and should_retry == "true":
            code = "provider_unavailable"
        else:
            code = "provider_failed"
    retry = RetryPolicy.NEVER
    if code == "provider_unavailable" and (mapping.replays or status == 429):
        retry = RetryPolicy.NEXT_ROUTE if should_retry == "false" else RetryPolicy.SAME_ROUTE
    elif code == "provider_failed" and status < 500 and (mapping.replays or status != 303):
        retry = RetryPolicy.NEXT_ROUTE  # it concerns our key, account or model id; after a 303 work was done
    wait = wait_hint(headers, now) if code == "provider_unavailable" else None
    request_id = headers.get("x-request-id") or headers.get("request-id") or ""
    note = ", ".join((mapping.vendor, f"HTTP {status}", *_safe(*error_body.codes, request_id)))
    reason = error_body.reason or _reason(status, code)
    return _upstream_error(
        code, error_body, message=message, retry=retry, wait=wait, note=note, reason=reason
    )


def from_error_body(body: Any, mapping: ErrorMapping) -> UpstreamError:
    """Map an error object that was sent in place of a response, or within a stream. One whose code is in the
    mapping has the retry policy of a refusal, unless requests are charged each time; `stream_text` turns off
    retries once a stream has begun."""
    error_body = mapping.read(body)
    known = _meaning(error_body, mapping)
    retry = _RETRIES.get(known, RetryPolicy.NEVER) if mapping.replays else RetryPolicy.NEVER
    code = known or "provider_failed"
    note = ", ".join((mapping.vendor, *_safe(*error_body.codes)))
    reason = error_body.reason or _REASONS.get(code, "the vendor sent an error within its response")
    return _upstream_error(code, error_body, retry=retry, note=note, reason=reason)


def wait_hint(headers: Mapping[str, str], now: float) -> int | None:
    """Return the vendor's Retry-After in whole seconds, from 1 to MAX_RETRY_AFTER; None without a valid one.

    `retry-after-ms` counts before `retry-after`, which is in seconds or a date. Lookups in `headers` must
    ignore case.
    """
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) / unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - now
            except (ValueError, OverflowError):
                continue
        if isfinite(seconds):
            return min(max(ceil(seconds), 1), MAX_RETRY_AFTER)
    return None


def _meaning(error_body: ErrorBody, mapping: ErrorMapping) -> str | None:
    return next((mapping.meanings[code] for code in error_body.codes if code in mapping.meanings), None)


def _is_callers(field: str) -> bool:
    """Whether a field that the vendor refuses can be corrected by the caller: a maximum that only the
    catalogue has set can't."""
    return field != "max_tokens" or _given_max_tokens() != 0


def _given_max_tokens() -> int | None:
    """The max_tokens that the caller has set, or 0; None if there is no job, or if it is not for text."""
    call = VENDOR_CALL.get()
    if call is None or (job := call.job) is None:
        return None
    given = job.input if job.given is None else job.given.input
    return getattr(given, "max_tokens", None)


def _reason(status: int, code: str) -> str:
    """Why a vendor refused a request, for the operator."""
    if code in _REASONS:
        return _REASONS[code]
    if status == 429 and code == "provider_failed":
        return "your account at the vendor is out of quota or money"
    if status < 400:
        return "the vendor redirected the request: its base URL may be wrong"
    return _STATUS_REASONS.get(
        status, "the vendor failed" if status >= 500 else "the vendor refused the request"
    )


def _upstream_error(code: str, error_body: ErrorBody, *, message: str = "", **more: Any) -> UpstreamError:
    more["vendor_code"] = next(filter(None, map(vendor_token, error_body.codes)), "")
    if code == "context_length_exceeded" and error_body.field in ("prompt", "text"):
        message = f"{error_body.field} is longer than the provider takes. Shorten it"
        return UpstreamError(code, message, field=error_body.field, **more)
    if code == "context_length_exceeded" and _given_max_tokens():
        message = (
            "The prompt and max_tokens exceed what the model takes. Shorten messages or lower max_tokens"
        )
    if code != "invalid_parameter":
        return UpstreamError(code, message, **more)
    name = error_body.field or "messages"
    message = f"Invalid {name}: the provider does not take this value. Change it or leave it out"
    return UpstreamError(code, message, field=name, **more)


def _safe(*words: str) -> list[str]:
    """Only those words of a vendor that look like a code or an id, and can't be anything else."""
    return [word for word in words if vendor_token(word)]
