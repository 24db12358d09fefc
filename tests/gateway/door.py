"""A gateway before the real engine, whose one provider plays what a test says.

So a test decides when a provider speaks, fails or falls silent, and sees when it is closed.
"""

from __future__ import annotations

import asyncio
import io
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
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
PNG = b"\x89PNG\r\n\x1a\n" + b"picture" * 1000
SOUND = b"ID3" + bytes(range(256)) * 100


def words(*texts: str) -> list[Event]:
    """The events of a text answer."""
    usage = text_pb2.TokenUsage(prompt_tokens=3, completion_tokens=len(texts), total_tokens=3 + len(texts))
    return [Event(text_delta=text_pb2.TextDelta(content=text)) for text in texts] + [
        Event(
            text_delta=text_pb2.TextDelta(finish_reason=text_pb2.FinishReason.FINISH_REASON_STOP, usage=usage)
        )
    ]


class Player:
    """A provider that plays `script`; `closed` is set each time a play ends, however it does. `heard` has the
    beginnings of the sounds that jobs came with, read while they were there."""

    configured = True

    def __init__(self) -> None:
        self.script: Callable[[Job], AsyncIterator[Event]] | None = None
        self.jobs: list[Job] = []
        self.heard: list[bytes] = []
        self.closed = asyncio.Event()

    async def _play(self, job: Job) -> AsyncIterator[Event]:
        self.jobs.append(job)
        if job.audio is not None:
            with job.audio.path.open("rb") if job.audio.path else io.BytesIO(job.audio.data) as sound:
                self.heard.append(sound.read(64 * 1024))
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

    text = image = text_to_speech = speech_to_speech = speech_to_text = _play

    def _default(self, job: Job) -> list[Event]:
        kind = job.input.DESCRIPTOR.name
        if kind == "TextInput":
            return words("Hello", ' "wörld"\n')
        if kind == "ImageInput":
            result = TaskResult()
            result.image.images.add(data=PNG, content_type="image/png")
            progress = [Event(image_progress=image_pb2.ImageProgress(progress=p)) for p in (0.25, 1.0)]
            return [*progress, Event(result=result)]
        if kind == "SpeechToTextInput":
            script = speech_pb2.Transcription(text="hi there", language="en", audio_seconds=1)
            script.words.add(text="hi", start=0.0, end=0.5, speaker="speaker_0" if job.input.diarize else "")
            return [Event(result=TaskResult(transcription=script))]
        half = len(SOUND) // 2
        return [
            Event(audio_chunk=speech_pb2.AudioChunk(data=SOUND[:half], content_type="audio/mpeg")),
            Event(audio_chunk=speech_pb2.AudioChunk(data=SOUND[half:])),
        ]

    async def aclose(self) -> None:
        """See Provider."""


async def authenticate(call: Call) -> Principal:
    """Two keys are good; as the real one does, it fills the reply."""
    if call.api_key not in (KEY, HAIKU_ONLY):
        raise PomeloError("invalid_api_key")
    call.response_headers["X-Pomelo-Mode"] = "test"
    models = frozenset({"claude-3-haiku"}) if call.api_key == HAIKU_ONLY else None
    return Principal("default", "key", live=False, models=models, plan="unlimited")


@dataclass
class Door:
    """An open gateway, what is behind it, and a client of it."""

    host: str
    port: int
    player: Player
    media: MediaStore
    http: aiohttp.ClientSession
    services: Services
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {KEY}"})

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.host}:{self.port}"

    def ask(self, body: Any = None, **more: Any) -> Any:
        """Posts a task; `body` goes out as JSON."""
        headers = self.headers | more.pop("headers", {})
        if body is not None:
            more["json"] = body
        return self.http.post(f"{self.url}/api/v1/task", headers=headers, **more)

    @asynccontextmanager
    async def talk(self, data: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Opens a new connection and sends bytes on it."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(20):
                yield reader, writer
        finally:
            writer.transport.abort()

    async def raw(self, data: bytes) -> bytes:
        """Sends bytes on a connection of their own; everything that comes back until it is closed."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(10):
                return await reader.read()
        finally:
            writer.close()


@dataclass(frozen=True)
class StaticKeys:
    """Keys that a test decides on, in place of a keyring."""

    authenticate: Callable[[Call], Awaitable[Principal]]


@asynccontextmanager
async def open_door(
    folder: Path,
    *,
    tls: ssl.SSLContext | None = None,
    healthy: Callable[[], bool] = lambda: True,
    in_flight: InFlightLimits | None = None,
    authenticate: Callable[[Call], Awaitable[Principal]] = authenticate,
    **options: Any,
) -> AsyncIterator[Door]:
    """Opens a gateway with options of a test's own; media go to `folder`."""
    media = MediaStore(folder, b"s" * 32, now=time.time)
    player = Player()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(f"sqlite:{folder}.db"))
        await endow(store)
        ledger = Ledger(store, BUILTIN)
        catalog, router, turns = Catalog.load(), Router({"sandbox": player}), Turns()
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
        yield Door(host, port, player, media, http, services)
