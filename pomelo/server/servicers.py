"""The gRPC services of callers: each method makes a `Call`, asks a port, and sends back what comes.

Made and served by `pomelo.server.main`. They translate and decide nothing: no key check, limit or price.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any

import grpc

from pomelo.call import Call
from pomelo.errors import PomeloError, invalid, missing
from pomelo.gen.v1 import account_service_pb2 as account_pb
from pomelo.gen.v1 import media_service_pb2 as media_pb
from pomelo.gen.v1 import model_service_pb2 as model_pb
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceServicer
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceServicer
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceServicer
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, RunTaskResponse, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceServicer
from pomelo.origin import GatewayProof
from pomelo.service import AccountService, MediaService, ModelService, TaskService
from pomelo.traces import trace
from pomelo.wire import OPEN_KEY, status_code, to_status, trailing

MAX_CHUNK = 1024 * 1024
"""Bytes that a piece of an upload may have."""

log = logging.getLogger("pomelo.server")

_RETRY = frozenset({409, 429, 503})
_LINGER = 1.0
"""Seconds for which what a refused uploader still sends is taken and dropped."""


class Running:
    """Counts the calls whose handlers have not ended, and knows which `proof` gateways show.

    grpc.aio's own stop returns before the handlers that it cancelled have cleaned up, so whoever stops a
    server waits here as well.
    """

    __slots__ = ("_idle", "count", "proof")

    def __init__(self, proof: GatewayProof | None = None) -> None:
        self.proof = proof or GatewayProof()
        self.count = 0
        self._idle = asyncio.Event()

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.count -= 1
        if not self.count:
            self._idle.set()

    async def idle(self) -> None:
        """Returns when no handler runs."""
        while self.count:
            self._idle.clear()
            await self._idle.wait()


class Rpc:
    """One gRPC call as a servicer sees it: its `Call`, and the headers and errors that go back."""

    __slots__ = ("_context", "_sent", "call", "gateway")

    def __init__(self, context: Any, proof: GatewayProof) -> None:
        given = dict(context.invocation_metadata() or ())
        self._context = context
        self._sent = False
        origin = proof.origin(given, context.peer())
        self.gateway = origin.gateway
        # A gateway's own deadline is a little later than its caller's, which it sends in a header: so a
        # late task is answered from here, with all that an answer bears.
        self.call = Call.from_headers(
            given.get,
            wire=origin.wire,
            address=origin.address,
            timeout=None if origin.proven else context.time_remaining(),
        )

    async def open(self) -> None:
        """Sends `call.reply`, once: the call was taken in and will be answered. Later calls do nothing."""
        if not self._sent:
            await self._send((OPEN_KEY, "1") if self.gateway else None)

    async def write(self, message: Any) -> None:
        """Sends one message of a stream; waits while the caller does not read."""
        await self._context.write(message)

    def close(self) -> None:
        """Adds what is known at a stream's end alone; to be called ahead of it."""
        if self.call.trailer:
            self._context.set_trailing_metadata(self._trailer())

    def _trailer(self) -> list[tuple[str, str]]:
        return [(name.lower(), value) for name, value in self.call.trailer.items()]

    async def refuse(self, error: PomeloError) -> None:
        """Ends the call with an error. Never returns.

        Raises:
            grpc.aio.AbortError: always; grpc.aio wants it back.
        """
        if not self._sent:
            retry = error.retry_after is not None and error.row.http in _RETRY
            await self._send(("retry-after", str(error.retry_after)) if retry else None)
            # Once more at the end: where both come at once, a busy client may lose what came first.
            self.call.trailer |= self.call.reply
        status = to_status(error)
        details = (*trailing(status), *self._trailer())
        await self._context.abort(status_code(error), status.message, details)

    async def _send(self, extra: tuple[str, str] | None) -> None:
        self._sent = True
        pairs = [(name.lower(), value) for name, value in self.call.reply.items()]
        if extra is not None:
            pairs.append(extra)
        await self._context.send_initial_metadata(pairs)


def answering(method: Callable[[Any, Any, Rpc], Awaitable[Any]]) -> Callable[[Any, Any, Any], Any]:
    """Makes a gRPC handler of a method: counts it as running, and answers what it raises."""

    async def handler(self: Any, request: Any, context: Any) -> Any:
        with self.running:
            rpc = Rpc(context, self.running.proof)
            try:
                return await method(self, request, rpc)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # Something inside was cancelled, not this call: left alone, the caller would wait for ever.
                log.error(
                    "request %s failed: something that it waited for was cancelled", rpc.call.request_id
                )
                error = PomeloError("internal_error")
            except PomeloError as refusal:
                error = refusal
            except grpc.aio.BaseError:
                raise  # The caller has left, or was aborted already; grpc.aio knows.
            except Exception as fault:
                log.error("request %s failed unexpectedly\n%s", rpc.call.request_id, trace(fault))
                error = PomeloError("internal_error")
            return await rpc.refuse(error)

    return handler


class TaskServicer(TaskServiceServicer):
    """pomelo.v1.TaskService over a `TaskService`."""

    def __init__(self, tasks: TaskService, running: Running) -> None:
        self._tasks = tasks
        self.running = running

    @answering
    async def RunTask(self, request: RunTaskRequest, rpc: Rpc) -> RunTaskResponse:
        """See the contract."""
        result = await self._tasks.run_task(request.task, rpc.call)
        await rpc.open()
        return RunTaskResponse(result=result)

    # A coroutine that writes, not a generator: a generator would be closed by the garbage collector when
    # the caller leaves during a write, and the task with it, some time later.
    @answering
    async def StreamTask(self, request: StreamTaskRequest, rpc: Rpc) -> None:
        """See the contract."""
        async with self._tasks.stream_task(request.task, rpc.call) as events:
            await rpc.open()
            async for event in events:
                await rpc.write(event)
        rpc.close()


class ModelServicer(ModelServiceServicer):
    """pomelo.v1.ModelService over a `ModelService`."""

    def __init__(self, models: ModelService, running: Running) -> None:
        self._models = models
        self.running = running

    @answering
    async def ListModels(self, request: model_pb.ListModelsRequest, rpc: Rpc) -> model_pb.ListModelsResponse:
        """See the contract."""
        models = await self._models.list_models(rpc.call)
        await rpc.open()
        return model_pb.ListModelsResponse(models=models)

    @answering
    async def GetModel(self, request: model_pb.GetModelRequest, rpc: Rpc) -> model_pb.GetModelResponse:
        """See the contract."""
        model = await self._models.get_model(request.name, rpc.call)
        await rpc.open()
        return model_pb.GetModelResponse(model=model)


class AccountServicer(AccountServiceServicer):
    """pomelo.v1.AccountService over an `AccountService`."""

    def __init__(self, accounts: AccountService, running: Running) -> None:
        self._accounts = accounts
        self.running = running

    @answering
    async def GetAccount(
        self, request: account_pb.GetAccountRequest, rpc: Rpc
    ) -> account_pb.GetAccountResponse:
        """See the contract."""
        account = await self._accounts.get_account(rpc.call)
        await rpc.open()
        return account_pb.GetAccountResponse(account=account)

    @answering
    async def ListUsage(self, request: account_pb.ListUsageRequest, rpc: Rpc) -> account_pb.ListUsageResponse:
        """See the contract."""
        usage = await self._accounts.list_usage(request, rpc.call)
        await rpc.open()
        return usage


class MediaServicer(MediaServiceServicer):
    """pomelo.v1.MediaService over a `MediaService`."""

    def __init__(self, media: MediaService, running: Running) -> None:
        self._media = media
        self.running = running

    @answering
    async def UploadMedia(
        self, requests: AsyncIterator[media_pb.UploadMediaRequest], rpc: Rpc
    ) -> media_pb.UploadMediaResponse:
        """See the contract."""
        pieces = aiter(requests)
        first = await anext(pieces, None)
        content_type, begun = "", []
        if first is not None:
            content_type = first.content_type
            if first.WhichOneof("data") != "content_type":
                begun.append(first)
        del first
        try:
            media = await self._media.upload_media(content_type, _chunks(begun, pieces, rpc), rpc.call)
        except PomeloError:
            if not rpc.gateway:
                await _linger(pieces)
            raise
        await rpc.open()
        return media_pb.UploadMediaResponse(media=media)

    @answering
    async def DownloadMedia(self, request: media_pb.DownloadMediaRequest, rpc: Rpc) -> None:
        """See the contract."""
        async with self._media.download_media(request.media_id, request.signature, rpc.call) as (
            media,
            chunks,
        ):
            await rpc.open()
            await rpc.write(media_pb.DownloadMediaResponse(media=media))
            async for chunk in chunks:
                await rpc.write(media_pb.DownloadMediaResponse(chunk=chunk))


async def _chunks(
    begun: list[media_pb.UploadMediaRequest], rest: AsyncIterator[media_pb.UploadMediaRequest], rpc: Rpc
) -> AsyncIterator[bytes]:
    """The bytes of an upload, of those that have `begun` it and of the rest. It ends when the caller says so,
    not when the caller is gone.

    A piece has up to 1 MiB, so none is held while the next one is waited for.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    while begun:
        yield _chunk(begun.pop())
    async for piece in rest:
        chunk = _chunk(piece)
        del piece
        yield chunk
        del chunk
    try:
        # grpc.aio shows a caller who left as one who is done, and cancels us a moment later. Sending
        # something brings that moment about.
        await rpc.open()
    except grpc.aio.BaseError:
        await asyncio.Event().wait()  # until we are cancelled


def _chunk(piece: media_pb.UploadMediaRequest) -> bytes:
    match piece.WhichOneof("data"):
        case "chunk":
            chunk = piece.chunk  # a copy each time
            if not 0 < len(chunk) <= MAX_CHUNK:
                raise invalid("chunk", f"1 to {MAX_CHUNK:,} bytes")
            return chunk
        case "content_type":
            raise invalid("content_type", "in the first message alone")
    raise missing("chunk")


async def _linger(pieces: AsyncIterator[Any]) -> None:
    """Drops what a refused uploader still sends, for a moment.

    grpc.aio's client forgets the status that it got when one of its writes fails, so an uploader that is
    about to end gets the chance to.
    """
    try:
        async with asyncio.timeout(_LINGER):
            async for _ in pieces:
                pass
    except TimeoutError:
        pass
