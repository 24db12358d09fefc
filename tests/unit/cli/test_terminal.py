"""The texts that commands print."""

from __future__ import annotations

import pytest

from pomelo.cli.accounts import _format_limits
from pomelo.cli.terminal import counted, print_pages
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


def test_a_list_of_several_pages_is_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    pages = [[("long-name", "1")], [], [("b", "2"), ("a-longer-name", "3")]]
    print_pages(("NAME", "CREDITS"), iter(pages))
    assert capsys.readouterr().out.splitlines() == [
        "NAME       CREDITS",
        "long-name  1",
        "b              2",
        "a-longer-name  3",
    ]
    print_pages(("NAME", "CREDITS"), iter([[]]))
    assert capsys.readouterr().out == "NAME  CREDITS\n"


def test_pages_on_a_narrow_terminal_have_the_columns_of_the_first_one_and_one_header(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_pages(
        ("NAME", "PLAN"), iter([[("a" * 11, "pro")], [("b", "pro")], [("c" * 20, "pro")]]), optional=["PLAN"]
    )
    printed = capsys.readouterr()
    assert printed.out.split() == ["NAME", "a" * 11, "b", "c" * 12, "c" * 8]
    assert printed.err.count("1 column left out") == 1
