"""The floors: the least that a proxy with the same libraries does. Each is a process of its own.

    python -m bench.floors aiohttp|lines|httptools|grpc|hops --vendor URL

Prints its URL, and serves until it is terminated. A floor checks no key, counts no limit and bills nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
import grpc
import httptools
import uvloop
from aiohttp import web

from bench.vendor import Requests, serve
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import (
    RunTaskRequest,
    RunTaskResponse,
    StreamTaskRequest,
    StreamTaskResponse,
)
from pomelo.gen.v1.task_service_pb2_grpc import (
    TaskServiceServicer,
    TaskServiceStub,
    add_TaskServiceServicer_to_server,
)
from pomelo.gen.v1.text_pb2 import ROLE_ASSISTANT, ROLE_USER

COMPLETIONS = "/v1/chat/completions"
_UPLOAD_LIMIT = 64 * 1024 * 1024


def _client() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


async def _forever(url: str) -> None:
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


# --- aiohttp on both sides


async def serve_aiohttp(vendor: str, *, by_lines: bool = False) -> None:
    """Passes a request's body on to its path at the vendor, and the answer back: each chunk, or each line, by
    itself."""
    session = _client()

    async def relay(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {"Content-Type": request.headers["Content-Type"]}
        async with session.post(vendor + request.path, data=body, headers=headers) as answer:
            headers = {"Content-Type": answer.headers["Content-Type"]}
            if answer.content_length is not None:
                return web.Response(body=await answer.read(), status=answer.status, headers=headers)
            response = web.StreamResponse(status=answer.status, headers=headers)
            await response.prepare(request)
            if by_lines:
                async for line in answer.content:
                    await response.write(line)
            else:
                async for chunk, _ in answer.content.iter_chunks():
                    await response.write(chunk)
            await response.write_eof()
            return response

    await _serve_http(relay)


async def _serve_http(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
    app = web.Application(client_max_size=_UPLOAD_LIMIT)
    app.router.add_post("/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    await _forever("http://{}:{}".format(*runner.addresses[0]))


# --- httptools on both sides


class _Upstream(asyncio.Protocol):
    """A connection to the vendor. Bytes go back as they are: both sides have the same framing."""

    transport: asyncio.Transport

    def __init__(self, idle: deque[_Upstream]) -> None:
        self._idle = idle
        self._parser = httptools.HttpResponseParser(self)
        self._caller: asyncio.Transport | None = None
        self._is_complete = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes, caller: asyncio.Transport) -> None:
        """Sends a request whose answer goes to `caller`."""
        self._caller = caller
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        assert self._caller is not None
        self._parser.feed_data(data)
        self._caller.write(data)
        if self._is_complete:
            self._is_complete, self._caller = False, None
            self._idle.append(self)

    def on_message_complete(self) -> None:
        self._is_complete = True


class _Caller(Requests):
    def __init__(self, host: str, port: int, idle: deque[_Upstream]) -> None:
        super().__init__()
        self._host, self._port, self._idle = host, port, idle
        self._content_type = b""
        self._connecting: asyncio.Task[None] | None = None

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._content_type = value

    def answer(self, body: bytes) -> None:
        request = b"POST %b HTTP/1.1\r\nHost: vendor\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (
            *(self._path, self._content_type),
            *(len(body), body),
        )
        if self._idle:
            self._idle.pop().send(request, self.transport)
        else:
            self._connecting = asyncio.create_task(self._connect(request))

    async def _connect(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(lambda: _Upstream(self._idle), self._host, self._port)
        upstream.send(request, self.transport)


async def serve_httptools(vendor: str) -> None:
    """Does the same with httptools alone."""
    target = urlsplit(vendor)
    assert target.hostname is not None
    assert target.port is not None
    await serve(partial(_Caller, target.hostname, target.port, deque()))


# --- gRPC, and REST in front of it


def _body(spec: TaskSpec, **fields: Any) -> bytes:
    messages = [
        {"role": "user", "content": "".join(part.text for part in message.content)}
        for message in spec.text.messages
    ]
    return json.dumps({"model": spec.model, "messages": messages, **fields}).encode()


def _result(text: str, usage: Mapping[str, int]) -> TaskResult:
    result = TaskResult(id="task_1", model="bench")
    result.text.message.role = ROLE_ASSISTANT
    result.text.message.content.add().text = text
    result.usage.input_tokens, result.usage.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    return result


class _Tasks(TaskServiceServicer):
    """Asks the vendor by aiohttp's client."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url
        self._headers = {"Content-Type": "application/json"}

    async def RunTask(self, request: RunTaskRequest, context: object) -> RunTaskResponse:
        async with self._session.post(self._url, data=_body(request.spec), headers=self._headers) as answer:
            completion = json.loads(await answer.read())
        text = completion["choices"][0]["message"]["content"]
        return RunTaskResponse(result=_result(text, completion["usage"]))

    async def StreamTask(
        self, request: StreamTaskRequest, context: object
    ) -> AsyncIterator[StreamTaskResponse]:
        body = _body(request.spec, stream=True)
        number = 0
        async with self._session.post(self._url, data=body, headers=self._headers) as answer:
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                number += 1
                event = TaskEvent(sequence_number=number)
                if chunk["choices"]:
                    event.text_delta.text = chunk["choices"][0]["delta"].get("content", "")
                else:
                    event.completed.CopyFrom(_result("", chunk["usage"]))
                yield StreamTaskResponse(event=event)


async def _start_grpc(vendor: str) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    add_TaskServiceServicer_to_server(_Tasks(_client(), vendor + COMPLETIONS), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    return server, address


async def serve_grpc(vendor: str) -> None:
    """Answers RunTask and StreamTask with the same call upstream."""
    server, address = await _start_grpc(vendor)
    await _forever(f"http://{address}")
    await server.stop(None)


async def serve_hops(vendor: str) -> None:
    """Takes a task by aiohttp and asks that server by gRPC, all in one process."""
    server, address = await _start_grpc(vendor)
    stub = TaskServiceStub(grpc.aio.insecure_channel(address))

    async def ask(request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        spec = TaskSpec(model=body["model"])
        for message in body["messages"]:
            spec.text.messages.add(role=ROLE_USER).content.add().text = message["content"]
        response = await stub.RunTask(RunTaskRequest(spec=spec))
        result = response.result
        content = result.text.message.content[0].text
        answer = {"id": result.id, "choices": [{"message": {"role": "assistant", "content": content}}]}
        return web.json_response(answer)

    await _serve_http(ask)
    await server.stop(None)


FLOORS: Mapping[str, Callable[[str], Coroutine[Any, Any, None]]] = {
    "aiohttp": serve_aiohttp,
    "lines": partial(serve_aiohttp, by_lines=True),
    "httptools": serve_httptools,
    "grpc": serve_grpc,
    "hops": serve_hops,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One of the floors.")
    parser.add_argument("name", choices=FLOORS)
    parser.add_argument("--vendor", required=True, help="the URL of the stand-in vendor")
    given = parser.parse_args()
    uvloop.run(FLOORS[given.name](given.vendor))
