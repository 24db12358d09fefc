"""JSON text: what is refused, and counting its values before it is parsed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.parsing.json import MAX_ESCAPES, MAX_OUTSIDE_STRINGS, MAX_VALUES, JsonScan, parse_json
from pomelo.errors import PomeloError


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b'{"a":NaN}',
        b'{"a":"\xff"}',
        b'{"a":1}x',
        b"[" * 100_000,
        b'{"a":' * 300 + b"1" + b"}" * 300,
        b'{"a":' + b"9" * 5000 + b"}",
    ],
)
def test_anything_but_a_json_object_is_an_invalid_body(data: bytes) -> None:
    with pytest.raises(PomeloError) as caught:
        parse_json(data)
    assert caught.value.code == "invalid_body"


@pytest.mark.parametrize("data", [b'{"model":"a","model":"b"}', b'{"a":{"b":[{"c":1,"c":1}]}}'])
def test_a_duplicate_name_in_an_object_is_refused(data: bytes) -> None:
    with pytest.raises(PomeloError) as caught:
        parse_json(data)
    assert caught.value.code == "invalid_parameter"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"a":"é"}'.encode("latin-1"), "UTF-8"),
        ('{"a":1}'.encode("utf-16"), "UTF-16"),
        ('{"a":1}'.encode("utf-16-be"), "UTF-16"),
        ('{"a":1}'.encode("utf-32"), "UTF-32"),
        (b'{"a":"\\u12"}', "not JSON"),
        (b'{"a":"\xed\\ud83d"}', "not JSON: unexpected end of hex escape"),
        (
            b"--B\r\nContent-Disposition: form-data",
            "looks like a form. Let your HTTP client set Content-Type",
        ),
        (b"", "The body is empty. Send a JSON object"),
        (b" \r\n", "The body is empty"),
        (b"\xef\xbb\xbf", "The body is empty"),
    ],
)
def test_a_body_that_is_not_utf_8_or_not_json_is_refused_with_the_reason(data: bytes, words: str) -> None:
    with pytest.raises(PomeloError) as caught:
        parse_json(data)
    assert caught.value.code == "invalid_body"
    assert words in caught.value.message


def test_a_byte_order_mark_before_the_json_is_skipped() -> None:
    assert parse_json(b"\xef\xbb\xbf{}") == {}
    with pytest.raises(PomeloError):
        parse_json(b"\xef\xbb\xbf\xef\xbb\xbf{}")


HALVES = (
    "\\ud83d",
    "\\uDE00",
    "\\ud83dx",
    "\\ud83d\\n",
    "\\ud83d\\u0041",
    "\\ud83d\\ud83d\\ude00",
    "\\ud83d\\\\",
)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"prompt":"HALF"}', "prompt"),
        ('{"é":[1],"user":"é\\\\u \\ud83d\\ude00 HALF","x":1}', "user"),
        ('{"messages":[{"role":"user","content":"a"},\r\n\n {"role":"user",\n"content":"bHALFb"}]}', "messages[1].content"),
        ('{"messages":[{"content":[{"type":"text","text":"HALF"}]}]}', "messages[0].content[0].text"),
        ('{"stop":["a", "HALF"]}', "stop[1]"),
        ('{"text":"\\\\ud83dHALF"}', "text"),
        ('{"text":"\\\\\\\\HALF"}', "text"),
        ('{"voice_settings":{"x":"HALF"}}', "voice_settings.x"),
    ],
)  # fmt: skip
def test_a_lone_surrogate_is_refused_and_its_field_named(text: str, field: str, half: str) -> None:
    with pytest.raises(PomeloError) as caught:
        parse_json(text.replace("HALF", half).encode())
    assert (caught.value.code, caught.value.field) == ("invalid_parameter", field)
    assert field in caught.value.message
    assert half[:6] in caught.value.message


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    "text", ['{"HALF":1}', '{"a":1,"HALF":1}', '{"a":"x","aHALF":1}', '{"metadata":{"a":"b","HALF":"v"}}', '{"a":[{"HALF":1}]}']
)  # fmt: skip
def test_a_lone_surrogate_in_the_name_of_a_field_is_refused(text: str, half: str) -> None:
    with pytest.raises(PomeloError) as caught:
        parse_json(text.replace("HALF", half).encode())
    assert (caught.value.code, caught.value.field) == ("invalid_parameter", None)
    assert half[:6] in caught.value.message


def test_a_complete_surrogate_pair_is_one_character() -> None:
    assert parse_json(b'{"a":"\\ud83d\\ude00"}') == {"a": "\U0001f600"}


# --- counting values


TEXTS = st.text(st.sampled_from('ab"\\[]{},:\n\u00e9\u4e2d\U0001f600'), max_size=12)
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=25,
)


def count_values(value: Any) -> int:
    """The number of values in a value, including itself."""
    if isinstance(value, dict):
        return 1 + sum(map(count_values, value.values()))
    return 1 + (sum(map(count_values, value)) if isinstance(value, list) else 0)


def scan_split(data: bytes, cuts: list[int]) -> JsonScan:
    """A scan that was fed the data, split at `cuts`."""
    scan = JsonScan()
    at = 0
    for cut in sorted(cut % (len(data) + 1) for cut in cuts):
        scan.feed(data[at:cut])
        at = cut
    scan.feed(data[at:])
    return scan


@example(["\\", '\\"', 1, 2, 3], False, 0, [])  # the quotes after an escaped backslash end a text
@example(["\\", '\\"', 1, 2, 3], False, 4_000, [])
@example(["\\", '\\"', 1, 2, 3], False, 4_000, [4])
@given(JSON, st.booleans(), st.sampled_from([0, 4_000]), st.lists(st.integers(0, 10_000), max_size=8))
def test_values_outside_strings_are_counted_in_any_split(
    value: Any, ascii_only: bool, padding: int, cuts: list[int]
) -> None:
    value = [value, " " * padding]  # in a long text, the same escapes are sparse
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    empty = sum(data.count(pair) for pair in (b"[]", b"{}"))  # at most: they may also be in strings
    counted = scan_split(data, cuts)._values
    assert count_values(value) - 1 <= counted <= count_values(value) - 1 + empty + 1


def feed_all(data: bytes, step: int = 65_536) -> None:
    """Feeds the data to a scan in pieces."""
    scan = JsonScan()
    for at in range(0, len(data), step):
        scan.feed(data[at : at + step])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"messages":[' + b"[]," * MAX_VALUES + b"1]}", "values"),
        (b'{"messages":[' + b'"",' * (2 * MAX_VALUES) + b"1]}", "values"),
        (b'"' * (4 * MAX_VALUES + 2), "values"),
        (b'{"a":"' + b"\\n" * (MAX_ESCAPES + 1) + b'"}', "backslashes"),
        (b'{"a":' + b"9" * (MAX_OUTSIDE_STRINGS + 1) + b"}", "outside"),
        (b" " * (MAX_OUTSIDE_STRINGS + 1), "outside"),
    ],
    ids=["lists", "empty texts", "quotes", "escapes", "digits", "spaces"],
)
def test_json_that_is_slow_to_parse_is_refused_in_any_pieces(data: bytes, message: str) -> None:
    for step in (len(data), 65_536, 1009):
        with pytest.raises(PomeloError, match=message) as caught:
            feed_all(data, step)
        assert caught.value.code == "invalid_body"


def test_the_first_piece_that_exceeds_the_limit_is_refused() -> None:
    scan = JsonScan()
    scan.feed(b'{"messages":[')
    pieces = 0
    with pytest.raises(PomeloError):  # noqa: PT012 - the test counts the pieces
        while True:
            pieces += 1
            scan.feed(b"[]," * 20_000)
    assert pieces == MAX_VALUES // 40_000 + 1


@pytest.mark.parametrize("text", [b'"[', b'"\\', b"[\\"], ids=["string", "escape", "backslash"])
def test_the_values_after_an_incomplete_text_are_counted(text: bytes) -> None:
    scan = JsonScan()
    scan.feed(text)
    scan.begin_text()
    with pytest.raises(PomeloError, match="values"):
        scan.feed(b'"' + b'","' * (MAX_VALUES + 1) + b'"')


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{"role": "user", "content": 'Hi, [you] {there}: "friend"\n' * 200_000}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}] * 10_000},
        {"messages": [{"role": "user", "content": "中" * 1_390_000}]},
        {"audio": "A" * 8_000_000},
    ],
    ids=["prose", "ten thousand messages", "escaped chinese", "audio"],
)
def test_realistic_bodies_pass_the_scan(value: Any) -> None:
    feed_all(json.dumps(value).encode())


@pytest.mark.parametrize(
    ("unit", "limit"),
    [(b"[", MAX_VALUES), (b" ", MAX_OUTSIDE_STRINGS), (b'"', 4 * MAX_VALUES), (b"\\n", MAX_ESCAPES)],
    ids=["values", "bytes outside strings", "quotes", "escapes"],
)
def test_exactly_the_limit_is_accepted(unit: bytes, limit: int) -> None:
    scan = JsonScan()
    scan.feed(b'"' if unit == b"\\n" else b"")
    scan.feed(unit * limit)
    with pytest.raises(PomeloError):
        scan.feed(unit)
