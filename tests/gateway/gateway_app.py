"""Runs a gateway over the real engine with a scripted provider.

A test decides when the provider sends, fails or stalls, and sees when it is closed.
"""

from __future__ import annotations

import asyncio
import io
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from gateway.app import open_rest
from gateway.state import GatewayOptions
from pomelo.accounts.access import Access
from pomelo.accounts.accounts import LocalAccounts
from pomelo.accounts.plans import BUILTIN
from pomelo.accounts.usage import UsageReader
from pomelo.call import Call, Principal
from pomelo.catalog.catalog import Catalog
from pomelo.engine.acceptance import Acceptance
from pomelo.engine.engine import Engine
from pomelo.engine.ledger import Ledger
from pomelo.engine.models import LocalModels
from pomelo.engine.routing import Router
from pomelo.errors import PomeloError
from pomelo.gen.v1 import image_pb2, speech_pb2, text_pb2
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.in_flight import InFlightLimits
from pomelo.media.duration import Measurer
from pomelo.media.local import LocalMedia
from pomelo.media.store import MediaStore
from pomelo.providers.base import Job
from pomelo.service import Services
from pomelo.stores import open_store
from pomelo.turns import Turns
from tests.app import endow

KEY = "pml_test_open"
HAIKU_ONLY = "pml_test_haiku"
PNG = b"\x89PNG\r\n\x1a\n" + b"a pixel" * 1000
AUDIO = b"ID3" + bytes(range(256)) * 100


def text_events(*texts: str) -> list[Event]:
    """The events of a text response."""
    usage = text_pb2.TokenUsage(prompt_tokens=3, completion_tokens=len(texts), total_tokens=3 + len(texts))
    return [Event(text_delta=text_pb2.TextDelta(content=text)) for text in texts] + [
        Event(
            text_delta=text_pb2.TextDelta(finish_reason=text_pb2.FinishReason.FINISH_REASON_STOP, usage=usage)
        )
    ]


class ScriptedProvider:
    """A provider that yields the events of `script`, or default ones; `closed` is set whenever a stream ends.
    `received_audio` has the beginning of each job's audio."""

    configured = True

    def __init__(self) -> None:
        self.script: Callable[[Job], AsyncIterator[Event]] | None = None
        self.jobs: list[Job] = []
        self.received_audio: list[bytes] = []
        self.closed = asyncio.Event()

    async def _stream(self, job: Job) -> AsyncIterator[Event]:
        self.jobs.append(job)
        if job.audio is not None:
            with job.audio.path.open("rb") if job.audio.path else io.BytesIO(job.audio.data) as file:
                self.received_audio.append(file.read(64 * 1024))
        self.closed.clear()
        try:
            if self.script is not None:
                async for event in self.script(job):
                    yield event
            else:
                for event in self._default(job):
                    yield event
        finally:
            self.closed.set()

    text = image = text_to_speech = speech_to_speech = speech_to_text = _stream

    def _default(self, job: Job) -> list[Event]:
        input_type = job.input.DESCRIPTOR.name
        if input_type == "TextInput":
            return text_events("Hello", ' "wörld"\n')
        if input_type == "ImageInput":
            result = TaskResult()
            result.image.images.add(data=PNG, content_type="image/png")
            progress = [Event(image_progress=image_pb2.ImageProgress(progress=p)) for p in (0.25, 1.0)]
            return [*progress, Event(result=result)]
        if input_type == "SpeechToTextInput":
            transcription = speech_pb2.Transcription(text="hi there", language="en", audio_seconds=1)
            transcription.words.add(
                text="hi", start=0.0, end=0.5, speaker="speaker_0" if job.input.diarize else ""
            )
            return [Event(result=TaskResult(transcription=transcription))]
        half = len(AUDIO) // 2
        return [
            Event(audio_chunk=speech_pb2.AudioChunk(data=AUDIO[:half], content_type="audio/mpeg")),
            Event(audio_chunk=speech_pb2.AudioChunk(data=AUDIO[half:])),
        ]

    async def aclose(self) -> None:
        pass


async def authenticate(call: Call) -> Principal:
    """Accepts two keys, and sets the response header that the real check sets."""
    if call.api_key not in (KEY, HAIKU_ONLY):
        raise PomeloError("invalid_api_key")
    call.response_headers["X-Pomelo-Mode"] = "test"
    models = frozenset({"claude-3-haiku"}) if call.api_key == HAIKU_ONLY else None
    return Principal("default", "key", live=False, models=models, plan="unlimited")


@dataclass
class GatewayApp:
    """A running gateway, its services, and an HTTP client of it."""

    host: str
    port: int
    provider: ScriptedProvider
    media: MediaStore
    http: aiohttp.ClientSession
    services: Services
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {KEY}"})

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://{self.host}:{self.port}"

    def post_task(self, body: Any = None, **more: Any) -> Any:
        """Posts a task; `body` is sent as JSON."""
        headers = self.headers | more.pop("headers", {})
        if body is not None:
            more["json"] = body
        return self.http.post(f"{self.url}/api/v1/task", headers=headers, **more)

    @asynccontextmanager
    async def connect(self, data: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Opens a new connection and sends bytes on it."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(20):
                yield reader, writer
        finally:
            writer.transport.abort()

    async def exchange(self, data: bytes) -> bytes:
        """Sends bytes on a new connection; returns everything received until it is closed."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(10):
                return await reader.read()
        finally:
            writer.close()


OpenApp = Callable[..., AbstractAsyncContextManager[GatewayApp]]


@dataclass(frozen=True)
class StaticKeys:
    """Keys that a test decides on, in place of a keyring."""

    authenticate: Callable[[Call], Awaitable[Principal]]


@asynccontextmanager
async def run_gateway(
    folder: Path,
    *,
    tls: ssl.SSLContext | None = None,
    healthy: Callable[[], bool] = lambda: True,
    in_flight: InFlightLimits | None = None,
    authenticate: Callable[[Call], Awaitable[Principal]] = authenticate,
    **options: Any,
) -> AsyncIterator[GatewayApp]:
    """Runs a gateway with these options; media are stored in `folder`."""
    media = MediaStore(folder, b"s" * 32, now=time.time)
    provider = ScriptedProvider()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(f"sqlite:{folder}.db"))
        await endow(store)
        ledger = Ledger(store, BUILTIN)
        catalog, router, turns = Catalog.load(), Router({"sandbox": provider}), Turns()
        access = Access(StaticKeys(authenticate), BUILTIN, catalog, ledger, in_flight)  # type: ignore[arg-type]
        measurer = Measurer()
        stack.push_async_callback(measurer.aclose)
        acceptance = Acceptance(access=access, router=router, media=media, measurer=measurer)
        services = Services(
            tasks=Engine(access, acceptance, ledger, router, media, turns),
            models=LocalModels(catalog, router, access),
            media=LocalMedia(media, access, turns=turns),
            accounts=LocalAccounts(store, UsageReader(store, b"s" * 32), access),
            access=access,
        )
        host, port = await stack.enter_async_context(
            open_rest(services, GatewayOptions(**options), "127.0.0.1", 0, tls, healthy=healthy)
        )
        http = await stack.enter_async_context(aiohttp.ClientSession())
        yield GatewayApp(host, port, provider, media, http, services)
