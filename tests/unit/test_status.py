"""Errors over gRPC arrive as they were raised."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from gateway.openapi.schema import RESPONSE_HEADERS
from pomelo.errors import FAILED_KEYS_QUOTA, TABLE, ErrorRow, PomeloError
from pomelo.status import (
    DETAILS_KEY,
    OPEN_KEY,
    REFUSED_KEY,
    cause,
    details_metadata,
    error_of,
    from_rpc_error,
    header_name,
    retry_metadata,
    status_code,
    to_status,
)
from tests.calls import error_parts, unpack

CODES = sorted(TABLE)
NO_METADATA = grpc.aio.Metadata()
TOO_LARGE = "Received message larger than max (5 vs. 4)"


def travel(error: PomeloError) -> PomeloError:
    status = to_status(error)
    metadata = grpc.aio.Metadata(*details_metadata(status))
    return from_rpc_error(
        grpc.aio.AioRpcError(status_code(error), NO_METADATA, metadata, details=status.message)
    )


def details_of(error: PomeloError) -> dict[str, Any]:
    """Returns the details of an error's status, by their type names."""
    return unpack(to_status(error))


@pytest.mark.parametrize("code", CODES)
def test_every_error_is_received_as_it_was_raised(code: str) -> None:
    for error in (
        PomeloError(code),
        PomeloError(code, "Another message: ünïcödé 🦊", field="voice_settings.speed"),
        PomeloError(code, retry_after=17),
        PomeloError(code, field="", retry_after=0),
        PomeloError(code, field="stop", values={"maximum": 4, "expected": "at most 4 strings, ünïcödé 🦊"}),
        PomeloError(code, values={"maxBytes": 0, "character": ""}),
    ):
        assert error_parts(travel(error)) == error_parts(error)


@pytest.mark.parametrize("code", CODES)
def test_every_error_has_the_status_and_the_reason_of_the_contract(code: str) -> None:
    row = TABLE[code]
    error = PomeloError(code, field="model")
    status = to_status(error)
    assert status.code == code_pb2.Code.Value(row.status) == status_code(error).value[0]
    assert status.message == row.message
    details = details_of(error)
    info = details["ErrorInfo"]
    assert (info.reason, info.domain, dict(info.metadata)) == (code.upper(), "pomelo", {"field": "model"})
    assert ("RetryInfo" in details) == (row.retry_after is not None)
    if row.retry_after is not None:
        assert details["RetryInfo"].retry_delay.seconds == row.retry_after
    assert ("BadRequest" in details) == (row.http < 500)
    assert ("QuotaFailure" in details) == (row.http == 429)


def test_an_invalid_field_is_named_in_bad_request() -> None:
    error = PomeloError("invalid_parameter", "Invalid temperature: must be a number", field="temperature")
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.field == "temperature"
    assert violation.description == error.message
    assert violation.reason == "INVALID_PARAMETER"


def test_a_rate_limit_is_a_quota_failure_with_a_retry() -> None:
    details = details_of(
        PomeloError("rate_limit_exceeded", "Rate limit exceeded. Reset at noon", retry_after=42)
    )
    (violation,) = details["QuotaFailure"].violations
    assert (violation.subject, violation.description) == ("account", "Rate limit exceeded. Reset at noon")
    assert details["RetryInfo"].retry_delay.seconds == 42


def test_an_exceeded_limit_has_its_name_its_value_and_its_model() -> None:
    values = {"quota": "tokens_per_minute", "limit": 40_000, "model": "gpt-4", "requested": 50_000}
    (violation,) = details_of(PomeloError("token_limit_exceeded", values=values))["QuotaFailure"].violations
    assert (violation.quota_id, violation.quota_metric) == ("tokens_per_minute", "tokens")
    assert (violation.quota_value, dict(violation.quota_dimensions)) == (40_000, {"model": "gpt-4"})
    assert violation.subject == "account"


def test_the_limit_of_failed_keys_is_that_of_an_address() -> None:
    error = PomeloError("rate_limit_exceeded", values={"quota": FAILED_KEYS_QUOTA, "retryAfter": 9})
    (violation,) = details_of(error)["QuotaFailure"].violations
    assert (violation.subject, violation.quota_metric, violation.quota_value) == ("address", "failed_keys", 0)


def test_an_error_without_a_field_has_neither_a_bad_request_nor_metadata() -> None:
    details = details_of(PomeloError("invalid_body"))
    assert set(details) == {"ErrorInfo"}
    assert not details["ErrorInfo"].metadata


@pytest.mark.parametrize("code", CODES)
def test_a_retry_policy_receives_the_delay_or_that_a_retry_is_pointless(code: str) -> None:
    row, metadata = TABLE[code], dict(retry_metadata(PomeloError(code)))
    if code == "provider_not_configured":  # only the operator can change that
        assert metadata == {"retry-after": "60", "grpc-retry-pushback-ms": "-1"}
    elif row.http in (409, 429, 503):
        assert metadata == {
            "retry-after": str(row.retry_after),
            "grpc-retry-pushback-ms": f"{row.retry_after}000",
        }
    else:
        assert metadata == {"grpc-retry-pushback-ms": "-1"}


def test_a_retry_of_a_request_that_alone_exceeds_a_limit_is_pointless_at_both_ends() -> None:
    error = PomeloError("token_limit_exceeded", retry_after=60, values={"limit": 1_000, "requested": 1_001})
    for each in (error, travel(error)):
        assert dict(retry_metadata(each)) == {"retry-after": "60", "grpc-retry-pushback-ms": "-1"}


@given(
    message=st.text(max_size=250),
    field=st.none() | st.text(max_size=30),
    values=st.dictionaries(st.from_regex("[a-z]{1,4}", fullmatch=True), st.text(max_size=60), max_size=4),
)
def test_any_message_field_and_values_arrive(message: str, field: str | None, values: dict[str, str]) -> None:
    error = PomeloError("invalid_parameter", message, field=field, values=values)
    assert error_parts(travel(error)) == error_parts(error)


def test_a_lone_surrogate_is_replaced_and_the_rest_arrives() -> None:
    assert travel(PomeloError("invalid_parameter", "Unknown field: \ud800x")).message == "Unknown field: ?x"


@pytest.mark.parametrize("letter", ["x", "é", "🦊"])
def test_a_long_message_is_truncated_to_fit_into_metadata(letter: str) -> None:
    values = {"expected": letter * 300, "model": letter * 300, "limit": 2**53, "quota": "tokens_per_minute"}
    error = PomeloError(
        "rate_limit_exceeded", letter * 100_000, field=letter * 300, retry_after=1, values=values
    )
    arrived = travel(error)
    assert arrived.message.endswith(letter + "…")
    status = to_status(error)
    percent_encoded = 3 * len(status.message.encode())
    base64_encoded = len(status.SerializeToString()) * 4 / 3
    assert percent_encoded + base64_encoded < 8 * 1024
    assert len(status.message.encode()) <= 1024


@pytest.mark.parametrize("letter", ["x", "é", "🦊"])
def test_a_message_of_768_bytes_is_unchanged_and_a_longer_one_is_truncated_to_768(letter: str) -> None:
    whole = letter * (768 // len(letter.encode()))
    assert travel(PomeloError("invalid_parameter", whole)).message == whole
    cut = travel(PomeloError("invalid_parameter", whole + letter)).message
    assert len(cut.encode()) <= 768
    assert whole.startswith(cut.removesuffix("…"))
    assert len(cut) >= len(whole) - 3


@pytest.mark.parametrize("letter", ["x", "é", "🦊"])
def test_a_field_of_128_and_a_value_of_256_bytes_arrive_whole_and_longer_ones_truncated(letter: str) -> None:
    half = letter * (128 // len(letter.encode()))
    whole = travel(PomeloError("invalid_parameter", field=half, values={"expected": half + half}))
    assert (whole.field, whole.values) == (half, {"expected": half + half})
    values = {"expected": half + half + letter}
    cut = travel(PomeloError("invalid_parameter", field=half + letter, values=values))
    for text, limit in ((cut.field or "", 128), (cut.values["expected"], 256)):
        assert text.endswith(letter + "…")
        assert limit - 8 < len(text.encode()) <= limit


@pytest.mark.parametrize(
    ("status", "words", "code"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses", "server_unavailable"),
        ("UNAVAILABLE", "Socket closed", "server_unavailable"),
        ("CANCELLED", "Cancelled on the server side", "shutting_down"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", "deadline_exceeded"),
        ("UNIMPLEMENTED", "Method not details!", "not_found"),
        ("RESOURCE_EXHAUSTED", f"SERVER: {TOO_LARGE}", "payload_too_large"),
        ("RESOURCE_EXHAUSTED", f"Stream removed (CLIENT: {TOO_LARGE})", "internal_error"),
        ("RESOURCE_EXHAUSTED", "received metadata size exceeds hard limit", "payload_too_large"),
        ("RESOURCE_EXHAUSTED", "Concurrent RPC limit exceeded!", "overloaded"),
        ("INTERNAL", "secret words", "internal_error"),
        ("UNKNOWN", "secret words", "internal_error"),
        ("UNAUTHENTICATED", "a proxy's words", "internal_error"),
    ],
)
def test_a_foreign_status_becomes_the_nearest_error_without_its_text(
    status: str, words: str, code: str
) -> None:
    error = from_rpc_error(
        grpc.aio.AioRpcError(grpc.StatusCode[status], NO_METADATA, NO_METADATA, details=words)
    )
    assert error.code == code
    assert error.message == TABLE[code].message
    assert words not in error.message


@pytest.mark.parametrize(
    ("status", "retry_after", "http", "error_type"),
    [
        ("INVALID_ARGUMENT", None, 400, "invalid_request_error"),
        ("UNAUTHENTICATED", None, 401, "authentication_error"),
        ("PERMISSION_DENIED", None, 403, "permission_error"),
        ("NOT_FOUND", None, 404, "invalid_request_error"),
        ("UNIMPLEMENTED", None, 405, "invalid_request_error"),
        ("ABORTED", 1, 409, "invalid_request_error"),
        ("ABORTED", None, 409, "invalid_request_error"),
        ("RESOURCE_EXHAUSTED", None, 413, "invalid_request_error"),
        ("FAILED_PRECONDITION", None, 422, "invalid_request_error"),
        ("RESOURCE_EXHAUSTED", 60, 429, "rate_limit_error"),
        ("INTERNAL", None, 500, "api_error"),
        ("DATA_LOSS", None, 500, "api_error"),
        ("UNAVAILABLE", None, 502, "provider_error"),
        ("UNAVAILABLE", 5, 503, "api_error"),
        ("DEADLINE_EXCEEDED", None, 504, "timeout_error"),
    ],
)
def test_an_error_that_only_a_newer_version_has_keeps_its_code_and_is_treated_by_its_status(
    status: str, retry_after: int | None, http: int, error_type: str
) -> None:
    row = ErrorRow("newer_code", 418, "INTERNAL", "newer_error", "Do this", retry_after)
    error = PomeloError(row, field="newer", values={"newerMicros": 5}, repeatable=False)
    sent = to_status(error)
    metadata = grpc.aio.Metadata(*details_metadata(sent), *retry_metadata(error))
    received = from_rpc_error(
        grpc.aio.AioRpcError(grpc.StatusCode[status], NO_METADATA, metadata, details=sent.message)
    )
    assert error_parts(received) == error_parts(error)
    assert (received.row.http, received.row.type) == (http, error_type)
    assert not received.repeatable


def test_details_of_another_domain_or_without_a_reason_are_ignored() -> None:
    for domain, reason in (
        ("googleapis.com", "RATE_LIMIT_EXCEEDED"),
        ("pomelo", ""),
    ):
        status = status_pb2.Status(code=14, message="theirs")
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
        metadata = grpc.aio.Metadata((DETAILS_KEY, status.SerializeToString()))
        error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, NO_METADATA, metadata, details="theirs")
        assert error_parts(from_rpc_error(error)) == error_parts(PomeloError("server_unavailable"))


@given(st.binary(max_size=200))
def test_damaged_details_are_ignored(damaged: bytes) -> None:
    metadata = grpc.aio.Metadata((DETAILS_KEY, damaged))
    error = from_rpc_error(grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, NO_METADATA, metadata))
    assert error.code in ("internal_error", *TABLE)
    assert error.message


@pytest.mark.parametrize("name", RESPONSE_HEADERS)
def test_every_response_header_is_sent_by_the_name_of_the_documentation(name: str) -> None:
    sent = name not in ("Retry-After", "WWW-Authenticate")  # of REST alone
    assert header_name(name.lower()) == (name if sent else None)


def test_headers_of_unknown_limits_have_names_and_other_metadata_has_none() -> None:
    assert header_name("x-ratelimit-reset-images") == "X-RateLimit-Reset-Images"
    for key in ("x-ratelimit", "x-other", "", DETAILS_KEY, OPEN_KEY, REFUSED_KEY):
        assert header_name(key) is None


class Failed:
    """A call of grpc.aio that has ended, or that is still running."""

    def __init__(self, *, done: bool = True) -> None:
        self._done = done

    async def _get(self, value: object) -> object:
        if not self._done:
            await asyncio.sleep(0)
        return value

    def __getattr__(self, name: str) -> Any:
        return lambda: self._get({"code": grpc.StatusCode.INTERNAL}.get(name, name))


async def test_the_status_of_an_ended_call_is_read_without_waiting() -> None:
    error = error_of(Failed())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert (error.initial_metadata(), error.trailing_metadata(), error.details()) == (
        *("initial_metadata", "trailing_metadata"),
        "details",
    )
    with pytest.raises(RuntimeError, match="had to wait"):
        error_of(Failed(done=False))


def test_the_cause_of_a_failed_call_is_the_first_error_that_is_the_servers() -> None:
    def failed(details: str) -> grpc.aio.AioRpcError:
        return grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, NO_METADATA, NO_METADATA, details=details)

    own, first, second = (failed(text) for text in ("Internal error from Core", "first", "second"))
    assert cause([own, first, second], own) is first
    assert cause([own], second) is second
    assert cause([], own) is own
