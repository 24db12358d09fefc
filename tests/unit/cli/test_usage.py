"""Pages of usage, as `pomelo usage` prints them."""

from __future__ import annotations

import pytest

from pomelo.cli.usage import _print_csv, _print_table

PAGES = [[{"id": "a", "code": ""}, {"id": "b", "code": ""}], [{"id": "c", "code": ""}]]


def test_csv_of_several_pages_has_one_header(capsys: pytest.CaptureFixture[str]) -> None:
    _print_csv(iter(PAGES))
    assert capsys.readouterr().out.splitlines() == ["id,code", "a,", "b,", "c,"]


@pytest.mark.parametrize(("failed", "message"), [(False, "Nothing was used."), (True, "Nothing has failed.")])
def test_only_an_empty_first_page_says_that_there_is_nothing(
    capsys: pytest.CaptureFixture[str], failed: bool, message: str
) -> None:
    _print_table(iter([[]]), None, failed=failed)
    assert capsys.readouterr() == ("", message + "\n")
    _print_table(iter([*PAGES, []]), None, failed=failed)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [line.split()[0] for line in printed.out.splitlines()] == ["ID", "a", "b", "c"]


def test_seconds_are_printed_with_all_their_digits(capsys: pytest.CaptureFixture[str]) -> None:
    pages = [[{"model": "stt", "audio_seconds": seconds} for seconds in (1234567.891, 0.0, 12.5, 1e9)]]
    _print_table(iter(pages), None, failed=False)
    printed = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[1] for line in printed] == ["1234567.891", "0", "12.5", "1000000000"]


def test_the_code_of_a_stream_that_was_interrupted_is_not_lost_on_a_later_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    columns = (("CODE", "code"), ("ID", "id"))
    pages = [[{"id": "a", "code": ""}], [{"id": "b", "code": "cancelled"}]]
    _print_table(iter(pages), columns, failed=False)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["CODE", "ID"],
        ["a"],
        ["cancelled", "b"],
    ]
