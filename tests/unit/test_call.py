"""What a call says of itself, whatever its headers are."""

from __future__ import annotations

import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.call import DEFAULT_TIMEOUT, Call, Principal


def call(timeout: float | None = None, **headers: str) -> Call:
    """A call at second 1,000; `a_b` stands for the header a-b."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return Call.from_headers(given.get, wire="rest", timeout=timeout, clock=lambda: 1000.0)


@pytest.mark.parametrize(
    ("given", "secret"),
    [
        ("Bearer abc", "abc"),
        ("bearer abc", "abc"),
        ("BEARER  abc ", "abc"),
        ("Basic abc", None),
        ("abc", None),
        ("Bearer a b", None),
        ("", None),
    ],
)
def test_the_scheme_of_a_key_is_read_in_any_case(given: str, secret: str | None) -> None:
    assert call(authorization=given).api_key == secret


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_strange_timeout_is_a_fault_that_is_kept_for_later(given: str) -> None:
    fault = call(x_request_timeout=given).header_error
    assert fault is not None
    assert fault.code == "invalid_parameter"


def test_a_deadline_is_the_callers_up_to_the_most() -> None:
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


def test_the_trace_is_kept_as_it_came() -> None:
    assert call(traceparent="00-1-2-01").traceparent == "00-1-2-01"
    assert call().traceparent is None


def test_what_is_due_at_the_end_of_a_call_runs_once_and_the_last_one_first() -> None:
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
def test_a_request_id_comes_back_or_is_replaced_by_one_that_can(text: str) -> None:
    made = call(x_request_id=text)
    assert made.response_headers["X-Request-Id"] == made.request_id
    assert made.request_id.isascii()
    assert made.request_id.isprintable()
    assert 0 < len(made.request_id) <= 128
    assert made.request_id == text or made.request_id.startswith("req_")


@pytest.mark.parametrize(
    "name", ["Idempotency-Key", "X-Request-Id", "X-Request-Timeout", "traceparent", "Prefer", "Accept"]
)
def test_a_header_that_is_given_twice_is_a_fault_that_names_it(name: str) -> None:
    names = ["authorization", name.lower(), "cookie", "cookie", name.upper()]
    made = Call.from_headers({"authorization": "Bearer k"}.get, wire="grpc", names=names)
    assert made.header_error is not None
    assert (made.header_error.code, made.header_error.field) == ("invalid_parameter", name)
    assert made.api_key == "k"
    assert not Call.from_headers({}.get, wire="grpc", names=names[:-1]).header_error


def test_a_repeated_authorization_header_is_no_key() -> None:
    given = {"authorization": "Bearer k"}
    made = Call.from_headers(given.get, wire="grpc", names=["Authorization", "authorization"])
    assert (made.api_key, made.header_error) == (None, None)
    assert "twice" in made.key_error


@pytest.mark.parametrize(
    "prefer",
    [
        "handling=strict",
        "Handling=Strict",
        'handling="strict"',
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
def test_anything_else_is_lenient(prefer: str) -> None:
    made = call(prefer=prefer)
    assert (made.strict, made.header_error) == (False, None)


@given(st.text(st.sampled_from('handling=strict",;\\ \t'), max_size=60))
def test_no_preference_is_a_fault(prefer: str) -> None:
    assert call(prefer=prefer).header_error is None


@pytest.mark.parametrize(
    "prefer",
    ["handling=" + " " * 30_000 + "x y", "handling" + " " * 30_000 + "?", '"' * 30_000, "a\\" * 15_000],
)
def test_a_hostile_preference_is_read_in_linear_time(prefer: str) -> None:
    began = time.process_time()
    assert not call(prefer=prefer).strict
    assert time.process_time() - began < 0.1
