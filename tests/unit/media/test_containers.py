"""The bytes of each container that are not audio are counted exactly, and its tags and links are found."""

from __future__ import annotations

import io
import struct

import pytest

from pomelo.media.containers import FileSlice, chained_streams, structure_size, tag_sizes
from tests.unit.media.built import ape, appended_id3, chunk, ebml, id3, lyrics, page

REST = bytes(range(100, 140))
"""Bytes that no container knows."""


def structure(name: str, data: bytes) -> int:
    """The bytes that are not audio in a file of this demuxer."""
    return structure_size(io.BytesIO(data), len(data), name)


def tags(data: bytes) -> tuple[int, int]:
    return tag_sizes(io.BytesIO(data), len(data))


def test_a_slice_reads_only_its_part() -> None:
    file = FileSlice(io.BytesIO(b"0123456789"), 2, 5)
    assert (file.readable(), file.seekable()) == (True, True)
    assert (file.read(2), file.read(9), file.read()) == (b"23", b"456", b"")
    assert (file.seek(1), file.read()) == (1, b"3456")
    assert (file.seek(-2, io.SEEK_END), file.read(1)) == (3, b"5")
    assert (file.seek(-1, io.SEEK_CUR), file.read(2)) == (3, b"56")
    assert (file.seek(-9, io.SEEK_CUR), file.read(1)) == (0, b"2")
    assert (file.seek(8), file.read(3), file.read()) == (8, b"", b"")


@pytest.mark.parametrize("size", [0, 1, 0x7F, 0x80, 0x3FFF, 0x4000, 0x1FFFFF, 0x200000])
def test_an_id3_tag_has_the_size_in_its_header(size: int) -> None:
    assert tags(id3(size) + REST) == (10 + size, 0)


def test_all_tags_before_the_audio_are_counted() -> None:
    assert tags(REST) == (0, 0)
    assert tags(id3(3) * 2 + REST) == (26, 0)
    assert tags(id3(3) * 17 + REST) == (16 * 13, 0)  # more are audio
    assert tags(id3(0)) == (10, 0)
    assert tags(id3(0)[:9]) == (0, 0)
    assert tags(id3(300)[:200]) == (200, 0)
    footer = bytearray(id3(3))
    footer[5] = 0x1F
    assert tags(bytes(footer) + b"3DI" + bytes(7) + REST) == (23, 0)
    footer[5] = 0xEF
    assert tags(bytes(footer) + REST) == (13, 0)
    for at in range(6, 10):
        wrong = bytearray(id3(3))
        wrong[at] = 0x80
        assert tags(bytes(wrong) + REST) == (0, 0)


def test_an_id3v1_tag_is_the_last_128_bytes() -> None:
    tag = b"TAG" + bytes(125)
    assert tags(tag) == (0, 128)
    assert tags(REST + tag) == (0, 128)
    assert tags(tag[:127]) == (0, 0)
    assert tags(REST + tag + b"x") == (0, 0)
    assert tags(id3(5) + tag) == (15, 128)
    assert tags(id3(5 + 128) + b"TAG") == (143, 0)
    assert tags(id3(0)[:9] + b"\1" + tag) == (11, 0)  # the tag at the front has its first byte


def test_an_ape_tag_is_counted_with_its_header() -> None:
    assert tags(ape(0)) == (0, 64)
    assert tags(REST + ape(0)) == (0, 64)
    assert tags(REST + ape(700)) == (0, 764)
    assert tags(REST + ape(700) + b"TAG" + bytes(125)) == (0, 892)
    assert tags(id3(5) + ape(700)) == (15, 764)
    assert tags(ape(700)[1:]) == (0, 0)


@pytest.mark.parametrize(("error", "found"), [(-65, False), (-64, True), (0, True), (56, True), (57, False)])
def test_the_size_of_an_ape_tag_may_be_wrong_by_64_bytes(error: int, found: bool) -> None:
    tag = bytearray(ape(700))
    tag[-20:-16] = struct.pack("<I", 732 + error)
    assert tags(bytes(1000) + tag) == (0, 764 + error if found else 0)


def test_an_ape_tag_before_the_audio_is_not_skipped_but_counted() -> None:
    assert tags(ape(700) + REST) == (0, 764)
    assert tags(id3(5) + ape(700) + REST + ape(9)) == (15, 764 + 73)
    assert tags(ape(700)[:-64] + REST) == (0, 0)
    assert tags(ape(0) + id3(5)) == (0, 64)


@pytest.mark.parametrize(
    ("tag", "broken"),
    [
        (appended_id3(700), 0),
        (appended_id3(0x4001), 2),
        (lyrics(700), 10),
        (b"LYRICSBEGIN" + bytes(5100) + b"LYRICSEND", 0),
        (b"TAG+" + bytes(223) + b"TAG" + bytes(125), -128),
    ],
)
def test_every_tag_at_the_end_is_counted_if_it_has_its_beginning(tag: bytes, broken: int) -> None:
    assert sum(tags(tag)) == len(tag)
    assert tags(REST + tag) == (0, len(tag))
    assert tags(id3(5) + REST + ape(9) + tag + ape(0)) == (15, 73 + len(tag) + 64)
    assert tags(REST + tag + b"x") == (0, 0)
    wrong = bytearray(tag)
    wrong[broken] ^= 1
    assert tags(REST + wrong) == (0, 0)


def test_an_extended_tag_needs_all_its_bytes() -> None:
    tag = b"TAG+" + bytes(223) + b"TAG" + bytes(125)
    assert tags(tag[1:]) == (0, 128)
    assert tags(tag.replace(b"+", b"-")) == (0, 128)


def test_tags_at_the_end_may_not_overlap_those_before_the_audio() -> None:
    for inner in (appended_id3(700), lyrics(700), b"LYRICSBEGIN" + bytes(700) + b"LYRICSEND"):
        assert tags(id3(100) + inner[80:]) == (110, 0)
        assert tags(id3(len(inner) - 20) + inner[-20:]) == (len(inner) - 10, 0)
    assert tags(b"3DI" + bytes(7)) == (0, 0)
    assert tags(b"LYRICS200") == (0, 0)
    assert tags(b"000015LYRICS200") == (0, 0)


def test_sixteen_tags_at_the_end_are_counted() -> None:
    assert tags(REST + ape(1) * 16) == (0, 16 * 65)
    assert tags(REST + ape(1) * 17) == (0, 16 * 65)


def test_riff_chunks_that_are_not_samples_are_structure() -> None:
    head = b"RIFF\0\0\0\0WAVE"
    fmt = chunk(b"fmt ", bytes(16))
    samples = chunk(b"data", bytes(50))
    assert structure("wav", head + fmt + samples) == 12 + 24 + 8
    assert structure("rf64", head + fmt + samples) == 12 + 24 + 8
    # A chunk of an odd size is followed by a byte of padding.
    odd = chunk(b"JUNK", bytes(11)) + b"\0"
    assert structure("wav", head + odd + samples + odd + fmt) == 12 + 20 + 8 + 20 + 24
    # The chunks after an unknown one may be samples.
    assert structure("wav", head + fmt + chunk(b"what", REST) + fmt) == 12 + 24
    # A chunk that is too large ends with the file; less than 16 bytes are not a chunk.
    assert structure("wav", head + fmt + chunk(b"LIST", REST)[:-9]) == 12 + 24 + 8 + 31
    assert structure("wav", head + chunk(b"LIST", bytes(7))) == 12
    assert structure("wav", head + chunk(b"LIST", bytes(8))) == 12 + 16
    movie = chunk(b"LIST", b"movi" + bytes(60))
    assert structure("avi", head + chunk(b"LIST", b"hdrl" + bytes(60)) + movie + odd) == 12 + 72 + 8 + 20


def test_aiff_chunks_that_are_not_samples_are_structure() -> None:
    common, odd = chunk(b"COMM", bytes(18), ">"), chunk(b"NAME", bytes(9), ">") + b"\0"
    samples = chunk(b"SSND", bytes(51), ">") + b"\0"
    assert structure("aiff", bytes(12) + common + odd + samples + common) == 12 + 26 + 18 + 8 + 26


def test_caf_chunks_that_are_not_samples_are_structure() -> None:
    described = b"desc" + struct.pack(">Q", 33) + bytes(33)
    samples = b"data" + struct.pack(">Q", 51) + bytes(51)
    assert structure("caf", bytes(8) + described + samples + described) == 8 + 45 + 12 + 45


def test_mp4_atoms_that_are_not_samples_are_structure() -> None:
    def atom(name: bytes, body: bytes, large: bool = False) -> bytes:
        if large:
            return struct.pack(">I4sQ", 1, name, 16 + len(body)) + body
        return struct.pack(">I4s", 8 + len(body), name) + body

    free = atom(b"free", bytes(41))
    assert structure("mov", free + atom(b"mdat", bytes(70)) + free) == 49 + 8 + 49
    assert (
        structure("mov", atom(b"free", bytes(41), True) + atom(b"mdat", bytes(70), True) + free)
        == 57 + 16 + 49
    )
    # Without a size, an atom goes up to the end of the file.
    assert structure("mov", free + struct.pack(">I4s", 0, b"mdat") + bytes(70)) == 49 + 8
    assert structure("mov", free + struct.pack(">I4s", 0, b"skip") + bytes(70)) == 49 + 78
    # An atom is at least as large as its header.
    assert structure("mov", struct.pack(">I4s", 3, b"free") + free) == 8 + 49
    assert structure("mov", struct.pack(">I4sQ", 1, b"free", 3) + free) == 16 + 49


def test_flac_metadata_is_structure() -> None:
    def block(head: int, size: int) -> bytes:
        return bytes([head]) + size.to_bytes(3, "big") + bytes(size)

    frames = b"\xff\xf8" + REST
    assert structure("flac", b"fLaC" + block(0, 34) + block(0x81, 300) + frames) == 4 + 38 + 304
    assert structure("flac", b"fLaC" + block(0x86, 7) + block(1, 5)) == 4 + 11
    # Types from 7 on are not defined, and the file has to have the bytes.
    assert structure("flac", b"fLaC" + block(0, 34) + block(7, 5) + frames) == 4 + 38
    assert structure("flac", b"fLaC" + block(0, 34) + block(0x87, 5)) == 4 + 38
    assert structure("flac", b"fLaC" + block(0, 34)[:20]) == 24
    assert structure("flac", b"fLaC" + block(0, 34) + b"\1\0\0") == 42


MATROSKA_HEAD = ebml(0x1A45DFA3, bytes(9))  # 4 bytes of id, 4 of size


def test_matroska_elements_that_are_not_blocks_are_structure() -> None:
    cluster = ebml(0xE7, b"\0") + ebml(0xA3, REST) + ebml(0xEC, bytes(5)) + ebml(0xA0, REST)
    body = ebml(0x1549A966, bytes(20)) + ebml(0x1F43B675, cluster) + ebml(0x1C53BB6B, bytes(30))
    data = MATROSKA_HEAD + ebml(0x18538067, body)
    expected = 17 + 8 + 28 + 8 + 10 + 38
    assert structure("matroska", data) == expected
    # The elements after an unknown one may be audio, and so may the rest of an element that is too large.
    assert structure("matroska", data + ebml(0xB2, REST) + ebml(0xEC, bytes(5))) == expected
    assert structure("matroska", data + ebml(0xEC, bytes(90))[:-50]) == expected + 45
    # A segment or cluster of unknown size has children, too.
    unknown = b"\x18\x53\x80\x67\x01" + b"\xff" * 7
    assert structure("matroska", MATROSKA_HEAD + unknown + body) == 17 + 12 + 28 + 8 + 10 + 38


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        *[(name, False) for name in (0xA3, 0xA0, 0xE7, 0xAB, 0xA7, 0x5854, 0xBF)],
        *[(name, True) for name in (0x1941A469, 0x1254C367, 0x114D9B74, 0x1654AE6B, 0x1043A770)],
    ],
)
def test_parsing_continues_after_every_known_matroska_element(name: int, counted: bool) -> None:
    element = ebml(name, REST)
    data = MATROSKA_HEAD + ebml(0x1F43B675, element + ebml(0xEC, bytes(5)))
    assert structure("matroska", data) == 17 + 8 + (len(element) if counted else 0) + 10


@pytest.mark.parametrize("width", range(1, 9))
def test_a_matroska_size_may_have_any_width(width: int) -> None:
    size = (1 << 7 * width | 5).to_bytes(width, "big")
    data = MATROSKA_HEAD + b"\xec" + size + bytes(5)
    assert structure("matroska", data + ebml(0xEC, bytes(9))) == 17 + 1 + width + 5 + 14
    assert structure("matroska", MATROSKA_HEAD + b"\xec" + size[: width - 1]) == 17
    assert structure("matroska", MATROSKA_HEAD + b"\xec\0" + bytes(20)) == 17


def test_mxf_packs_that_are_not_essence_are_structure() -> None:
    def pack(key: bytes, body: bytes, width: int = 0) -> bytes:
        size = bytes([0x80 | width]) + len(body).to_bytes(width, "big") if width else bytes([len(body)])
        return b"\x06\x0e\x2b\x34" + key.ljust(12, b"\0") + size + body

    essence = b"\1\2\1\1\x0d\1\3\1\x16"
    metadata = b"\2\x05\1\1\x0d\1\2\1"
    for width in range(4):
        data = pack(metadata, REST, width) + pack(essence, bytes(90), width) + pack(metadata, REST)
        assert structure("mxf", data) == 17 + width + 40 + 17 + width + 17 + 40
    # What looks like essence in a part of its key is not.
    for other in (b"\1\2\1\1\x0d\1\4\1\x16", b"\2\2\1\1\x0d\1\3\1\x16"):
        assert structure("mxf", pack(other, bytes(90))) == 17 + 90
    assert structure("mxf", pack(metadata, REST) + REST) == 57
    assert structure("mxf", pack(metadata, REST) + pack(metadata, REST)[:30]) == 57 + 30
    assert structure("mxf", pack(metadata, REST) + pack(metadata, b"1234567")) == 57


def test_ogg_header_pages_and_the_headers_of_audio_pages_are_structure() -> None:
    head, tags_, more = page(2, 0, bytes(19)), page(0, 0, bytes(200), 4), page(0, -1, bytes(50))
    audio, last = page(0, 960, bytes(90), 3), page(4, 0, bytes(70))
    assert structure("ogg", head) == 28 + 19
    assert structure("ogg", head + tags_ + more) == 47 + 231 + 78
    # A granule position of 0 after audio does not make a page one of headers, the first page of a stream does.
    assert structure("ogg", head + audio + last) == 47 + 30 + 28
    assert structure("ogg", head + audio + last + head + tags_ + audio) == 47 + 30 + 28 + 47 + 231 + 30
    assert structure("ogg", page(2, 960, bytes(19)) + tags_) == 28 + 31
    # Bytes between pages are not structure; a page needs its whole header.
    assert structure("ogg", REST + head + REST + audio) == 47 + 30
    assert structure("ogg", head + audio[:26]) == 47
    assert structure("ogg", head + audio[:27]) == 47 + 27


def test_chained_streams_begin_at_the_first_page_after_audio() -> None:
    def links(data: bytes, start: int = 0) -> list[tuple[int, int]]:
        return chained_streams(io.BytesIO(data), start, len(data))

    first, audio = page(2, 0, bytes(19)), page(0, 960, bytes(90), 3)
    stream = first + audio
    assert (len(first), len(audio)) == (47, 120)
    assert links(REST) == [(0, 40)]
    assert links(REST + stream) == [(0, 207)]  # not an Ogg file
    assert links(REST + stream, 40) == [(40, 167)]
    assert links(stream * 3) == [(0, 167), (167, 167), (334, 167)]
    assert links(first + stream + stream) == [(0, 214), (214, 167)]
    # The page after a truncated one is found anywhere.
    for rest in (1, 65_530, 65_536 + 27, 131_000):
        data = first + audio[:-1] + bytes(rest) + stream
        assert links(data) == [(0, 166 + rest), (166 + rest, 167)]


@pytest.mark.parametrize("before", range(65_530, 65_538))
def test_a_page_is_found_across_the_end_of_what_is_read_together(before: int) -> None:
    stream = page(2, 0, bytes(19)) + page(0, 960, bytes(90), 3)
    assert structure("ogg", bytes(before) + stream) == 47 + 30


def ts(pid: int, payload: bytes, start: bool = False, adaptation: int = -1, fields: int = 0) -> bytes:
    """A transport packet: optionally with an adaptation field of this size, or with these flags."""
    field = b"" if adaptation < 0 else bytes([adaptation]) + bytes(adaptation)
    flags = fields or (0x10 | (0x20 if field else 0))
    head = bytes([0x47, (0x40 if start else 0) | pid >> 8, pid & 0xFF, flags])
    return (head + field + payload).ljust(188, b"\xff")[:188]


def test_transport_packets_without_audio_are_structure() -> None:
    pes = b"\0\0\1\xc0\0\0\x80\x80\5" + bytes(5)
    packets = [
        (ts(0x1FFF, b""), 188),  # a null packet
        (ts(0x100, pes, start=True), 4 + 14),
        (ts(0x100, REST), 4),
        (ts(0x100, REST, adaptation=0), 5),
        (ts(0x100, REST, adaptation=20), 25),
        (ts(0x100, pes, start=True, adaptation=20), 25 + 14),
        (ts(0x100, b"", adaptation=182), 187),
        (ts(0x100, b"", adaptation=183), 188),
        (ts(0x100, b"", adaptation=200), 188),
        (ts(0x100, REST, fields=0x20), 188),  # no payload
        (ts(0x100, REST, fields=0x40), 188),
        (ts(0x100, b"\0\0\1\xc0\0\0\x80\x80\xff", start=True), 188),
        # A table, and its continuation
        (ts(0x11F, b"\0\2\xb0\x17", start=True), 188),
        (ts(0x11F, REST), 188),
        (ts(0x01F, REST), 4),
        (ts(0x100, REST), 4),
        (ts(0x11F, pes, start=True), 4 + 14),
        (ts(0x11F, REST), 4),
        # A PES header that does not fit into its packet
        (ts(0x100, b"\0\0\1\xc0\0\0\x80\x80\0", start=True, adaptation=174), 188),
        (ts(0x100, b"\0\0\1\xc0\0\0\x80\x80", start=True, adaptation=175), 188),
        (ts(0x100, REST), 188),
    ]
    data = b""
    for at, (packet, _) in enumerate(packets):
        data += packet
        assert structure("mpegts", data) == sum(count for _, count in packets[: at + 1]), at
    # Nothing after a packet without its sync byte, nor an incomplete packet.
    total = sum(count for _, count in packets)
    assert structure("mpegts", data + b"\0" + ts(0x1FFF, b"")[1:] + ts(0x1FFF, b"")) == total
    assert structure("mpegts", data + ts(0x1FFF, b"")[:187]) == total


def test_transport_packets_are_read_in_batches() -> None:
    assert structure("mpegts", ts(0x100, REST) * 4097 + ts(0x1FFF, b"")) == 4 * 4097 + 188


def test_transport_packets_may_follow_four_bytes_each() -> None:
    for stamp in (bytes(4), b"GGGG"):
        stamped = stamp + ts(0x100, REST)
        assert structure("mpegts", stamped) == 8
        assert structure("mpegts", stamped * 3 + stamp + ts(0x1FFF, b"")) == 3 * 8 + 192
        assert structure("mpegts", stamped * 4096 + bytes(4) + ts(0x1FFF, b"")) == 4096 * 8 + 192


@pytest.mark.parametrize("packets", [1, 2, 3])
def test_a_payload_may_begin_like_a_transport_packet(packets: int) -> None:
    assert structure("mpegts", ts(0x100, b"G" * 184) * packets) == 4 * packets
    assert structure("mpegts", ts(0x100, b"G" + REST) * packets) == 4 * packets


@pytest.mark.parametrize(
    "before", [b"x", b"G", b"xG" * 50, bytes(187), b"G" + bytes(3000), bytes(8192 - 4 - 2 * 192 - 1)]
)
@pytest.mark.parametrize("stamp", [b"", bytes(4)])
def test_a_recording_may_begin_within_a_transport_packet(before: bytes, stamp: bytes) -> None:
    packets = (stamp + ts(0x100, REST)) * 20
    assert structure("mpegts", before + packets) == (4 + len(stamp)) * 20


def test_the_first_transport_packet_is_not_searched_in_the_whole_file() -> None:
    assert structure("mpegts", bytes(8192) + ts(0x100, REST) * 3) == 0
    assert structure("mpegts", b"x" + ts(0x100, REST) * 2) == 0


def test_other_formats_have_no_structure() -> None:
    assert structure("nut", chunk(b"LIST", REST)) == 0
