"""The errors of providers: copies, and the end of retries."""

from __future__ import annotations

import pytest

from pomelo.errors import PomeloError
from pomelo.providers.errors import RetryPolicy, UpstreamError, never_retried
from pomelo.providers.http.errors import TruncatedError


def test_a_copy_has_the_type_and_the_content_of_its_error() -> None:
    error = TruncatedError(
        "provider_unavailable",
        "Busy",
        field="voice",
        retry=RetryPolicy.SAME_ROUTE,
        wait=7,
        note="acme",
        reason="the vendor is busy",
        vendor_code="busy",
    )
    copy = error.copy()
    assert copy is not error
    assert type(copy) is TruncatedError
    assert (copy.code, copy.message, copy.field) == ("provider_unavailable", "Busy", "voice")
    assert (copy.retry, copy.wait, copy.retry_after) == (RetryPolicy.SAME_ROUTE, 7, 7)
    assert (copy.note, copy.reason, copy.vendor_code) == ("acme", "the vendor is busy", "busy")
    assert copy.__notes__ == error.__notes__ == ["acme"]
    assert error.copy(RetryPolicy.NEXT_ROUTE).retry is RetryPolicy.NEXT_ROUTE


def test_an_error_after_an_accepted_order_is_never_retried() -> None:
    with pytest.raises(UpstreamError, match="Busy") as failure, never_retried():
        raise UpstreamError("provider_unavailable", "Busy", retry=RetryPolicy.SAME_ROUTE)
    assert failure.value.retry is RetryPolicy.NEVER


def test_other_errors_pass_through_unchanged() -> None:
    error = PomeloError("invalid_parameter")
    with pytest.raises(PomeloError) as failure, never_retried():
        raise error
    assert failure.value is error
