"""Builds small audio files and their parts byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import count


def chunk(name: bytes, body: bytes, order: str = "<") -> bytes:
    return name + struct.pack(f"{order}I", len(body)) + body


def id3(size: int) -> bytes:
    return b"ID3\4\0\0" + bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0)) + bytes(size)


def appended_id3(size: int) -> bytes:
    """An ID3v2 tag with a footer, as it is at the end of a file."""
    tag = bytearray(id3(size))
    tag[5] = 0x10
    return bytes(tag) + b"3DI" + tag[3:10]


def lyrics(size: int) -> bytes:
    """A Lyrics3 tag of the second version."""
    body = b"LYRICSBEGIN" + bytes(size)
    return body + b"%06dLYRICS200" % len(body)


def ape(size: int) -> bytes:
    """An APEv2 tag with a header and a footer."""
    head, foot = (struct.pack("<IIII8x", 2000, size + 32, 1, flags) for flags in (0xA0000000, 0x80000000))
    return b"APETAGEX" + head + bytes(size) + b"APETAGEX" + foot


def ebml(name: int, body: bytes) -> bytes:
    return (
        name.to_bytes((name.bit_length() + 7) // 8, "big") + (1 << 28 | len(body)).to_bytes(4, "big") + body
    )


def matroska(
    codec: bytes,
    rate: float,
    frames: Iterable[bytes],
    private: bytes = b"",
    void: int = 0,
    times: Iterable[int] = (),
    discarded: int = 0,
) -> bytes:
    """A Matroska file of mono audio with these packets, at these times in milliseconds; else each is a
    millisecond long by its timestamps. Players discard `discarded` nanoseconds at the end of each packet."""
    audio = ebml(0xB5, struct.pack(">d", rate)) + ebml(0x9F, b"\1")
    track = (
        ebml(0xD7, b"\1") + ebml(0x73C5, b"\1") + ebml(0x83, b"\2") + ebml(0x86, codec) + ebml(0xE1, audio)
    )
    blocks = [_block(at, packet, discarded) for at, packet in zip(times or count(), frames, strict=False)]
    body = ebml(0x1549A966, ebml(0x2AD7B1, (10**6).to_bytes(3, "big")))
    body += ebml(0x1654AE6B, ebml(0xAE, track + (ebml(0x63A2, private) if private else b"")))
    body += ebml(0xEC, bytes(void)) + ebml(0x1F43B675, ebml(0xE7, b"\0") + b"".join(blocks))
    return ebml(0x1A45DFA3, ebml(0x4282, b"matroska")) + ebml(0x18538067, body)


def _block(at: int, packet: bytes, discarded: int) -> bytes:
    body = b"\x81" + struct.pack(">hB", at, 128) + packet
    if not discarded:
        return ebml(0xA3, body)
    return ebml(0xA0, ebml(0xA1, body) + ebml(0x75A2, discarded.to_bytes(4, "big")))


def page(flags: int, granule: int, body: bytes, segments: int = 1, number: int = 0) -> bytes:
    """An Ogg page with one packet or several of one size."""
    table = bytes([len(body) // segments] * segments)
    head = b"OggS\0" + struct.pack("<BqII", flags, granule, 1, number)
    data = bytes([segments]) + table + body
    return head + struct.pack("<I", checksum(head + bytes(4) + data)) + data


def checksum(data: bytes) -> int:
    """The checksum of an Ogg page, as the Ogg specification defines it."""
    value = 0
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = value << 1 ^ (0x104C11DB7 if value & 0x80000000 else 0)
    return value


OPUS_HEAD = b"OpusHead\1\1" + struct.pack("<HIhB", 0, 48_000, 0, 0)


def opus(packets: list[bytes], granule: int = 960) -> bytes:
    """Ogg Opus of packets of one size, 32 a page; the position of a page has `granule` samples per packet."""
    pages = [page(2, 0, OPUS_HEAD), page(0, 0, b"OpusTags" + bytes(8), number=1)]
    for at in range(0, len(packets), 32):
        part = packets[at : at + 32]
        pages.append(page(0, granule * (at + len(part)), b"".join(part), len(part), len(pages)))
    return b"".join(pages)
