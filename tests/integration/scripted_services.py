"""Services scripted by a test, for tests of the gRPC server: one key is valid, and no engine is needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

import grpc

from pomelo.call import Call, Principal
from pomelo.errors import PomeloError, missing
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest, ListModelsResponse, Model
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec, TaskStarted
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest, TaskOptions
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.text_pb2 import ContentPart, Message, TextDelta, TextOutput
from pomelo.network.origin import GatewayProof
from pomelo.server.call_limits import CallLimits
from pomelo.server.connection_limits import ConnectionLimits, ConnectionObserver
from pomelo.server.server import Server, ServerOptions, open_server
from pomelo.service import Services
from pomelo.telemetry.events import Observer
from pomelo.telemetry.readiness import Readiness
from tests.calls import bearer
from tests.faults import http2
from tests.tasks import text_task

KEY = "pml_test_services"
PROOF = GatewayProof(b"p" * 32)
UPLOAD = "/pomelo.v1.MediaService/UploadMedia"
GATEWAY = PROOF.metadata("rest", "192.0.2.7", f"Bearer {KEY}")
STARTED = TaskEvent(started=TaskStarted(id="task_7"))


class RecordingVisit:
    """A visit that records its calls."""

    def __init__(self, refusal: PomeloError | None = None) -> None:
        self.reserved: list[int] = []
        self.refused: list[tuple[str, str]] = []
        self.refusal = refusal
        self.closed = 0
        self.unread = 0

    def reserve(self, size: int) -> None:
        """Records the size."""
        self.reserved.append(size)

    def hold(self, size: int) -> Callable[[], None]:
        """Counts the size in `unread`."""
        self.unread += size

        def release() -> None:
            self.unread -= size

        return release

    def is_alone(self) -> bool:
        """Says that no other account has a call in flight."""
        return True

    async def refuse(self, error: PomeloError, model: str = "") -> PomeloError:
        """Records the error; returns `refusal` in its place, if it is set."""
        self.refused.append((error.code, model))
        return self.refusal or error

    async def refuse_task(self, error: PomeloError) -> PomeloError:
        """Returns the error."""
        return error

    def close(self) -> None:
        """Counts the call."""
        self.closed += 1


async def complete(call: Call) -> None:
    """Waits for nothing."""


@dataclass
class ScriptedServices:
    """All services. One key is valid. `admission`, `before`, `during`, `upload` and `download` are awaited during
    the admission of a call, before and after the first event of a task, and in uploads and downloads. Tasks answer
    with `text`."""

    during: Callable[[Call], Awaitable[None]] = complete
    before: Callable[[Call], Awaitable[None]] = complete
    admission: Callable[[Call], Awaitable[None]] = complete
    upload: Callable[[AsyncIterator[bytes]], Awaitable[None]] | None = None
    download: Callable[[], Awaitable[None]] | None = None
    refusal: PomeloError | None = None
    chunks: tuple[bytes, ...] = (b"abc",)
    text: str = "one"
    calls: list[Call] = field(default_factory=list)
    visits: list[RecordingVisit] = field(default_factory=list)
    uploads: int = 0

    def services(self) -> Services:
        """Returns the services, all implemented by this object."""
        own: Any = self
        return Services(tasks=own, models=own, media=own, accounts=own, access=own)

    async def admit(self, call: Call) -> RecordingVisit:
        """Accepts the valid key, and reports limits."""
        self.calls.append(call)
        await self.admission(call)
        if call.api_key != KEY:
            raise PomeloError("invalid_api_key")
        call.principal = Principal("acme", "key", live=False)
        call.response_headers |= {"X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "19"}
        self.visits.append(RecordingVisit(self.refusal))
        return self.visits[-1]

    async def run_task(self, spec: TaskSpec, options: TaskOptions, call: Call) -> TaskResult:
        """Awaits `before` and `during`, and returns a result with `text`."""
        await self.before(call)
        await self.during(call)
        message = Message(content=[ContentPart(text=self.text)])
        return TaskResult(id="task_7", text=TextOutput(message=message))

    @asynccontextmanager
    async def stream_task(
        self, spec: TaskSpec, options: TaskOptions, call: Call
    ) -> AsyncIterator[AsyncIterator[TaskEvent]]:
        """Awaits `before` and then `during`, and streams two events, the second with `text`."""
        await self.before(call)

        async def produce() -> AsyncIterator[TaskEvent]:
            await self.during(call)
            yield STARTED
            yield TaskEvent(text_delta=TextDelta(text=self.text))

        yield produce()

    async def list_models(self, request: ListModelsRequest, call: Call) -> ListModelsResponse:
        """Returns one model."""
        return ListModelsResponse(models=[Model(id="m")])

    async def get_model(self, model_id: str, call: Call) -> Model:
        """Returns the model m, and refuses others."""
        if not model_id:
            raise missing("id")
        if model_id != "m":
            raise PomeloError("model_not_found")
        return Model(id="m")

    async def upload_media(self, content_type: str, chunks: AsyncIterator[bytes], call: Call) -> Media:
        """Awaits `upload` if it is set, and reads the rest."""
        self.uploads += 1
        if self.upload is not None:
            await self.upload(chunks)
        size = sum([len(chunk) async for chunk in chunks])
        return Media(id="media_1", size_bytes=size, content_type=content_type)

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call, offset: int = 0
    ) -> AsyncIterator[tuple[Media, AsyncIterator[bytes]]]:
        """Returns a file of `chunks`."""

        async def produce() -> AsyncIterator[bytes]:
            if self.download is not None:
                await self.download()
            skipped = offset
            for chunk in self.chunks:
                if rest := chunk[skipped:]:
                    yield rest
                skipped = max(0, skipped - len(chunk))

        yield Media(id=media_id, size_bytes=sum(map(len, self.chunks))), produce()


@dataclass
class ChargedAtTheEnd(ScriptedServices):
    """Services whose streams have one event, and then the header of their cost. `fails`: they end with an error."""

    fails: bool = False

    @asynccontextmanager
    async def stream_task(
        self, spec: TaskSpec, options: TaskOptions, call: Call
    ) -> AsyncIterator[AsyncIterator[TaskEvent]]:
        async def produce() -> AsyncIterator[TaskEvent]:
            yield STARTED
            call.response_trailers["X-Credits-Charged"] = "0.5"
            if self.fails:
                raise PomeloError("provider_failed")

        yield produce()


def raises(error: Exception) -> Callable[..., Awaitable[None]]:
    """Returns a function that raises the error."""

    async def fail(*_: Any) -> None:
        raise error

    return fail


@dataclass
class ScriptedServer:
    """A server with scripted services, and a channel to it."""

    services: ScriptedServices
    server: Server
    channel: grpc.aio.Channel

    @property
    def tasks(self) -> Any:
        """A stub of TaskService."""
        return TaskServiceStub(self.channel)

    @property
    def media(self) -> Any:
        """A stub of MediaService."""
        return MediaServiceStub(self.channel)

    def task(self, method: str, prompt: str = "Hi", **options: Any) -> Any:
        """Starts a call of RunTask or StreamTask."""
        request = RunTaskRequest if method == "RunTask" else StreamTaskRequest
        metadata = options.pop("metadata", bearer(KEY))
        return getattr(self.tasks, method)(request(spec=text_task(prompt)), metadata=metadata, **options)

    async def upload_seconds(self, *metadata: tuple[str, str]) -> float:
        """Returns the seconds until the server ends an upload of one message that its caller leaves open."""
        host, _, port = self.server.address.rpartition(":")
        async with http2.connect(host, int(port)) as connection, asyncio.timeout(20):
            call = connection.begin(UPLOAD, [*bearer(KEY), *metadata])
            message = UploadMediaRequest(chunk=b"x").SerializeToString()
            await connection.send(call, http2.prefixed(message))
            await connection.over(call)
            return call.lasted


@asynccontextmanager
async def serve_scripted(
    services: ScriptedServices | None = None,
    connections: ConnectionObserver | None = None,
    observers: Sequence[Observer] = (),
    readiness: Readiness | None = None,
    trusted: Sequence[str] = (),
    **limits: Any,
) -> AsyncIterator[ScriptedServer]:
    """Serves scripted services on a free port, for at most twenty seconds. `trusted` are networks of proxies."""
    services = services or ScriptedServices()
    options = ServerOptions(
        "127.0.0.1:0",
        grace=0,
        limits=CallLimits(**limits),
        connections=ConnectionLimits(trusted=tuple(map(ip_network, trusted))),
        observers=observers,
    )
    async with (
        asyncio.timeout(20),
        open_server(
            services.services(),
            options,
            proof=PROOF,
            connections=connections or ConnectionObserver(),
            readiness=readiness,
        ) as server,
        grpc.aio.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel,
    ):
        yield ScriptedServer(services, server, channel)
