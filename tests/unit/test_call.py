"""A call is read from any headers."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pomelo.call import (
    ADJUSTED_HEADER,
    DEFAULT_TIMEOUT,
    MALFORMED_KEY,
    Call,
    Principal,
    before_deadline,
    report_adjustments,
)
from pomelo.gen.v1.task_pb2 import Adjustment
from tests.unit.refusals import refused


def call(timeout: float | None = None, **headers: str) -> Call:
    """Returns a call at second 1,000; the keyword `a_b` is the header a-b."""
    by_name = {name.replace("_", "-"): value for name, value in headers.items()}
    return Call.from_headers(by_name.get, protocol="rest", timeout=timeout, clock=lambda: 1000.0)


@pytest.mark.parametrize(
    ("header", "api_key", "error"),
    [
        ("Bearer abc", "abc", ""),
        ("bearer abc", "abc", ""),
        ("BEARER  abc ", "abc", ""),
        (" \tBearer abc\t ", "abc", ""),
        ("Basic abc", None, MALFORMED_KEY),
        ("abc", None, MALFORMED_KEY),
        ("Bearer", None, MALFORMED_KEY),
        ("Bearerabc", None, MALFORMED_KEY),
        ("Bearer a b", None, MALFORMED_KEY),
        ("Bearer a, Bearer b", None, MALFORMED_KEY),
        ("", None, ""),
    ],
)
def test_the_scheme_of_a_key_is_read_in_any_case(header: str, api_key: str | None, error: str) -> None:
    made = call(authorization=header)
    assert (made.api_key, made.key_error) == (api_key, error)


@pytest.mark.parametrize("header", ["0", "-1", "nan", "inf", "soon", ""])
def test_an_invalid_timeout_is_stored_as_the_header_error(header: str) -> None:
    error = call(x_request_timeout=header).header_error
    assert error is not None
    assert error.code == "invalid_parameter"


def test_a_deadline_is_the_caller_s_up_to_the_maximum() -> None:
    assert call().deadline == 1000 + DEFAULT_TIMEOUT
    assert call(x_request_timeout="2.5").deadline == 1002.5
    assert call(x_request_timeout="99999").deadline == 1000 + DEFAULT_TIMEOUT
    assert call(timeout=3.0, x_request_timeout="9").deadline == 1003


@pytest.mark.parametrize(
    ("given", "seconds"), [("+5", 5), (" 5 ", 5), ("1e2", 100), (".5", 0.5), ("5.", 5), ("1E-1", 0.1)]
)
def test_a_timeout_may_be_any_plain_number(given: str, seconds: float) -> None:
    made = call(x_request_timeout=given)
    assert (made.deadline, made.header_error) == (1000 + seconds, None)


def test_a_request_id_has_up_to_128_characters() -> None:
    assert call(x_request_id="x" * 128).request_id == "x" * 128
    assert call(x_request_id="x" * 129).request_id.startswith("req_")


def test_white_space_around_a_header_is_not_part_of_it() -> None:
    made = call(
        authorization="\tBearer abc ",
        x_request_id=" id\t",
        idempotency_key=" key ",
        prefer=" handling=strict ",
    )
    assert (made.api_key, made.request_id, made.idempotency_key, made.strict) == ("abc", "id", "key", True)
    assert made.header_error is None
    assert made.response_headers["X-Request-Id"] == "id"


@pytest.mark.parametrize(
    ("given", "good"),
    [("x", True), ("x" * 255, True), ("x" * 256, False), ("", False), ("a b", False), ("é", False)],
)
def test_an_idempotency_key_has_1_to_255_visible_characters(given: str, good: bool) -> None:
    made = call(idempotency_key=given)
    if good:
        assert (made.idempotency_key, made.header_error) == (given, None)
    else:
        assert made.header_error is not None
        assert (made.header_error.code, made.header_error.field) == ("invalid_parameter", "Idempotency-Key")


def test_the_address_of_a_call_is_stored() -> None:
    made = Call.from_headers(dict[str, str]().get, protocol="rest", address="192.0.2.1")
    assert (made.protocol, made.address) == ("rest", "192.0.2.1")


def test_adjusted_fields_are_listed_in_a_header() -> None:
    made = call()
    report_adjustments(made, [Adjustment(field="stop"), Adjustment(field="temperature", used="1")])
    assert made.response_headers[ADJUSTED_HEADER] == "stop; temperature=1"
    report_adjustments(made, [])
    assert ADJUSTED_HEADER not in made.response_headers


def test_the_trace_context_is_stored_unchanged() -> None:
    assert call(traceparent="00-1-2-01").traceparent == "00-1-2-01"
    assert call().traceparent is None


def test_cleanup_callbacks_of_a_call_run_once_in_reverse_order() -> None:
    made, done = call(), list[int]()
    for number in range(3):
        made.at_end.append(partial(done.append, number))
    made.end()
    made.end()
    assert done == [2, 1, 0]


def test_an_owner_is_an_account_in_one_of_its_modes() -> None:
    names = {Principal(account, "k", live=live).owner for account in ("a", "b") for live in (True, False)}
    assert len(names) == 4


@given(st.text(max_size=200))
@example(" 0\t")
def test_a_request_id_is_returned_or_replaced_by_a_valid_one(text: str) -> None:
    parsed = call(x_request_id=text)
    assert parsed.response_headers["X-Request-Id"] == parsed.request_id
    assert parsed.request_id.isascii()
    assert parsed.request_id.isprintable()
    assert 0 < len(parsed.request_id) <= 128
    assert parsed.request_id == text.strip(" \t") or parsed.request_id.startswith("req_")


@pytest.mark.parametrize(
    "name", ["Idempotency-Key", "X-Request-Id", "X-Request-Timeout", "traceparent", "Prefer", "Accept"]
)
def test_a_repeated_header_is_an_error_that_names_it(name: str) -> None:
    names = ["authorization", name.lower(), "cookie", "cookie", name.upper()]
    parsed = Call.from_headers({"authorization": "Bearer k"}.get, protocol="grpc", names=names)
    assert parsed.header_error is not None
    assert (parsed.header_error.code, parsed.header_error.field) == ("invalid_parameter", name)
    assert parsed.api_key == "k"
    assert not Call.from_headers(dict[str, str]().get, protocol="grpc", names=names[:-1]).header_error


def test_a_repeated_authorization_header_is_no_key() -> None:
    headers = {"authorization": "Bearer k"}
    parsed = Call.from_headers(headers.get, protocol="grpc", names=["Authorization", "authorization"])
    assert (parsed.api_key, parsed.header_error) == (None, None)
    assert "twice" in parsed.key_error


@pytest.mark.parametrize(
    "prefer",
    [
        "handling=strict",
        "Handling=Strict",
        'handling="strict"',
        'handling="\\strict"',
        "  handling = strict  ",
        "handling=strict; because=I-say-so",
        'respond-async, wait=10, handling=strict;x="a, b"',
        ', ,handling\t=\t"STRICT" ;y,',
        'return=minimal; foo="a,b;handling=lenient", handling=strict',
        'foo="a \\", handling=lenient, b", handling=strict',
        "handling=strict, handling=lenient",
    ],
)
def test_strict_handling_is_read_from_a_list_of_preferences(prefer: str) -> None:
    assert call(prefer=prefer).strict


@pytest.mark.parametrize(
    "prefer",
    [
        "",
        ",",
        "strict",
        "handling",
        "handling=lenient",
        "handling=lenient, handling=strict",
        "handling=maybe, handling=strict",
        "handling=stricter",
        "handling=strict lenient",
        "x-handling=strict",
        "respond-async; handling=strict",
        'foo="handling=strict"',
        'foo="a, handling=strict, b"',
        'foo="a, handling=strict',
        'handling="strict',
        'handling=""',
    ],
)
def test_other_preferences_are_not_strict(prefer: str) -> None:
    parsed = call(prefer=prefer)
    assert (parsed.strict, parsed.header_error) == (False, None)


@given(st.text(st.sampled_from('handling=strict",;\\ \t'), max_size=60))
def test_no_preference_is_an_error(prefer: str) -> None:
    assert call(prefer=prefer).header_error is None


@pytest.mark.parametrize(
    "prefer",
    ["handling=" + " " * 30_000 + "x y", "handling" + " " * 30_000 + "?", '"' * 30_000, "a\\" * 15_000],
)
def test_a_malicious_preference_is_read_in_linear_time(prefer: str) -> None:
    began = time.process_time()
    assert not call(prefer=prefer).strict
    assert time.process_time() - began < 0.1


async def test_a_deadline_ends_what_is_awaited_before_it() -> None:
    late = call()
    late.deadline = time.monotonic()
    with refused("deadline_exceeded"):
        async with before_deadline(late):
            await asyncio.Event().wait()
    late.deadline = time.monotonic() + 60
    with pytest.raises(KeyError):
        async with before_deadline(late):
            raise KeyError
