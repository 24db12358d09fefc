"""Requests to a gateway: small bodies, requests as bytes, and what their responses say."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from functools import partial
from typing import Any

from aiohttp.client import _RequestContextManager

Sending = _RequestContextManager
"""A request that is sent when it is awaited or entered."""

KEY = "pml_test_open"
HAIKU_ONLY = "pml_test_haiku"

HI = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}
FLUX = {"model": "flux-1-pro", "prompt": "a lake"}
TTS = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam"}
STS = {"model": "eleven-labs-sts", "voice": "adam"}
STT = {"model": "eleven-labs-stt"}


JSON = "application/json"
FORM = "multipart/form-data; boundary=B"
CHUNKED = "Transfer-Encoding: chunked"
EXPECT = "Expect: 100-continue"


def raw_task(
    body: bytes | dict[str, Any] = b"",
    *lines: str,
    key: str = KEY,
    content_type: str | None = JSON,
    framing: str = "",
    version: str = "1.1",
    close: bool = True,
) -> bytes:
    """Returns a task request as bytes. `lines` are more headers; `framing` replaces Content-Length."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST /api/v1/task HTTP/{version}", "Host: x", f"Authorization: Bearer {key}"]
    head += [f"Content-Type: {content_type}"] if content_type is not None else []
    head += [framing or f"Content-Length: {len(data)}", *lines, *(["Connection: close"] if close else [])]
    return "\r\n".join([*head, "", ""]).encode() + data


def raw_get(path: str, *lines: str) -> bytes:
    """Returns a GET request as bytes."""
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


ACCOUNT = raw_get("/api/v1/account", f"Authorization: Bearer {KEY}")
HEALTH = raw_get("/healthz")
GOOD = raw_task(HI)
BAD = raw_task(b"{}", key="bad", close=False)


def headers_of(head: bytes) -> dict[str, str]:
    """Returns the headers of a raw response by name in lower case."""
    first, *lines = head.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    assert first.startswith("HTTP/1.")
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Reads the next response: status, headers by name in lower case, body."""
    async with asyncio.timeout(20):
        head = await reader.readuntil(b"\r\n\r\n")
        headers = headers_of(head)
        return int(head.split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def read_status(reader: asyncio.StreamReader) -> int:
    """Reads the next response; returns its status."""
    return (await read_response(reader))[0]


async def read_until_closed(reader: asyncio.StreamReader) -> bytes:
    """Reads until the server closes or resets the connection."""
    received = b""
    async with asyncio.timeout(20):
        with suppress(ConnectionError):
            while piece := await reader.read(65_536):
                received += piece
    return received


async def code_of(request: Sending) -> tuple[int, str]:
    """Returns the status and the error code of a response, empty on success; checks the form of an error."""
    async with request as response:
        value = await response.json()
        if "error" not in value:
            return response.status, ""
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["X-Request-Id"]
        assert set(value) == {"error"}
        assert set(value["error"]) == {"message", "type", "code"}
        return response.status, value["error"]["code"]


def events(body: bytes) -> list[tuple[str, Any]]:
    """Returns the events of a stream: (name, data as JSON or text); comments are left out."""
    parsed = []
    for block in body.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            data = fields["data"]
            parsed.append((fields.get("event", "message"), data if data == "[DONE]" else json.loads(data)))
    return parsed


async def events_of(request: Sending) -> list[tuple[str, Any]]:
    """Returns the events of a stream that begins with status 200."""
    async with request as response:
        assert response.status == 200
        return events(await response.read())


def code_of_field(values: Any, field: str) -> str:
    """Returns the code with which a body is refused for a field: it is missing or null, or wrong."""
    for name in re.findall(r"[^.\[\]]+", field):
        values = values[int(name)] if isinstance(values, list) else values.get(name)
    return "missing_parameter" if values is None else "invalid_parameter"


def long(size: int, **fields: Any) -> dict[str, Any]:
    """Returns a text task with a message of this size."""
    return {"model": "gpt-4", "messages": [{"role": "user", "content": "x" * size}], **fields}


incomplete = partial(raw_task, b"", framing="Content-Length: 100000")
"""The head of a request whose body never comes."""
