"""The one map from what goes wrong upstream to the errors of the table.

`pomelo.providers.http.client` and the vendors' modules raise what these functions make. A vendor adds only a
`Dialect`: how its error bodies are read, and what its own codes mean. Nothing that a vendor wrote gets
into a message; what an operator needs (vendor, status, the vendor's code and request id) is a note of the
exception, shown in a traceback alone.

What became of the call                                   code                    Retry-After
--------------------------------------------------------  ----------------------  --------------------
the name can't be resolved, the connection is refused     provider_unavailable    5
no connection in `connect` seconds                        provider_unavailable    5
reset or closed before the answer began                   provider_unavailable    5
no good certificate, or no TLS there                      provider_failed         -
silence, before the answer or within it                   deadline_exceeded       -
reset or closed within the answer                         provider_failed         -
no HTTP, a redirect, a page, no JSON, another shape       provider_failed         -
an address of the vendor that is none                     provider_failed         -
larger than the limits                                    provider_failed         -
a code that the vendor's dialect knows, at any status     as the dialect says     the vendor's, or 5
400 or 422 that names a field of the caller's             invalid_parameter       -
413                                                       payload_too_large       -
401, 402, 403, 404, any other 4xx                         provider_failed         -
408, 409, 425, 429, 5xx                                   provider_unavailable    the vendor's, or 5
an error within a stream whose code nobody knows          provider_failed         -

A vendor's wait counts from 1 to 60 s. A refusal of our own credentials or money is never shown as the
caller's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from math import ceil, isfinite
from typing import Any

import aiohttp

from pomelo.errors import PomeloError, Replay
from pomelo.providers.http.parsing import parse

MAX_RETRY_AFTER = 60
"""The longest wait in seconds that is passed on from a vendor."""

_SAFE = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_RETRYABLE = frozenset((408, 409, 425, 429))


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """What a vendor says in an error body: its codes, the most telling first, and the contract's field that
    it blames, if any."""

    codes: tuple[str, ...] = ()
    field: str | None = None


NO_ERROR_BODY = ErrorBody()


@dataclass(frozen=True, slots=True)
class ErrorMapping:
    """How a vendor words its failures.

    `meanings` gives the code of our table for a vendor's code; `read` finds the complaint in a parsed body,
    whatever its shape, and never raises. `replays` False: each request may be paid for, so it is not sent a
    second time where the first may have gone through. `statuses` gives the code of our table for an HTTP
    status from 400 whose body has no code that is in `meanings`.
    """

    vendor: str
    read: Callable[[Any], ErrorBody]
    meanings: Mapping[str, str] = field(default_factory=dict)
    replays: bool = True
    statuses: Mapping[int, str] = field(default_factory=dict)


class TruncatedError(PomeloError):
    """The answer ended within its body, or went silent: what is free can be asked for again."""

    __slots__ = ()


def from_connect_error(error: BaseException, dialect: ErrorMapping) -> PomeloError:
    """What a failure before the answer's head means; `error` is aiohttp's, or an OSError or ValueError."""
    replay = Replay.NEVER
    match error:
        case aiohttp.ConnectionTimeoutError():
            failure = PomeloError("provider_unavailable", "The provider can't be reached. Retry later")
            replay = Replay.AGAIN
        case TimeoutError():
            failure = PomeloError("deadline_exceeded", "The provider did not answer in time. Retry")
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientSSLError():
            failure = PomeloError("provider_failed", "No safe connection to the provider can be made")
            replay = Replay.ELSEWHERE
        case (
            aiohttp.ClientResponseError()
            | aiohttp.ClientPayloadError()
            | aiohttp.NonHttpUrlClientError()
            | ValueError()
        ):
            failure = PomeloError("provider_failed")
        case _:
            failure = PomeloError("provider_unavailable", "The provider can't be reached. Retry later")
            if dialect.replays or isinstance(error, aiohttp.ClientConnectorError):
                replay = Replay.AGAIN
    failure.replay = replay
    return _noted(failure, type(error).__name__)


def truncated(error: BaseException) -> PomeloError:
    """What a failure within the answer's body means."""
    if isinstance(error, TimeoutError):
        failure = TruncatedError("deadline_exceeded", "The provider stopped half way and went silent. Retry")
    else:
        failure = TruncatedError("provider_failed", "The provider's answer was cut. Retry")
    return _noted(failure, type(error).__name__)


def malformed_response(what: str = "") -> PomeloError:
    """The answer can't be used; `what` says why, in our own words, to the operator alone."""
    return _noted(PomeloError("provider_failed"), what or "an answer that can't be read")


def refused(
    status: int, headers: Mapping[str, str], body: bytes, dialect: ErrorMapping, now: float
) -> PomeloError:
    """What an answer with a status from 300 means; `body` as far as it came, `now` is Unix time."""
    complaint = NO_ERROR_BODY
    if status >= 400:
        try:
            complaint = dialect.read(parse(body))
        except ValueError:
            complaint = NO_ERROR_BODY
    request_id = headers.get("x-request-id") or headers.get("request-id") or ""
    told = (dialect.vendor, f"HTTP {status}", *_safe(*complaint.codes, request_id))
    wait = wait_hint(headers, now)
    failure = _meant(complaint, dialect, wait)
    if failure is None:
        if status in dialect.statuses:
            failure = PomeloError(dialect.statuses[status])
        elif status >= 500 or status in _RETRYABLE:
            failure = PomeloError("provider_unavailable", retry_after=wait)
        elif status == 413:
            failure = PomeloError("payload_too_large", "The request is larger than the provider takes")
        elif status in (400, 422) and complaint.field:
            failure = _not_taken(complaint.field)
        else:
            failure = PomeloError("provider_failed")
    if failure.code == "provider_unavailable" and (dialect.replays or status == 429):
        failure.replay = Replay.AGAIN
    elif failure.code == "provider_failed" and status < 500:
        failure.replay = Replay.ELSEWHERE  # our key, our money, our name of the model: not the next host's
    return _noted(failure, *told)


def from_error_body(body: Any, dialect: ErrorMapping) -> PomeloError:
    """What an error object in place of an answer, or within a stream, means."""
    complaint = dialect.read(body)
    failure = _meant(complaint, dialect, None) or PomeloError("provider_failed")
    return _noted(failure, dialect.vendor, *_safe(*complaint.codes))


def wait_hint(headers: Mapping[str, str], now: float) -> int | None:
    """The vendor's wait in whole seconds, 1 to WAIT_MOST; None when it names none that can be read.

    `retry-after-ms` counts before `retry-after`, which has seconds or a date. `headers` must find names in
    any case.
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


def _meant(complaint: ErrorBody, dialect: ErrorMapping, wait: int | None) -> PomeloError | None:
    for code in complaint.codes:
        meaning = dialect.meanings.get(code)
        if meaning is None:
            continue
        if meaning == "invalid_parameter":
            return _not_taken(complaint.field or "messages")
        return PomeloError(meaning, retry_after=wait if meaning == "provider_unavailable" else None)
    return None


def _not_taken(name: str) -> PomeloError:
    message = f"Invalid {name}: the provider does not take this value. Change it or leave it out"
    return PomeloError("invalid_parameter", message, field=name)


def _noted(failure: PomeloError, *told: str) -> PomeloError:
    """Adds a note in our own words."""
    failure.add_note(", ".join(told))
    return failure


def _safe(*words: str) -> list[str]:
    """Those of a vendor's words that look like a code or an id, and can't be anything else."""
    return [word for word in words if _SAFE.fullmatch(word)]
