"""Language codes and tags are converted to ISO 639 codes."""

from __future__ import annotations

import gc
import subprocess
import sys
from itertools import product
from string import ascii_lowercase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langcodes import Language

from pomelo.catalog.languages import iso_language


@pytest.mark.parametrize(
    ("tag", "code"),
    [
        ("en", "en"), ("EN", "en"), ("eng", "en"), ("ENG", "en"), ("en-US", "en"), ("en_GB", "en"),
        ("eng-US", "en"), ("zh-Hant-TW", "zh"), ("sr-Latn-RS", "sr"), ("de-1996", "de"),
        ("ger", "de"), ("deu", "de"), ("fre", "fr"), ("fra", "fr"), ("chi", "zh"), ("zho", "zh"),
        ("haw", "haw"), ("yue", "yue"), ("cmn", "cmn"), ("fil", "fil"), ("ast", "ast"), ("HAW-US", "haw"),
        ("tgl", "tl"), ("tl", "tl"), ("twi", "tw"), ("nob", "nb"), ("nor", "no"), ("hbs", "sh"),
        ("iw", "he"), ("in", "id"), ("ji", "yi"), ("jw", "jv"), ("mo", "ro"),
        ("mol", "ro"), ("scc", "sr"), ("scr", "hr"), ("jaw", "jv"), ("MOL-MD", "ro"),
    ],
)  # fmt: skip
def test_a_language_is_converted_to_its_shortest_iso_639_code(tag: str, code: str) -> None:
    assert iso_language(tag) == code


@pytest.mark.parametrize(
    "tag",
    [
        "", "e", "zz", "xx", "xyz", "zzz", "xx1", "e1", "english", "English", "x" * 200, "en-" * 70 + "x",
        "en-", "-en", "en--US", "en US", " en", "en\n", "en-toolongsubtag", "\uff45\uff4e", "\u0435\u043d", "é",
        "und", "mis", "mul", "zxx", "qaa", "qtz", "i-klingon", "x-mine", "en-US-" + "a-" * 9 + "b",
    ],
)  # fmt: skip
def test_text_that_is_not_a_language_has_no_code(tag: str) -> None:
    assert iso_language(tag) == ""


def test_there_are_184_two_letter_codes() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    codes = {iso_language(first + second) for first in letters for second in letters} - {"", "bih"}
    assert len(codes) == 184
    assert {len(code) for code in codes} == {2}


_WITHDRAWN = {"bh", "in", "iw", "ji", "jw", "mo"}


def test_the_codes_of_languages_with_a_two_letter_code_are_those_of_the_registry() -> None:
    for code in map("".join, product(ascii_lowercase, repeat=2)):
        if code in _WITHDRAWN:
            continue
        try:
            others = {Language.make(code).to_alpha3(variant) for variant in ("T", "B")}
        except LookupError:
            assert iso_language(code) == ""
        else:
            assert {iso_language(each) for each in {code, *others}} == {code}


def test_only_a_language_without_a_two_letter_code_loads_the_library() -> None:
    program = (
        "import sys; from pomelo.catalog.languages import iso_language as find;"
        "assert find('deu') == 'de'; assert 'langcodes' not in sys.modules;"
        "assert find('haw') == 'haw'; assert 'langcodes' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@given(st.text(max_size=40))
def test_the_conversion_is_idempotent(tag: str) -> None:
    code = iso_language(tag)
    assert len(code) in (0, 2, 3)
    assert iso_language(code) == code


def test_tags_of_callers_are_not_cached() -> None:
    iso_language("en-x-warm")
    cached = len(Language._PARSE_CACHE) + len(Language._INSTANCES)
    gc.collect()
    blocks = sys.getallocatedblocks()
    for number in range(5_000):
        assert iso_language(f"haw-x-{number}") == "haw"
    assert sys.getallocatedblocks() - blocks < 1_000
    assert len(Language._PARSE_CACHE) + len(Language._INSTANCES) <= cached + 2
