"""The public gRPC services: each method calls a service interface and sends back its result.

They only translate: they check no key and no limit, and calculate no price.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from pomelo.errors import TABLE, PomeloError, invalid, missing
from pomelo.gen.v1 import account_service_pb2 as account_pb
from pomelo.gen.v1 import media_service_pb2 as media_pb
from pomelo.gen.v1 import model_service_pb2 as model_pb
from pomelo.gen.v1.task_service_pb2 import (
    RunTaskRequest,
    RunTaskResponse,
    StreamTaskRequest,
    StreamTaskResponse,
)
from pomelo.runtime.in_flight import LARGE_RESPONSE
from pomelo.server.calls import keyless
from pomelo.server.envelope import envelope
from pomelo.server.field_limit import SMALL_MESSAGE
from pomelo.server.messages import check_request
from pomelo.server.reflection import Reflection
from pomelo.server.rpc import Rpc
from pomelo.server.unread_streams import UNREAD_PER_BYTE
from pomelo.service import AccountService, MediaService, ModelService, TaskService

MAX_CHUNK = 1024 * 1024
"""Maximum bytes of an upload's chunk."""


_run_response = envelope(RunTaskResponse)
_stream_response = envelope(StreamTaskResponse)


class TaskServicer:
    def __init__(self, tasks: TaskService) -> None:
        self._tasks = tasks

    async def RunTask(self, request: RunTaskRequest, rpc: Rpc) -> bytes:
        rpc.model = request.spec.model
        if rpc.refused_body:
            raise _forwarded_refusal(rpc)
        return _run_response(await self._tasks.run_task(request.spec, request.options, rpc.call))

    # A coroutine that writes, not a generator: if the caller left during a write, the garbage collector would
    # close a generator, and with it the task, some time later.
    async def StreamTask(self, request: StreamTaskRequest, rpc: Rpc) -> None:
        rpc.model = request.spec.model
        async with self._tasks.stream_task(request.spec, request.options, rpc.call) as events:
            if rpc.gateway:
                await rpc.open()
            async for event in events:
                # Not before the first event: clients retry only calls that fail without initial metadata.
                if not rpc.accepted:
                    await rpc.open()
                data = _stream_response(event)
                rpc.unread = len(data) * UNREAD_PER_BYTE
                if len(data) <= LARGE_RESPONSE:
                    await rpc.write(data)
                else:
                    await rpc.write_large(data)
                rpc.unread = None


class ModelServicer:
    def __init__(self, models: ModelService) -> None:
        self._models = models

    async def ListModels(self, request: model_pb.ListModelsRequest, rpc: Rpc) -> model_pb.ListModelsResponse:
        return await self._models.list_models(request, rpc.call)

    async def GetModel(self, request: model_pb.GetModelRequest, rpc: Rpc) -> model_pb.GetModelResponse:
        return model_pb.GetModelResponse(model=await self._models.get_model(request.id, rpc.call))


class AccountServicer:
    def __init__(self, accounts: AccountService) -> None:
        self._accounts = accounts

    async def GetAccount(
        self, request: account_pb.GetAccountRequest, rpc: Rpc
    ) -> account_pb.GetAccountResponse:
        return account_pb.GetAccountResponse(account=await self._accounts.get_account(rpc.call))

    async def ListUsage(self, request: account_pb.ListUsageRequest, rpc: Rpc) -> account_pb.ListUsageResponse:
        return await self._accounts.list_usage(request, rpc.call)

    async def SumUsage(self, request: account_pb.SumUsageRequest, rpc: Rpc) -> account_pb.SumUsageResponse:
        return await self._accounts.sum_usage(request, rpc.call)


class MediaServicer:
    def __init__(self, media: MediaService) -> None:
        self._media = media

    async def UploadMedia(self, rpc: Rpc) -> media_pb.UploadMediaResponse:
        if rpc.call.header_error is not None:  # before a message is read
            raise rpc.call.header_error
        first = await rpc.next_message(media_pb.UploadMediaRequest)
        content_type, buffered = "", []
        if first is not None:
            check_request(first)
            content_type = first.header.content_type
            if first.WhichOneof("data") != "header":
                buffered.append(first)
        del first
        media = await self._media.upload_media(content_type, _chunks(buffered, rpc), rpc.call)
        return media_pb.UploadMediaResponse(media=media)

    @keyless
    async def DownloadMedia(self, rpc: Rpc) -> None:
        refusal = await rpc.admit_if_known()
        rpc.count_without_key()
        request = await rpc.small_message(media_pb.DownloadMediaRequest)
        if refusal is not None and not request.signature:
            raise refusal
        if rpc.visit is not None or request.signature:  # otherwise the missing key is reported
            check_request(request)
        opened = self._media.download_media(request.id, request.signature, rpc.call, request.offset)
        async with opened as (media, chunks):
            rpc.signed()
            await rpc.open()
            await rpc.send(media_pb.DownloadMediaResponse(media=media))
            async for chunk in chunks:
                await rpc.send(media_pb.DownloadMediaResponse(chunk=chunk))


class ReflectionServicer:
    """Serves grpc.reflection.v1alpha.ServerReflection without a key."""

    def __init__(self, services: list[str]) -> None:
        self._reflection = Reflection(services)

    @keyless
    async def ServerReflectionInfo(self, rpc: Rpc) -> None:
        await rpc.admit_if_known()
        rpc.count_without_key()
        await rpc.send_metadata()  # otherwise a first answer that is not read could not be ended
        # A response repeats its request.
        while (request := await rpc.next_message(ServerReflectionRequest, SMALL_MESSAGE)) is not None:
            for answer in self._reflection.answers(request):
                await rpc.send(answer)


def _forwarded_refusal(rpc: Rpc) -> PomeloError:
    """Counts a body that the gateway refused, and returns its error.

    Raises:
        PomeloError: overloaded.
    """
    assert rpc.visit is not None
    code, _, size = rpc.refused_body.partition(" ")
    # The body is not buffered here: only its size counts.
    rpc.visit.reserve(min(int(size), 1024 * 1024) if size.isascii() and size.isdigit() else 0)
    rpc.served = False
    return PomeloError(code if code in TABLE else "invalid_body")


async def _chunks(buffered: list[media_pb.UploadMediaRequest], rpc: Rpc) -> AsyncIterator[bytes]:
    """Yields the chunks of an upload: those of the `buffered` messages, then those that follow. It ends when
    the caller completes the upload, and not when the caller leaves.

    A message has up to 1 MiB, so it is released before the next one is awaited.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, payload_too_large, deadline_exceeded.
        grpc.aio.BaseError: the caller has left.
    """
    empty = True
    while buffered:
        empty = False
        yield _chunk(buffered.pop())
    while True:
        message = await rpc.next_message(media_pb.UploadMediaRequest)
        if message is None:
            break
        empty = False
        chunk = _chunk(check_request(message))
        del message
        yield chunk
        del chunk
    if empty:
        return  # refused in any case
    # To grpc.aio a caller who left looks like one who has completed the upload, until it cancels the call a
    # moment later. Sending something reveals the difference.
    await rpc.send_metadata()


def _chunk(message: media_pb.UploadMediaRequest) -> bytes:
    match message.WhichOneof("data"):
        case "chunk":
            chunk = message.chunk  # a copy each time
            if not 0 < len(chunk) <= MAX_CHUNK:
                raise invalid("chunk", f"1 to {MAX_CHUNK:,} bytes", minimum=1, maximum=MAX_CHUNK)
            return chunk
        case "header":
            raise invalid("header", "in the first message only")
    raise missing("chunk")
