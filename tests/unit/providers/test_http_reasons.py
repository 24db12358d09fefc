"""What an operator reads of a failed call: its reason, the vendor's code, and the vendor's id of the request."""

from __future__ import annotations

from dataclasses import replace

import pytest
from multidict import CIMultiDict

from pomelo.errors import PomeloError
from pomelo.providers.base import VendorCall
from pomelo.providers.errors import RetryPolicy
from pomelo.providers.http.errors import (
    DisconnectedError,
    ErrorBody,
    ErrorMapping,
    SecureConnectionError,
    from_connect_error,
    from_error_body,
    malformed_response,
    refused,
    truncated,
)

CODES = {
    "broke": "provider_failed",
    "busy": "provider_unavailable",
    "moderated": "content_policy_violation",
    "too_long": "context_length_exceeded",
    "too_large": "payload_too_large",
    "bad_value": "invalid_parameter",
}
ACME = ErrorMapping("acme", lambda body: ErrorBody(tuple(body["codes"])), CODES)


def reason(status: int, *codes: str) -> str:
    """The reason of a refusal with this status and these codes."""
    body = b'{"codes":[%b]}' % b",".join(b'"%b"' % code.encode() for code in codes)
    return refused(status, CIMultiDict(), body, ACME, 0).reason


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (302, "the vendor redirected the request: its base URL may be wrong"),
        (400, "the vendor refused the request"),
        (401, "the vendor refused your key"),
        (402, "your account at the vendor is out of money"),
        (403, "the vendor does not allow this to your key"),
        (404, "the vendor does not have the model or the path"),
        (408, "the vendor timed out"),
        (413, "the request is larger than the vendor takes"),
        (418, "the vendor refused the request"),
        (429, "the vendor's rate limit is reached"),
        (500, "the vendor failed"),
        (503, "the vendor is overloaded or down"),
        (504, "the vendor timed out"),
        (529, "the vendor is overloaded"),
    ],
)
def test_a_status_has_its_reason(status: int, expected: str) -> None:
    assert reason(status) == expected


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (413, "broke", "the request is larger than the vendor takes"),
        (429, "broke", "your account at the vendor is out of quota or money"),
        (429, "busy", "the vendor's rate limit is reached"),
        (400, "moderated", "the vendor's content policy refused the input"),
        (413, "too_long", "the input is longer than the model takes"),
        (400, "too_large", "the request is larger than the vendor takes"),
        (422, "bad_value", "the vendor refused a value of the request"),
    ],
)
def test_a_code_of_the_vendor_has_its_reason_before_the_status(status: int, code: str, expected: str) -> None:
    assert reason(status, code) == expected


def test_an_error_within_a_response_has_its_reason() -> None:
    for code, expected in (
        ("moderated", "the vendor's content policy refused the input"),
        ("busy", "the vendor sent an error within its response"),
    ):
        error = from_error_body({"codes": [code]}, ACME)
        assert (error.reason, error.note, error.vendor_code) == (expected, f"acme, {code}", code)


def test_a_vendor_without_tls_is_replaced_by_the_next_route() -> None:
    assert from_connect_error(SecureConnectionError(), ACME).retry is RetryPolicy.NEXT_ROUTE


def test_a_response_that_breaks_off_or_can_not_be_used_has_its_reason() -> None:
    assert truncated(TimeoutError()).reason == "the vendor stopped sending its response"
    assert truncated(DisconnectedError()).reason == "the vendor's response broke off"
    assert malformed_response("a page").reason == "a page"


def test_only_an_unavailable_vendor_is_waited_for() -> None:
    headers = CIMultiDict({"Retry-After": "7"})
    for status, wait in ((429, 7), (503, 7), (400, None), (401, None), (413, None)):
        assert refused(status, headers, b"", ACME, 0).wait == wait
    assert refused(429, headers, b'{"codes":["broke"]}', ACME, 0).wait is None


@pytest.mark.parametrize(
    ("status", "should_retry", "code", "retry"),
    [
        (503, "false", "provider_unavailable", RetryPolicy.NEXT_ROUTE),
        (429, "False", "provider_unavailable", RetryPolicy.NEXT_ROUTE),
        (503, "true", "provider_unavailable", RetryPolicy.SAME_ROUTE),
        (503, "maybe", "provider_unavailable", RetryPolicy.SAME_ROUTE),
        (418, "true", "provider_unavailable", RetryPolicy.SAME_ROUTE),
        (418, "false", "provider_failed", RetryPolicy.NEXT_ROUTE),
        (413, "true", "payload_too_large", RetryPolicy.NEVER),
        (302, "true", "provider_failed", RetryPolicy.NEXT_ROUTE),
    ],
)
def test_a_vendor_may_decide_whether_it_is_called_again(
    status: int, should_retry: str, code: str, retry: RetryPolicy
) -> None:
    error = refused(status, CIMultiDict({"X-Should-Retry": should_retry}), b"", ACME, 0)
    assert (error.code, error.retry) == (code, retry)


def test_a_known_code_and_a_request_that_is_charged_count_before_the_header() -> None:
    headers = CIMultiDict({"X-Should-Retry": "true"})
    assert refused(429, headers, b'{"codes":["broke"]}', ACME, 0).code == "provider_failed"
    charged = replace(ACME, replays=False)
    assert refused(418, headers, b"", charged, 0).retry is RetryPolicy.NEVER
    assert refused(503, headers, b"", charged, 0).retry is RetryPolicy.NEVER


def test_a_refused_value_without_a_field_is_one_of_the_messages() -> None:
    error = refused(400, CIMultiDict(), b'{"codes":["bad_value"]}', ACME, 0)
    assert error.field == "messages"
    assert error.message.startswith("Invalid messages: ")


def test_the_vendors_code_is_the_first_that_can_be_one() -> None:
    body = b'{"codes":["", "not a code", "busy", "broke"]}'
    error = refused(429, CIMultiDict(), body, ACME, 0)
    assert isinstance(error, PomeloError)
    assert error.vendor_code == "busy"


KEY = "sk-canary-3141"


def called(*fields: tuple[str, str], status: int = 200) -> VendorCall:
    """A call with KEY whose response has these fields."""
    call = VendorCall()
    call.sent = {"Authorization": f"Bearer {KEY}", "X-Short": "x a"}
    call.status = status
    call.fields = [(name.encode(), value.encode("latin-1")) for name, value in fields]
    return call


@pytest.mark.parametrize(
    "name",
    ["x-request-id", "Request-Id", "X-TRACE-ID", "Mistral-Correlation-Id", "X-Generation-Id", "CF-Ray"],
)
def test_a_request_has_the_vendors_id(name: str) -> None:
    assert called(("Date", "now"), (name, "req_8"), ("Server", "x")).request_id == "req_8"


def test_the_id_of_the_proxy_is_the_last_choice() -> None:
    assert called(("cf-ray", "ray_1"), ("x-request-id", "req_8")).request_id == "req_8"
    assert called(("x-request-id", "req_8"), ("cf-ray", "ray_1")).request_id == "req_8"


@pytest.mark.parametrize(
    "value", ["", "two words", "é", "x" * 65, KEY, KEY[3:], f"a.{KEY}.b", f"Bearer.{KEY}"]
)
def test_what_can_not_be_an_id_or_repeats_the_key_is_no_id(value: str) -> None:
    assert called(("x-request-id", value)).request_id == ""


def test_a_short_word_of_a_header_is_no_key() -> None:
    assert called(("x-request-id", "request-a-1")).request_id == "request-a-1"
    assert called(("x-request-id", KEY[:7])).request_id == KEY[:7]


def test_before_the_response_there_is_no_id() -> None:
    assert called(("x-request-id", "req_8"), status=0).request_id == ""
