"""The measured length of audio is its playing time, whatever the container, its headers and tags say."""

from __future__ import annotations

import io
import struct

import av
import pytest

from pomelo.media import demux, packets
from pomelo.media.containers import (
    MAX_CHUNKS,
    FileSlice,
    chained_streams,
    has_too_many_chunks,
    tag_sizes,
)
from tests.unit.media import corpus
from tests.unit.media.built import ape, appended_id3, chunk, id3, lyrics, matroska

SECONDS = corpus.SECONDS
LONG = 20.0


def measured(data: bytes) -> float:
    """The seconds of a file; 0 if it can't be measured."""
    return demux.measure(io.BytesIO(data), len(data), False)[0] / 1000


def frames(data: bytes) -> list[bytes]:
    """The packets of a file, which are one frame each."""
    with av.open(io.BytesIO(data), "r") as container:
        return [bytes(packet) for packet in container.demux() if packet.size]


def joined(frames: list[bytes], count: int) -> list[bytes]:
    return [b"".join(frames[at : at + count]) for at in range(0, len(frames), count)]


AAC_LC = bytes.fromhex("1208")
"""AudioSpecificConfig: AAC-LC, 44,100 Hz, mono."""


@pytest.mark.parametrize("count", [1, 2, 10, 50])
def test_all_frames_of_a_packet_count(count: int) -> None:
    aac = matroska(b"A_AAC", 44_100, joined(frames(corpus.make("m4a")), count), AAC_LC)
    assert measured(aac) == pytest.approx(SECONDS, rel=0.03)
    mp2 = matroska(b"A_MPEG/L2", 44_100, joined(frames(corpus.make("mp2")), count))
    assert measured(mp2) == pytest.approx(SECONDS, rel=0.03)


@pytest.mark.parametrize("sample", [8, 60, 200])
def test_a_wrong_sample_size_does_not_hide_the_samples_after_it(sample: int) -> None:
    data = bytearray(corpus.make("m4a", LONG))
    data[data.index(b"stsz") + 16 + 4 * sample] = 0x7F
    assert measured(bytes(data)) >= 0.94 * LONG


@pytest.mark.parametrize("count", [1, 50])
def test_audio_that_takes_too_long_to_decode_is_estimated(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_frames = frames(corpus.make("m4a", LONG))
    half = len(all_frames) // 2
    data = matroska(b"A_AAC", 44_100, all_frames[:half] + joined(all_frames[half:], count), AAC_LC)
    for seconds in (0.0, 0.005):
        monkeypatch.setattr(packets, "DECODE_SECONDS", seconds)
        assert measured(data) == pytest.approx(LONG, rel=0.05)


def test_chained_streams_of_different_codecs_and_rates_are_added_up() -> None:
    parts = [
        corpus.make("ogg opus"),
        corpus.make("ogg vorbis"),
        corpus.make("ogg vorbis", SECONDS, 16_000),
        corpus.make("ogg opus of one packet per page"),
    ]
    assert measured(b"".join(parts)) == pytest.approx(4 * SECONDS, rel=0.03)
    assert measured(b"".join([parts[0][: len(parts[0]) // 2], *parts[1:]])) > 3 * SECONDS


def test_simultaneous_tracks_are_not_added_up() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="ogg") as container:
        tracks = [container.add_stream("libopus", rate=48_000) for _ in range(2)]
        for at in range(0, int(SECONDS * 48_000), 960):
            for track in tracks:
                frame = av.AudioFrame(format="s16", layout="stereo", samples=960)
                frame.planes[0].update(bytes(960 * 4))
                frame.sample_rate, frame.pts = 48_000, at
                container.mux(track.encode(frame))
        for track in tracks:
            container.mux(track.encode(None))
    assert measured(out.getvalue()) == pytest.approx(SECONDS, rel=0.03)


@pytest.mark.parametrize("skipped", [False, True])
def test_a_stream_that_begins_late_does_not_end_the_measurement(
    skipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if skipped:  # without an error, as PyAV does if its array of streams is followed by a zero in memory
        packets_of = demux._packets
        monkeypatch.setattr(demux, "_packets", lambda container, thorough: packets_of(container, True))
    data = corpus.make("flv", 60.0)
    positions, at = [], 13
    while at < len(data):
        positions.append(at)
        at += 15 + int.from_bytes(data[at + 1 : at + 4], "big")
    late = positions[len(positions) * 9 // 10]
    frame = b"\x12\0\0\x84" + bytes(600_000)  # a large video frame is not audio
    tag = b"\x09" + len(frame).to_bytes(3, "big") + data[late + 4 : late + 11] + frame
    tag += struct.pack(">I", len(tag))
    assert measured(data[:late] + tag + data[late:]) == pytest.approx(60, rel=0.03)


@pytest.mark.parametrize("name", ["adts", "mpeg-ts"])
def test_each_frame_plays_at_its_own_rate(name: str) -> None:
    data = corpus.make(name, 0.5, 96_000) + corpus.make(name, LONG, 8_000)
    assert measured(data) == pytest.approx(LONG + 0.5, rel=0.03, abs=0.3)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_flac_frames_with_a_wrong_checksum_count(every: int) -> None:
    data = bytearray(corpus.make("flac", LONG))
    with av.open(io.BytesIO(bytes(data)), "r") as container:
        sizes = [packet.size for packet in container.demux() if packet.size]
    at = len(data) - sum(sizes)
    for number, size in enumerate(sizes):
        at += size
        if number % every == 0:
            data[at - 1] ^= 0x55
    assert measured(bytes(data)) == pytest.approx(LONG, rel=0.03)


@pytest.mark.parametrize("name", ["wav", "mp3"])
def test_a_comment_that_is_not_utf_8_does_not_prevent_the_measurement(name: str) -> None:
    comment = "Ménage".encode("latin-1") + b"\0"
    if name == "wav":
        data = corpus.make("wav")
        data = data[:12] + chunk(b"LIST", b"INFO" + chunk(b"ICMT", comment + bytes(1))) + data[12:]
    else:
        data = corpus.mp3(SECONDS) + b"TAG" + comment.ljust(125, b"\0")
    assert measured(data) == pytest.approx(SECONDS, rel=0.03)


PADDING = 300_000
WITH_PADDING: dict[str, bytes] = {
    "wav with padding": (w := corpus.make("wav"))[:12] + chunk(b"JUNK", bytes(PADDING)) + w[12:],
    "wav with an overview": w[:12] + chunk(b"levl", bytes(PADDING)) + w[12:] + chunk(b"SMED", bytes(PADDING)),
    "wav with a tag at the end": w + chunk(b"id3 ", bytes(PADDING)),
    "wav with a comment": w[:12] + chunk(b"LIST", b"INFO" + chunk(b"ICMT", b"x" * PADDING)) + w[12:],
    "aiff with a tag": corpus.make("aiff") + chunk(b"ID3 ", bytes(PADDING), ">"),
    "m4a with free space": corpus.make("m4a") + struct.pack(">I4s", PADDING + 8, b"free") + bytes(PADDING),
    "flac with padding": (f := corpus.make("flac"))[:42]
    + struct.pack(">I", 1 << 24 | PADDING)
    + bytes(PADDING)
    + f[42:],
    "flac after a tag": id3(PADDING) + f,
    "tta after a tag": id3(PADDING) + corpus.make("tta"),
    "aiff after a tag": id3(PADDING) + corpus.make("aiff"),
    "ogg after a tag": id3(PADDING) + corpus.make("ogg opus"),
    "mp3 after a large tag": id3(8_000_000) + corpus.mp3(SECONDS),
    "tta before a tag": corpus.make("tta") + ape(PADDING),
    "wavpack before a tag": corpus.make("wavpack") + ape(PADDING),
    "mp3 before a tag": corpus.mp3(SECONDS) + ape(PADDING),
    "mp3 before tags of all kinds": corpus.mp3(SECONDS)
    + ape(PADDING)
    + appended_id3(PADDING)
    + lyrics(PADDING)
    + b"TAG"
    + bytes(125),
    "mpeg-ts that begins within a packet": corpus.make("mpeg-ts of a fixed rate")[100:],
    "mp3 after an ape tag": ape(PADDING) + corpus.mp3(SECONDS),
    "matroska with a void": matroska(b"A_AAC", 44_100, frames(corpus.make("m4a")), AAC_LC, PADDING),
}


@pytest.mark.parametrize("name", WITH_PADDING)
def test_tags_and_padding_are_not_audio(name: str) -> None:
    assert measured(WITH_PADDING[name]) == pytest.approx(SECONDS, rel=0.03)


@pytest.mark.parametrize("name", ["wav", "m4a", "aiff", "tta", "wavpack", "matroska aac", "nut"])
def test_unknown_bytes_count_as_audio(name: str) -> None:
    data = corpus.make(name)
    hidden = data[len(data) // 4 : -len(data) // 4]
    assert measured(data + hidden) > 1.4 * SECONDS


def test_a_footer_without_a_header_is_not_a_tag() -> None:
    data = corpus.make("wavpack")
    foot = b"APETAGEX" + struct.pack("<IIII8x", 2000, len(data), 1, 0x80000000)
    assert tag_sizes(io.BytesIO(data + foot), len(data) + 32) == (0, 0)


def test_chained_streams_are_found_after_a_truncated_page() -> None:
    first, second = corpus.make("ogg opus"), corpus.make("ogg vorbis")
    for cut in (len(first), len(first) - 1000, len(first) - 1):
        data = first[:cut] + second
        streams = chained_streams(io.BytesIO(data), 0, len(data))
        assert [start for start, _ in streams] == [0, cut]
        start, size = streams[1]
        assert FileSlice(io.BytesIO(data), start, size).read() == second


@pytest.mark.parametrize("name", [*corpus.CASES, *WITH_PADDING])
def test_a_truncated_or_corrupt_file_never_fails(name: str) -> None:
    data = WITH_PADDING.get(name) or corpus.make(name)
    for at in range(1, 64, 3):
        assert measured(data[:at] + bytes(5) + data[at:][:20_000]) >= 0
        assert measured(data[:at]) >= 0


def audio_last(head: bytes) -> bytes:
    """An M4A file whose last atom is that with the audio; it has this head."""
    data = corpus.make("m4a")
    audio = data.index(b"mdat") - 4
    index = data.index(b"moov") - 4
    moov = bytearray(data[index:])
    offsets = moov.index(b"stco") + 8
    moved = len(moov) + len(head) - 8
    for at in range(offsets + 4, offsets + 4 + 4 * int.from_bytes(moov[offsets : offsets + 4], "big"), 4):
        moov[at : at + 4] = struct.pack(">I", int.from_bytes(moov[at : at + 4], "big") + moved)
    return data[:audio] + bytes(moov) + head + data[audio + 8 : index]


@pytest.mark.parametrize(
    "head",
    [
        struct.pack(">I4s", 0, b"mdat"),  # to the end of the file
        struct.pack(">I4s", 2**32 - 1, b"mdat"),
        struct.pack(">I4sQ", 1, b"mdat", 2**63 - 1),
        struct.pack(">I4sQ", 1, b"mdat", 2**64 - 1),
    ],
)
def test_an_atom_without_its_real_size_is_measured(head: bytes) -> None:
    assert measured(audio_last(head)) == pytest.approx(SECONDS, rel=0.03)


@pytest.mark.parametrize("size", [-1, 0, 2**62])
def test_a_caf_file_that_was_written_into_a_pipe_is_measured(size: int) -> None:
    data = bytearray(corpus.make("caf"))
    at = data.index(b"data") + 4
    data[at : at + 8] = struct.pack(">q", size)
    assert measured(bytes(data)) == pytest.approx(SECONDS, rel=0.03)


@pytest.mark.parametrize(
    ("head", "unit"),
    [
        (b"RIFF\0\0\0\0WAVE", b"abcd\0\0\0\0"),
        (corpus.wav(1), b"LIST\4\0\0\0INFO"),
        (b"RIFX\0\0\0\0WAVE", b"abcd\0\0\0\1a\0"),
        (b"RF64\0\0\0\0WAVE", b"abcd\0\0\0\0"),
        (b"BW64\0\0\0\0WAVE", b"abcd\0\0\0\0"),
        (b"RIFF\0\0\0\0AVI ", b"JUNK\0\0\0\0"),
        (b"", b"\0\0\0\x08free"),
        (b"\0\0\0\x08ftyp", b"\0\0\0\1sidx\0\0\0\0\0\0\0\x10"),
        (id3(100), b"\0\0\0\x08mdat"),
    ],
)
def test_a_file_of_very_many_empty_chunks_is_not_demuxed(
    head: bytes, unit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    open_file = av.open

    def record(file: object, **options: object) -> object:
        opened.append(file)
        return open_file(file, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(av, "open", record)
    measured(head + unit * (MAX_CHUNKS - 10))
    assert opened
    opened.clear()
    assert measured(head + unit * (MAX_CHUNKS + 10)) == 0
    assert not opened


@pytest.mark.parametrize(("size", "too_many"), [(64, True), (65, False)])
def test_a_large_file_may_have_more_chunks(size: int, too_many: bool) -> None:
    data = (struct.pack(">I", size) + b"moof").ljust(size, b"\0") * (MAX_CHUNKS + 1_000)
    assert has_too_many_chunks(io.BytesIO(data), len(data)) is too_many


@pytest.mark.parametrize("data", [bytes(2_000_000), corpus.wav(70, data=0), corpus.wav(70, data=-1 % 2**32)])
def test_silent_samples_are_not_chunks(data: bytes) -> None:
    assert not has_too_many_chunks(io.BytesIO(data), len(data))
