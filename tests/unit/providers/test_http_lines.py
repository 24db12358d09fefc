"""Lines of a stream, whatever the boundaries of its packets."""

from __future__ import annotations

import pytest

from pomelo.providers.errors import UpstreamError
from pomelo.providers.http.sse import MAX_EVENT_BYTES, LineParser

STREAM = '{"a": 1}\r\n\n  \n{"b": "é"}\n{"c": 3}'.encode()
LINES = [b'{"a": 1}', '{"b": "é"}'.encode(), b'{"c": 3}']


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_are_the_same_however_they_are_divided(size: int) -> None:
    parser = LineParser()
    packets = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    events = [event for packet in packets for event in parser.feed(packet)]
    assert [data for _, data in events] == LINES[:2]
    assert [*events, *parser.end()] == [("", line) for line in LINES]
    assert parser.end() == []


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_above_the_limit_fails(end: bytes) -> None:
    parser = LineParser()
    assert parser.feed(b"x" * MAX_EVENT_BYTES + b"\n") == [("", b"x" * MAX_EVENT_BYTES)]
    with pytest.raises(UpstreamError) as caught:
        parser.feed(b"x" * (MAX_EVENT_BYTES + 1) + end)
    assert caught.value.code == "provider_failed"
