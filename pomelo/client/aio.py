"""The client for programs with asyncio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import IO, Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import grpc

from pomelo.client import tasks
from pomelo.client.connection import Attempts, ClientBase
from pomelo.client.errors import ClientClosed, IncompleteStream, text_metadata
from pomelo.client.files import File, Upload, media_id, written_file
from pomelo.client.pipes import may_stall, open_pipe_async, to_daemon_thread
from pomelo.client.streams import StreamState
from pomelo.client.stubs import Stubs, UsageOptions, list_usage_request, sum_usage_request
from pomelo.client.tasks import Task
from pomelo.gen.v1.account_service_pb2 import Account, GetAccountRequest, UsageRecord, UsageSum
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest
from pomelo.gen.v1.model_service_pb2 import GetModelRequest, ListModelsRequest, Model
from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.status import cause, error_of

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


def _run(build: Callable[P, Task[T, R]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]]:
    @tasks.described_by(build)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._run_task(build(*args, **kwargs))

    return method


def _stream(build: Callable[P, Task[T, R]]) -> Callable[Concatenate[AsyncClient, P], AsyncStream[T, R]]:
    @tasks.described_by(build)
    def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncStream[T, R]:
        return AsyncStream(self, build(*args, **kwargs))

    return method


class AsyncClient(ClientBase):
    """A client of a Pomelo server, over gRPC. One client serves any number of concurrent calls.

    `target` is `host:port` (with TLS unless it is this machine), `https://host[:port]`, `http://host:port` or
    `unix:/path`; the default is POMELO_TARGET, then 127.0.0.1:50051. `key` is an API key; the default is
    POMELO_KEY. `ca` is the authority to trust, a PEM file or its bytes; the default is the well-known ones.
    `certificate` is a client certificate and its key, two PEM files. `timeout` is the seconds that a call may
    take with its retries, `retries` how often it is repeated at most. `strict` refuses tasks with fields that
    the model does not support as given.

    Cancelling a call also cancels it at the server. Leaving the context, or `close`, ends all calls.

    Raises:
        ValueError: an argument is missing or wrong.
        OSError: a file can't be read.
        pomelo.client.ApiError: a call was refused or failed; each code of an error has its own class.
        pomelo.client.ClientClosed: the client was closed before or during a call.
    """

    def _open_client(self) -> None:
        self._channel: Any = None
        self._stubs: Stubs | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection, and ends the calls that are running. Idempotent."""
        self._closed.set()
        if self._channel is not None:
            await self._channel.close()

    text = _run(tasks.text)
    image = _run(tasks.image)
    speech = _run(tasks.speech)
    convert_speech = _run(tasks.convert_speech)
    transcribe = _run(tasks.transcribe)
    stream = _stream(tasks.text)
    stream_image = _stream(tasks.image)
    stream_speech = _stream(tasks.speech)
    stream_converted_speech = _stream(tasks.convert_speech)

    async def upload(self, file: File, *, content_type: str = "") -> Media:
        """Stores a file for one hour; tasks then take it in place of its bytes. It is read in chunks.

        `content_type` is needed only for raw samples, such as audio/pcm;rate=16000.

        Raises:
            OSError: the file can't be read.
        """
        return await self._upload(Upload(file, content_type), Attempts(self._connection))

    async def download(self, media: Media | str, to: str | os.PathLike[str] | IO[bytes]) -> Media:
        """Writes stored media, by their id, to a path or an open file, in chunks. A path exists only when the
        file is complete, unless it names a device or a pipe.

        Raises:
            OSError: the file can't be written.
        """
        attempts = Attempts(self._connection)
        request, target = DownloadMediaRequest(id=media_id(media)), written_file(to)
        pipe = may_stall(to)
        run = to_daemon_thread if pipe else asyncio.to_thread
        rpc, first = await self._open(lambda stubs: stubs.media.DownloadMedia, request, attempts)
        try:
            with ExitStack() as stack:
                file = await self._opened(partial(stack.enter_context, target), attempts, pipe=pipe)
                while (message := await self._next(rpc, attempts)) is not None:
                    await run(file.write, message.chunk)
        finally:
            rpc.cancel()
        stored: Media = first.media
        return stored

    async def models(self) -> AsyncIterator[Model]:
        """Yields the models that the key may use, with their limits and prices."""
        request = ListModelsRequest(page_size=1000)
        async for page in self._pages(lambda stubs: stubs.models.ListModels, request):
            for model in page.models:
                yield model

    async def model(self, name: str) -> Model:
        """Returns a model, with its limits and prices."""
        request = GetModelRequest(id=name)
        response, _ = await self._unary(
            lambda stubs: stubs.models.GetModel, request, Attempts(self._connection)
        )
        model: Model = response.model
        return model

    async def account(self) -> Account:
        """Returns the account of the key: its plan, limits and credits, in the mode of the key."""
        attempts = Attempts(self._connection)
        response, _ = await self._unary(
            lambda stubs: stubs.accounts.GetAccount, GetAccountRequest(), attempts
        )
        account: Account = response.account
        return account

    async def usage(self, **options: Unpack[UsageOptions]) -> AsyncIterator[UsageRecord]:
        """Yields usage records of the account, newest first: those that match every option."""
        request = list_usage_request(options)
        async for page in self._pages(lambda stubs: stubs.accounts.ListUsage, request):
            for one in page.records:
                yield one

    async def usage_sums(self, *group_by: str, **options: Unpack[UsageOptions]) -> AsyncIterator[UsageSum]:
        """Yields sums of the usage records that match every option: one of all, or one for each group of up
        to 4 properties. These are model, key, day, user, task_type, provider, protocol, code, and
        metadata.NAME for the value of NAME in the tasks' metadata."""
        request = sum_usage_request(group_by, options)
        async for page in self._pages(lambda stubs: stubs.accounts.SumUsage, request):
            for one in page.sums:
                yield one

    # --- calls

    def _services(self) -> Stubs:
        if self._closed.is_set():
            raise ClientClosed("The client is closed")
        loop = asyncio.get_running_loop()
        if self._stubs is None:  # not before: a channel belongs to the running loop
            self._loop = loop
            self._channel = self._connection.channel(grpc.aio)
            self._stubs = Stubs(self._channel)
        elif self._loop is not loop:
            raise RuntimeError(
                "An AsyncClient belongs to the event loop of its first call. Make one for each loop"
            )
        return self._stubs

    @contextmanager
    def _unless_closed(self) -> Iterator[None]:
        """Raises ClientClosed for a call that ended because the client was closed."""
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed.is_set() and not (task is not None and task.cancelling()):
                raise ClientClosed("The client was closed during the call") from None
            raise

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)

    async def _run_task(self, task: Task[T, R]) -> R:
        attempts = Attempts(self._connection, task.settings, task=True)
        await self._upload_audio(task, attempts)
        request = RunTaskRequest(spec=task.spec, options=task.options)
        response, metadata = await self._unary(lambda stubs: stubs.tasks.RunTask, request, attempts)
        return task.reader().result(response.result, metadata)

    async def _open_task(self, task: Task[T, R]) -> tuple[Any, Any, Attempts]:
        """Returns the call of a streamed task, its first message, and its attempts."""
        attempts = Attempts(self._connection, task.settings, task=True)
        await self._upload_audio(task, attempts)
        request = StreamTaskRequest(spec=task.spec, options=task.options)
        rpc, first = await self._open(lambda stubs: stubs.tasks.StreamTask, request, attempts)
        return rpc, first, attempts

    async def _unary(
        self, method: Callable[[Stubs], Any], request: Any, attempts: Attempts
    ) -> tuple[Any, dict[str, str]]:
        """Returns the response of a call, and its metadata."""
        while True:
            rpc = method(self._services())(request, **attempts.arguments())
            try:
                with self._unless_closed():
                    response = await rpc
                    return response, text_metadata(await rpc.trailing_metadata())
            except grpc.aio.AioRpcError as error:
                wait = attempts.wait(error)
            await self._sleep(wait)

    async def _open(
        self, method: Callable[[Stubs], Any], request: Any, attempts: Attempts
    ) -> tuple[Any, Any]:
        """Returns a call whose response is a stream, and the first message, after which it is not
        repeated."""
        while True:
            rpc = method(self._services())(request, **attempts.arguments())
            try:
                with self._unless_closed():
                    first = await rpc.read()
                if first is grpc.aio.EOF:
                    raise IncompleteStream("The server sent nothing. Try again")
                return rpc, first
            except grpc.aio.AioRpcError as error:
                wait = attempts.wait(error)
            await self._sleep(wait)

    async def _next(self, rpc: Any, attempts: Attempts) -> Any:
        """Returns the next message of a stream, None at its end."""
        try:
            with self._unless_closed():
                message = await rpc.read()
        except grpc.aio.AioRpcError as error:
            raise attempts.failure(error) from None
        return None if message is grpc.aio.EOF else message

    async def _pages(self, method: Callable[[Stubs], Any], request: Any) -> AsyncIterator[Any]:
        while True:
            attempts = Attempts(self._connection)
            response, _ = await self._unary(method, request, attempts)
            yield response
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    async def _upload_audio(self, task: Task[T, R], attempts: Attempts) -> None:
        if task.upload is not None:
            media = await self._upload(task.upload, attempts)
            getattr(task.spec, task.spec.WhichOneof("input") or "").audio.media_id = media.id

    async def _upload(self, upload: Upload, attempts: Attempts) -> Media:
        while True:
            self._services()  # in another event loop, the wait for a pipe would not end
            with await self._opened(upload.open, attempts, pipe=upload.is_pipe) as file:
                rpc = self._services().media.UploadMedia(**attempts.arguments())
                errors: list[grpc.aio.AioRpcError] = []
                rpc.add_done_callback(lambda rpc, errors=errors: errors.append(error_of(rpc)))
                try:
                    with self._unless_closed():
                        await _send(rpc, upload, file, self._closed)
                        media: Media = (await rpc).media
                    return media
                except grpc.aio.AioRpcError as error:
                    ended = cause(errors, error)
                    if not upload.repeatable:
                        raise attempts.failure(ended) from None
                    wait = attempts.wait(ended)
                finally:
                    if rpc.cancel():
                        with suppress(asyncio.CancelledError):
                            await rpc  # else the call occupies a stream until the garbage collector runs
            await self._sleep(wait)

    async def _opened(self, open_file: Callable[[], T], attempts: Attempts, *, pipe: bool) -> T:
        """Opens a file. A pipe waits for its other end, at most until the deadline."""
        if not pipe:
            return await asyncio.to_thread(open_file)
        return await open_pipe_async(open_file, attempts.arguments()["timeout"], self._closed)


class AsyncStream(StreamState[AsyncClient, T, R]):
    """The output of a task as it arrives: `async with` opens the stream and cancels it when it is left,
    `async for` yields its pieces. After the last piece there is the `result`. Cancelling a read, also by a
    timeout, ends the stream.

    Raises:
        pomelo.client.ApiError: the task was refused or failed.
        pomelo.client.IncompleteStream: the server ended the stream too early, or a read was cancelled.
    """

    async def __aenter__(self) -> Self:
        self._check_unopened()
        self._rpc, self._first, self._attempts = await self._client._open_task(self._task)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._left = True
        self._rpc.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while (event := await self._next_event()) is not None:
            piece = self._read(event)
            if piece is not None:
                return piece
        raise StopAsyncIteration

    def events(self) -> AsyncIterator[TaskEvent]:
        """Yields the events of the contract in place of the pieces."""
        return _Events(self)

    async def _next_event(self) -> TaskEvent | None:
        if self._rpc is None:
            raise RuntimeError("Open the stream with: async with client.stream(…) as stream")
        if self._is_over():
            return None
        message, self._first = self._first, None
        if message is None:
            message = await self._next_message()
        if message is None:
            rpc = self._rpc
            self._finish(text_metadata(await rpc.initial_metadata(), await rpc.trailing_metadata()))
            return None
        event: TaskEvent = message.event
        return event

    async def _next_message(self) -> Any:
        try:
            return await self._client._next(self._rpc, self._attempts)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                self._is_over()  # another task has left the block
                raise IncompleteStream("A cancelled read of the stream has ended it") from None
            raise


class _Events(AsyncIterator[TaskEvent]):
    """The events of a stream. A generator would look complete after a read that was cancelled."""

    def __init__(self, stream: AsyncStream[Any, Any]) -> None:
        self._stream = stream

    async def __anext__(self) -> TaskEvent:
        event = await self._stream._next_event()
        if event is None:
            raise StopAsyncIteration
        self._stream._read(event)
        return event


async def _send(rpc: Any, upload: Upload, file: IO[bytes], closed: asyncio.Event) -> None:
    """Sends an upload until it is complete or the server has answered, also while a pipe is waited for."""
    # An InternalError: the call ended while the end of the upload was being sent.
    ended = (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError)
    sending = asyncio.timeout(None)
    # What can't be read again may stay silent: the end of the program does not wait for it.
    run = asyncio.to_thread if upload.repeatable else to_daemon_thread

    def stop(_: Any) -> None:
        # A file that is read again must not be read by a thread that is left. When the client is closed, a
        # write waits forever for a call that has not begun.
        if closed.is_set() or not upload.repeatable:
            with suppress(RuntimeError):  # it has ended already
                sending.reschedule(0)

    try:
        async with sending:
            rpc.add_done_callback(stop)
            with suppress(*ended):
                requests = upload.requests(file)
                while (request := await run(next, requests, None)) is not None:
                    await rpc.write(request)
                await rpc.done_writing()
    except TimeoutError:
        if not sending.expired():
            raise
