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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from gateway.app import open_rest
from gateway.options import GatewayOptions
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
from pomelo.gen.v1 import speech_pb2
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.media.duration import Measurer
from pomelo.media.local import LocalMedia
from pomelo.media.store import MediaStore
from pomelo.providers.base import AudioSource, Job
from pomelo.runtime.in_flight import InFlightLimits
from pomelo.runtime.turns import Turns
from pomelo.service import Services
from pomelo.stores import open_store
from pomelo.telemetry.readiness import Readiness
from tests.app import endow
from tests.gateway.requests import HAIKU_ONLY, HEALTH, KEY, TTS, Sending, read_status
from tests.gateway.scripts import Script, audio, play, progress, text_events

PNG = b"\x89PNG\r\n\x1a\n" + b"a pixel" * 1000
AUDIO = b"ID3" + bytes(range(256)) * 100


class ScriptedProvider:
    """A provider that yields the events of `script`, or default ones; `closed` is set whenever a stream ends.
    `received_audio` has the beginning of each job's audio."""

    configured = True

    def __init__(self) -> None:
        self.script: Script | None = None
        self.jobs: list[Job[Any]] = []
        self.received_audio: list[bytes] = []
        self.closed = asyncio.Event()

    @property
    def audio(self) -> AudioSource:
        """The audio of the last job."""
        audio = self.jobs[-1].audio
        assert audio is not None
        return audio

    async def _stream(self, job: Job[Any]) -> AsyncIterator[Event]:
        self.jobs.append(job)
        if job.audio is not None:
            with job.audio.path.open("rb") if job.audio.path else io.BytesIO(job.audio.data) as file:
                self.received_audio.append(file.read(64 * 1024))
        self.closed.clear()
        try:
            async for event in (self.script or play(*self._default(job)))(job):
                yield event
        finally:
            self.closed.set()

    text = image = text_to_speech = speech_to_speech = speech_to_text = _stream

    def _default(self, job: Job[Any]) -> list[Event]:
        input_type = job.input.DESCRIPTOR.name
        if input_type == "TextInput":
            return text_events("Hello", ' "wörld"\n')
        if input_type == "ImageInput":
            result = TaskResult()
            result.image.images.add(data=PNG, content_type="image/png")
            return [progress(0.25), progress(1.0), Event(completed=result)]
        if input_type == "SpeechToTextInput":
            transcription = speech_pb2.Transcription(text="hi there", language_code="en", audio_seconds=1)
            word = transcription.words.add(text="hi", speaker="speaker_0" if job.input.diarize else None)
            word.start_offset.FromMilliseconds(0)
            word.end_offset.FromMilliseconds(500)
            return [Event(completed=TaskResult(transcription=transcription))]
        half = len(AUDIO) // 2
        return [audio(AUDIO[:half]), Event(audio_chunk=speech_pb2.AudioChunk(data=AUDIO[half:]))]

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

    def post_task(self, body: Any = None, **more: Any) -> Sending:
        """Posts a task; `body` is sent as JSON."""
        headers = self.headers | more.pop("headers", {})
        if body is not None:
            more["json"] = body
        return self.http.post(f"{self.url}/api/v1/task", headers=headers, **more)

    def get(self, path: str, **headers: str) -> Sending:
        """Requests a path with the key."""
        return self.http.get(self.url + path, headers=self.headers | headers)

    async def link(self) -> str:
        """Returns a signed link to new audio."""
        async with self.post_task({**TTS, "response_format": "url"}) as response:
            return str((await response.json())["audio"]["url"])

    @asynccontextmanager
    async def over(
        self, max_downloads: int = 512, trusted_proxies: tuple[Any, ...] = (), **services: Any
    ) -> AsyncIterator[GatewayApp]:
        """Runs another gateway, in which `services` replace those of this one."""
        replaced = replace(self.services, **services)
        options = GatewayOptions(max_downloads=max_downloads, trusted_proxies=trusted_proxies)
        async with open_rest(replaced, options, "127.0.0.1", 0) as (host, port):
            yield replace(self, host=host, port=port, services=replaced)

    @asynccontextmanager
    async def connect(
        self, data: bytes = b"", **options: Any
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Opens a new connection and sends bytes on it; aborts it at the end."""
        reader, writer = await asyncio.open_connection(self.host, self.port, **options)
        try:
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(20):
                yield reader, writer
        finally:
            writer.transport.abort()

    async def exchange(self, data: bytes) -> bytes:
        """Sends bytes on a new connection; returns everything received until it is closed."""
        async with asyncio.timeout(20), self.connect(data) as (reader, _):
            return await reader.read()

    async def is_healthy(self) -> bool:
        """Returns whether a health check on a new connection succeeds, once earlier data was processed."""
        return await self.status_of(HEALTH) == 200

    async def status_of(self, data: bytes) -> int:
        """Sends a request on a new connection; returns the status of its response."""
        async with self.connect(data) as (reader, _):
            return await read_status(reader)


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
    readiness: Readiness | None = None,
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
        ledger = Ledger(store)
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
            open_rest(
                services,
                GatewayOptions(**options),
                "127.0.0.1",
                0,
                tls,
                readiness=readiness,
            )
        )
        http = await stack.enter_async_context(aiohttp.ClientSession())
        yield GatewayApp(host, port, provider, media, http, services)
