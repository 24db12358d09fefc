"""Measures audio in a process of its own: `python -m pomelo.demux`. Started and killed by `pomelo.measure`.

Only this process passes callers' bytes to a native demuxer, with limits of memory and time. The length is
counted from the frames, packets and samples in the file, not taken from a header. It reads one request after
another from stdin, and answers each with a line of JSON on stdout:

    {"path": "/media/x", "raw": false}        a file
    {"size": 4096, "raw": true}               followed by that many bytes; raw: labelled as bare samples

    {"ms": 62040, "format": "mp3"}            the length; 0 and an empty format where it can't be measured;
                                              with raw, an empty format also where it isn't certain
"""

import json
import os
import resource
import sys
import time
from io import BytesIO
from typing import Any, BinaryIO

FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,asf,au,avi,caf,dts,eac3,flac,flv,gsm,matroska,mov,mp3,mp4,m4a,3gp,3g2,mj2,"
    "mpegts,ogg,rf64,tta,voc,w64,wav,webm,wv"
)
"""The demuxers that may see a caller's bytes: none of them opens another file or address."""

MEMORY = 1024 * 1024 * 1024
"""Bytes of address space that this process may have."""

DECODE_SECONDS = 1.0
"""Time that may be spent on decoding where a container only claims how long its packets are."""

_CLAIMING = ("ogg", "mov", "matroska", "avi", "asf", "flv", "caf")
"""Containers whose packets have the durations that the container claims."""

_BARE = ("mp3", "aac", "ac3", "eac3", "dts", "amr", "amrnb", "amrwb", "gsm")
"""Formats that are frames and nothing else. Any garbage has bytes that look like one."""

_COVERED = 0.1
"""The share of a bare format's bytes that must be frames."""

_HEADERS = 16 * 1024
"""Bytes of headers, padding and indexes that a file may have, besides those of its packets."""

_PACKET_HEADER = {"mpegts": 300}
_ANY_PACKET_HEADER = 20
"""Bytes that a container adds to a packet, by its format."""

_PADDED = {"asf": 0.1}
"""The share of a format's bytes that is padding."""

_RAW_COVERED = 0.95
"""The share from which bytes that are labelled as bare samples are certainly of a bare format."""

_SYNCHRONIZED = ("mp3", "aac", "ac3", "eac3", "dts")
"""Bare formats whose frames begin with a mark. Any bytes can be cut into frames of the others."""

_MAGIC = (b"ID3", b"#!AMR")
"""How files of bare formats may begin."""

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

    # An edit list may claim that most of a file is not to be played.
    options = {"format_whitelist": FORMATS, "ignore_editlist": "1"}
    try:
        with av.open(file, options=options, metadata_errors="replace") as container:
            name = container.format.name.partition(",")[0]
            lengths, packets, covered = _lengths(container, name)
    except (av.FFmpegError, ValueError, OSError, OverflowError):
        return 0, ""
    shown = name if not raw or _is_certain(file, size, name, covered) else ""
    if name in _BARE and covered < size * _COVERED:
        return 0, shown if raw else ""
    # Chained streams follow each other; tracks lie beside each other.
    seconds = sum(lengths) if name == "ogg" else max(lengths, default=0.0)
    if covered and name not in _BARE:
        # Bytes in no packet may be audio that the headers hide, for a vendor that reads them in another way.
        hidden = size * (1 - _PADDED.get(name, 0.0)) - covered - _HEADERS
        hidden -= packets * _PACKET_HEADER.get(name, _ANY_PACKET_HEADER)
        seconds *= 1 + max(hidden, 0.0) / covered
    return (round(seconds * 1000), shown) if seconds > 0 else (0, shown if raw else "")


def _is_certain(file: BinaryIO, size: int, name: str, covered: int) -> bool:
    """Whether bytes that are labelled as bare samples are certainly of a format: by a magic number, or by
    frames from beginning to end. Samples look like single frames by chance."""
    file.seek(0)
    if name not in _BARE or file.read(5).startswith(_MAGIC):
        return True
    return name in _SYNCHRONIZED and covered >= size * _RAW_COVERED


def _lengths(container: Any, name: str) -> tuple[list[float], int, int]:
    """The seconds of each audio stream, and the number and the bytes of all packets, also those of video and
    pictures."""
    # A stream of a codec that FFmpeg has not has no context, and no length that could be relied on.
    known = [stream for stream in container.streams.audio if stream.codec_context is not None]
    streams = {stream.index: _Stream(stream, name) for stream in known}
    packets = covered = 0
    if not streams:
        return [], 0, 0
    try:
        for packet in container.demux():
            if packet.size:
                packets += 1
                covered += packet.size
                stream = streams.get(packet.stream.index)
                if stream is not None:
                    stream.add(packet)
    except (ValueError, OSError):
        pass  # truncated: the packets so far are counted
    return [stream.seconds() for stream in streams.values()], packets, covered


class _Stream:
    """Counts the packets of one audio stream."""

    def __init__(self, stream: Any, name: str) -> None:
        codec = stream.codec_context
        self._ogg = name == "ogg"
        claiming = name in _CLAIMING
        self._codec = codec
        self._name: str = codec.name
        self._rate: int = codec.sample_rate or 0
        self._base = float(stream.time_base or 0)
        self._claiming = claiming
        self._width: int = codec.channels * (codec.format.bytes if codec.format else 0)
        self._frame: int = codec.frame_size or 0
        self._packets = self._bytes = self._ticks = self._samples = 0
        self._first: int | None = None
        self._end = 0
        self._decoded = self._decoded_bytes = 0
        self._deadline = 0.0

    def add(self, packet: Any) -> None:
        """Counts a packet."""
        self._packets += 1
        self._bytes += packet.size
        self._ticks += packet.duration or 0
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            self._first = stamp if self._first is None else min(self._first, stamp)
            self._end = max(self._end, stamp + (packet.duration or 0))
        if self._name.endswith("opus"):
            self._samples += _opus_samples(bytes(packet)[:2])
        elif self._claiming and not self._countable:
            self._decode(packet)

    @property
    def _countable(self) -> bool:
        return bool(self._frame) or self._name.startswith("pcm_")

    def _decode(self, packet: Any) -> None:
        now = time.process_time()
        if not self._deadline:
            self._deadline = now + DECODE_SECONDS
        if now > self._deadline:
            return
        self._decoded_bytes += packet.size
        try:
            for frame in self._codec.decode(packet):
                self._decoded += frame.samples
        except (ValueError, OSError):
            pass  # a broken packet has no audio

    def seconds(self) -> float:
        """The length of the stream."""
        claimed: float = self._base * max(
            self._ticks, self._end - (self._first or 0) if self._claiming else 0
        )
        if not self._rate:
            return claimed
        if self._name.endswith("opus"):
            # In Ogg, times are those of the packets; elsewhere packets may be left out for silence.
            return max(self._samples / _OPUS_RATE, 0.0 if self._ogg else claimed)
        if not self._claiming:
            return claimed
        if self._name.startswith("pcm_") and self._width:
            return max(self._bytes / (self._width * self._rate), claimed)
        if self._frame:
            return max(self._packets * self._frame / self._rate, claimed)
        if not self._decoded:
            return claimed
        counted = self._decoded / self._rate
        if self._decoded_bytes < self._bytes:
            # Not all of it was decoded: the rest is as dense as what was, or as long as it claims.
            return max(claimed, counted * (self._bytes / self._decoded_bytes))
        return counted


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
