"""JSON of vendors, and halves of surrogate pairs in it."""

from __future__ import annotations

import itertools
import json
from codecs import BOM_UTF8

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.providers.http.parsing import parse, split_half, well_formed


@pytest.mark.parametrize(
    ("data", "kept", "replaced"),
    [
        (rb'"a\ud83d"', "a\ud83d", "a\ufffd"),
        (rb'"\uDE00b"', "\ude00b", "\ufffdb"),
        (rb'{"\ud83d": ["\ud83d\ude00"]}', {"\ud83d": ["😀"]}, {"\ufffd": ["😀"]}),
        (rb'["\ud83d", "\ude00"]', ["\ud83d", "\ude00"], ["\ufffd", "\ufffd"]),
        (rb'"\\ud83d"', "\\ud83d", "\\ud83d"),
        ('"é \\ud83d 日本"'.encode(), "é \ud83d 日本", "é \ufffd 日本"),
        (BOM_UTF8 + b'"a"', "a", "a"),
        (BOM_UTF8 + rb'"\ud83d"', "\ud83d", "\ufffd"),
    ],
)
def test_lone_surrogates_are_kept_on_request_and_otherwise_replaced(
    data: bytes, kept: object, replaced: object
) -> None:
    assert parse(data, surrogates=True) == kept
    assert parse(data) == replaced


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b'"\xff"', b'"\xed\xa0\xbd"', rb'"\ud83d', rb'"\ud83"', rb'["\u0041"', rb'"\ud83d" "',
        rb'["\ud83d"' + b",[" * 100_000, b"[" * 100_000 + rb'"\ud83d"' + b"]" * 100_000, rb'["\ud83d",' + b"9" * 5000 + b"]",
    ],
)  # fmt: skip
def test_invalid_json_is_a_value_error(data: bytes) -> None:
    for surrogates in (False, True):
        with pytest.raises(ValueError):  # noqa: PT011
            parse(data, surrogates=surrogates)


ANY = st.text(st.characters(exclude_categories=()))


@given(ANY)
def test_any_text_becomes_valid_utf_8(text: str) -> None:
    found = parse(json.dumps(text).encode())
    assert found == well_formed(text)
    found.encode()
    assert len(found) == len(json.loads(json.dumps(text)))


@given(ANY, st.lists(st.integers(0, 5)))
def test_a_text_is_the_same_however_it_is_split_into_utf_16_units(text: str, sizes: list[int]) -> None:
    data = text.encode("utf-16-le", "surrogatepass")
    units = iter([chr(int.from_bytes(data[at : at + 2], "little")) for at in range(0, len(data), 2)])
    half = joined = ""
    for size in (*sizes, len(data)):
        piece, half = split_half(half + "".join(itertools.islice(units, size)))
        joined += well_formed(piece)
    assert joined + well_formed(half) == well_formed(text)
