"""Services that a test plays, for front ends of gRPC: one key is good, and nothing has to be computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from pomelo.call import Call, Principal
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2 import Model
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest, StreamTaskResponse, TaskStarted
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.text_pb2 import TextDelta
from pomelo.origin import GatewayProof
from pomelo.server.limits import CallLimits, Connections
from pomelo.server.server import Server, ServerOptions, open_server
from pomelo.service import Services
from tests.calls import bearer
from tests.faults import http2
from tests.tasks import text_task

KEY = "pml_test_services"
PROOF = GatewayProof(b"p" * 32)
UPLOAD = "/pomelo.v1.MediaService/UploadMedia"
GATEWAY = PROOF.metadata("rest", "192.0.2.7", f"Bearer {KEY}")
Event = StreamTaskResponse
STARTED = Event(started=TaskStarted(id="task_7"))
TEXT = Event(text_delta=TextDelta(content="one"))


class Visited:
    """A visit that records what happens to it."""

    def __init__(self, refusal: PomeloError | None = None) -> None:
        self.reserved: list[int] = []
        self.refused: list[tuple[str, str]] = []
        self.refusal = refusal
        self.closed = 0

    def reserve(self, size: int) -> None:
        """Records the bytes."""
        self.reserved.append(size)

    async def refuse(self, error: PomeloError, model: str = "") -> PomeloError:
        """Records the refusal; gives `refusal` the precedence."""
        self.refused.append((error.code, model))
        return self.refusal or error

    async def refuse_task(self, error: PomeloError) -> PomeloError:
        """Gives the error back."""
        return error

    def close(self) -> None:
        """Records the end."""
        self.closed += 1


async def complete(call: Call) -> None:
    """A task that has nothing to wait for."""


@dataclass
class Played:
    """All services in one. One key is good; what the other fields say is awaited where their names say."""

    during: Callable[[Call], Awaitable[None]] = complete
    before: Callable[[Call], Awaitable[None]] = complete
    admission: Callable[[Call], Awaitable[None]] = complete
    upload: Callable[[AsyncIterator[bytes]], Awaitable[None]] | None = None
    download: Callable[[], Awaitable[None]] | None = None
    refusal: PomeloError | None = None
    chunks: tuple[bytes, ...] = (b"abc",)
    calls: list[Call] = field(default_factory=list)
    visits: list[Visited] = field(default_factory=list)
    uploads: int = 0

    def services(self) -> Services:
        """The interfaces of this."""
        played: Any = self
        return Services(tasks=played, models=played, media=played, accounts=played, access=played)

    async def admit(self, call: Call) -> Visited:
        """Accepts one key, and reports limits."""
        self.calls.append(call)
        await self.admission(call)
        if call.api_key != KEY:
            raise PomeloError("invalid_api_key")
        call.principal = Principal("acme", "key", live=False)
        call.response_headers |= {"X-RateLimit-Limit": "20", "X-RateLimit-Remaining": "19"}
        self.visits.append(Visited(self.refusal))
        return self.visits[-1]

    async def run_task(self, task: Task, call: Call) -> TaskResult:
        """Does as the test says."""
        await self.before(call)
        await self.during(call)
        return TaskResult(id="task_7")

    @asynccontextmanager
    async def stream_task(self, task: Task, call: Call) -> AsyncIterator[AsyncIterator[Event]]:
        """Does as the test says before the first event and after it."""
        await self.before(call)

        async def play() -> AsyncIterator[Event]:
            await self.during(call)
            yield STARTED
            yield TEXT

        yield play()

    async def list_models(self, call: Call) -> list[Model]:
        """One model."""
        return [Model(name="m")]

    async def upload_media(self, content_type: str, chunks: AsyncIterator[bytes], call: Call) -> Media:
        """Reads an upload, or does as the test says."""
        self.uploads += 1
        if self.upload is not None:
            await self.upload(chunks)
        size = sum([len(chunk) async for chunk in chunks])
        return Media(media_id="media_1", size_bytes=size, content_type=content_type)

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call
    ) -> AsyncIterator[tuple[Media, AsyncIterator[bytes]]]:
        """A file of `chunks`."""

        async def play() -> AsyncIterator[bytes]:
            if self.download is not None:
                await self.download()
            for chunk in self.chunks:
                yield chunk

        yield Media(media_id=media_id, size_bytes=sum(map(len, self.chunks))), play()


def raises(error: Exception) -> Callable[..., Awaitable[None]]:
    """What fails with that error."""

    async def fail(*_: Any) -> None:
        raise error

    return fail


@dataclass
class Front:
    """A server before played services, and a channel to it."""

    played: Played
    server: Server
    channel: grpc.aio.Channel

    @property
    def tasks(self) -> Any:
        """The stub of tasks."""
        return TaskServiceStub(self.channel)

    @property
    def media(self) -> Any:
        """The stub of media."""
        return MediaServiceStub(self.channel)

    def task(self, method: str, prompt: str = "Hi", **more: Any) -> Any:
        """A call of either method."""
        request = RunTaskRequest if method == "RunTask" else StreamTaskRequest
        metadata = more.pop("metadata", bearer(KEY))
        return getattr(self.tasks, method)(request(task=text_task(prompt)), metadata=metadata, **more)

    async def lasts(self, *metadata: tuple[str, str]) -> float:
        """Seconds until the server ends an upload that its caller goes on with after one message."""
        host, _, port = self.server.address.rpartition(":")
        async with http2.connect(host, int(port)) as connection, asyncio.timeout(10):
            call = connection.begin(UPLOAD, [*bearer(KEY), *metadata])
            message = UploadMediaRequest(chunk=b"x").SerializeToString()
            await connection.send(call, http2.prefixed(message))
            await connection.over(call)
            return call.lasted


@asynccontextmanager
async def front(
    played: Played | None = None, connections: Connections | None = None, **limits: Any
) -> AsyncIterator[Front]:
    """Opens one; a test of it ends within ten seconds."""
    played = played or Played()
    options = ServerOptions("127.0.0.1:0", grace=0, limits=CallLimits(**limits))
    async with (
        asyncio.timeout(10),
        open_server(
            played.services(), options, proof=PROOF, connections=connections or Connections()
        ) as server,
        grpc.aio.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel,
    ):
        yield Front(played, server, channel)
