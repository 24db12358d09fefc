"""Speech of the sandbox: a tone for each word, silence for each space, in every output format, mono.

It is generated chunk by chunk, so memory does not grow with the length. The file contains the spoken text,
unless that is too long: as a tag in MP3 and Opus, else in the lowest bits of the samples.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice, repeat
from typing import Any

from pomelo.audio_formats import AudioFormat
from pomelo.media.audio import wav_header
from pomelo.providers.sandbox import mp3, ogg, samples
from pomelo.providers.sandbox.pyav import load_av

CHARACTER_SECONDS = 0.06
"""How long a character takes at speed 1."""

_CHUNKS = 2
"""Chunks a second."""

_ENCODERS = {"ulaw": samples.ulaw, "alaw": samples.alaw}
"""Codec -> what encodes 16-bit samples; the others, or their encoders, take them as they are."""


@dataclass(frozen=True, slots=True)
class Speech:
    """Speech to generate: `text` in `seconds`. `voice` is all else that the tones depend on."""

    format: AudioFormat
    text: str
    voice: str
    seconds: float

    def chunks(self, *, half: bool = False) -> Iterator[bytes]:
        """The file, in chunks of half a second; with `half`, only its first half.

        Raises:
            PomeloError: provider_not_configured, the format needs PyAV, which is not installed.
        """
        stored = self.text if len(self.text.encode()) <= samples.MAX_TEXT_BYTES else ""
        make = {"mp3": self._mp3, "opus": self._opus}.get(self.format.codec, self._raw)
        return make(stored, 2 if half else 1)

    def _blocks(self, count: int, size: int) -> Iterator[bytes]:
        """`count` samples in blocks of `size` bytes; the last block is padded with zeros."""
        buffer = bytearray()
        for tone in self._tones(count):
            buffer += tone
            while len(buffer) >= size:
                yield bytes(buffer[:size])
                del buffer[:size]
        if buffer:
            yield bytes(buffer.ljust(size, b"\0"))

    def _tones(self, count: int) -> Iterator[bytes]:
        """A tone for each word, of whole periods so that it has no clicks; silence between words."""
        encode = _ENCODERS.get(self.format.codec, samples.pcm)
        silence = encode([0])
        text = self.text or " "
        done = 0
        for token in re.finditer(r"\S+|\s+", text):
            length = count * token.end() // len(text) - done
            done += length
            if not token[0].isspace():
                period = self.format.rate // (100 + zlib.crc32(f"{self.voice}\n{token[0]}".encode()) % 400)
                sines = (math.sin(2 * math.pi * index / period) for index in range(period))
                yield from repeat(encode(int(9000 * sine) for sine in sines), length // period)
                length %= period
            yield silence * length

    def _raw(self, text: str, divisor: int) -> Iterator[bytes]:
        rate = self.format.rate
        count = max(1, round(self.seconds * rate))
        width = self.format.bytes_per_second // rate
        embedder = samples.TextEmbedder(text, rate, count, width)
        header = b"" if self.format.is_bare else wav_header(f"audio/pcm;rate={rate}", count * width)
        end = count // divisor * width
        size = rate // _CHUNKS * width
        for start, block in zip(range(0, end, size), self._blocks(count, size), strict=False):
            yield header + embedder.embed(block[: end - start])
            header = b""

    def _mp3(self, text: str, divisor: int) -> Iterator[bytes]:
        encoder = self._encoder("libmp3lame", "s16p", {"compression_level": "7"})
        frame = encoder.frame_size
        count = max(1, round(self.seconds * self.format.rate / frame))
        # The encoder's delay makes more packets than `count`, the length that the file states.
        blocks = self._blocks(count * frame, frame * 2)
        packets = islice(_packets(encoder, blocks), max(1, count // divisor))
        first = next(packets)
        size = mp3.frames_size(count, frame, self.format.rate, self.format.kbits)
        yield mp3.tag(text) + mp3.info(first, count, size)
        frames = chain((first,), packets)
        yield from iter(lambda: b"".join(islice(frames, self.format.rate // frame // _CHUNKS)), b"")

    def _opus(self, text: str, divisor: int) -> Iterator[bytes]:
        encoder = self._encoder("libopus", "s16", {"vbr": "off", "compression_level": "3"})
        frame = encoder.frame_size
        head = encoder.extradata or b""
        count = max(1, round(self.seconds * self.format.rate))
        # The decoder skips the encoder's delay, so the end may need one frame more.
        end = count + int.from_bytes(head[10:12], "little")
        frames = chain(self._blocks(count, frame * 2), (bytes(frame * 2),))
        packets = islice(_packets(encoder, frames), max(1, -(-end // frame) // divisor))
        writer = ogg.Writer()
        yield writer.head(head, text)
        done = 0
        while page := list(islice(packets, self.format.rate // frame // _CHUNKS)):
            done += len(page) * frame
            yield writer.page(page, min(done, end), last=done >= end)

    def _encoder(self, name: str, sample_format: str, options: dict[str, str]) -> Any:
        encoder = load_av(self.format.codec, "wav_44100").CodecContext.create(name, "w")
        encoder.sample_rate, encoder.layout, encoder.format = self.format.rate, "mono", sample_format
        encoder.bit_rate, encoder.time_base = self.format.kbits * 1000, Fraction(1, self.format.rate)
        encoder.options = options
        encoder.open()
        return encoder


def _packets(encoder: Any, frames: Iterable[bytes]) -> Iterator[bytes]:
    """Encodes frames of `encoder.frame_size` 16-bit samples each."""
    import av

    for index, block in enumerate(frames):
        frame = av.AudioFrame(encoder.format, "mono", encoder.frame_size)
        frame.planes[0].update(block)
        frame.sample_rate, frame.time_base = encoder.sample_rate, encoder.time_base
        frame.pts = index * encoder.frame_size
        yield from map(bytes, encoder.encode(frame))
    yield from map(bytes, encoder.encode(None))
