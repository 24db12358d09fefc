"""Bytes of a file that are in no packet count as audio as dense as the rest, except those of its structure."""

from __future__ import annotations

import io

import av
import pytest

from pomelo.media import demux
from pomelo.media.containers import structure_size
from tests.unit.media import corpus
from tests.unit.media.built import chunk, id3, opus, page

TAG = b"TAG" + bytes(125)
UNPARSED = 2048
"""Bytes of a file with a known structure that are not audio in addition to it."""


def measured(data: bytes, raw: bool = False) -> tuple[int, str]:
    return demux.measure(io.BytesIO(data), len(data), raw)


def extended(ms: float, hidden: float, covered: int) -> int:
    """The milliseconds of audio with hidden bytes in addition to those of its packets."""
    return round(ms * (1 + hidden / covered))


@pytest.mark.parametrize("hidden", [-1000, -1, 0, 16, 17, 36_380])
def test_hidden_bytes_of_a_wav_file_count_as_samples(hidden: int) -> None:
    data = corpus.wav(5, rate=8000)
    headers = 79 * 20  # of the packets of 1,024 bytes that the samples are read in
    unknown = chunk(b"what", bytes(UNPARSED + headers + hidden - 8))
    ms = extended(5000, max(hidden, 0), 80_000)
    assert measured(data + unknown) == (ms, "wav")
    assert measured(data + unknown + TAG) == (ms, "wav")


@pytest.mark.parametrize(
    "name", ["m4a", "ogg opus", "mpeg-ts", "avi", "webm opus", "caf", "aiff", "nut", "asf"]
)
def test_hidden_bytes_of_every_container_count_as_audio(name: str) -> None:
    data = corpus.make(name)
    with av.open(io.BytesIO(data), "r") as container:
        packets = [packet.size for packet in container.demux() if packet.size]
        demuxer = container.format.name.partition(",")[0]
        (stream,) = container.streams.audio
        assert stream.codec_context is not None
    ms, covered = measured(data)[0], sum(packets)
    data += bytes(50_000)
    structure = structure_size(io.BytesIO(data), len(data), demuxer)
    assert (structure > 0) == (name not in ("nut", "asf"))
    hidden = len(data) * (0.9 if name == "asf" else 1) - covered - structure
    hidden -= UNPARSED if structure else 16 * 1024
    hidden -= len(packets) * (0 if name in ("m4a", "ogg opus", "mpeg-ts") else 20)
    assert hidden > 10_000
    assert measured(data)[0] == pytest.approx(extended(ms, hidden, covered), abs=1)


@pytest.mark.parametrize(("samples", "hidden", "ms"), [(800, 1600, 200), (800, 1601, 0), (1024, 4000, 378)])
def test_a_few_bytes_of_audio_do_not_measure_the_rest(samples: int, hidden: int, ms: int) -> None:
    data = corpus.wav(samples / 8000, rate=8000)
    unknown = chunk(b"what", bytes(UNPARSED + 2 * 20 + hidden - 8))
    assert measured(data + unknown) == (ms, "wav" if ms else "")


@pytest.mark.parametrize("tag", [b"", TAG])
def test_frames_are_a_third_of_the_bytes_of_a_bare_format(tag: bytes) -> None:
    frames = corpus.FRAME * 10
    assert measured(frames + bytes(8466) + tag) == (287, "mp3")  # the garbage counts as one more frame
    assert measured(frames + bytes(8467) + tag) == (0, "")


def test_bytes_in_a_packet_larger_than_any_frame_are_not_frames() -> None:
    assert measured(corpus.FRAME * 4 + bytes(8192)) == (131, "mp3")
    assert measured(corpus.FRAME * 4 + bytes(8193)) == (0, "")


def test_declared_samples_are_frames_only_if_nearly_all_bytes_are() -> None:
    data = corpus.make("adts")
    rest = len(data) * 5 // 95
    ms = measured(data)[0]
    assert measured(data + bytes(rest), raw=True) == (ms, "aac")
    assert measured(data + bytes(rest + 1), raw=True) == (ms, "")
    assert measured(id3(3) + data + bytes(rest), raw=True) == (ms, "aac")
    assert measured(data + bytes(rest) + TAG, raw=True) == (ms, "aac")
    assert measured(id3(3) + corpus.FRAME * 40 + bytes(8200), raw=True)[1] == "mp3"
    assert measured(b"xxx" + corpus.FRAME * 40 + bytes(8200), raw=True)[1] == ""


def test_the_links_of_a_chained_file_are_measured_one_by_one() -> None:
    packet = b"\xf8" + bytes(30)
    first, second = opus([packet] * 100), opus([packet] * 50)
    assert measured(first + second + first) == (5000, "ogg")
    assert measured(id3(700) + first + second) == (3000, "ogg")
    silent = opus([b"\xfb"] * 10)
    assert measured(first + silent) == (0, "")
    assert measured(silent + first) == (0, "")
    assert measured(first + page(2, 0, b"unknown stream")) == (0, "")
