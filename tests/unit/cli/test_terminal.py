"""The texts that commands print."""

from __future__ import annotations

import pytest

from pomelo.cli.accounts import _format_limits
from pomelo.cli.terminal import counted
from pomelo.gen.admin.v1.admin_service_pb2 import Account


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 keys"), (1, "1 key"), (2, "2 keys"), (12_345, "12,345 keys")]
)
def test_a_number_agrees_with_what_it_counts(number: int, text: str) -> None:
    assert counted(number, "key") == text


def test_the_limits_of_an_account_agree_with_their_numbers() -> None:
    account = Account()
    account.limits.SetInParent()
    assert _format_limits(account) == ": no limits"
    account.limits.requests_per_minute = account.limits.concurrent_requests = 1
    account.limits.tokens_per_minute = 40_000
    assert _format_limits(account) == ": 1 request a minute, 1 concurrent, 40,000 tokens a minute"
