"""A vendor that sends as fast as it can, and callers who read as fast as they can: processes of their own.

Run as `python -m tests.load.flood ROLE …`: a process says on stdout when it is ready, and ends with its stdin.
Both do as little as possible for each event, so that the server between them is what is busy.

The vendor speaks OpenAI's chat completions. A stream is endless unless the prompt has `events=N`; `size=N` are
the characters of an event. With `pace=S` each event waits so many seconds, and its text is the time of its
sending. A request without streaming is answered immediately.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import StreamTaskRequest
from pomelo.gen.v1.text_pb2 import Role

BLOCK = 64 * 1024
MOST_SECONDS = 300.0
"""It ends after this long, whatever happens."""

PER_CONNECTION = 25
"""gRPC streams that share a connection."""

_WHOLE = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
).encode()


# --- the vendor


def event(text: str = " word", finish: str | None = None) -> bytes:
    """One event, as a chunk of HTTP."""
    delta = {"content": text} if finish is None else {}
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
        "usage": None if finish is None else {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    return _chunk(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers the requests of a connection."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            if b'"stream":true' in body:
                await _stream(body, writer)
            else:
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                    % (len(_WHOLE), _WHOLE)
                )
            await writer.drain()
    except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
        pass  # it has left, or we are ending
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await writer.wait_closed()


async def _stream(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    wanted = re.search(rb"events=(\d+)", body)
    left = int(wanted[1]) if wanted else 10**9
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
    """Listens, and says where."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=BLOCK)
    _say(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    await _stdin()


# --- the readers


class Reader(asyncio.BufferedProtocol):
    """Sends a request, and throws away what comes."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._buffer = bytearray(256 * 1024)
        self.size = 0
        self.begun = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Sends the request."""
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def get_buffer(self, sizehint: int) -> bytearray:
        """Returns the one buffer, which is overwritten each time."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Counts the bytes."""
        self.size += nbytes
        if self.size > 1000:
            self.begun.set()


def by_rest(port: int, key: str, streams: int) -> list[bytes]:
    """What is sent on each connection: a request of server-sent events."""
    body = json.dumps(
        {"model": "gpt-4", "messages": [{"role": "user", "content": "Go"}], "stream": True}
    ).encode()
    head = (
        f"POST /api/v1/task HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return [head.encode() + body] * streams


def by_grpc(port: int, key: str, streams: int) -> list[bytes]:
    """What is sent on each connection: HTTP/2 with windows that never close, and calls of StreamTask."""
    task = Task(model="gpt-4")
    task.text.messages.add(role=Role.ROLE_USER, content="Go")
    message = StreamTaskRequest(task=task).SerializeToString()
    headers = _hpack(
        {
            ":method": "POST",
            ":scheme": "http",
            ":path": "/pomelo.v1.TaskService/StreamTask",
            ":authority": f"127.0.0.1:{port}",
            "te": "trailers",
            "content-type": "application/grpc",
            "authorization": f"Bearer {key}",
        }
    )
    window = 2**31 - 1
    connections = []
    for first in range(0, streams, PER_CONNECTION):
        sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, struct.pack(">HI", 4, window))
        sent += _frame(8, 0, 0, struct.pack(">I", window - 65535)) + _frame(4, 1, 0, b"")
        for number in range(min(PER_CONNECTION, streams - first)):
            sent += _frame(1, 4, 2 * number + 1, headers)
            sent += _frame(0, 1, 2 * number + 1, struct.pack(">BI", 0, len(message)) + message)
        connections.append(sent)
    return connections


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _hpack(headers: dict[str, str]) -> bytes:
    """Headers as literals, each shorter than 127 bytes."""
    return b"".join(
        b"\0" + b"".join(bytes([len(part)]) + part.encode() for part in pair) for pair in headers.items()
    )


async def readers(wire: str, port: int, key: str, streams: int) -> None:
    """Opens streams, prints when all of them flow, and at the end how many bytes were received."""
    loop = asyncio.get_running_loop()
    requests = (by_rest if wire == "rest" else by_grpc)(port, key, streams)
    opened = [await loop.create_connection(lambda r=r: Reader(r), "127.0.0.1", port) for r in requests]
    for _, reader in opened:
        await reader.begun.wait()
    began, before = time.monotonic(), sum(reader.size for _, reader in opened)
    _say("ready")
    await _stdin()
    took = time.monotonic() - began
    sizes = [reader.size for _, reader in opened]
    _say(json.dumps({"bytes": (sum(sizes) - before) / took, "least": min(sizes), "most": max(sizes)}))


# --- processes


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def _stdin() -> None:
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.wait([ended], timeout=MOST_SECONDS)


class Process:
    """A process of this file. `said` is its first line, `last` what it says at its end."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.said = ""
        self.last = ""
        self._process = process

    async def end(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self.last = (await self._process.stdout.read()).decode().strip()
        await self._process.wait()


@asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[Process]:
    """Starts a role; returns once it is ready, and ends it on leaving."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.load.flood",
        *arguments,
        stdin=pipe,
        stdout=pipe,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    running = Process(process)
    try:
        async with asyncio.timeout(MOST_SECONDS):
            running.said = (await process.stdout.readline()).decode().strip()
        yield running
    finally:
        await running.end()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    roles = parser.add_subparsers(dest="role", required=True)
    roles.add_parser("vendor")
    reading = roles.add_parser("readers")
    reading.add_argument("wire", choices=("rest", "grpc"))
    reading.add_argument("port", type=int)
    reading.add_argument("key")
    reading.add_argument("streams", type=int)
    given = parser.parse_args()
    if given.role == "vendor":
        asyncio.run(vendor())
    else:
        asyncio.run(readers(given.wire, given.port, given.key, given.streams))


if __name__ == "__main__":
    main()
