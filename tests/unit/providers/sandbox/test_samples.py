"""Raw samples: G.711 against PyAV's decoder, and text embedded in the lowest bits."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.providers.sandbox.samples import MAX_TEXT_BYTES, TextEmbedder, alaw, extract, pcm, ulaw
from tests.unit.providers.sandbox.sandbox_jobs import decode


@pytest.mark.parametrize(("code", "demuxer"), [(ulaw, "mulaw"), (alaw, "alaw")])
def test_every_sample_is_decoded_to_nearly_the_same_value(code: object, demuxer: str) -> None:
    samples = list(range(-32768, 32768, 7))
    decoded_samples = decode(code(samples), demuxer, sample_rate="8000").samples  # type: ignore[operator]
    assert len(decoded_samples) == len(samples)
    for sample, decoded in zip(samples, decoded_samples, strict=True):
        assert abs(sample - decoded) <= 16 + abs(sample) / 16


@pytest.mark.parametrize(("code", "silence"), [(ulaw, 0xFF), (alaw, 0xD5)])
def test_silence_has_its_standard_code(code: object, silence: int) -> None:
    assert code([0]) == bytes([silence])  # type: ignore[operator]


def test_pcm_is_little_endian() -> None:
    assert pcm([1, -2, 32767]) == struct.pack("<hhh", 1, -2, 32767)


@st.composite
def cuts(draw: st.DrawFn, size: int, width: int) -> list[slice]:
    """Ways to cut audio between samples."""
    positions = sorted(draw(st.sets(st.integers(0, size // width), max_size=5)))
    return [
        slice(a * width, b * width) for a, b in zip([0, *positions], [*positions, size // width], strict=True)
    ]


@given(st.text(max_size=300), st.sampled_from([1, 2]), st.integers(1, 96_000), st.data())
def test_any_text_is_extracted_from_any_samples_however_they_are_cut(
    text: str, width: int, rate: int, data: st.DataObject
) -> None:
    seed = data.draw(st.binary(min_size=1, max_size=64))
    needed = (len(text.encode()) + 16) * 8
    carrier = (seed * (needed * width // len(seed) + 1))[: needed * width]
    embedder = TextEmbedder(text, rate, needed, width)
    changed = b"".join(embedder.embed(carrier[piece]) for piece in data.draw(cuts(len(carrier), width)))
    assert extract(changed, width) == (text, rate)
    assert len(changed) == len(carrier)
    assert all(a >> 1 == b >> 1 for a, b in zip(carrier[::width], changed[::width], strict=True))
    if width == 2:
        assert carrier[1::2] == changed[1::2]


@given(st.text(min_size=1, max_size=40), st.sampled_from([1, 2]))
def test_a_text_that_does_not_fit_leaves_the_samples_unchanged(text: str, width: int) -> None:
    samples = (len(text.encode()) + 16) * 8 - 1
    carrier = bytes(samples * width)
    embedder = TextEmbedder(text, 8000, samples, width)
    assert embedder.embed(carrier) == carrier
    assert extract(carrier, width) is None


@given(st.binary(max_size=2000), st.sampled_from([1, 2]))
def test_no_text_is_extracted_from_other_bytes(data: bytes, width: int) -> None:
    assert extract(data, width) is None


@given(st.text(min_size=1, max_size=20), st.data())
def test_a_text_with_a_changed_bit_is_not_extracted(text: str, data: st.DataObject) -> None:
    samples = (len(text.encode()) + 16) * 8
    changed = bytearray(TextEmbedder(text, 8000, samples, 1).embed(bytes(samples)))
    changed[data.draw(st.integers(0, samples - 1))] ^= 1
    assert extract(bytes(changed), 1) is None


@given(st.text(min_size=1, max_size=20), st.data())
def test_a_text_that_is_cut_off_is_not_extracted(text: str, data: st.DataObject) -> None:
    samples = (len(text.encode()) + 16) * 8
    complete = TextEmbedder(text, 8000, samples, 1).embed(bytes(samples))
    assert extract(complete[: data.draw(st.integers(0, samples - 1))], 1) is None


def test_the_longest_text_is_extracted_and_a_longer_one_is_not() -> None:
    for extra in (0, 1):
        text = "x" * (MAX_TEXT_BYTES + extra)
        samples = (len(text) + 16) * 8
        extracted = extract(TextEmbedder(text, 8000, samples, 1).embed(bytes(samples)), 1)
        assert (extracted is not None) == (extra == 0)
