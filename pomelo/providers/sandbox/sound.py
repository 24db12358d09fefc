"""Sounds of the sandbox in every output format: mp3, Ogg Opus, WAV, PCM, µ-law and A-law, mono.

`provider.py` walks `pieces` in a worker thread. All of it is a stream: nothing holds more of a sound than
one piece. The spoken text goes along, as a tag where the format has one, in the lowest bits where not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from typing import TYPE_CHECKING, cast

from pomelo.providers.sandbox import mp3, ogg, samples
from pomelo.providers.sandbox.melody import CHARACTER_SECONDS, blocks, notes

if TYPE_CHECKING:
    from av.audio.codeccontext import AudioCodecContext

DEFAULT = "mp3_44100_128"
PIECE = 64 * 1024
"""The most bytes of a piece."""

_RAW_PIECE = PIECE - 64
"""The most bytes of samples in a piece; the header of a WAV goes before the first ones."""

_FIRST, _NEXT = 0.25, 2.0
"""Seconds of sound in the first encoded piece, which comes early, and in the next ones."""

_PAGE_PACKETS = 50
"""A second of Opus: at 192 kbit/s a page has 100 of the 255 segments that it may have."""

_CONTENT_TYPES = {
    "mp3": "audio/mpeg",
    "wav": "audio/wav",
    "ulaw": "audio/basic",
    "alaw": "audio/x-alaw-basic",
    "opus": "audio/ogg",
}
_CODINGS = {"pcm": samples.pcm, "wav": samples.pcm, "ulaw": samples.ulaw, "alaw": samples.alaw}


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound to be made. `text` is what it says and bears along, `tone` what its voice comes from.

    `rate` is in samples a second, `kbits` the kbit/s of an encoded one, `character` the seconds for one.
    """

    codec: str
    rate: int
    kbits: int
    text: str
    tone: str
    seconds: float
    character: float = CHARACTER_SECONDS

    @classmethod
    def of(
        cls, output_format: str, text: str, tone: str, seconds: float, character: float = CHARACTER_SECONDS
    ) -> Sound:
        """A sound in a format named as the contract does, such as mp3_44100_128; empty is the default."""
        codec, rate, *kbits = (output_format or DEFAULT).split("_")
        return cls(codec, int(rate), int(kbits[0]) if kbits else 0, text, tone, seconds, character)

    @property
    def content_type(self) -> str:
        """The media type of the file."""
        return _CONTENT_TYPES.get(self.codec) or f"audio/pcm;rate={self.rate}"

    def pieces(self, *, half: bool = False) -> Iterator[bytes]:
        """The file, in pieces of at most PIECE bytes; with `half` it breaks off half way."""
        if self.codec == "mp3":
            return self._mp3(half)
        if self.codec == "opus":
            return self._opus(half)
        return self._raw(half)

    def _blocks(self, total: int, size: int) -> Iterator[bytes]:
        """The melody in blocks of `size` bytes, `total` samples in all."""
        code = _CODINGS.get(self.codec, samples.pcm)
        return blocks(notes(self.text, self.tone, self.rate, total, self.character, code), size)

    def _raw(self, half: bool) -> Iterator[bytes]:
        total = max(1, round(self.seconds * self.rate))
        width = 2 if self.codec in ("pcm", "wav") else 1
        left = total * width
        hiding = samples.Hiding(self._borne, self.rate, total, width)
        lead = _wav_header(self.rate, left) if self.codec == "wav" else b""
        count = 2 * -(-left // (2 * _RAW_PIECE))
        size = -(-left // (2 * count)) * 2
        for block in islice(self._blocks(total, size), count // 2 if half else count):
            # The last block is filled up beyond the end of the sound.
            piece = hiding.into(block[:left])
            left -= len(piece)
            yield lead + piece
            lead = b""

    def _mp3(self, half: bool) -> Iterator[bytes]:
        encoder = _encoder("libmp3lame", "s16p", self.rate, self.kbits, {"compression_level": "7"})
        per_frame = encoder.frame_size
        frames = max(1, round(self.seconds * self.rate / per_frame))
        wanted = max(1, frames // 2) if half else frames
        tune = islice(self._blocks(frames * per_frame, per_frame * 2), wanted)
        # What the encoder still gives beyond `wanted` is its delay: the file is as long as it says.
        packets = islice(_packets(encoder, tune), wanted)
        first = next(packets)
        size = mp3.frames_size(frames, per_frame, self.rate, self.kbits)
        yield mp3.tag(self._borne) + mp3.info(first, frames, size)
        for group in _groups(chain((first,), packets), per_frame / self.rate):
            yield b"".join(group)

    def _opus(self, half: bool) -> Iterator[bytes]:
        options = {"vbr": "off", "compression_level": "3"}
        encoder = _encoder("libopus", "s16", ogg.RATE, self.kbits, options)
        per_packet = encoder.frame_size
        total = max(1, round(self.seconds * ogg.RATE))
        writer = ogg.Writer()
        head = encoder.extradata or b""
        yield writer.head(head, self._borne)
        skip = int.from_bytes(head[10:12], "little")
        count = -(-(total + skip) // per_packet)
        # The decoder's delay of `skip` samples may take one packet more than the sound.
        wanted = max(1, count // 2) if half else count
        tune = islice(chain(self._blocks(total, per_packet * 2), (bytes(per_packet * 2),)), wanted)
        packets = islice(_packets(encoder, tune), wanted)
        done = 0
        for group in _groups(packets, per_packet / ogg.RATE):
            pages = []
            for start in range(0, len(group), _PAGE_PACKETS):
                page = group[start : start + _PAGE_PACKETS]
                done += len(page)
                last = done == count
                granule = total + skip if last else done * per_packet
                pages.append(writer.page(page, granule, kind=4 if last else 0))
            yield b"".join(pages)

    @property
    def _borne(self) -> str:
        """The text that goes along; none when it is too long to."""
        return self.text if len(self.text.encode()) <= samples.TEXT_MOST else ""


def _encoder(
    name: str, sample_format: str, rate: int, kbits: int, options: dict[str, str]
) -> AudioCodecContext:
    # The import costs a tenth of a second and 30 MB: a server that makes no sound does without.
    import av

    encoder = cast("AudioCodecContext", av.CodecContext.create(name, "w"))
    encoder.sample_rate = rate
    encoder.layout = "mono"
    encoder.format = sample_format
    encoder.bit_rate = kbits * 1000
    encoder.time_base = Fraction(1, rate)
    encoder.options = options
    encoder.open()
    return encoder


def _packets(encoder: AudioCodecContext, tune: Iterator[bytes]) -> Iterator[bytes]:
    """What the encoder makes of blocks of one frame each."""
    import av

    per_frame = encoder.frame_size
    for index, block in enumerate(tune):
        frame = av.AudioFrame(encoder.format, "mono", per_frame)
        frame.planes[0].update(block)
        frame.sample_rate = encoder.sample_rate
        frame.time_base = encoder.time_base
        frame.pts = index * per_frame
        for packet in encoder.encode(frame):
            yield bytes(packet)
    for packet in encoder.encode(None):
        yield bytes(packet)


def _groups(packets: Iterator[bytes], each: float) -> Iterator[list[bytes]]:
    """Packets of `each` seconds in groups: a small one that comes early, then larger ones."""
    count = max(1, int(_FIRST / each))
    while group := list(islice(packets, count)):
        yield group
        count = int(_NEXT / each)


def _wav_header(rate: int, size: int) -> bytes:
    """The 44 bytes before `size` bytes of 16-bit samples."""
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16, b"data", size),
    )
