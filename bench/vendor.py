"""The stand-in vendor: OpenAI's chat completions and ElevenLabs' speech, prebuilt so that it costs little.

    python -m bench.vendor

Prints its URL, and serves until it is terminated. The text of a conversation says how it is streamed:
`[[200]]` gives 200 chunks in one burst, `[[200@50]]` gives 50 a second. The text of each chunk is its
number, or at a pace the time at which it was sent, in nanoseconds of the monotonic clock. The first packet of
speech has that time, too; with `[[1@50]]` in its text it comes a fiftieth of a second after the head.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from typing import cast

import httptools
import uvloop

STAMP = 20
"""Digits of the number or time in a chunk."""

SPEECH_BYTES = 64 * 1024
_PACKET = 4096
_TICK = 0.001
"""Seconds between two turns of the paced streams."""

_PACE_WITHIN = 1000
"""The bytes of a request in which its pace is."""

_PACE = re.compile(rb"\[\[(\d+)(?:@(\d+))?\]\]")
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n"
_CHUNK_HEAD = b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1790000000,"model":"bench",'
_CHUNK = _CHUNK_HEAD + b'"choices":[{"index":0,"delta":{%b},"finish_reason":%b}],"usage":null}'
_USAGE = b'"usage":{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":%d}'


def _whole(content_type: bytes, body: bytes) -> bytes:
    return _HEAD % content_type + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _piece(data: bytes) -> bytes:
    """A chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(data: bytes) -> bytes:
    return _piece(b"data: %b\n\n" % data)


COMPLETION = _whole(
    b"application/json",
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1790000000,"model":"bench","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"Hello! How can I help you today?"},"finish_reason":"stop"}],'
    + _USAGE % (9, 18)
    + b"}",
)
TRANSCRIPT = _whole(
    b"application/json",
    b'{"language_code":"en","language_probability":0.98,"text":"Hello.","words":[{"text":"Hello.","start":0.1,'
    b'"end":0.6,"type":"word"}],"audio_duration_secs":60.0}',
)
_STREAM_HEAD = _HEAD % b"%b" + b"Transfer-Encoding: chunked\r\n\r\n"
_SPEECH_HEAD = _STREAM_HEAD % b"audio/mpeg"
_SPEECH_REST = _piece(b"\xff" * _PACKET) * (SPEECH_BYTES // _PACKET - 1) + b"0\r\n\r\n"
_EVENTS_HEAD = _STREAM_HEAD % b"text/event-stream" + _event(
    _CHUNK % (b'"role":"assistant","content":""', b"null")
)
_BEFORE, _AFTER = _event(_CHUNK % (b'"content":"%b"' % (b"#" * STAMP), b"null")).split(b"#" * STAMP)


@cache
def _ending(chunks: int) -> bytes:
    return (
        _event(_CHUNK % (b"", b'"stop"'))
        + _event(_CHUNK_HEAD + b'"choices":[],' + _USAGE % (chunks, chunks + 9) + b"}")
        + _event(b"[DONE]")
        + b"0\r\n\r\n"
    )


def _token(number: int) -> bytes:
    return b"%b%020d%b" % (_BEFORE, number, _AFTER)


@cache
def _burst(chunks: int) -> bytes:
    return _EVENTS_HEAD + b"".join(map(_token, range(chunks))) + _ending(chunks)


def speech() -> bytes:
    """Audio whose first packet has the time at which it is sent."""
    return _piece((b"ID3\4%020d" % time.monotonic_ns()).ljust(_PACKET, b"\0")) + _SPEECH_REST


class Pacer:
    """Sends the chunks of all paced streams from one timer."""

    def __init__(self) -> None:
        self._due: defaultdict[int, list[tuple[Connection, int, int, int]]] = defaultdict(list)
        self._now = 0
        self._began = 0.0

    def add(self, connection: Connection, chunks: int, rate: int) -> None:
        """Sends `chunks`, `rate` a second, and the end of the stream."""
        if not self._due:
            self._began = time.monotonic() - self._now * _TICK
            asyncio.get_running_loop().call_later(_TICK, self._turn)
        self._due[self._now + 1].append((connection, chunks, chunks, round(1 / rate / _TICK)))

    def _turn(self) -> None:
        while self._now < (time.monotonic() - self._began) / _TICK:
            self._now += 1
            if streams := self._due.pop(self._now, None):
                self._send(streams)
        if self._due:
            wait = self._began + (self._now + 1) * _TICK - time.monotonic()
            asyncio.get_running_loop().call_later(max(0.0, wait), self._turn)

    def _send(self, streams: list[tuple[Connection, int, int, int]]) -> None:
        chunk = _token(time.monotonic_ns())
        for connection, left, chunks, ticks in streams:
            if connection.is_closed:
                continue
            if left:
                connection.transport.write(chunk)
                self._due[self._now + ticks].append((connection, left - 1, chunks, ticks))
            else:
                connection.transport.write(_ending(chunks))


class Requests(asyncio.Protocol):
    """A connection of a caller. `answer` gets the body of each request, whose path is in `_path`."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        self._body.clear()
        self.answer(body)

    def answer(self, body: bytes) -> None:
        raise NotImplementedError


class Connection(Requests):
    def __init__(self, pacer: Pacer) -> None:
        super().__init__()
        self._pacer = pacer
        self.is_closed = False

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True

    def answer(self, body: bytes) -> None:
        found = _PACE.search(body[:_PACE_WITHIN])
        chunks, rate = (int(found[1]), int(found[2] or 0)) if found else (0, 0)
        if b"/text-to-speech/" in self._path:
            self._speak(1 / rate if rate else 0.0)
        elif self._path.startswith(b"/v1/speech-to-text"):
            self.transport.write(TRANSCRIPT)
        elif b'"stream":true' in body or b'"stream": true' in body:
            self._stream(chunks, rate)
        else:
            self.transport.write(COMPLETION)

    def _speak(self, wait: float) -> None:
        if wait:
            self.transport.write(_SPEECH_HEAD)
            asyncio.get_running_loop().call_later(wait, lambda: self.transport.write(speech()))
        else:
            self.transport.write(_SPEECH_HEAD + speech())

    def _stream(self, chunks: int, rate: int) -> None:
        if rate:
            self.transport.write(_EVENTS_HEAD)
            self._pacer.add(self, chunks, rate)
        else:
            self.transport.write(_burst(chunks))


async def serve(make: Callable[[], Requests]) -> None:
    """Prints the URL of a server, and serves until the process is terminated."""
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0, backlog=4096)
    sys.stdout.write("http://{}:{}\n".format(*server.sockets[0].getsockname()))
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(partial(Connection, Pacer())))
