"""The table of errors matches the published contract, row by row, and both protocols report it equally."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pomelo.errors import BODY_ERRORS, TABLE, ErrorRow, PomeloError, invalid, missing, unsupported_model
from pomelo.gen.v1.error_reason_pb2 import ErrorReason

ROOT = Path(__file__).parents[2]

CONTRACT = """
invalid_api_key             401 UNAUTHENTICATED     authentication_error
model_not_allowed           403 PERMISSION_DENIED   permission_error
invalid_body                400 INVALID_ARGUMENT    invalid_request_error
missing_parameter           400 INVALID_ARGUMENT    invalid_request_error
invalid_parameter           400 INVALID_ARGUMENT    invalid_request_error
unsupported_model           400 INVALID_ARGUMENT    invalid_request_error
context_length_exceeded     400 INVALID_ARGUMENT    invalid_request_error
content_policy_violation    400 INVALID_ARGUMENT    invalid_request_error
payload_too_large           413 RESOURCE_EXHAUSTED  invalid_request_error
unsupported_media_type      415 INVALID_ARGUMENT    invalid_request_error
not_found                   404 NOT_FOUND           invalid_request_error
method_not_allowed          405 UNIMPLEMENTED       invalid_request_error
rate_limit_exceeded         429 RESOURCE_EXHAUSTED  rate_limit_error
concurrency_limit_exceeded  429 RESOURCE_EXHAUSTED  rate_limit_error
token_limit_exceeded        429 RESOURCE_EXHAUSTED  rate_limit_error
insufficient_credits        402 FAILED_PRECONDITION insufficient_credits_error
idempotency_conflict        409 ABORTED             invalid_request_error
idempotency_mismatch        422 FAILED_PRECONDITION invalid_request_error
provider_not_configured     503 UNAVAILABLE         provider_error
provider_unavailable        503 UNAVAILABLE         provider_error
provider_failed             502 UNAVAILABLE         provider_error
deadline_exceeded           504 DEADLINE_EXCEEDED   timeout_error
store_unavailable           503 UNAVAILABLE         api_error
shutting_down               503 UNAVAILABLE         api_error
internal_error              500 INTERNAL            api_error
overloaded                  503 UNAVAILABLE         api_error
server_unavailable          503 UNAVAILABLE         api_error
model_not_found             404 NOT_FOUND           invalid_request_error
"""


@pytest.mark.parametrize("line", CONTRACT.split("\n")[1:-1])
def test_a_row_matches_the_contract(line: str) -> None:
    code, http, status, error_type = line.split()
    row = TABLE[code]
    assert (row.http, row.status, row.type) == (int(http), status, error_type)
    assert row.message


def test_the_table_the_promise_and_the_contract_have_the_same_rows() -> None:
    assert set(TABLE) == {line.split()[0] for line in CONTRACT.split("\n")[1:-1]}
    assert sorted(ErrorReason.Value(f"ERROR_REASON_{row.reason}") for row in TABLE.values()) == sorted(
        set(ErrorReason.values()) - {0}
    )


def test_a_retry_is_proposed_only_with_409_429_and_503() -> None:
    for row in TABLE.values():
        assert (row.retry_after is not None) == (row.http in (409, 429, 503)), row.code


def test_the_reference_documents_every_error() -> None:
    page = (ROOT / "docs/rest-api.md").read_text()
    rows = re.findall(r"^\| ([a-z_, ]+) \| ([0-9, ]+) \| ([a-z_]+) \|", page, re.MULTILINE)
    documented = [code for codes, _, _ in rows for code in codes.split(", ")]
    assert sorted(documented) == sorted(TABLE)
    for codes, numbers, error_type in rows:
        statuses = [int(n) for n in numbers.split(", ")]
        for code in codes.split(", "):
            assert TABLE[code].http in statuses
            assert TABLE[code].type == error_type


def test_the_proposed_waits_are_the_documented_ones() -> None:
    waits = {row.code: row.retry_after for row in TABLE.values() if row.retry_after is not None}
    assert waits == {
        **dict.fromkeys(("rate_limit_exceeded", "token_limit_exceeded", "provider_not_configured"), 60),
        **dict.fromkeys(("provider_unavailable", "store_unavailable"), 5),
        **dict.fromkeys(("concurrency_limit_exceeded", "idempotency_conflict", "shutting_down"), 1),
        **dict.fromkeys(("overloaded", "server_unavailable"), 1),
    }
    assert [row.code for row in TABLE.values() if row.permanent] == ["provider_not_configured"]


def test_errors_of_a_body_that_was_not_read_have_no_model() -> None:
    assert {"invalid_body", "payload_too_large", "unsupported_media_type"} == BODY_ERRORS


def test_the_error_of_a_field_names_it() -> None:
    for error, code in (
        (missing("model"), "missing_parameter"),
        (invalid("model", "text"), "invalid_parameter"),
    ):
        assert (error.code, error.field) == (code, "model")
        assert "model" in error.message


def test_an_error_has_the_default_message_and_wait_unless_it_sets_them() -> None:
    assert PomeloError("insufficient_credits").message == "Insufficient credits for this operation"
    error = PomeloError("provider_unavailable", "Busy", retry_after=9)
    assert (str(error), error.message, error.retry_after) == ("Busy", "Busy", 9)
    assert PomeloError("provider_unavailable", retry_after=0).retry_after == 0


@pytest.mark.parametrize("row", TABLE.values(), ids=list(TABLE))
def test_only_errors_of_codes_with_a_wait_propose_one(row: ErrorRow) -> None:
    assert PomeloError(row.code, retry_after=17).retry_after == (None if row.retry_after is None else 17)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("invalid-model", "invalid-model"),
        ("x" * 100, "x" * 100),
        ("x" * 101, "x" * 100 + "…"),
        ("x" * 10_000, "x" * 100 + "…"),
    ],
)
def test_an_unknown_model_is_reported_with_its_name(name: str, shown: str) -> None:
    error = unsupported_model(name)
    assert (error.code, error.message) == ("unsupported_model", f"Unsupported task type: {shown}")
    assert error.field == "model"
