"""Base64 and data: URIs are decoded in every spelling that browsers, libraries and people use."""

from __future__ import annotations

import base64
import re
import time
import tracemalloc
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.errors import PomeloError
from pomelo.media import data_uris
from tests.unit.refusals import refused

MIB = 1024 * 1024


def decoded(text: str) -> tuple[str, bytes]:
    media_type, start = data_uris.head(text, "audio")
    return media_type, b"".join(data_uris.decode(text, start, "audio"))


def error_message(text: str) -> str:
    with refused("invalid_parameter", "audio") as caught:
        decoded(text)
    return caught.value.message


@given(
    st.binary(min_size=1, max_size=80),
    st.sampled_from(["", "data:audio/ogg;base64,", "\r\n DATA: ;codecs=vp8,opus; Base64;charset=utf-8 ,"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["unescaped", "some escaped", "all escaped"]),
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from([" ", "\r\n", "\n", "\t"])), max_size=8),
    st.integers(1, 40),
)
def test_every_spelling_is_decoded_to_the_same_bytes_in_steps_of_any_size(
    data: bytes,
    prefix: str,
    url_safe: bool,
    padded: bool,
    escaped: str,
    blanks: list[tuple[int, str]],
    step: int,
) -> None:
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    if escaped == "some escaped":
        text = quote(text, safe="")
    elif escaped == "all escaped":
        text = "".join(f"%{ord(c):02x}" for c in text)
    for position, blank in blanks:
        text = text[:position] + blank + text[position:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pomelo.media.data_uris._STEP", step)
        assert decoded(prefix + text)[1] == data
        url = "data:image/png;base64," + text
        canonical = data_uris.canonical(url, 22, "image/jpeg", "x")
    assert canonical == "data:image/jpeg;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("head", "media_type"),
    [
        ("data:audio/mpeg;base64,", "audio/mpeg"),
        ("Data:Audio/MPEG;BASE64,", "Audio/MPEG"),
        ("data:;base64,", ""),
        ("data:base64,", ""),
        (" Data: BASE64 ,", ""),
        ("data:audio/*;charset=utf-8;base64,", "audio/*;charset=utf-8"),
        (" \n data: audio/ogg ; base64 ,", "audio/ogg"),
        ("data:video/webm;codecs=vp8,opus;base64,", "video/webm;codecs=vp8,opus"),
        ('data:audio/ogg; codecs="a;base64,b";base64,', 'audio/ogg; codecs="a;base64,b"'),
        ('data:audio/pcm; rate="16000";name=a,b.raw;base64,', 'audio/pcm; rate="16000";name=a,b.raw'),
        ("data:audio/l16;base64;channels=1;rate=8000,", "audio/l16;channels=1;rate=8000"),
        ("data:;rate=8000;base64,", ";rate=8000"),
        ("data:nonsense;base64,", "nonsense"),
    ],
)
def test_the_media_type_is_read_in_any_order_of_parameters(head: str, media_type: str) -> None:
    assert decoded(head + "SUQz") == (media_type, b"ID3")


@pytest.mark.parametrize(
    ("text", "excerpt"),
    [
        ("!", "'!'"),
        ("SUQ\u00e9", "'\\xe9'"),
        ("data:audio/mpeg;base64,SUQz,SUQz", "','"),
        ("https://example.com/a.mp3", "':'"),
        ("SUQ%zz", "'%'"),
        ("SUQ%3", "'%'"),
        ("SUQz%2525", "'%'"),
        ("SUQzS", "missing"),
        ("S===", "missing"),
        ("SQ==SQ==", "padding"),
        ("S=QQ", "padding"),
        ("data:audio/mpeg,SUQz", "';base64,'"),
        ("data:audio/mpeg;base64", "';base64,'"),
        ("data:", "';base64,'"),
        ('data:audio/mpeg;name="a;base64,SUQz', "';base64,'"),
        ("data:" + " " * 1024 + ";base64,SUQz", "';base64,'"),
    ],
)
def test_text_that_is_not_base64_is_refused_with_the_reason(text: str, excerpt: str) -> None:
    assert excerpt in error_message(text)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("SUQ\u00e9", {"character": "\u00e9"}),
        ("SUQ%zz", {"character": "%"}),
        ("data:audio/mpeg,SUQz", {"maxCharacters": "1024"}),
        ("S=QQ", {}),
    ],
)
def test_the_values_of_a_refusal_are_those_that_its_message_names(text: str, values: dict[str, str]) -> None:
    with refused("invalid_parameter", "audio") as caught:
        decoded(text)
    assert caught.value.values == values


def test_empty_base64_is_decoded_to_no_bytes() -> None:
    for text in ("", " \r\n", "====", "data:audio/mpeg;base64,"):
        assert decoded(text)[1] == b""


def test_a_canonical_data_uri_is_not_copied() -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(MIB)).decode()
    assert data_uris.canonical(url, 22, "image/png", "x") is url


LARGE = {
    "plain": "A" * (8 * MIB),
    "lines": ("A" * 76 + "\r\n") * (8 * MIB // 78),
    "escaped": "%41" * (8 * MIB // 3),
    "blanks": " " * (8 * MIB),
    "padding": "=" * (8 * MIB),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_text_is_decoded_quickly_and_with_little_memory(name: str) -> None:
    text = LARGE[name]
    began = time.process_time()
    for _ in data_uris.decode(text, 0, "audio"):
        pass
    assert time.process_time() - began < 2.0, "some 0.05 s on an idle machine"
    tracemalloc.start()
    try:
        for _ in data_uris.decode(text, 0, "audio"):
            pass
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("part", ["a", ";", ",", '"', "\\", ";a=", '="', ";base64", "; base64 ;", ' a="\\"'])
def test_a_hostile_head_is_parsed_quickly(part: str) -> None:
    began = time.process_time()
    data_uris_head = f"data:{part * 1024}"
    for _ in range(20):
        try:
            data_uris.head(data_uris_head, "audio")
        except PomeloError as error:
            assert error.code == "invalid_parameter"  # noqa: PT017
    assert time.process_time() - began < 0.5


def test_text_after_the_padding_is_refused_in_every_step() -> None:
    step = 64 * 1024
    assert "after its padding" in error_message("A" * (step - 2) + "==" + "AAAA")


def test_unused_bits_before_the_padding_are_ignored() -> None:
    assert decoded("SUR=")[1] == decoded("SUQ=")[1] == b"ID"
    assert decoded("A" * 4 + "QR")[1] == bytes(3) + b"A"


@given(st.text("Aa1+/=-_ \n%\u00e9", max_size=12), st.integers(1, 8))
def test_only_padded_standard_base64_is_left_as_it_is(text: str, step: int) -> None:
    uri = "data:image/png;base64," + text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pomelo.media.data_uris._STEP", step)
        try:
            left = data_uris.canonical(uri, len(uri) - len(text), "image/png", "x") is uri
        except PomeloError:
            left = False
    assert left == (len(text) % 4 == 0 and re.fullmatch("[A-Za-z0-9+/]+={0,2}", text) is not None)


def test_base64_without_its_padding_is_padded() -> None:
    uri = "data:image/png;base64,AA"
    assert data_uris.canonical(uri, len(uri) - 2, "image/png", "x") == uri + "=="
