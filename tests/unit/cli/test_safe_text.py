"""Escaping of untrusted text for terminals, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomelo.cli.safe_text import csv_cell, visible, visible_json, visible_lines

CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("acme-1_B.2", "acme-1_B.2"),
        ("Größe 漢字 🦊", "Größe 漢字 🦊"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\rb\nc\td", "a\\rb\\nc\\td"),
        ("\x9b2J", "\\x9b2J"),
        ("\x7f\0", "\\x7f\\x00"),
        ("abc\u202egnp.exe", "abc\\u202egnp.exe"),
        ("a\u200bb\ufeff", "a\\u200bb\\ufeff"),
        ("\ud800", "\\ud800"),
        ("", ""),
    ],
)
def test_control_and_invisible_characters_are_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text())
def test_a_name_has_no_control_characters(text: str) -> None:
    assert not CONTROLS.search(visible(text))
    assert visible(visible(text)) == visible(text)


def test_text_keeps_its_lines_and_the_joiners_of_its_script() -> None:
    text = "one\n\ttwo 👩\u200d💻 \u200f\u05e9\u05dc\u05d5\u05dd\n"
    assert visible_lines(text) == text
    assert visible_lines("a\x1b]0;title\x07b\r\x9b") == "a\\x1b]0;title\\x07b\\r\\x9b"


@settings(max_examples=30)
@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_escaped_json_is_equivalent(value: object) -> None:
    text = visible_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert not CONTROLS.search(text)


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (0, 0),
        (-5, -5),
        (1.25, 1.25),
        (True, "true"),
        (None, None),
        ("0.000744", "0.000744"),
        ("-12", "-12"),
        ("-0.5", "-0.5"),
        ("task_01", "task_01"),
        ("2026-11-24T12:00:00Z", "2026-11-24T12:00:00Z"),
        ("a-b+c=d@e", "a-b+c=d@e"),
        ('=HYPERLINK("http://x","y")', '\'=HYPERLINK("http://x","y")'),
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1+cmd|' /C calc'!A0", "'-1+cmd|' /C calc'!A0"),
        ("-", "'-"),
        ("--1", "'--1"),
        ("-1e5", "'-1e5"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "\\t=1"),
        ("\r=1", "\\r=1"),
        ("\n=1", "\\n=1"),
        (" =1", "' =1"),
        ('"=1', "'\"=1"),
        ("'=1", "''=1"),
        ("\" '=1", "'\" '=1"),
        ("\uff1d1", "'\uff1d1"),
        ("a;=1", "a;'=1"),
        ('a,"=1', "a,'\"=1"),
        ("a|=1", "a|'=1"),
        ("\x1b=1", "\\x1b=1"),
    ],
)
def test_formulas_are_escaped_and_numbers_stay_numbers(value: object, cell: object) -> None:
    assert csv_cell(value) == cell


@given(st.text())
def test_no_cell_begins_like_a_formula_with_any_separator(text: str) -> None:
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerow([csv_cell(text), "end"])
    for separator in ",;\t|":
        for row in csv.reader(io.StringIO(sheet.getvalue(), newline=""), delimiter=separator):
            for cell in row:
                start = cell.lstrip(" '\"`\u3000")
                number = re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", cell)
                assert (
                    cell.startswith("'")
                    or number
                    or start[:1] not in set("=+-@\uff1d\uff0b\uff0d\uff20")
                    or ("'" in cell[: len(cell) - len(start)])
                )
