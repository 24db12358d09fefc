"""Computes the length of an audio stream from its packets, not from what the container declares.

Packets whose length only a decoder knows are decoded, within a budget of CPU time.
"""

from __future__ import annotations

import re
import time
from typing import Any

DECODE_SECONDS = 1.0
"""CPU time for decoding one file whose container only declares the duration of its packets. It is enough for
about half an hour of audio; of a longer file, blocks spread over the whole file are decoded."""

_BLOCK_PACKETS = 32
"""Packets of a block, which is decoded or skipped as a whole."""

_DECLARING = ("ogg", "mov", "matroska", "avi", "asf", "flv", "caf", "nut")
"""Containers that declare the duration of their packets."""

_FRAMED = (
    *("mp1", "mp2", "mp3", "ac3", "eac3", "dts", "mlp", "truehd"),
    *("amr_nb", "amr_wb", "gsm", "wavpack", "tta"),
)
"""Codecs whose frames have a known length, or state it. FFmpeg computes that of others from the block size or
the bit rate in the file's header."""

_PCM_BITS = re.compile(r"\d+")

MAX_FRAME = 8192
"""Bytes of the largest frame of most codecs."""

_MAX_RATE = 384_000
_MAX_DENSITY = 3_072_000
"""Samples and bytes of audio that a second may have: those of 32-bit stereo at 384,000 Hz. More than that is
a header that makes its audio short."""

_SKIP_MANUAL = 1 << 29
"""FFmpeg's AV_CODEC_FLAG2_SKIP_MANUAL: a file can't make the decoder skip samples."""

_NEGATIVE = 2**31
"""FFmpeg's unsigned durations from here on are negative: those of an Ogg packet that begins after its end."""

_OPUS_RATE = 48_000
_OPUS_FRAME = (
    *(480, 960, 1920, 2880) * 3,
    *(480, 960) * 2,
    *(120, 240, 480, 960) * 4,
)
"""Samples per frame, by the configuration number of the packet (RFC 6716, table 2)."""


class DecodeBudget:
    """CPU time for decoding a file of `size` bytes, spread over the whole file."""

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        self.bytes_read = 0
        """Bytes of the file that were read."""
        self._spent = 0.0

    def spend(self, seconds: float) -> None:
        """Records CPU time spent on decoding."""
        self._spent += seconds

    @property
    def left(self) -> bool:
        """Whether time is left for this position of the file."""
        return self._spent < DECODE_SECONDS * (0.5 + 0.5 * min(self.bytes_read / self.size, 1.0))


class StreamLength:
    """Adds up the length of one audio stream of a file in the container `name`."""

    def __init__(self, stream: Any, name: str, budget: DecodeBudget) -> None:
        codec = stream.codec_context
        codec.flags2 |= _SKIP_MANUAL
        self._ogg = name == "ogg"
        self._codec = codec
        self._name: str = codec.name
        self._rate: int = codec.sample_rate or 0
        self._base = float(stream.time_base or 0)
        self._declares = name in _DECLARING
        # The decoded samples may be larger: A-law has 8 bits, which become 16.
        bits = _PCM_BITS.search(self._name)
        self._bytes_per_sample: float = codec.channels * (int(bits[0]) if bits else 8) / 8
        self._frame: int = codec.frame_size or 0
        self._opus = self._name.endswith("opus")
        self._pcm = self._name.startswith("pcm_")
        # Only a decoder knows the frames of a packet, the sample rate of ADTS frames, the FLAC frames that
        # play despite a wrong checksum, and the samples of an incomplete ADPCM block.
        framed = codec.codec.canonical_name in _FRAMED and not self._declares
        self._decodes = not (framed or self._opus or self._pcm)
        self._packets = self._bytes = self._ticks = self._samples = 0
        self._first: int | None = None
        self._end = 0
        self._decoder = _Decoder(codec, budget)

    def add(self, packet: Any, size: int) -> None:
        """Adds a packet of `size` bytes. There may be a hundred thousand in a file."""
        self._packets += 1
        self._bytes += size
        duration = packet.duration or 0
        if duration >= _NEGATIVE:
            duration = 0
        self._ticks += duration
        stamp = packet.pts
        if stamp is None:
            stamp = packet.dts
        if stamp is not None:
            if self._first is None or stamp < self._first:
                self._first = stamp
            if (end := stamp + duration) > self._end:
                self._end = end
        if self._opus:
            self._samples += _opus_samples(bytes(packet)[:2])
        elif self._decodes:
            self._decoder.add(packet)

    def seconds(self) -> float:
        """The length of the stream.

        Raises:
            ValueError: the header claims more samples or bytes a second than audio has, or no sample rate.
        """
        if not self._rate:
            if self._bytes:
                # The durations that the container declares have no meaning without it.
                raise ValueError("no sample rate")
            return 0.0
        seconds = self._count()
        if self._rate > _MAX_RATE or self._bytes > seconds * _MAX_DENSITY > 0:
            raise ValueError("implausible sample rate or number of channels")
        return seconds

    def _count(self) -> float:
        declared: float = self._base * max(
            self._ticks, self._end - (self._first or 0) if self._declares else 0
        )
        if self._opus:
            # In Ogg, packets determine the time; in other containers packets may be omitted for silence.
            return max(self._samples / _OPUS_RATE, 0.0 if self._ogg else declared)
        if self._decodes:
            counted, whole = self._decoder.seconds()
            if self._frame:
                counted = max(counted, self._packets * self._frame / self._rate)
            elif whole and self._declares:
                return counted
            return max(counted, declared)
        if self._declares and self._pcm and self._bytes_per_sample:
            return max(self._bytes / (self._bytes_per_sample * self._rate), declared)
        return declared


class _Decoder:
    """Decodes the packets of one stream, as far as the budget allows."""

    def __init__(self, codec: Any, budget: DecodeBudget) -> None:
        self._codec = codec
        self._budget = budget
        self._seconds = 0.0
        self._bytes = self._largest_packet = 0
        self._skipped = 0.0
        """Seconds of the skipped packets, if they are like the packets before them."""
        self._skipped_bytes = 0
        self._left_in_block = _BLOCK_PACKETS
        self._decoding = True
        self._block_seconds = 0.0
        self._seconds_per_packet = 0.0
        """In the last decoded block."""

    def add(self, packet: Any) -> None:
        if not self._left_in_block:
            if self._decoding:
                self._seconds_per_packet = self._block_seconds / _BLOCK_PACKETS
                self._block_seconds = 0.0
            self._left_in_block = _BLOCK_PACKETS
            self._decoding = self._budget.left
        self._left_in_block -= 1
        # A packet that is larger than all previous ones may have more frames.
        if self._decoding or packet.size > self._largest_packet:
            seconds = self._decode(packet)
            if self._decoding:
                self._block_seconds += seconds
        else:
            self._skipped += self._seconds_per_packet
            self._skipped_bytes += packet.size

    def _decode(self, packet: Any) -> float:
        import av

        began = time.process_time()
        self._largest_packet = max(self._largest_packet, packet.size)
        self._bytes += packet.size
        seconds = 0.0
        try:
            for frame in self._codec.decode(packet):
                seconds += frame.samples / frame.sample_rate
        except (av.FFmpegError, ValueError, OSError, ZeroDivisionError):
            # A broken packet has no audio, unless it is larger than a frame: a decoder plays the part before
            # the error, which PyAV drops.
            if self._codec.name == "flac" or packet.size > MAX_FRAME:
                self._skipped_bytes += packet.size
                self._bytes -= packet.size
        self._seconds += seconds
        self._budget.spend(time.process_time() - began)
        return seconds

    def seconds(self) -> tuple[float, bool]:
        """The length, and whether all packets were decoded. Skipped and broken packets are assumed to be as
        long as the others, by packets or by bytes, whichever is longer."""
        if not self._skipped_bytes:
            return self._seconds, self._seconds > 0
        # Packets of a broken file may overlap.
        rest = min(self._skipped_bytes, max(self._budget.size - self._bytes, 0))
        by_bytes = self._seconds * rest / max(self._bytes, 1)
        return self._seconds + max(self._skipped, by_bytes), False


def _opus_samples(head: bytes) -> int:
    """The samples at 48,000 Hz of an Opus packet, from its first bytes (RFC 6716, section 3.1)."""
    if not head:
        return 0
    frames = (1, 2, 2, head[1] & 0x3F if len(head) > 1 else 0)[head[0] & 3]
    return min(frames * _OPUS_FRAME[head[0] >> 3], 5760)
