"""Which streams end because their callers do not read."""

from __future__ import annotations

import asyncio

from pomelo.runtime.process import in_background
from pomelo.server.unread_streams import UnreadStreams
from tests.waiting import until


class FakeStream:
    """A stream that is looked at; the caller of a `read` one reads a message between any two looks."""

    def __init__(self, unread: float | None, *, read: bool = False) -> None:
        self._unread = unread
        self._read = read
        self.looks = 0

    @property
    def unread(self) -> float | None:
        self.looks += 1
        return self._unread

    @unread.setter
    def unread(self, seconds: float | None) -> None:
        if not self._read:
            self._unread = seconds


async def test_only_a_stream_that_waits_for_one_message_to_be_read_ends() -> None:
    stalled, slow = FakeStream(0.0), FakeStream(0.0, read=True)
    silent, large, left = FakeStream(None), FakeStream(-1000.0), FakeStream(0.0)
    ended: list[FakeStream] = []
    streams: UnreadStreams[FakeStream] = UnreadStreams()
    for stream in (stalled, slow, silent, large, left):
        streams.add(stream)
    streams.discard(left)
    async with in_background(streams.watch(0.04, ended.append)), asyncio.timeout(20):
        await until(lambda: slow.looks > 100 and ended)
    assert set(ended) == {stalled}
    assert silent.looks > 8
    assert not left.looks


async def test_a_stream_ends_after_the_time_and_a_second_for_each_kib() -> None:
    looks: dict[FakeStream, int] = {}
    small, large = FakeStream(0.0), FakeStream(-0.04)
    streams: UnreadStreams[FakeStream] = UnreadStreams()

    def end(stream: FakeStream) -> None:
        looks[stream] = stream.looks
        streams.discard(stream)

    for stream in (small, large):
        streams.add(stream)
    async with in_background(streams.watch(0.04, end)), asyncio.timeout(20):
        await until(lambda: len(looks) == 2)
    assert looks[large] > looks[small] > 8
