"""Errors and headers as they travel over gRPC: `PomeloError` to google.rpc.Status and back.

The servicers write with it and `pomelo.server.remote` reads with it, so that an error is the same object at
both ends of a channel. It knows nothing of tasks, servers or channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from pomelo.errors import RETRY_AFTER, TABLE, PomeloError

DOMAIN = "pomelo"
"""The `domain` of google.rpc.ErrorInfo."""

DETAILS_KEY = "grpc-status-details-bin"
"""The trailing metadata in which gRPC carries a google.rpc.Status."""

REFUSED_KEY = "x-pomelo-refused"
"""Metadata in, from a gateway alone, with RunTask: the gateway refused the body. The value is the
error's code and the number of bytes read; the answer is that error, or one that takes precedence,
with the limits."""

OPEN_KEY = "x-pomelo-open"
"""Metadata out, to a gateway alone: all checks that can refuse the task are done, and a later
failure is part of the answer. It reveals nothing secret, so a gateway needs no proof to get it."""

HEADER_NAMES = {
    name.lower(): name
    for name in (
        "X-Request-Id",
        "X-Pomelo-Mode",
        "X-RateLimit-Limit",
        "X-RateLimit-Remaining",
        "X-RateLimit-Reset",
        "X-RateLimit-Limit-Tokens",
        "X-RateLimit-Remaining-Tokens",
        "X-RateLimit-Reset-Tokens",
        "X-RateLimit-Limit-Concurrent",
        "X-RateLimit-Remaining-Concurrent",
        "X-Credits-Remaining",
        "X-Credits-Charged",
        "Idempotent-Replayed",
        "X-Pomelo-Adjusted",
        "Preference-Applied",
        "Deprecation",
        "Sunset",
    )
}
"""The headers of `call.reply`: metadata's lower-case name -> the name as the documentation writes it."""

_LONGEST = 768
"""The most UTF-8 bytes of a message: with its details the trailing metadata repeat it up to four
times, beside the headers, and clients accept 8 KiB."""

_LONGEST_FIELD = 128

_CODES = {code: grpc.StatusCode[row.status] for code, row in TABLE.items()}


def status_code(error: PomeloError) -> Any:
    """The grpc.StatusCode of an error."""
    return _CODES[error.code]


def to_status(error: PomeloError) -> status_pb2.Status:
    """The rich form of an error: ErrorInfo, and RetryInfo, BadRequest, QuotaFailure where they apply."""
    message = _fitting(error.message, _LONGEST)
    status = status_pb2.Status(code=_CODES[error.code].value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=error.row.reason, domain=DOMAIN)
    field = None if error.field is None else _fitting(error.field, _LONGEST_FIELD)
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
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject="account", description=message)
        status.details.add().Pack(quota)
    return status


def trailing(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries a rich status."""
    return ((DETAILS_KEY, status.SerializeToString()),)


def retry(error: PomeloError) -> list[tuple[str, str]]:
    """The metadata that says whether and when to retry: `retry-after` in seconds as over REST, and
    the pushback in milliseconds that gRPC's own retry policies follow, which is -1 where a retry is
    pointless or somebody has to act first."""
    wait = error.retry_after if error.row.http in RETRY_AFTER else None
    if wait is None:
        return [("grpc-retry-pushback-ms", "-1")]
    pushback = -1 if error.row.permanent else wait * 1000
    return [("retry-after", str(wait)), ("grpc-retry-pushback-ms", str(pushback))]


def from_rpc_error(error: Any) -> PomeloError:
    """The error that a failed call (a grpc.aio.AioRpcError) stands for.

    What another Pomelo raised comes back as it was: code, message, field, retry_after. What the channel
    or a proxy made of it is told from the status.
    """
    return _rich(error.trailing_metadata() or ()) or _plain(error.code(), error.details() or "")


def _rich(metadata: Iterable[tuple[str, Any]]) -> PomeloError | None:
    status = status_pb2.Status()
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after = None
    try:
        for key, value in metadata:
            if key == DETAILS_KEY:
                status.ParseFromString(value)
        for detail in status.details:
            if detail.Is(info.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Is(retry.DESCRIPTOR):
                detail.Unpack(retry)
                retry_after = retry.retry_delay.seconds
    except DecodeError:
        return None
    code = info.reason.lower()
    if info.domain != DOMAIN or code not in TABLE:
        return None
    return PomeloError(code, status.message, field=info.metadata.get("field"), retry_after=retry_after)


def _plain(status: Any, details: str) -> PomeloError:
    """What a status without our details means; `details` is only looked at, never passed on."""
    match status:
        case grpc.StatusCode.UNAVAILABLE:
            return PomeloError("server_unavailable")
        case grpc.StatusCode.CANCELLED:  # not by us: that is a CancelledError
            return PomeloError("shutting_down")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return PomeloError("deadline_exceeded")
        case grpc.StatusCode.UNIMPLEMENTED:
            return PomeloError("not_found")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "CLIENT:" in details:
            return PomeloError("internal_error")  # an answer that is larger than this end takes
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details or "metadata size" in details:
            return PomeloError("payload_too_large")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return PomeloError("overloaded")
    return PomeloError("internal_error")


def _fitting(text: str, most: int) -> str:
    """`text` as UTF-8 of at most so many bytes."""
    data = text.encode("utf-8", "replace")
    if len(data) <= most:
        return data.decode()
    return data[: most - 3].decode("utf-8", "ignore") + "…"
