"""Measures audio in a process of its own: `python -m pomelo.media.demux`.

Only this process passes callers' bytes to a native demuxer, with limits of memory and time. The length is
counted from the frames, packets and samples in the file, not taken from a header. It reads one request after
another from stdin, and answers each with a line of JSON on stdout:

    {"path": "/media/x", "raw": false}        a file
    {"size": 4096, "raw": true}               followed by that many bytes; raw: labelled as bare samples

    {"ms": 62040, "format": "mp3"}            the length; 0 and an empty format where it can't be measured;
                                              with raw, an empty format also where it isn't certain
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any, BinaryIO

from pomelo.media.containers import Window, links, structure, tags

FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,asf,au,avi,caf,dts,eac3,flac,flv,gsm,loas,matroska,mov,mp3,mp4,m4a,3gp,3g2,"
    "mj2,mpeg,mpegts,mxf,nut,ogg,rf64,tta,voc,w64,wav,webm,wv"
)
"""The demuxers that may see a caller's bytes: none of them opens another file or address."""

MEMORY = 1024 * 1024 * 1024
"""Bytes of address space that this process may have."""

DECODE_SECONDS = 1.0
"""CPU time that may be spent on decoding one file, where a container only claims how long its packets are. It
is enough for about half an hour of audio; of a longer file, parts are decoded, spread over all of it."""

_BLOCK = 32
"""Packets that are decoded, or left out, together."""

_FAILURES = 16
"""Errors in a row after which no more packets are read."""

_ALL = 2**62
"""Microseconds: longer than any file."""

_CLAIMING = ("ogg", "mov", "matroska", "avi", "asf", "flv", "caf", "nut")
"""Containers whose packets have the durations that the container claims."""

_DECODED = ("aac", "aac_latm", "flac", "adpcm_ms", "adpcm_ima_wav")
"""Codecs that are decoded in every container."""

_BARE = ("mp3", "aac", "ac3", "eac3", "dts", "amr", "amrnb", "amrwb", "gsm", "loas")
"""Formats that are frames and nothing else. Any garbage has bytes that look like one."""

_COVERED = 0.33
"""The share of a bare format's bytes that must be frames."""

_HEADERS = 16 * 1024
"""Bytes of headers, padding and indexes that a file may have, besides those of its packets."""

_FEW_HEADERS = 2 * 1024
"""The same, of a file whose structure is known."""

_PACKET_HEADER = {"mov": 0, "mpegts": 0, "ogg": 0}
_ANY_PACKET_HEADER = 20
"""Bytes that a container adds to a packet, by its format."""

_FEW = 2048
"""Bytes of audio from which that of a whole file can't be computed."""

_PADDED = {"asf": 0.1}
"""The share of a format's bytes that is padding."""

_LARGEST = {"dts": 65_536}
_ANY_LARGEST = 8192
"""Bytes of the largest frames; a larger packet of a bare format is garbage that was found before a frame."""

_RAW_COVERED = 0.95
"""The share from which bytes that are labelled as bare samples are certainly of a bare format."""

_SYNCHRONIZED = ("mp3", "aac", "ac3", "eac3", "dts", "loas")
"""Bare formats whose frames begin with a mark. Any bytes can be cut into frames of the others."""

_MAGIC = (b"ID3", b"#!AMR")
"""How files of bare formats may begin."""

_SKIP_MANUAL = 1 << 29
"""FFmpeg's AV_CODEC_FLAG2_SKIP_MANUAL: a file can't claim that decoded samples are to be left out."""

_OPUS_RATE = 48_000
_OPUS_FRAME = (
    *(480, 960, 1920, 2880) * 3,
    *(480, 960) * 2,
    *(120, 240, 480, 960) * 4,
)
"""Samples of a frame by the configuration number of its packet (RFC 6716, table 2)."""


def measure(file: BinaryIO, size: int, raw: bool) -> tuple[int, str]:
    """The length in milliseconds and the demuxer's name of the format; (0, "") where it can't be measured."""
    import av

    try:
        front, back = tags(file, size)
        ms, name, covered = 0, "", 0
        for start, length in links(file, front, size):
            whole = length == size  # then a window would only make each of a hostile file's reads slower
            part = file if whole else Window(file, start, length)
            part.seek(0)
            more, name, covered = _measure(part, length, back)
            ms += more
            if not more:
                ms = 0
                break
        if raw and name and not _is_certain(file, size - front - back, name, covered):
            name = ""
    except (av.FFmpegError, ValueError, OSError, OverflowError, LookupError, MemoryError):
        return 0, ""
    return ms, name if ms or raw else ""


class _LateStreamError(Exception):
    """A stream begins behind what was read to find the streams."""


def _measure(file: Any, size: int, back: int, thorough: bool = False) -> tuple[int, str, int]:
    """The length, the format, and the bytes of all packets of a file, or of a link of a chained one. Its last
    `back` bytes are tags. If it is `thorough`, all of the file is read to find its streams."""
    import av

    # An edit list may claim that most of a file is not to be played.
    options = {"format_whitelist": FORMATS, "ignore_editlist": "1"}
    if thorough:
        options |= {"probesize": str(max(size, 32)), "analyzeduration": str(_ALL)}
    with av.open(file, options=options, metadata_errors="replace") as container:
        name = container.format.name.partition(",")[0]
        try:
            lengths, packets, covered = _lengths(container, name, size, thorough)
        except _LateStreamError:
            lengths = None
    if lengths is None:
        file.seek(0)
        return _measure(file, size, back, thorough=True)
    if name in _BARE and covered < (size - back) * _COVERED:
        return 0, name, covered
    seconds = max(lengths, default=0.0)
    if covered and name not in _BARE:
        # Bytes in no packet may be audio that the headers hide, for a vendor that reads them in another way.
        known = structure(file, size, name)
        hidden = size * (1 - _PADDED.get(name, 0.0)) - covered - back
        hidden -= known + (_FEW_HEADERS if known else _HEADERS)
        hidden -= packets * _PACKET_HEADER.get(name, _ANY_PACKET_HEADER)
        if covered < _FEW and hidden > covered:
            return 0, name, covered  # so few bytes say nothing about the density of the rest
        seconds *= 1 + max(hidden, 0.0) / covered
    return max(round(seconds * 1000), 0), name, covered


def _is_certain(file: BinaryIO, size: int, name: str, covered: int) -> bool:
    """Whether bytes that are labelled as bare samples are certainly of a format: by a magic number, or by
    frames from beginning to end. Samples look like single frames by chance."""
    file.seek(0)
    if name not in _BARE or file.read(5).startswith(_MAGIC):
        return True
    return name in _SYNCHRONIZED and covered >= size * _RAW_COVERED


def _lengths(container: Any, name: str, size: int, thorough: bool) -> tuple[list[float], int, int]:
    """The seconds of each audio stream, and the number and the bytes of all packets, also those of video and
    pictures."""
    # A stream of a codec that FFmpeg has not has no context, and no length that could be relied on.
    known = [stream for stream in container.streams.audio if stream.codec_context is not None]
    if not known:
        return [], 0, 0
    budget = _Budget(size)
    streams = {stream.index: _Stream(stream, name, budget) for stream in known}
    largest = _LARGEST.get(name, _ANY_LARGEST) if name in _BARE else size
    packets = covered = 0
    for packet in _packets(container, thorough):
        packets += 1
        if packet.size <= largest:
            covered += packet.size
        budget.read(packet.size)
        stream = streams.get(packet.stream.index)
        if stream is not None:
            stream.add(packet)
    return [stream.seconds() for stream in streams.values()], packets, covered


def _packets(container: Any, thorough: bool) -> Iterator[Any]:
    """The packets that can be read; what is broken or truncated is left out.

    Raises:
        _LateStreamError: a packet is of no stream that was found, unless `thorough`: then it is left out.
    """
    import av

    failures = 0
    demuxed = container.demux()
    while failures < _FAILURES:
        try:
            packet = next(demuxed, None)
        except IndexError:
            if not thorough:
                raise _LateStreamError from None
            demuxed = container.demux()
        except (av.FFmpegError, ValueError, OSError):
            failures += 1
            demuxed = container.demux()
        else:
            if packet is None:
                return
            if packet.size:
                failures = 0
                yield packet


class _Budget:
    """CPU time for decoding a file of `size` bytes, spread over the whole of it."""

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        self._bytes = 0
        self._spent = 0.0

    def read(self, count: int) -> None:
        """So many bytes of the file were read."""
        self._bytes += count

    def spend(self, seconds: float) -> None:
        """So much was spent."""
        self._spent += seconds

    @property
    def left(self) -> bool:
        """Whether more may be spent at this place of the file."""
        return self._spent < DECODE_SECONDS * (0.5 + 0.5 * min(self._bytes / self.size, 1.0))


class _Stream:
    """Counts the packets of one audio stream."""

    def __init__(self, stream: Any, name: str, budget: _Budget) -> None:
        codec = stream.codec_context
        codec.flags2 |= _SKIP_MANUAL
        self._ogg = name == "ogg"
        claiming = name in _CLAIMING
        self._codec = codec
        self._name: str = codec.name
        self._rate: int = codec.sample_rate or 0
        self._base = float(stream.time_base or 0)
        self._claiming = claiming
        self._width: int = codec.channels * (codec.format.bytes if codec.format else 0)
        self._frame: int = codec.frame_size or 0
        self._opus = self._name.endswith("opus")
        self._pcm = self._name.startswith("pcm_")
        # Only a decoder knows how many frames a packet has, at which rate ADTS frames play, which frames of
        # FLAC play although their checksums are wrong, and the samples of an incomplete block of ADPCM.
        self._decodes = (claiming and not self._opus and not self._pcm) or self._name in _DECODED
        self._packets = self._bytes = self._ticks = self._samples = 0
        self._first: int | None = None
        self._end = 0
        self._decoded = _Decoded(codec, budget)

    def add(self, packet: Any) -> None:
        """Counts a packet."""
        self._packets += 1
        self._bytes += packet.size
        self._ticks += packet.duration or 0
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            self._first = stamp if self._first is None else min(self._first, stamp)
            self._end = max(self._end, stamp + (packet.duration or 0))
        if self._opus:
            self._samples += _opus_samples(bytes(packet)[:2])
        elif self._decodes:
            self._decoded.add(packet)

    def seconds(self) -> float:
        """The length of the stream."""
        claimed: float = self._base * max(
            self._ticks, self._end - (self._first or 0) if self._claiming else 0
        )
        if not self._rate:
            return claimed
        if self._opus:
            # In Ogg, times are those of the packets; elsewhere packets may be left out for silence.
            return max(self._samples / _OPUS_RATE, 0.0 if self._ogg else claimed)
        if self._decodes:
            counted, whole = self._decoded.seconds()
            if self._frame:
                counted = max(counted, self._packets * self._frame / self._rate)
            elif whole and self._claiming:
                return counted
            return max(counted, claimed)
        if self._claiming and self._pcm and self._width:
            return max(self._bytes / (self._width * self._rate), claimed)
        return claimed


class _Decoded:
    """Decodes the packets of one stream, or as many of them as the budget allows."""

    def __init__(self, codec: Any, budget: _Budget) -> None:
        self._codec = codec
        self._budget = budget
        self._seconds = 0.0
        self._bytes = self._largest = 0
        self._left_out = 0.0
        """Seconds of the packets that were left out, if they are like those before them."""
        self._left_out_bytes = 0
        self._block = _BLOCK
        self._decoding = True
        self._block_seconds = 0.0
        self._density = 0.0
        """Seconds of a packet in the last block that was decoded."""

    def add(self, packet: Any) -> None:
        """Decodes a packet, or leaves it out."""
        if not self._block:
            if self._decoding:
                self._density = self._block_seconds / _BLOCK
                self._block_seconds = 0.0
            self._block = _BLOCK
            self._decoding = self._budget.left
        self._block -= 1
        # A packet that is larger than all before it may have more frames.
        if self._decoding or packet.size > self._largest:
            seconds = self._decode(packet)
            if self._decoding:
                self._block_seconds += seconds
        else:
            self._left_out += self._density
            self._left_out_bytes += packet.size

    def _decode(self, packet: Any) -> float:
        import av

        began = time.process_time()
        self._largest = max(self._largest, packet.size)
        self._bytes += packet.size
        seconds = 0.0
        try:
            for frame in self._codec.decode(packet):
                seconds += frame.samples / frame.sample_rate
        except (av.FFmpegError, ValueError, OSError, ZeroDivisionError):
            # A broken packet has no audio, unless it is more than a frame: a decoder plays what is before
            # the fault, which PyAV drops.
            if self._codec.name == "flac" or packet.size > _ANY_LARGEST:
                self._left_out_bytes += packet.size
                self._bytes -= packet.size
        self._seconds += seconds
        self._budget.spend(time.process_time() - began)
        return seconds

    def seconds(self) -> tuple[float, bool]:
        """The length, and whether all was decoded. What was left out or is broken is as dense as the rest, by
        packets or by bytes, whichever is longer."""
        if not self._left_out_bytes:
            return self._seconds, self._seconds > 0
        # Packets of a broken file may overlap.
        rest = min(self._left_out_bytes, max(self._budget.size - self._bytes, 0))
        by_bytes = self._seconds * rest / max(self._bytes, 1)
        return self._seconds + max(self._left_out, by_bytes), False


def _opus_samples(head: bytes) -> int:
    """Samples at 48,000 Hz of an Opus packet, from its first bytes (RFC 6716, section 3.1)."""
    if not head:
        return 0
    frames = (1, 2, 2, head[1] & 0x3F if len(head) > 1 else 0)[head[0] & 3]
    return min(frames * _OPUS_FRAME[head[0] >> 3], 5760)


def _limit() -> None:
    """Limits what a hostile file can do: bounded memory, low priority, no file writes, no core dumps."""
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Answers requests until stdin ends."""
    try:
        import av

        av.logging.set_level(None)
    except ImportError:
        print(json.dumps({"missing": "av"}), flush=True)  # noqa: T201
        return
    _limit()
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    source = sys.stdin.buffer
    while line := source.readline():
        request = json.loads(line)
        raw = bool(request.get("raw"))
        if "path" in request:
            try:
                with open(request["path"], "rb") as file:  # noqa: PTH123
                    result = measure(file, os.fstat(file.fileno()).st_size, raw)
            except OSError:
                result = (0, "")
        else:
            data = source.read(request["size"])
            result = measure(BytesIO(data), len(data), raw)
        print(json.dumps({"ms": result[0], "format": result[1]}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
