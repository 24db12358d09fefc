"""The fake server of `pomelo.testing`: it records requests, and plays replies step by step."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Self
from urllib.parse import unquote

from aiohttp import web

from pomelo.testing import (
    anthropic_protocol,
    bfl_protocol,
    elevenlabs_protocol,
    mistral_protocol,
    openai_protocol,
    replicate_protocol,
    together_protocol,
)
from pomelo.testing.form import read_form
from pomelo.testing.reply import Gate, Received, Reply, Script, Step, Stop, Token, VendorProtocol

PROTOCOLS: tuple[VendorProtocol, ...] = (
    openai_protocol.PROTOCOL,
    elevenlabs_protocol.PROTOCOL,
    anthropic_protocol.PROTOCOL,
    mistral_protocol.PROTOCOL,
    bfl_protocol.PROTOCOL,
    together_protocol.PROTOCOL,
    replicate_protocol.PROTOCOL,
)
"""The built-in vendors of the server."""

_MAX_BODY_BYTES = 64 * 1024 * 1024


class FaultUpstream:
    """The server; an async context manager.

    The reply to a valid request is the first of these: the script of the first `when` that matches, the
    `follow` of an earlier reply, the next script of the queue, `default`, the default of its protocol. An
    invalid request is refused as by the vendor, and uses no script. With `api_key`, any other key is refused.
    `protocols` are further vendors, which come before the built-in ones.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        protocols: Iterable[VendorProtocol] = (),
    ) -> None:
        self.requests: list[Received] = []
        """Every request, valid or not, in order of arrival."""
        self.default: Script | None = None
        """If set, it replaces the defaults of the protocols."""
        self.unscripted: Callable[[Received], Reply | None] | None = elevenlabs_protocol.unscripted
        """Replies to requests that belong to no task, such as for a list of voices: they are not added to
        `requests` and use no script. If it is or returns None, a request is handled like any other."""
        self.serving = 0
        """Requests that are being answered now."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._protocols = (*protocols, *PROTOCOLS)
        self._host = host
        self._port = port
        self._api_key = api_key
        self._queue: deque[Script] = deque()
        self._rules: list[tuple[str, Script]] = []
        self._following: dict[str, deque[Script]] = {}
        self._waiting: asyncio.Queue[Received] = asyncio.Queue()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """The server's URL, without a slash at the end."""
        return f"http://{self._host}:{self._port}"

    @property
    def connections(self) -> int:
        """The number of open connections, including those that clients keep for later."""
        server = None if self._runner is None else self._runner.server
        return 0 if server is None else len(server.connections)

    @property
    def openai_base_url(self) -> str:
        """The base URL for OpenAI's own clients, with /v1."""
        return f"{self.url}/v1"

    @property
    def elevenlabs_base_url(self) -> str:
        """The base URL for ElevenLabs' own clients, without /v1."""
        return f"{self.url}{elevenlabs_protocol.PREFIX}"

    @property
    def bfl_base_url(self) -> str:
        """The base URL of Black Forest Labs, without /v1."""
        return f"{self.url}{bfl_protocol.PREFIX}"

    @property
    def together_base_url(self) -> str:
        """The base URL of Together, without /v1."""
        return f"{self.url}{together_protocol.PREFIX}"

    @property
    def replicate_base_url(self) -> str:
        """The base URL of Replicate, without /v1."""
        return f"{self.url}{replicate_protocol.PREFIX}"

    @property
    def anthropic_base_url(self) -> str:
        """The base URL for Anthropic's own clients, without /v1."""
        return self.url

    @property
    def mistral_base_url(self) -> str:
        """The base URL for Mistral's own clients, without /v1."""
        return f"{self.url}{mistral_protocol.PREFIX}"

    def script(self, *scripts: Script) -> None:
        """Add scripts to the queue: one for each of the next valid requests that no `when` matches."""
        self._queue.extend(scripts)

    def when(self, prompt: str, script: Script) -> None:
        """Play `script` if the last message contains `prompt`; the oldest of several matches is played."""
        self._rules.append((prompt, script))

    def reset(self) -> None:
        """Delete scripts, rules and requests; replies that are being played continue."""
        self._queue.clear()
        self._rules.clear()
        self._following.clear()
        self.requests.clear()
        self.unscripted = elevenlabs_protocol.unscripted
        self._waiting = asyncio.Queue()

    async def received(self) -> Received:
        """Wait for the next request that was not returned here before."""
        return await self._waiting.get()

    async def idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *error: object) -> None:
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
        if self.unscripted is not None and (reply := self.unscripted(received)) is not None:
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
        # The first vendor refuses a path that no vendor has.
        protocol = next((one for one in self._protocols if one.serves(received)), PROTOCOLS[0])
        script: Script | None = protocol.refused(received, self._api_key)
        if script is None:
            prompt = received.prompt
            script = next((script for part, script in self._rules if part in prompt), None)
        if script is None and (following := self._following.get(unquote(received.target))):
            script = following.popleft() if len(following) > 1 else following[0]
        if script is None:
            script = self._queue.popleft() if self._queue else self.default or protocol.default
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
            # A turn of the event loop, so that a client on the same loop reads single packets.
            await asyncio.sleep(0)
    if not transport.is_closing():
        await response.write_eof()
    return response


async def _steps(
    steps: tuple[Step, ...], transport: asyncio.Transport, received: Received
) -> AsyncGenerator[bytes, None]:
    """Yield the packets to send, and execute the other steps."""
    for step in steps:
        if isinstance(step, bytes):
            yield step
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
