"""The map from upstream failures to errors, row by row."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import replace
from email.utils import formatdate
from typing import Any

import pytest
from multidict import CIMultiDict

from pomelo.errors import PomeloError
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.errors import (
    ConnectError,
    ConnectTimeoutError,
    DisconnectedError,
    ErrorBody,
    ErrorMapping,
    ProtocolError,
    SecureConnectionError,
    UnknownHostError,
    from_connect_error,
    from_error_body,
    malformed_response,
    refused,
    truncated,
    wait_hint,
)

NOW = 1_800_000_000.0
CANARY = "sk-canary-3141 and the prompt"


def read(body: Any) -> ErrorBody:
    """A vendor whose error bodies are {"codes": […], "field": …}."""
    if not isinstance(body, dict):
        return ErrorBody()
    return ErrorBody(tuple(body.get("codes", ())), body.get("field"))


ACME = ErrorMapping(
    "acme",
    read,
    {
        "too_long": "context_length_exceeded",
        "moderated": "content_policy_violation",
        "broke": "provider_failed",
        "busy": "provider_unavailable",
        "bad_picture": "invalid_parameter",
    },
)


def refuse(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> UpstreamError:
    """The error of a response with this status."""
    return refused(status, CIMultiDict(headers or {}), body, ACME, NOW)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (300, "provider_failed"),
        (301, "provider_failed"),
        (307, "provider_failed"),
        (400, "provider_failed"),
        (401, "provider_failed"),
        (402, "provider_failed"),
        (403, "provider_failed"),
        (404, "provider_failed"),
        (405, "provider_failed"),
        (408, "provider_unavailable"),
        (409, "provider_unavailable"),
        (413, "payload_too_large"),
        (415, "provider_failed"),
        (418, "provider_failed"),
        (422, "provider_failed"),
        (425, "provider_unavailable"),
        (429, "provider_unavailable"),
        (500, "provider_unavailable"),
        (502, "provider_unavailable"),
        (503, "provider_unavailable"),
        (529, "provider_unavailable"),
    ],
)
def test_a_status_without_a_body_is_mapped_to_an_error(status: int, code: str) -> None:
    for body in (b"", b"<html>", b"[1]", b"null", b'{"codes": ["unheard_of"]}'):
        assert refuse(status, body).code == code


@pytest.mark.parametrize(
    ("status", "word", "code"),
    [
        (400, "too_long", "context_length_exceeded"),
        (413, "too_long", "context_length_exceeded"),
        (400, "moderated", "content_policy_violation"),
        (403, "moderated", "content_policy_violation"),
        (429, "broke", "provider_failed"),
        (400, "busy", "provider_unavailable"),
        (400, "bad_picture", "invalid_parameter"),
    ],
)
def test_a_code_of_the_vendor_counts_before_the_status(status: int, word: str, code: str) -> None:
    assert refuse(status, b'{"codes": ["%s"]}' % word.encode()).code == code
    assert refuse(status, b'{"codes": ["unheard_of", "%s"]}' % word.encode()).code == code


@pytest.mark.parametrize(
    ("status", "retry"),
    [(400, RetryPolicy.NEXT_ROUTE), (499, RetryPolicy.NEXT_ROUTE), (500, RetryPolicy.NEVER)],
)
def test_only_a_refusal_of_our_account_is_tried_on_the_next_route(status: int, retry: RetryPolicy) -> None:
    failure = refuse(status, b'{"codes": ["broke"]}')
    assert (failure.code, failure.retry) == ("provider_failed", retry)


@pytest.mark.parametrize("status", [301, 303, 307])
@pytest.mark.parametrize("replays", [True, False])
def test_a_redirect_after_the_work_was_done_leads_to_no_second_order(status: int, replays: bool) -> None:
    failure = refused(status, CIMultiDict(), b"", replace(ACME, replays=replays), NOW)
    paid = status == 303 and not replays
    assert failure.retry is (RetryPolicy.NEVER if paid else RetryPolicy.NEXT_ROUTE)


@pytest.mark.parametrize("status", [400, 422])
def test_a_refused_field_of_the_caller_is_named(status: int) -> None:
    failure = refuse(status, b'{"field": "top_p"}')
    assert (failure.code, failure.field) == ("invalid_parameter", "top_p")
    assert "top_p" in failure.message


def test_a_refused_field_is_ignored_if_our_permissions_are_refused() -> None:
    assert refuse(403, b'{"field": "top_p"}').code == "provider_failed"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "7.2"}, 8),
        ({"Retry-After": "0"}, 1),
        ({"Retry-After": "-3"}, 1),
        ({"Retry-After": "3600"}, 60),
        ({"Retry-After": formatdate(NOW + 20, usegmt=True)}, 20),
        ({"Retry-After": formatdate(NOW - 20, usegmt=True)}, 1),
        ({"retry-after-ms": "1500", "Retry-After": "9"}, 2),
        ({"retry-after-ms": "soon", "Retry-After": "9"}, 9),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "tomorrow"}, None),
        ({}, None),
    ],
)
def test_a_vendors_wait_is_passed_on_within_bounds(headers: Mapping[str, str], seconds: int | None) -> None:
    assert wait_hint(CIMultiDict(headers), NOW) == seconds
    default = PomeloError("provider_unavailable").retry_after
    assert refuse(429, headers=headers).retry_after == (default if seconds is None else seconds)
    assert refuse(401, headers=headers).retry_after is None


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (UnknownHostError, "provider_unavailable", "the vendor's host name has no address"),
        (ConnectError, "provider_unavailable", "the vendor can't be connected to"),
        (DisconnectedError, "provider_unavailable", "the vendor closed the connection before it answered"),
        (ConnectionResetError, "provider_unavailable", "the vendor closed the connection before it answered"),
        (
            SecureConnectionError,
            "provider_failed",
            "the vendor's certificate is invalid, or it does not speak TLS",
        ),
        (ConnectTimeoutError, "provider_unavailable", "there was no connection to the vendor in time"),
        (TimeoutError, "deadline_exceeded", "the vendor did not answer in time"),
        (ProtocolError, "provider_failed", "the vendor's response is not HTTP, or exceeds the limits"),
        (ValueError, "provider_failed", "the vendor's base URL or your key can't be sent"),
    ],
)
def test_a_failure_before_the_answer_is_mapped_to_an_error_with_its_reason(
    error: type[Exception], code: str, reason: str
) -> None:
    failure = from_connect_error(error(CANARY), ACME)
    assert (failure.code, failure.reason, failure.note) == (code, reason, error.__name__)
    assert CANARY not in "".join(traceback.format_exception(failure))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ProtocolError(CANARY), "provider_failed"),
        (DisconnectedError(CANARY), "provider_failed"),
        (ConnectionResetError(CANARY), "provider_failed"),
        (TimeoutError(CANARY), "deadline_exceeded"),
    ],
)
def test_a_failure_within_the_answer_is_mapped_to_an_error(error: BaseException, code: str) -> None:
    failure = truncated(error)
    assert failure.code == code
    assert CANARY not in "".join(traceback.format_exception(failure))


@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize(
    ("error", "repeatable"),
    [
        (UnknownHostError(), True),
        (ConnectError(), True),
        (ConnectTimeoutError(), True),
        (DisconnectedError(), False),
        (ConnectionResetError(), False),
    ],
)
def test_only_what_was_never_sent_may_be_repeated_if_each_request_is_charged(
    error: BaseException, repeatable: bool, replays: bool
) -> None:
    failure = from_connect_error(error, replace(ACME, replays=replays))
    assert failure.retry is (RetryPolicy.SAME_ROUTE if repeatable or replays else RetryPolicy.NEVER)


def test_an_error_instead_of_an_answer_is_mapped_by_its_code() -> None:
    assert from_error_body({"codes": ["busy"]}, ACME).code == "provider_unavailable"
    assert from_error_body({"codes": ["unheard_of"]}, ACME).code == "provider_failed"
    assert from_error_body("no object", ACME).code == "provider_failed"


@pytest.mark.parametrize(
    ("code", "policy"),
    [
        ("busy", RetryPolicy.SAME_ROUTE),
        ("broke", RetryPolicy.NEXT_ROUTE),
        ("unheard_of", RetryPolicy.NEVER),
        ("moderated", RetryPolicy.NEVER),
        ("too_long", RetryPolicy.NEVER),
    ],
)
def test_an_error_instead_of_an_answer_may_be_retried_unless_requests_are_charged(
    code: str, policy: RetryPolicy
) -> None:
    assert from_error_body({"codes": [code]}, ACME).retry is policy
    charged = replace(ACME, replays=False)
    assert from_error_body({"codes": [code]}, charged).retry is RetryPolicy.NEVER


def test_an_operator_finds_the_status_the_code_and_the_request_id_in_the_traceback() -> None:
    failure = refuse(429, b'{"codes": ["busy"]}', {"x-request-id": "req_8"})
    shown = "".join(traceback.format_exception(failure))
    assert "acme, HTTP 429, busy, req_8" in shown
    assert "req_8" not in failure.message
    assert "req_9" in refuse(429, b"{}", {"request-id": "req_9"}).note


def test_a_charged_request_is_repeated_only_if_the_vendor_has_refused_it() -> None:
    mapping = replace(ACME, replays=False)
    for status, policy in ((429, RetryPolicy.SAME_ROUTE), (503, RetryPolicy.NEVER)):
        assert refused(status, CIMultiDict(), b"{}", mapping, NOW).retry is policy


def test_the_text_of_a_vendor_never_gets_into_a_message_or_a_note() -> None:
    body = b'{"codes": ["%s", "line\\nbreak", "%s"]}' % (CANARY.encode(), b"x" * 65)
    for failure in (refuse(400, body, {"x-request-id": CANARY}), from_error_body({"codes": [CANARY]}, ACME)):
        shown = "".join(traceback.format_exception(failure))
        assert CANARY not in shown
        assert "break" not in shown
        assert "xxx" not in shown


def test_a_malformed_response_is_a_failure_of_the_provider() -> None:
    assert malformed_response("a page").code == "provider_failed"
    assert "page" not in malformed_response("a page").message
