"""The cutting of a byte stream into events."""

from __future__ import annotations

import itertools
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.errors import PomeloError
from pomelo.providers.http.sse import MAX_EVENT_BYTES, SseEvent, SseParser


def parse(*packets: bytes) -> list[SseEvent]:
    """All events of a stream that came in these packets."""
    parser = SseParser()
    return [event for packet in packets for event in parser.feed(packet)]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """The stream in packets, cut at `places`."""
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


def test_one_event_in_one_packet() -> None:
    assert parse(b"data: one\n\n", b"data: two\n\n") == [("", b"one"), ("", b"two")]


def test_many_events_in_one_packet_are_yielded_immediately_and_in_order() -> None:
    parser = SseParser()
    parser.feed(b": hello\n\n")
    packet = b"".join(b"data: %d\n\n" % number for number in range(100))
    assert parser.feed(packet) == [("", b"%d" % number) for number in range(100)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_every_line_end_ends_lines(end: bytes) -> None:
    stream = b"event: a\ndata: 1\n\ndata: 2\ndata: 3\n\n".replace(b"\n", end)
    assert parse(stream) == [("a", b"1"), ("", b"2\n3")]


def test_a_crlf_between_two_packets_is_one_line_end() -> None:
    assert parse(b"data: 1\r", b"\n", b"data: 2\r", b"\n\r", b"\n") == [("", b"1\n2")]


def test_an_empty_line_that_two_packets_share_ends_an_event() -> None:
    assert parse(b"data: 1\n", b"\ndata: 2\n\n") == [("", b"1"), ("", b"2")]


def test_comments_ids_retry_times_and_unknown_fields_are_skipped() -> None:
    stream = b": ping\n\nid: 7\nretry: 10\nfoo: bar\ndata: x\n\n: bye\n\n"
    assert parse(b"data: 0\n\n", stream) == [("", b"0"), ("", b"x")]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\r\n"])
def test_a_json_object_without_a_field_name_is_an_event(end: bytes) -> None:
    error = b'{"error": {"code": 429}}'
    for before, name in ((b"", ""), (b"data: 0\n\n: note\n", ""), (b"event: error\n", "error")):
        for size in (1, 7, 100):
            parser = SseParser()
            stream = before + error + end
            events = [e for at in range(0, len(stream), size) for e in parser.feed(stream[at : at + size])]
            assert (events + parser.end())[-1] == (name, error)
    assert parse(b"data: 1\n" + error + b"\n\n") == [("", b"1")]
    assert parse(error + b"\ndata: 1\n\n") == [("", error), ("", b"1")]


@pytest.mark.parametrize("before", [b"", b"id: 7\n", b"data:\n"])
def test_only_one_space_before_the_data_is_left_out(before: bytes) -> None:
    expected = b"\n  x " if before.startswith(b"data") else b"  x "
    assert parse(before + b"data:   x \n\n") == [("", expected)]
    assert parse(b"data: 0\n\n", before + b"data:   x \n\n")[1:] == [("", expected)]


def test_comments_without_empty_lines_can_go_on_for_ever() -> None:
    parser = SseParser()
    for _ in range(2 * MAX_EVENT_BYTES // 1000):
        assert parser.feed(b": " + b"x" * 997 + b"\n") == []
    assert parser.feed(b"data: x\n\n") == [("", b"x")]


def test_exactly_one_space_after_the_colon_goes() -> None:
    assert parse(b"data:a\n\n", b"data:  b\n\n", b"data: c \n\n") == [("", b"a"), ("", b" b"), ("", b"c ")]


def test_a_byte_order_mark_is_skipped() -> None:
    assert parse(b"\xef\xbb\xbfdata: x\n\n", b"data: y\n\n") == [("", b"x"), ("", b"y")]


def test_an_event_without_data_is_skipped_with_its_name() -> None:
    assert parse(b"event: ping\n\n", b"data: x\n\n") == [("", b"x")]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r"], ids=["none", "lf", "crlf", "cr"])
def test_an_event_without_its_empty_line_is_returned_at_the_end(end: bytes) -> None:
    for packets in (
        [b"data: one\n\nevent: x\ndata: [DONE]" + end],
        [b"data: one\n\nevent: x\nda", b"ta: [DONE]" + end],
    ):
        parser = SseParser()
        assert [event for packet in packets for event in parser.feed(packet)] == [("", b"one")]
        assert parser.end() == [("x", b"[DONE]")]
        assert parser.end() == []


@pytest.mark.parametrize(
    "stream", [b"", b"data: x\n\n", b"data: x\r\n\r\n", b"data: x\r\r", b": bye", b"event: x", b"id: 7\n"]
)
def test_nothing_is_returned_at_the_end_of_a_stream_without_an_unfinished_event(stream: bytes) -> None:
    parser = SseParser()
    parser.feed(stream)
    assert parser.end() == []


def test_an_unfinished_event_above_the_limit_fails_at_the_end() -> None:
    parser = SseParser()
    for _ in range(2):
        assert parser.feed(b"data: " + b"x" * (MAX_EVENT_BYTES // 2 - 7) + b"\n") == []
    parser.feed(b"data: " + b"x" * 100)
    with pytest.raises(PomeloError):
        parser.end()


def test_line_separators_within_data_do_not_end_a_line() -> None:
    for separator in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"):
        data = f"a{separator}b".encode()
        assert parse(b"data: " + data + b"\n\n", b"data: y\ndata: " + data + b"\n\n") == [
            ("", data),
            ("", b"y\n" + data),
        ]


def test_a_line_above_the_limit_fails_whether_it_ends_or_not() -> None:
    for packets in (
        [b"data: " + b"x" * MAX_EVENT_BYTES + b"\n\n"],
        [b"data: 1\n\n", b"data: " + b"x" * MAX_EVENT_BYTES + b"\n\n"],
        [b"data: 1\n\n", *[b"x" * 1000] * (MAX_EVENT_BYTES // 1000 + 1)],
        [b"data: 1\n\n" + b"x" * (MAX_EVENT_BYTES + 1)],
    ):
        with pytest.raises(PomeloError) as failure:
            parse(*packets)
        assert failure.value.code == "provider_failed"


def test_an_event_of_many_lines_is_limited_too() -> None:
    line = b"data: " + b"x" * 1000 + b"\n"
    with pytest.raises(PomeloError):
        parse(*[line] * (MAX_EVENT_BYTES // 1000))
    with pytest.raises(PomeloError):
        parse(b"data: " + b"x" * (MAX_EVENT_BYTES - 1000) + b"\n", *[b"data\n"] * 1000)


def test_an_event_of_many_short_lines_takes_no_more_memory_than_its_bytes() -> None:
    parser = SseParser()
    packet = b"data:ab\n" * 8192
    tracemalloc.start()
    try:
        for _ in range(16):
            assert parser.feed(packet) == []
        assert tracemalloc.get_traced_memory()[0] < 16 * len(packet)
    finally:
        tracemalloc.stop()
    assert parser.feed(b"\n") == [("", b"\n".join([b"ab"] * 16 * 8192))]


def test_a_line_at_the_limit_passes() -> None:
    data = b"x" * (MAX_EVENT_BYTES - 6)
    assert parse(b"data: " + data + b"\n\n") == [("", data)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_an_event_keeps_its_name_and_its_lines_wherever_packets_are_cut(end: bytes) -> None:
    stream = b"data: 0\n\nevent: a\ndata: data: 1\ndata: 2\n\nevent: b\n\ndata: data: 3\ndata: 4\n\n".replace(
        b"\n", end
    )
    events = [("", b"0"), ("a", b"data: 1\n2"), ("", b"data: 3\n4")]
    for places in itertools.combinations(range(len(stream) + 1), 2):
        assert parse(*cut(stream, list(places))) == events, places


def test_a_name_in_a_packet_of_its_own_is_kept() -> None:
    assert parse(b"data: 0\n\n", b"event: a\n", b"data: 1\n\n") == [("", b"0"), ("a", b"1")]


def test_a_name_that_is_not_utf_8_does_not_break_the_stream() -> None:
    assert parse(b"event: \xff\ndata: 1\n\n") == [("\ufffd", b"1")]


def test_the_size_limit_applies_to_an_event_and_not_to_a_stream() -> None:
    event = b"event: a\ndata: " + b"x" * 10_000 + b"\n\n"
    assert len(parse(*[event] * (2 * MAX_EVENT_BYTES // len(event)))) == 2 * MAX_EVENT_BYTES // len(event)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["", "delta", "größe"]),
        st.text().filter(lambda text: "\r" not in text and "\n" not in text),
        st.integers(1, 3),
    ),
    min_size=1,
)


@given(EVENTS, st.sampled_from([b"\n", b"\r\n", b"\r"]), st.lists(st.integers(0, 10_000)), st.booleans())
def test_the_events_are_the_same_however_the_stream_is_split(
    events: list[tuple[str, str, int]], end: bytes, places: list[int], comments: bool
) -> None:
    stream = b""
    expected: list[SseEvent] = []
    for name, text, lines in events:
        data = json.dumps(text, ensure_ascii=False).encode()
        stream += b": note\n\n" if comments else b""
        stream += b"event: %s\n" % name.encode() if name else b""
        stream += (b"data: %s\n" % data) * lines + b"\n"
        expected.append((name, b"\n".join([data] * lines)))
    stream = stream.replace(b"\n", end)
    assert parse(*cut(stream, places)) == expected
    assert parse(*(stream[at : at + 1] for at in range(len(stream)))) == expected


def test_the_size_of_each_event_is_limited_separately() -> None:
    parser = SseParser()
    line = b"data: " + b"x" * (MAX_EVENT_BYTES // 3) + b"\n"
    for _ in range(4):
        assert len(parser.feed(line + line + b"\n")) == 1
