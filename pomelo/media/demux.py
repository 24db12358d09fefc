"""Measures the length of audio in a subprocess: `python -m pomelo.media.demux`.

Only this process passes callers' bytes to a native demuxer, with limits of memory and time. The length is
counted from the frames, packets and samples in the file, not taken from a header. The process reads requests
from stdin and answers each with a line of JSON on stdout:

    {"path": "/media/x", "raw": false}        a file
    {"size": 4096, "raw": true}               followed by that many bytes; raw: declared as bare samples

    {"ms": 62040, "format": "mp3"}            the length; 0 and an empty format if it can't be measured;
                                              with raw, an empty format also if the format isn't certain
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from pomelo.media.containers import FileSlice, chained_streams, has_too_many_chunks, structure_size, tag_sizes
from pomelo.media.packets import MAX_FRAME, DecodeBudget, StreamLength
from pomelo.media.unsized import with_size

FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,asf,au,avi,caf,dts,eac3,flac,flv,gsm,loas,matroska,mov,mp3,mp4,m4a,3gp,3g2,"
    "mj2,mpeg,mpegts,mxf,nut,ogg,rf64,tta,voc,w64,wav,webm,wv"
)
"""The allowed demuxers. They open no other file or address."""

MAX_MEMORY = 1024 * 1024 * 1024
"""Bytes of address space of this process."""

_MAX_FAILURES = 16
"""Consecutive errors after which no more packets are read."""

_LONGER_THAN_ANY_FILE = 2**62
"""In microseconds."""

_BEYOND_ANY_FILE = 2**40
"""A position that every file system has."""

_BARE_FORMATS = ("mp3", "aac", "ac3", "eac3", "dts", "amr", "amrnb", "amrwb", "gsm", "loas")
"""Formats that consist only of frames. Any garbage has bytes that look like a frame."""

_MIN_COVERAGE = 0.33
"""The minimum share of frames in the bytes of a bare format."""

_MAX_HEADERS = 16 * 1024
"""Bytes of headers, padding and indexes that a file may have in addition to those of its packets."""

_MAX_UNPARSED = 2 * 1024
"""The same for a file whose structure is parsed, so that only unparsed headers remain."""

_PACKET_HEADERS = {"mov": 0, "mpegts": 0, "ogg": 0}
_DEFAULT_PACKET_HEADER = 20
"""Bytes that a container adds to a packet, by format."""

_MIN_EXTRAPOLATED = 2048
"""Bytes of audio below which the length of the rest of a file can't be extrapolated."""

_PADDING = {"asf": 0.1}
"""The share of padding in the bytes of a format."""

_MAX_FRAMES = {"dts": 65_536}
"""Bytes of the largest frame, by format; else MAX_FRAME. A larger packet has garbage before its frame."""

_CERTAIN_COVERAGE = 0.95
"""The share of frames from which bytes declared as bare samples are certainly of a bare format."""

_SYNCHRONIZED = ("mp3", "aac", "ac3", "eac3", "dts", "loas")
"""Bare formats whose frames begin with a sync word. Any bytes can be split into frames of the others."""

_MAGIC = (b"ID3", b"#!AMR")
"""The magic numbers of bare formats."""

_MAX_REPEATED = 30_000
"""Packets from which a file that refers to the same bytes repeatedly is not counted to its end: a few
kilobytes can play for hours, so neither its size nor the time for measuring it limits its length."""

_ENDLESS = 1e9
"""Seconds that every limit refuses."""


def measure(file: BinaryIO, size: int, raw: bool) -> tuple[int, str]:
    """The length in milliseconds and the demuxer's name of the format; (0, "") if it can't be measured.
    `raw`: the bytes are declared as bare samples."""
    import av

    try:
        file = with_size(file, size)
        front, back = tag_sizes(file, size)
        if has_too_many_chunks(FileSlice(file, front, size - front) if front else file, size - front):
            return 0, ""
        ms, name, covered = 0, "", 0
        for start, length in chained_streams(file, front, size):
            whole = length == size  # a slice would slow down the many reads of a hostile file
            part = file if whole else FileSlice(file, start, length)
            part.seek(0)
            part_ms, name, covered = _measure(part, length, back)
            ms += part_ms
            if not part_ms:
                ms = 0
                break
        if raw and name and not _is_certain(file, size - front - back, name, ms, covered):
            # Frames without a sync word are no evidence of a length: those of GSM may be silent A-law.
            ms, name = (ms if name in _SYNCHRONIZED else 0), ""
    except (av.FFmpegError, ValueError, OSError, OverflowError, LookupError, MemoryError):
        return 0, ""
    return ms, name if ms or raw else ""


class DiskFile(io.BufferedReader):
    """A file on the disk that a demuxer reads as it reads bytes in memory: without its name, by whose
    extension it would guess the format, and with positions far beyond its end, which file systems refuse."""

    def __init__(self, path: str) -> None:
        raw = io.FileIO(path)
        raw.name = ""
        super().__init__(raw)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return super().seek(min(offset, _BEYOND_ANY_FILE), whence)


class _LateStreamError(Exception):
    """A stream begins after the bytes that were probed for streams."""


def _measure(file: Any, size: int, back: int, thorough: bool = False) -> tuple[int, str, int]:
    """The length, the format, and the bytes of all packets of a file or of a link of a chained one. Its last
    `back` bytes are tags. `thorough` probes the whole file for streams."""
    import av

    # An edit list may exclude most of a file from playback, or repeat it.
    options = {"format_whitelist": FORMATS, "ignore_editlist": "1"}
    if thorough:
        options |= {"probesize": str(max(size, 32)), "analyzeduration": str(_LONGER_THAN_ANY_FILE)}
    with av.open(file, options=options, metadata_errors="replace") as container:
        name = container.format.name.partition(",")[0]
        if name == "mov" and _is_endless(container.streams.audio, size):
            return round(_ENDLESS * 1000), name, 0
        try:
            lengths, packets, covered = _lengths(container, name, size, thorough)
        except _LateStreamError:
            lengths = None
    if lengths is None:
        file.seek(0)
        return _measure(file, size, back, thorough=True)
    if name in _BARE_FORMATS and covered < (size - back) * _MIN_COVERAGE:
        return 0, name, covered
    seconds = max(lengths, default=0.0)
    if covered and name not in _BARE_FORMATS:
        # Bytes in no packet may be audio that the headers hide, for a vendor that parses them differently.
        structure = structure_size(file, size, name)
        hidden = size * (1 - _PADDING.get(name, 0.0)) - covered - back
        hidden -= structure + (_MAX_UNPARSED if structure else _MAX_HEADERS)
        hidden -= packets * _PACKET_HEADERS.get(name, _DEFAULT_PACKET_HEADER)
        if hidden > 0 and not thorough:
            # Of a stream that begins late, PyAV may skip all packets without an error.
            file.seek(0)
            return _measure(file, size, back, thorough=True)
        if covered < _MIN_EXTRAPOLATED and hidden > covered:
            return 0, name, covered  # too few bytes to know the density of the rest
        seconds *= 1 + max(hidden, 0.0) / covered
    if name == "mov" and seconds < _ENDLESS:
        seconds = max(seconds, _repeated_seconds(file, size))
    return max(round(seconds * 1000), 0), name, covered


def _repeated_seconds(file: Any, size: int) -> float:
    """The length of an MP4 file whose edit list plays parts of it repeatedly; 0 for other files."""
    import av

    file.seek(0)
    with av.open(file, options={"format_whitelist": FORMATS}, metadata_errors="replace") as container:
        streams = container.streams.audio
        if _is_endless(streams, size):
            return _ENDLESS
        positions = [[entry.pos for entry in stream.index_entries] for stream in streams]
        if all(len(set(found)) == len(found) for found in positions):
            return 0.0
        lengths, _, _ = _lengths(container, "mov", size, thorough=True)
    return max(lengths, default=0.0)


def _is_certain(file: BinaryIO, size: int, name: str, ms: int, covered: int) -> bool:
    """Whether bytes declared as bare samples are certainly of a format: by a magic number, or by frames from
    beginning to end that can be decoded. Samples may look like frames by chance."""
    file.seek(0)
    if name not in _BARE_FORMATS or file.read(5).startswith(_MAGIC):
        return True
    return ms > 0 and name in _SYNCHRONIZED and covered >= size * _CERTAIN_COVERAGE


def _lengths(container: Any, name: str, size: int, thorough: bool) -> tuple[list[float], int, int]:
    """The seconds of each audio stream, and the number and bytes of all packets, also of video and images."""
    # A stream of an unsupported codec has no context, and no reliable length.
    streams_with_codec = [stream for stream in container.streams.audio if stream.codec_context is not None]
    if not streams_with_codec:
        return [], 0, 0
    budget = DecodeBudget(size)
    streams = {stream.index: StreamLength(stream, name, budget) for stream in streams_with_codec}
    max_frame = _MAX_FRAMES.get(name, MAX_FRAME) if name in _BARE_FORMATS else size
    packets = covered = 0
    for packet in _packets(container, thorough):
        packets += 1
        packet_size = packet.size
        if packet_size <= max_frame:
            covered += packet_size
            if packets > _MAX_REPEATED and covered > size:
                return [_ENDLESS], packets, covered
        budget.bytes_read += packet_size
        stream = streams.get(packet.stream_index)
        if stream is not None:
            stream.add(packet, packet_size)
    return [stream.seconds() for stream in streams.values()], packets, covered


def _is_endless(streams: Iterable[Any], size: int) -> bool:
    """Whether the index of an MP4 file lists too many packets, with more bytes than the file has. Packets
    beyond the end of a truncated file don't count."""
    for stream in streams:
        entries, listed = stream.index_entries, 0
        for entry in entries if len(entries) > _MAX_REPEATED else ():
            if entry.pos + entry.size <= size:
                listed += entry.size
            if listed > size:
                return True
    return False


def _packets(container: Any, thorough: bool) -> Iterator[Any]:
    """The readable packets; broken and truncated ones are skipped.

    Raises:
        _LateStreamError: a packet belongs to an unknown stream. If `thorough`, it is skipped instead.
    """
    import av

    failures = 0
    demuxed = container.demux()
    while failures < _MAX_FAILURES:
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


def _restrict_process() -> None:
    """Limits the damage of a hostile file: bounded memory, low priority, no file writes, no core dumps."""
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Answers requests until the end of stdin."""
    try:
        import av

        av.logging.set_level(None)
    except ImportError:
        print(json.dumps({"missing": "av"}), flush=True)  # noqa: T201
        return
    _restrict_process()
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201
    source = sys.stdin.buffer
    while line := source.readline():
        request = json.loads(line)
        raw = bool(request.get("raw"))
        if "path" in request:
            try:
                with DiskFile(request["path"]) as file:
                    result = measure(file, os.fstat(file.fileno()).st_size, raw)
            except OSError:
                result = (0, "")
        else:
            data = source.read(request["size"])
            result = measure(io.BytesIO(data), len(data), raw)
        print(json.dumps({"ms": result[0], "format": result[1]}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
