"""The length of a stream is that of its packets, exactly, and an estimate counts each skipped packet."""

from __future__ import annotations

import io
import random
from functools import cache
from typing import Any

import av
import pytest

from pomelo.media import demux, packets
from pomelo.media.packets import DecodeBudget, StreamLength
from tests.unit.media import corpus
from tests.unit.media.built import OPUS_HEAD, matroska, opus

LONG, SHORT = 4608, 1152
"""Samples of FLAC frames."""


def measured_ms(data: bytes) -> int:
    return demux.measure(io.BytesIO(data), len(data), False)[0]


MILLISECONDS = [*[10, 20, 40, 60] * 3, *[10, 20] * 2, *[2.5, 5, 10, 20] * 4]


@pytest.mark.parametrize("configuration", range(32))
def test_opus_packets_have_the_length_of_their_first_byte(configuration: int) -> None:
    for code, frames in ((0, 1), (1, 2), (2, 2), (3, 3)):
        packet = bytes([configuration << 3 | 4 | code, 0xC0 | 3]) + bytes(30)
        ms = min(frames * MILLISECONDS[configuration], 120)
        assert measured_ms(opus([packet] * 8)) == 8 * ms


def test_an_opus_packet_is_at_most_120_ms_and_may_have_no_frame() -> None:
    assert measured_ms(opus([b"\xfb\x3f" + bytes(30)] * 10)) == 1200
    assert measured_ms(opus([b"\xfb\x06" + bytes(30)] * 10)) == 1200
    assert measured_ms(opus([b"\xfb\x05" + bytes(30)] * 10)) == 1000
    assert measured_ms(opus([b"\xfb"] * 10)) == 0
    assert measured_ms(opus([b"\xf8"] * 10)) == 200


def test_packets_determine_the_time_of_opus_in_ogg() -> None:
    assert measured_ms(opus([b"\xf8" + bytes(30)] * 100, granule=96_000)) == 2000


@pytest.mark.parametrize(
    ("times", "ms"),
    [
        (range(100), 2000),
        (range(0, 2000, 20), 2000),
        (range(5000, 7000, 20), 2000),
        (range(0, 10_000, 100), 9920),  # without the packets of silence
        (range(5990, 4990, -10), 2000),
        (range(9900, -100, -100), 9920),
    ],
)
def test_opus_in_matroska_has_the_longer_of_its_packets_and_its_timestamps(times: range, ms: int) -> None:
    frames = [b"\xf8" + bytes(30)] * 100
    assert measured_ms(matroska(b"A_OPUS", 48_000, frames, OPUS_HEAD, times=times)) == ms


@pytest.mark.parametrize(
    ("times", "ms"),
    [
        (range(100), 1000),
        (range(0, 2000, 20), 1990),
        (range(5000, 7000, 20), 1990),
        (range(0, 10_000, 100), 9910),
    ],
)
def test_samples_in_matroska_have_the_longer_of_their_bytes_and_their_timestamps(
    times: range, ms: int
) -> None:
    data = matroska(b"A_PCM/INT/LIT", 8000, [bytes(160)] * 100, times=times)
    assert measured_ms(data) == ms


@pytest.mark.parametrize(("times", "ms"), [(range(100), 2612), (range(0, 10_000, 100), 9926)])
def test_frames_of_a_known_size_count_besides_the_timestamps(times: range, ms: int) -> None:
    assert measured_ms(matroska(b"A_MPEG/L3", 44_100, [corpus.FRAME] * 100, times=times)) == ms


@cache
def flac(samples: int, noise: bool) -> tuple[list[bytes], bytes]:
    """Frames of FLAC with this many samples each at 44,100 Hz, and a file of them."""
    out = io.BytesIO()
    frames = []
    with av.open(out, "w", format="flac") as container:
        stream: Any = container.add_stream("flac", rate=44_100, options={"frame_size": str(samples)})
        stream.layout = "mono"
        for at in range(40):
            frame = av.AudioFrame(format="s16", layout="mono", samples=samples)
            data = random.Random(at).randbytes(2 * samples) if noise else bytes(2 * samples)
            frame.planes[0].update(data)
            frame.sample_rate, frame.pts = 44_100, at * samples
            for packet in stream.encode(frame):
                frames.append(bytes(packet))
                container.mux(packet)
        for packet in stream.encode(None):
            if packet.size:
                frames.append(bytes(packet))
                container.mux(packet)
    return frames, out.getvalue()


def length(budget: DecodeBudget, *feeds: list[bytes]) -> float:
    """The seconds of these packets of FLAC. The time of the budget is used up after the first of the lists, is
    left after the second, and is used up again after the third."""
    with av.open(io.BytesIO(flac(LONG, True)[1])) as container:
        stream = StreamLength(container.streams.audio[0], "flac", budget)
        for at, feed in enumerate(feeds):
            for data in feed:
                stream.add(av.Packet(data), len(data))
            budget.spend(1e6 if at % 2 == 0 else -1e6)
    return stream.seconds()


def test_all_packets_are_decoded_while_time_is_left() -> None:
    long, short = flac(LONG, True)[0], flac(SHORT, True)[0]
    assert length(DecodeBudget(10**7), long + short) * 44_100 == pytest.approx(40 * (LONG + SHORT))


def test_a_skipped_packet_is_as_long_as_those_of_the_last_decoded_block() -> None:
    long, short = flac(LONG, True)[0], flac(SHORT, True)[0]
    estimate = length(DecodeBudget(10**7), long[:32], short[:32], short[:32], short[:31])
    assert estimate * 44_100 == pytest.approx(64 * LONG + 63 * SHORT)
    # A block is decoded or skipped as a whole.
    estimate = length(DecodeBudget(10**7), long[:31], [long[0], *short[:31]])
    assert estimate * 44_100 == pytest.approx(63 * LONG)


def test_a_packet_larger_than_all_before_it_is_decoded() -> None:
    long, short, silent = flac(LONG, True)[0], flac(SHORT, True)[0], flac(SHORT, False)[0]
    estimate = length(DecodeBudget(10**7), short[:32], [*silent[:10], max(long, key=len), *silent[:21]])
    assert estimate * 44_100 == pytest.approx(63 * SHORT + LONG)
    # It is not one of the packets of the block by which others are estimated.
    estimate = length(DecodeBudget(10**7), short[:32], [max(long, key=len), *silent[:31]], [], silent[:32])
    assert estimate * 44_100 == pytest.approx(95 * SHORT + LONG)


def test_skipped_packets_count_by_their_bytes_if_that_is_longer() -> None:
    loud, silent = sorted(flac(LONG, True)[0], key=len, reverse=True), flac(LONG, False)[0]
    decoded, skipped = [loud[0], *silent[:31]], loud[1:33]
    size, rest = (sum(map(len, part)) for part in (decoded, skipped))
    assert length(DecodeBudget(10**7), decoded, skipped) * 44_100 == pytest.approx(
        32 * LONG * (1 + rest / size)
    )
    # The packets of a broken file may overlap: they are not longer than the rest of the file.
    assert length(DecodeBudget(size + 10_000), decoded, skipped) * 44_100 == pytest.approx(
        32 * LONG * (1 + 10_000 / size)
    )
    assert length(DecodeBudget(size - 1), decoded, skipped) * 44_100 == pytest.approx(64 * LONG)


def test_a_broken_flac_frame_counts_by_its_bytes() -> None:
    loud = flac(LONG, True)[0]
    broken = loud[0][:3000]
    size = sum(map(len, loud[:20]))
    expected = 20 * LONG * (1 + len(broken) / size)
    assert length(DecodeBudget(10**7), [*loud[:20], broken]) * 44_100 == pytest.approx(expected)
    assert length(DecodeBudget(10**7), [broken]) == 0


def test_time_for_decoding_is_spread_over_the_file() -> None:
    budget = DecodeBudget(100)
    assert packets.DECODE_SECONDS == 1.0
    budget.spend(0.4)
    assert budget.left
    budget.spend(0.1)
    assert not budget.left  # half of the time is for the beginning
    budget.bytes_read += 25
    assert budget.left
    budget.spend(0.125)
    assert not budget.left
    budget.bytes_read += 75
    assert budget.left
    budget.bytes_read += 900
    budget.spend(0.375)
    assert not budget.left
    assert DecodeBudget(0).left


@pytest.mark.parametrize("name", ["ogg vorbis", "ogg vorbis of one packet per page"])
def test_a_packet_that_begins_after_its_end_has_no_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The position of a last page may be too small, and FFmpeg has the duration as an unsigned number.
    monkeypatch.setattr(packets, "DECODE_SECONDS", 0.0)
    assert measured_ms(corpus.make(name)) == pytest.approx(1000 * corpus.SECONDS, rel=0.03)


def test_declared_durations_count_only_if_not_all_packets_were_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames, file = flac(LONG, True)
    data = matroska(b"A_FLAC", 44_100, frames, file[:42], times=range(0, 8000, 200))
    assert measured_ms(data) == round(40 * LONG / 44.1)
    monkeypatch.setattr(packets, "DECODE_SECONDS", 0.0)
    assert measured_ms(data) == pytest.approx(8000, abs=200)


def test_a_file_cannot_make_the_decoder_skip_samples() -> None:
    frames, file = flac(LONG, True)
    data = matroska(b"A_FLAC", 44_100, frames, file[:42], discarded=90_000_000)
    assert measured_ms(data) == round(40 * LONG / 44.1)


def test_decoding_spends_the_time_of_the_budget() -> None:
    frames, file = flac(LONG, True)
    budget = DecodeBudget(10**7)
    with av.open(io.BytesIO(file)) as container:
        stream = StreamLength(container.streams.audio[0], "flac", budget)
        for data in frames:
            stream.add(av.Packet(data), len(data))
    assert 0 < budget._spent < 10


def test_broken_frames_of_a_known_size_count() -> None:
    data = matroska(b"A_MPEG/L3", 44_100, [corpus.FRAME] * 50 + [bytes(417)] * 50)
    assert measured_ms(data) == 2612
