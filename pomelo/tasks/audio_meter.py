"""Measures how long the audio of an answer is, while it passes.

The provider's bytes decide, not the format that was asked for. MP3 frames and pages of Ogg Opus are counted;
the samples of WAV files and of audio without a header have a constant rate. Other formats aren't measured.
"""

from __future__ import annotations

from io import BytesIO
from math import ceil

from pomelo.media import audio as samples

_HEAD = 4096
"""Bytes within which the samples of a WAV file begin."""

_OPUS_HEAD = slice(28, 36)
"""Where the first page of an Ogg stream names its codec."""

_OPUS_TICKS = 48
"""Units of a granule position of Opus in a millisecond."""

_PAGE_HEADER = 27
_NO_GRANULE = 2**64 - 1
"""The granule position of a page on which no packet ends."""

_TAG_HEADER = 10
_OLD_TAG = 128
"""Bytes of the header of an ID3v2 tag, and of an ID3v1 tag."""


def _frames() -> dict[bytes, tuple[int, float]]:
    """The size in bytes and the milliseconds of an MP3 frame, by the first three bytes of its header."""
    kbits = {
        1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
        2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    }
    found = {}
    # The second byte without its last bit (no checksum): MPEG 1, 2 and 2.5, layer III.
    for second, version, divisor in ((0xFA, 1, 1), (0xF2, 2, 2), (0xE2, 2, 4)):
        for rate_index, full_rate in enumerate((44100, 48000, 32000)):
            rate, count = full_rate // divisor, 1152 // version
            for index, kbit in enumerate(kbits[version], 1):
                for low in range(8):  # checksum, padding, private bit
                    third = index << 4 | rate_index << 2 | (low & 3)
                    size = count * kbit * 125 // rate + (third >> 1 & 1)
                    found[bytes((0xFF, second | low >> 2, third))] = (size, count * 1000 / rate)
    return found


_FRAMES = _frames()


class AudioMeter:
    """Measures one answer.

    `content_type` is that of its first piece; `output_format` is what the provider was asked for. It tells
    the sample rate of bare samples whose content type has none.
    """

    __slots__ = ("_bare", "_head", "_parts", "_size")

    def __init__(self, content_type: str, output_format: str) -> None:
        self._bare = _bare_rate(content_type, output_format)
        self._head = b""
        self._size = 0
        self._parts: _Parts | None = None

    def add(self, data: bytes) -> None:
        """Takes the next bytes."""
        before = self._size
        self._size += len(data)
        if before < _HEAD:
            self._head += data[: _HEAD - before]
        if self._parts is None:
            # The parts are found from the beginning: what came before the codec was known is in the head.
            if before >= _OPUS_HEAD.stop or self._size < _OPUS_HEAD.stop:
                return
            self._parts = _parts(self._head)
            data = self._head[:before] + data
        if self._parts is not None:
            self._parts.add(data)

    @property
    def ms(self) -> int | None:
        """Milliseconds of the audio so far, rounded up; None if it can't be measured."""
        parts = self._parts
        # Samples without a header may begin like a frame by chance, but not like two in a row.
        if parts is not None and (self._bare is None or (parts.count > 1 and not parts.lost)):
            return ceil(parts.estimate(self._size))
        if self._head.startswith(b"RIFF"):
            wav = samples.wav_data(BytesIO(self._head), self._size)
            if wav is None:
                return 0 if self._size < _HEAD else None
            return -(-(self._size - wav.start) * 1000 // wav.per_second) if wav.per_second else None
        if self._bare is not None:
            return -(-self._size * 1000 // self._bare)
        return 0 if self._size < _OPUS_HEAD.stop else None


def _bare_rate(content_type: str, output_format: str) -> int | None:
    """Bytes per second of an answer of bare samples; None for other formats."""
    codec, rate, *_ = output_format.split("_")
    if codec in ("pcm", "ulaw", "alaw") and ";rate=" not in content_type:
        return int(rate) * (2 if codec == "pcm" else 1)
    bare = samples.sample_format(content_type)
    return None if bare is None else bare[0] * bare[1]


def _parts(head: bytes) -> _Parts | None:
    if head.startswith(b"ID3") or head[:3] in _FRAMES:
        return _Mp3Frames()
    if head.startswith(b"OggS") and head[_OPUS_HEAD] == b"OpusHead":
        return _OpusPages()
    return None


class _Parts:
    """Adds up the milliseconds of the frames or pages that are complete."""

    __slots__ = ("_due", "_missing", "_rest", "count", "covered", "lost", "ms")

    def __init__(self) -> None:
        self.ms = 0.0
        self.count = 0
        """Parts with audio."""
        self.covered = 0
        """Bytes of all complete parts."""
        self.lost = False
        """Whether something else followed a part; the rest is not counted then."""
        self._rest = b""
        self._missing = 0
        """Bytes that the current part still lacks."""
        self._due = 0.0
        """Its milliseconds."""

    def add(self, data: bytes) -> None:
        """Takes the next bytes."""
        if self.lost:
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
            if self._due:
                self.ms += self._due
                self.count += 1
                self._due = 0.0
            if at == len(data):
                return
            length = self._read(data, at)
            if length <= 0:
                self.lost = length < 0
                self._rest = data[at:]
                return
            self._missing = length

    def estimate(self, size: int) -> float:
        """The milliseconds of `size` bytes: what was not counted is as dense as what was."""
        return self.ms * size / self.covered if self.lost and self.covered else self.ms

    def _read(self, data: bytes, at: int) -> int:
        """The length of the part at `at`, whose milliseconds it puts into `_due`; 0 if its header is
        incomplete, -1 if no part begins there."""
        raise NotImplementedError


class _Mp3Frames(_Parts):
    __slots__ = ()

    def _read(self, data: bytes, at: int) -> int:
        begin = at
        size, ms = 0, 0.0
        # Complete frames are counted in one go: there are 40 of them in a second.
        while (frame := _FRAMES.get(data[at : at + 3])) is not None:
            size, ms = frame
            if at + size >= len(data):
                break
            self.ms += ms
            self.count += 1
            at += size
        if frame is not None:
            self._due = ms
            return at + size - begin
        if at > begin:
            return at - begin
        head = data[at : at + _TAG_HEADER]
        if head.startswith(b"ID3") and len(head) == _TAG_HEADER:
            size = 0
            for byte in head[6:]:
                size = size << 7 | (byte & 0x7F)
            return size + _TAG_HEADER * (2 if head[5] & 0x10 else 1)
        if head.startswith(b"TAG"):
            return _OLD_TAG
        begins = len(head) < 3 or (head.startswith(b"ID3") and len(head) < _TAG_HEADER)
        return 0 if begins else -1


class _OpusPages(_Parts):
    __slots__ = ("_granule",)

    def __init__(self) -> None:
        super().__init__()
        self._granule = 0

    def _read(self, data: bytes, at: int) -> int:
        if data[at : at + 4] != b"OggS"[: len(data) - at]:
            return -1
        if len(data) - at < _PAGE_HEADER:
            return 0
        body = at + _PAGE_HEADER + data[at + 26]
        if len(data) < body:
            return 0
        if data[at + 5] & 2:  # the first page of a stream: streams may follow each other
            self._granule = 0
        granule = int.from_bytes(data[at + 6 : at + 14], "little")
        if granule != _NO_GRANULE and granule > self._granule:
            self._due = (granule - self._granule) / _OPUS_TICKS
            self._granule = granule
        return body - at + sum(data[at + _PAGE_HEADER : body])
