"""Converts `PomeloError` to gRPC's status and back, so that an error is the same at both ends of a
channel."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from pomelo.errors import FAILED_KEYS_QUOTA, TABLE, ErrorRow, PomeloError

DOMAIN = "pomelo"
"""The `domain` of google.rpc.ErrorInfo."""

DETAILS_KEY = "grpc-status-details-bin"
"""The name of the trailing metadata that carries a google.rpc.Status."""

REFUSED_KEY = "x-pomelo-refused"
"""Request metadata of RunTask, from gateways only: the gateway refused the body. The value is the error's
code and the number of bytes read. The response is that error or one that takes precedence, with the
limits."""

DISCARD_KEY = "x-pomelo-discard"
"""Request metadata of RunTask, from gateways only: the task is only sent to delete the upload of a request
that does not need it, and is not reported."""

OPEN_KEY = "x-pomelo-open"
"""Response metadata, to gateways only: all checks that can refuse the task are done, and a later failure is
part of the response. It is not secret, so a gateway needs no proof to receive it."""

HEADERS = frozenset(
    {
        *("x-request-id", "x-pomelo-mode", "x-credits-remaining", "x-credits-charged", "idempotent-replayed"),
        *("x-pomelo-adjusted", "preference-applied", "deprecation", "sunset"),
    }
)
"""Response headers, as metadata names them, besides those of limits."""

_LIMIT_PREFIX = "x-ratelimit-"

_PUSHBACK_KEY, _NO_RETRY = "grpc-retry-pushback-ms", "-1"

_MAX_MESSAGE_BYTES = 768
"""Maximum UTF-8 bytes of a message. With its details the trailing metadata repeats it up to four times,
beside the headers, and clients accept 8 KiB."""

_MAX_FIELD_BYTES = 128

_FAILED_WRITE = "Internal error from Core"
"""grpc.aio's details of a call whose write failed, whatever status the server sent."""

_MAX_VALUE_BYTES = 256
"""Maximum UTF-8 bytes of one of an error's values. No error has more than two that can be so long."""

_CODES = {row.status: grpc.StatusCode[row.status] for row in TABLE.values()}

_TYPICAL = {
    (TABLE[code].status, TABLE[code].retry_after is not None): TABLE[code]
    for code in (
        *("invalid_parameter", "invalid_api_key", "model_not_allowed", "not_found", "method_not_allowed"),
        *("payload_too_large", "rate_limit_exceeded", "idempotency_mismatch", "idempotency_conflict"),
        *("provider_failed", "overloaded", "deadline_exceeded", "internal_error"),
    )
}
"""By gRPC status and whether a wait is proposed: the error whose HTTP status and type an unknown one gets."""


class _Keys(dict[str, str]):
    """The names of headers -> their keys in metadata. There are few, as no caller can name one."""

    def __missing__(self, name: str) -> str:
        key = self[name] = name.lower()
        return key


_KEYS = _Keys()


def to_metadata(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns headers as metadata."""
    keys = _KEYS
    return [(keys[name], value) for name, value in headers.items()]


@lru_cache(maxsize=256)
def header_name(key: str) -> str | None:
    """Returns the name of the response header that is `key` in metadata; None for other metadata. A gateway
    also passes on the headers of limits that only the engine knows."""
    if key.startswith(_LIMIT_PREFIX):
        return f"X-RateLimit-{key.removeprefix(_LIMIT_PREFIX).title()}"
    return key.title() if key in HEADERS else None


def status_code(error: PomeloError) -> Any:
    return _CODES[error.row.status]


def to_status(error: PomeloError) -> status_pb2.Status:
    """Returns the google.rpc.Status of an error, with ErrorInfo and, as they apply, RetryInfo, BadRequest and
    QuotaFailure. The metadata of ErrorInfo are the error's field and values."""
    message = _truncate(error.message, _MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=_CODES[error.row.status].value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=error.row.reason, domain=DOMAIN)
    field = None if error.field is None else _truncate(error.field, _MAX_FIELD_BYTES)
    values = {key: _truncate(value, _MAX_VALUE_BYTES) for key, value in error.values.items()}
    info.metadata.update(values)
    if field is not None:
        info.metadata["field"] = field
    status.details.add().Pack(info)
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.seconds = error.retry_after
        status.details.add().Pack(retry)
    if field is not None and error.row.http < 500:
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=field, description=message, reason=error.row.reason)
        status.details.add().Pack(bad)
    if error.row.type == "rate_limit_error":
        status.details.add().Pack(_quota_failure(values, message))
    return status


def _quota_failure(values: Mapping[str, str], message: str) -> error_details_pb2.QuotaFailure:
    quota = values.get("quota", "")
    failure = error_details_pb2.QuotaFailure()
    violation = failure.violations.add(
        subject="address" if quota == FAILED_KEYS_QUOTA else "account",
        description=message,
        quota_metric=quota.partition("_per_")[0],
        quota_id=quota,
    )
    if "model" in values:
        violation.quota_dimensions["model"] = values["model"]
    if "limit" in values:
        violation.quota_value = int(values["limit"])
    return failure


def details_metadata(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    """Returns the trailing metadata that carries a google.rpc.Status."""
    return ((DETAILS_KEY, status.SerializeToString()),)


def retry_metadata(error: PomeloError) -> list[tuple[str, str]]:
    """Returns the metadata that says whether and when to retry: `retry-after` in seconds, as over REST, and
    the pushback in milliseconds that gRPC's retry policies obey. The pushback is -1 if a retry is pointless,
    or must not be automatic."""
    wait = error.retry_after
    if wait is None:
        return [(_PUSHBACK_KEY, _NO_RETRY)]
    pushback = str(wait * 1000) if error.repeatable else _NO_RETRY
    return [("retry-after", str(wait)), (_PUSHBACK_KEY, pushback)]


def from_rpc_error(error: Any) -> PomeloError:
    """Returns the error of a failed call (a grpc.RpcError).

    An error of another Pomelo keeps all that callers see of it; if only a newer version has it, its HTTP
    status and type follow from the status code. An error of the channel or of a proxy is derived from the
    status code.
    """
    status = status_pb2.Status()
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after, repeatable = None, True
    try:
        for key, value in error.trailing_metadata() or ():
            if key == DETAILS_KEY:
                status.ParseFromString(value)
            elif key == _PUSHBACK_KEY:
                repeatable = value != _NO_RETRY
        for detail in status.details:
            if detail.Is(info.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Is(retry.DESCRIPTOR):
                detail.Unpack(retry)
                retry_after = retry.retry_delay.seconds
    except DecodeError:
        info.Clear()
    if info.domain != DOMAIN or not info.reason:
        return _from_code(error.code(), error.details() or "")
    code, values = info.reason.lower(), dict(info.metadata)
    return PomeloError(
        code if code in TABLE else _newer_row(error.code(), code, retry_after),
        status.message,
        field=values.pop("field", None),
        retry_after=retry_after,
        values=values,
        repeatable=repeatable,
    )


def _newer_row(status_code: Any, code: str, retry_after: int | None) -> ErrorRow:
    """Returns the row of an error that only a newer version has."""
    status, waits = status_code.name, retry_after is not None
    typical = _TYPICAL.get((status, waits)) or _TYPICAL.get((status, not waits)) or TABLE["internal_error"]
    return replace(typical, code=code, retry_after=retry_after)


def _from_code(code: Any, details: str) -> PomeloError:
    """Returns the error of a status code without Pomelo's details; the text of `details` is not passed on."""
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return PomeloError("server_unavailable")
        case grpc.StatusCode.CANCELLED:  # by the server: our own cancellation is a CancelledError
            return PomeloError("shutting_down")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return PomeloError("deadline_exceeded")
        case grpc.StatusCode.UNIMPLEMENTED:
            return PomeloError("not_found")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "CLIENT:" in details:
            return PomeloError("internal_error")  # a response above our message limit
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details or "metadata size" in details:
            return PomeloError("payload_too_large")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return PomeloError("overloaded")
    return PomeloError("internal_error")


def _truncate(text: str, limit: int) -> str:
    """Returns `text`, shortened to at most `limit` bytes of UTF-8."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode("utf-8", "ignore") + "…"


def error_of(rpc: Any) -> Any:
    """Returns the current status of a call of grpc.aio that is done, as an error."""
    return grpc.aio.AioRpcError(
        _result(rpc.code()),
        _result(rpc.initial_metadata()),
        _result(rpc.trailing_metadata()),
        _result(rpc.details()),
    )


def cause(errors: Iterable[Any], last: Any) -> Any:
    """Returns the error that ended a call of grpc.aio: the first of its earlier ones and its last one that is
    not grpc.aio's own. When a write fails, that one comes before or after the server's status."""
    return next((each for each in errors if each.details() != _FAILED_WRITE), last)


def _result(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Returns the result of a coroutine that does not wait for anything."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise RuntimeError("the coroutine had to wait")
