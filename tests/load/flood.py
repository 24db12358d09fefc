"""A vendor that sends streams at full speed, and readers for them, as processes of their own.

Run as `python -m tests.load.flood vendor` or `readers PROTOCOL PORT KEY STREAMS`: a process prints a line when it is ready, and ends when its stdin
ends. Both do as little as possible for each event, so that the server between them is the bottleneck.

The vendor has OpenAI's chat completions. A stream is endless unless the prompt contains `events=N`; `size=N`
sets the characters of an event. With `pace=S` each event is sent S seconds after the last, and its text is
the time when it was sent. A request without streaming is answered immediately.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from functools import partial
from typing import Any

from pomelo.gen.v1.task_service_pb2 import StreamTaskRequest
from tests.faults import frames
from tests.load.child_process import print_line, stdin_end
from tests.load.rest_attacks import head
from tests.tasks import text_body, text_task

BLOCK = 64 * 1024
MAX_SECONDS = 300.0
"""Seconds after which the process ends in any case."""

PER_CONNECTION = 25
"""gRPC streams on one connection."""

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def completion(suffix: str, choice: dict[str, Any], **more: Any) -> bytes:
    """A completion or a chunk in JSON; `suffix` is that of its type."""
    head = {"id": "chatcmpl-1", "object": f"chat.completion{suffix}", "created": 1, "model": "gpt-4"}
    return json.dumps({**head, "choices": [{"index": 0, **choice}], **more}, separators=(",", ":")).encode()


_MESSAGE = {"message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
_RESPONSE = completion("", _MESSAGE, usage=USAGE)


# --- the vendor


def event(text: str = " word", finish: str | None = None) -> bytes:
    delta = {"content": text} if finish is None else {}
    choice = {"delta": delta, "logprobs": None, "finish_reason": finish}
    usage = None if finish is None else USAGE
    data = completion(".chunk", choice, system_fingerprint="fp_1", usage=usage)
    return _chunk(b"data: " + data + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers the requests of a connection."""
    try:
        while True:
            start = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", start)
            body = await reader.readexactly(int(length[1]) if length else 0)
            if b'"stream":true' in body:
                await _stream(body, writer)
            else:
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                    % (len(_RESPONSE), _RESPONSE)
                )
            await writer.drain()
    except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
        pass  # the client disconnected, or this process is ending
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await writer.wait_closed()


async def _stream(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    limit = re.search(rb"events=(\d+)", body)
    left = int(limit[1]) if limit else 10**9
    pace = re.search(rb"pace=([\d.]+)", body)
    if pace:
        for _ in range(left):
            await asyncio.sleep(float(pace[1]))
            writer.write(event(f" {time.monotonic_ns()}"))
        left = 0
    size = re.search(rb"size=(\d+)", body)
    one = event("x" * int(size[1])) if size else event()
    count = max(1, BLOCK // len(one))
    block = one * count
    while left > 0:
        writer.write(block if left >= count else one * left)
        left -= count
        await writer.drain()
    writer.write(event(finish="stop") + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def vendor() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=BLOCK)
    print_line(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    await asyncio.wait([stdin_end()], timeout=MAX_SECONDS)


# --- the readers


class Reader(asyncio.BufferedProtocol):
    """Sends a request, and discards the response."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._buffer = bytearray(256 * 1024)
        self.size = 0
        self.started = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.size += nbytes
        if self.size > 1000:
            self.started.set()


def by_rest(key: str, streams: int) -> list[bytes]:
    """The bytes to send on each connection: a request for server-sent events."""
    body = json.dumps(text_body("Go", stream=True)).encode()
    return [head(key, len(body)) + body] * streams


def by_grpc(key: str, streams: int) -> list[bytes]:
    """The bytes to send on each connection: HTTP/2 with the largest windows, and calls of StreamTask."""
    message = StreamTaskRequest(spec=text_task("Go")).SerializeToString()
    authorization = ("authorization", f"Bearer {key}")
    preface = frames.wide_hello() + frames.frame(frames.SETTINGS, frames.ACK)
    connections = []
    for first in range(0, streams, PER_CONNECTION):
        data = preface
        for number in range(min(PER_CONNECTION, streams - first)):
            stream = 2 * number + 1
            data += frames.headers(stream, "/pomelo.v1.TaskService/StreamTask", authorization)
            data += frames.message(stream, message)
        connections.append(data)
    return connections


async def readers(protocol: str, port: str, key: str, streams: str) -> None:
    """Opens streams, prints a line when all of them have started, and at the end the received bytes."""
    loop = asyncio.get_running_loop()
    requests = (by_rest if protocol == "rest" else by_grpc)(key, int(streams))
    opened = [await loop.create_connection(partial(Reader, one), "127.0.0.1", int(port)) for one in requests]
    for _, reader in opened:
        await reader.started.wait()
    began, before = time.monotonic(), sum(reader.size for _, reader in opened)
    print_line("ready")
    await asyncio.wait([stdin_end()], timeout=MAX_SECONDS)
    seconds = time.monotonic() - began
    sizes = [reader.size for _, reader in opened]
    print_line(json.dumps({"bytes": (sum(sizes) - before) / seconds, "min": min(sizes), "max": max(sizes)}))


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    asyncio.run(vendor() if role == "vendor" else readers(*arguments))
