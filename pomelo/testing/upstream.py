"""The server of `pomelo.testing`: it takes requests in, notes them, and plays replies step by step.

What a vendor's requests and answers look like stands in a wire's own file; `openai_wire` is one. Here is only
what a connection can do: send a packet, wait, end, break.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Self
from urllib.parse import unquote

from aiohttp import web

from pomelo.testing import (
    anthropic_wire,
    bfl_wire,
    elevenlabs_wire,
    mistral_wire,
    openai_wire,
    replicate_wire,
    together_wire,
)
from pomelo.testing.form import read_form
from pomelo.testing.reply import Gate, Received, Reply, Script, Step, Stop, Token, Wire

WIRES: tuple[Wire, ...] = (
    openai_wire.WIRE,
    elevenlabs_wire.WIRE,
    anthropic_wire.WIRE,
    mistral_wire.WIRE,
    bfl_wire.WIRE,
    together_wire.WIRE,
    replicate_wire.WIRE,
)
"""The vendors that the server plays by itself."""

BODY_MOST = 64 * 1024 * 1024
"""Bytes of a request that the server takes."""


class FaultUpstream:
    """The server; an async context manager.

    A valid request gets, in this order: the script of the first `when` that applies to it; what an earlier
    reply says shall `follow`; the next of the queue that `script` fills; `default`, or its wire's. An invalid
    one is refused as the vendor would, and uses up nothing. With `api_key` any other key is refused. `wires`
    are further vendors to play; where they serve a request, they do it in place of the built-in ones.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        wires: Iterable[Wire] = (),
    ) -> None:
        self.requests: list[Received] = []
        """Every request, valid or not, in order of arrival."""
        self.default: Script | None = None
        """Where set, in place of the wires' defaults."""
        self.aside: Callable[[Received], Reply | None] | None = elevenlabs_wire.aside
        """Answers requests that belong to no task, such as for a list of voices; they are not added
        to `requests` and use no script. None: the request is handled like any other."""
        self.serving = 0
        """Requests that are being answered now."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._wires = (*wires, *WIRES)
        self._host = host
        self._port = port
        self._api_key = api_key
        self._queue: deque[Script] = deque()
        self._cases: list[tuple[str, Script]] = []
        self._following: dict[str, deque[Script]] = {}
        self._waiting: asyncio.Queue[Received] = asyncio.Queue()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where the server is, without a slash at the end."""
        return f"http://{self._host}:{self._port}"

    @property
    def connections(self) -> int:
        """Connections that are open now, those that clients keep for later included."""
        server = None if self._runner is None else self._runner.server
        return 0 if server is None else len(server.connections)

    @property
    def openai_base_url(self) -> str:
        """The base URL as OpenAI's own clients take it, with /v1."""
        return f"{self.url}/v1"

    @property
    def elevenlabs_base_url(self) -> str:
        """The base URL as ElevenLabs' own clients take it, without /v1."""
        return f"{self.url}{elevenlabs_wire.PREFIX}"

    @property
    def bfl_base_url(self) -> str:
        """Where Black Forest Labs is played; as in the vendor's own clients, without /v1."""
        return f"{self.url}/bfl"

    @property
    def together_base_url(self) -> str:
        """Where Together is played; as in the vendor's own clients, without /v1."""
        return f"{self.url}/together"

    @property
    def replicate_base_url(self) -> str:
        """Where Replicate is played; as in the vendor's own clients, without /v1."""
        return f"{self.url}/replicate"

    @property
    def anthropic_base_url(self) -> str:
        """The base URL as Anthropic's own clients take it, without /v1."""
        return self.url

    @property
    def mistral_base_url(self) -> str:
        """The base URL as Mistral's own clients take it, without /v1."""
        return f"{self.url}{mistral_wire.PREFIX}"

    def script(self, *scripts: Script) -> None:
        """Adds to the queue: one for each of the next valid requests that no `when` takes."""
        self._queue.extend(scripts)

    def when(self, prompt: str, script: Script) -> None:
        """Plays `script` whenever the last message contains `prompt`; of several that apply, the oldest."""
        self._cases.append((prompt, script))

    def reset(self) -> None:
        """Forgets scripts, rules and requests; what is being played goes on."""
        self._queue.clear()
        self._cases.clear()
        self._following.clear()
        self.requests.clear()
        self.aside = elevenlabs_wire.aside
        self._waiting = asyncio.Queue()

    async def received(self) -> Received:
        """The next request that nobody has asked for here yet; waits for it."""
        return await self._waiting.get()

    async def idle(self) -> None:
        """Waits until no request is being answered."""
        await self._idle.wait()

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=BODY_MOST)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.serving += 1
        self._idle.clear()
        try:
            return await self._answer(request)
        finally:
            self.serving -= 1
            if not self.serving:
                self._idle.set()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        raw, body, form = b"", None, None
        if request.content_type == "multipart/form-data":
            with contextlib.suppress(ValueError):
                form = await read_form(request)
        else:
            raw = await request.read()
            with contextlib.suppress(ValueError):
                body = json.loads(raw)
        peer = request.transport.get_extra_info("peername") if request.transport else None
        received = Received(
            method=request.method,
            path=request.path,
            headers=request.headers.copy(),
            raw=raw,
            body=body,
            at=asyncio.get_running_loop().time(),
            connection=peer,
            query=dict(request.query),
            target=request.path_qs,
            form=form,
        )
        if self.aside is not None and (reply := self.aside(received)) is not None:
            return await _play(reply, request, received)
        self.requests.append(received)
        self._waiting.put_nowait(received)
        try:
            return await _play(self._reply(received), request, received)
        except (asyncio.CancelledError, ConnectionError):
            if request.transport is None or request.transport.is_closing():
                received.left_at = asyncio.get_running_loop().time()
                received.left.set()
            raise
        finally:
            received.done.set()

    def _reply(self, received: Received) -> Reply:
        # A path that no vendor has is refused in the first one's words.
        wire = next((wire for wire in self._wires if wire.serves(received)), WIRES[0])
        script: Script | None = wire.refused(received, self._api_key)
        if script is None:
            prompt = received.prompt
            script = next((script for part, script in self._cases if part in prompt), None)
        if script is None and (following := self._following.get(unquote(received.target))):
            script = following.popleft() if len(following) > 1 else following[0]
        if script is None:
            script = self._queue.popleft() if self._queue else self.default or wire.default
        reply = script if isinstance(script, Reply) else script(received)
        for target, scripts in reply.follow.items():
            self._following[unquote(target)] = deque(scripts)
        return reply


async def _play(reply: Reply, request: web.Request, received: Received) -> web.StreamResponse:
    transport = request.transport
    if transport is None:
        raise ConnectionResetError
    async with aclosing(_steps(reply.before, transport, received)) as packets:
        async for packet in packets:
            transport.write(packet)
    response = web.StreamResponse(status=reply.status, headers=dict(reply.headers))
    if transport.is_closing():
        return response
    await response.prepare(request)
    async with aclosing(_steps(reply.steps, transport, received)) as packets:
        async for packet in packets:
            await response.write(packet)
            # One turn of the loop, so that a reader on the same loop may see packets and not their sum.
            await asyncio.sleep(0)
    if not transport.is_closing():
        await response.write_eof()
    return response


async def _steps(
    steps: tuple[Step, ...], transport: asyncio.Transport, received: Received
) -> AsyncGenerator[bytes, None]:
    """The packets to send; does all else that the steps ask for."""
    for step in steps:
        if isinstance(step, bytes):
            yield step
            received.packets_sent += 1
            received.bytes_sent += len(step)
            received.tokens_sent += isinstance(step, Token)
        elif isinstance(step, Gate):
            await step.pass_through()
        elif step is Stop.SILENCE:
            await asyncio.get_running_loop().create_future()
        elif isinstance(step, Stop):
            _stop(step, transport)
            return
        else:
            await asyncio.sleep(step)


def _stop(stop: Stop, transport: asyncio.Transport) -> None:
    if stop is Stop.CLOSE:
        transport.close()
    elif stop is Stop.RESET:
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
