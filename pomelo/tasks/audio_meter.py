"""Measures the length of the audio of an answer while it is delivered.

The provider's bytes decide, not the requested format. MP3 frames and Ogg Opus pages are counted; the samples
of WAV files and of audio without a header have a constant rate. Other formats aren't measured.
"""

from __future__ import annotations

from io import BytesIO
from math import ceil

from pomelo.audio_formats import AudioFormat
from pomelo.media import audio as samples
from pomelo.media.containers import from_synchsafe

_HEAD_SIZE = 4096
"""Bytes within which the samples of a WAV file begin."""

_OGG_CODEC = slice(28, 36)
"""The position of the codec's name in the first page of an Ogg stream."""

_OPUS_UNITS_PER_MS = 48
"""Of a granule position."""

_PAGE_HEADER_SIZE = 27
_NO_GRANULE = 2**64 - 1
"""The granule position of a page on which no packet ends."""

_ID3V2_HEADER_SIZE = 10
_ID3V1_SIZE = 128


def _mp3_frames() -> dict[bytes, tuple[int, float]]:
    """The size in bytes and the milliseconds of an MP3 frame, by the first three bytes of its header."""
    kbits = {
        1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
        2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    }
    frames = {}
    # The second byte without its last bit (no checksum): MPEG 1, 2 and 2.5, layer III.
    for second, version, divisor in ((0xFA, 1, 1), (0xF2, 2, 2), (0xE2, 2, 4)):
        for rate_index, full_rate in enumerate((44100, 48000, 32000)):
            rate, count = full_rate // divisor, 1152 // version
            for index, kbit in enumerate(kbits[version], 1):
                for low in range(8):  # checksum, padding, private bit
                    third = index << 4 | rate_index << 2 | (low & 3)
                    size = count * kbit * 125 // rate + (third >> 1 & 1)
                    frames[bytes((0xFF, second | low >> 2, third))] = (size, count * 1000 / rate)
    return frames


_MP3_FRAMES = _mp3_frames()


class AudioMeter:
    """Measures one answer.

    `content_type` is that of its first chunk; `audio_format` is the requested format, which determines the
    sample rate of bare samples whose content type has none.
    """

    __slots__ = ("_bytes_per_second", "_counter", "_head", "_size")

    def __init__(self, content_type: str, audio_format: AudioFormat) -> None:
        self._bytes_per_second = _sample_bytes_per_second(content_type, audio_format)
        self._head = b""
        self._size = 0
        self._counter: _FrameCounter | None = None

    def add(self, data: bytes) -> None:
        before = self._size
        self._size += len(data)
        if before < _HEAD_SIZE:
            self._head += data[: _HEAD_SIZE - before]
        if self._counter is None:
            # Frames are counted from the beginning: the bytes before the codec was known are in the head.
            if before >= _OGG_CODEC.stop or self._size < _OGG_CODEC.stop:
                return
            self._counter = _new_counter(self._head)
            data = self._head[:before] + data
        if self._counter is not None:
            self._counter.add(data)

    @property
    def ms(self) -> int | None:
        """Milliseconds of the audio so far, rounded up; None if it can't be measured."""
        counter = self._counter
        # Bare samples may begin like a frame by chance, but not like two consecutive frames.
        if counter is not None and (
            self._bytes_per_second is None or (counter.count > 1 and not counter.out_of_sync)
        ):
            if counter.out_of_sync and not counter.count:
                return None  # audio in another format after a tag
            return ceil(counter.estimate(self._size))
        if self._head.startswith(b"RIFF"):
            wav = samples.wav_data(BytesIO(self._head), self._size)
            if wav is None:
                return 0 if self._size < _HEAD_SIZE else None
            return -(-(self._size - wav.start) * 1000 // wav.per_second) if wav.per_second else None
        if self._bytes_per_second is not None:
            return -(-self._size * 1000 // self._bytes_per_second)
        return 0 if self._size < _OGG_CODEC.stop else None


def _sample_bytes_per_second(content_type: str, audio_format: AudioFormat) -> int | None:
    """The bytes per second of bare samples; None for other formats."""
    if audio_format.is_bare and ";rate=" not in content_type:
        return audio_format.bytes_per_second
    sample_format = samples.sample_format(content_type)
    return None if sample_format is None else sample_format[0] * sample_format[1]


def _new_counter(head: bytes) -> _FrameCounter | None:
    if head.startswith(b"ID3") or head[:3] in _MP3_FRAMES:
        return _Mp3FrameCounter()
    if head.startswith(b"OggS") and head[_OGG_CODEC] == b"OpusHead":
        return _OpusPageCounter()
    return None


class _FrameCounter:
    """Adds up the milliseconds of complete frames: MP3 frames or Ogg pages."""

    __slots__ = ("_frame_ms", "_missing", "_rest", "count", "covered", "ms", "out_of_sync")

    def __init__(self) -> None:
        self.ms = 0.0
        self.count = 0
        """Frames with audio."""
        self.covered = 0
        """Bytes of all complete frames."""
        self.out_of_sync = False
        """Whether other bytes followed a frame; the rest is not counted then."""
        self._rest = b""
        self._missing = 0
        """Bytes that are missing from the current frame."""
        self._frame_ms = 0.0
        """The length of the current frame."""

    def add(self, data: bytes) -> None:
        if self.out_of_sync:
            return
        if self._rest:
            data, self._rest = self._rest + data, b""
        at = 0
        while True:
            step = min(self._missing, len(data) - at)
            at += step
            self.covered += step
            self._missing -= step
            if self._missing:
                return
            if self._frame_ms:
                self.ms += self._frame_ms
                self.count += 1
                self._frame_ms = 0.0
            if at == len(data):
                return
            length = self._next_frame(data, at)
            if length <= 0:
                self.out_of_sync = length < 0
                self._rest = data[at:]
                return
            self._missing = length

    def estimate(self, size: int) -> float:
        """The milliseconds of `size` bytes, extrapolated from the counted ones."""
        return self.ms * size / self.covered if self.out_of_sync and self.covered else self.ms

    def _next_frame(self, data: bytes, at: int) -> int:
        """The size of the frame at `at`, whose length it stores in `_frame_ms`; 0 if its header is
        incomplete, -1 if no frame begins there."""
        raise NotImplementedError


class _Mp3FrameCounter(_FrameCounter):
    __slots__ = ()

    def _next_frame(self, data: bytes, at: int) -> int:
        begin = at
        size, ms = 0, 0.0
        # Complete frames are counted in one loop: there are 40 of them per second.
        while (frame := _MP3_FRAMES.get(data[at : at + 3])) is not None:
            size, ms = frame
            if at + size >= len(data):
                break
            self.ms += ms
            self.count += 1
            at += size
        if frame is not None:
            self._frame_ms = ms
            return at + size - begin
        if at > begin:
            return at - begin
        head = data[at : at + _ID3V2_HEADER_SIZE]
        if head.startswith(b"ID3") and len(head) == _ID3V2_HEADER_SIZE:
            return from_synchsafe(head[6:]) + _ID3V2_HEADER_SIZE * (2 if head[5] & 0x10 else 1)
        if head.startswith(b"TAG"):
            return _ID3V1_SIZE
        begins = len(head) < 3 or (head.startswith(b"ID3") and len(head) < _ID3V2_HEADER_SIZE)
        return 0 if begins else -1


class _OpusPageCounter(_FrameCounter):
    __slots__ = ("_granule",)

    def __init__(self) -> None:
        super().__init__()
        self._granule = 0

    def _next_frame(self, data: bytes, at: int) -> int:
        if data[at : at + 4] != b"OggS"[: len(data) - at]:
            return -1
        if len(data) - at < _PAGE_HEADER_SIZE:
            return 0
        body = at + _PAGE_HEADER_SIZE + data[at + 26]
        if len(data) < body:
            return 0
        if data[at + 5] & 2:  # the first page of a stream: streams may be chained
            self._granule = 0
        granule = int.from_bytes(data[at + 6 : at + 14], "little")
        if granule != _NO_GRANULE and granule > self._granule:
            self._frame_ms = (granule - self._granule) / _OPUS_UNITS_PER_MS
            self._granule = granule
        return body - at + sum(data[at + _PAGE_HEADER_SIZE : body])
