"""The client for programs without asyncio."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO, Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

import grpc

from pomelo.client import tasks
from pomelo.client.connection import Attempts, ClientBase
from pomelo.client.errors import (
    ApiError,
    ClientClosed,
    DeadlineExceeded,
    IncompleteStream,
    text_metadata,
)
from pomelo.client.files import File, Upload, media_id, written_file
from pomelo.client.pipes import is_pipe, open_pipe
from pomelo.client.streams import StreamState
from pomelo.client.stubs import Stubs, UsageOptions, list_usage_request, sum_usage_request
from pomelo.client.tasks import Task
from pomelo.gen.v1.account_service_pb2 import Account, GetAccountRequest, UsageRecord, UsageSum
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest, UploadMediaRequest
from pomelo.gen.v1.model_service_pb2 import GetModelRequest, ListModelsRequest, Model
from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

_GRACE = 5.0
"""Seconds after its deadline in which a call must end."""


def _run(build: Callable[P, Task[T, R]]) -> Callable[Concatenate[Client, P], R]:
    @tasks.described_by(build)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._run_task(build(*args, **kwargs))

    return method


def _stream(build: Callable[P, Task[T, R]]) -> Callable[Concatenate[Client, P], Stream[T, R]]:
    @tasks.described_by(build)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Stream[T, R]:
        return Stream(self, build(*args, **kwargs))

    return method


class Client(ClientBase):
    """A client of a Pomelo server, over gRPC. Threads can share it, for concurrent calls.

    The arguments and exceptions are those of AsyncClient. Leaving the context, or `close` in another thread,
    ends all calls.
    """

    def _open_client(self) -> None:
        self._channel = self._connection.channel(grpc)
        self._stubs = Stubs(self._channel)
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection, and ends the calls that are running. Idempotent."""
        self._closed.set()
        self._channel.close()

    text = _run(tasks.text)
    image = _run(tasks.image)
    speech = _run(tasks.speech)
    convert_speech = _run(tasks.convert_speech)
    transcribe = _run(tasks.transcribe)
    stream = _stream(tasks.text)
    stream_image = _stream(tasks.image)
    stream_speech = _stream(tasks.speech)
    stream_converted_speech = _stream(tasks.convert_speech)

    def upload(self, file: File, *, content_type: str = "") -> Media:
        """Stores a file for one hour; tasks then take it in place of its bytes. It is read in chunks.

        `content_type` is needed only for raw samples, such as audio/pcm;rate=16000.

        Raises:
            OSError: the file can't be read.
        """
        return self._upload(Upload(file, content_type), Attempts(self._connection))

    def download(self, media: Media | str, to: str | os.PathLike[str] | IO[bytes]) -> Media:
        """Writes stored media, by their id, to a path or an open file, in chunks. A path exists only when the
        file is complete, unless it names a device or a pipe.

        Raises:
            OSError: the file can't be written.
        """
        attempts = Attempts(self._connection)
        request, target = DownloadMediaRequest(id=media_id(media)), written_file(to)
        rpc, first = self._open(lambda stubs: stubs.media.DownloadMedia, request, attempts)
        try:
            with ExitStack() as stack:
                file = self._opened(partial(stack.enter_context, target), attempts, pipe=is_pipe(to))
                while (message := self._next(rpc, attempts)) is not None:
                    file.write(message.chunk)
        finally:
            rpc.cancel()
        stored: Media = first.media
        return stored

    def models(self) -> Iterator[Model]:
        """Yields the models that the key may use, with their limits and prices."""
        request = ListModelsRequest(page_size=1000)
        for page in self._pages(lambda stubs: stubs.models.ListModels, request):
            yield from page.models

    def model(self, name: str) -> Model:
        """Returns a model, with its limits and prices."""
        request = GetModelRequest(id=name)
        response, _ = self._unary(lambda stubs: stubs.models.GetModel, request, Attempts(self._connection))
        model: Model = response.model
        return model

    def account(self) -> Account:
        """Returns the account of the key: its plan, limits and credits, in the mode of the key."""
        attempts = Attempts(self._connection)
        response, _ = self._unary(lambda stubs: stubs.accounts.GetAccount, GetAccountRequest(), attempts)
        account: Account = response.account
        return account

    def usage(self, **options: Unpack[UsageOptions]) -> Iterator[UsageRecord]:
        """Yields usage records of the account, newest first: those that match every option."""
        request = list_usage_request(options)
        for page in self._pages(lambda stubs: stubs.accounts.ListUsage, request):
            yield from page.records

    def usage_sums(self, *group_by: str, **options: Unpack[UsageOptions]) -> Iterator[UsageSum]:
        """Yields sums of the usage records that match every option: one of all, or one for each group of up
        to 4 properties. These are model, key, day, user, task_type, provider, protocol, code, and
        metadata.NAME for the value of NAME in the tasks' metadata."""
        request = sum_usage_request(group_by, options)
        for page in self._pages(lambda stubs: stubs.accounts.SumUsage, request):
            yield from page.sums

    # --- calls

    def _services(self) -> Stubs:
        if self._closed.is_set():
            raise ClientClosed("The client is closed")
        return self._stubs

    @contextmanager
    def _unless_closed(self) -> Iterator[None]:
        """Raises ClientClosed for a call that ended because the client was closed."""
        try:
            yield
        except (grpc.RpcError, ValueError):  # a ValueError of a channel that is closed
            if self._closed.is_set():
                raise ClientClosed("The client was closed during the call") from None
            raise

    def _sleep(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise ClientClosed("The client was closed during the call")

    def _run_task(self, task: Task[T, R]) -> R:
        attempts = Attempts(self._connection, task.settings, task=True)
        self._upload_audio(task, attempts)
        request = RunTaskRequest(spec=task.spec, options=task.options)
        response, metadata = self._unary(lambda stubs: stubs.tasks.RunTask, request, attempts)
        return task.reader().result(response.result, metadata)

    def _open_task(self, task: Task[T, R]) -> tuple[Any, Any, Attempts]:
        """Returns the call of a streamed task, its first message, and its attempts."""
        attempts = Attempts(self._connection, task.settings, task=True)
        self._upload_audio(task, attempts)
        request = StreamTaskRequest(spec=task.spec, options=task.options)
        rpc, first = self._open(lambda stubs: stubs.tasks.StreamTask, request, attempts)
        return rpc, first, attempts

    def _unary(
        self, method: Callable[[Stubs], Any], request: Any, attempts: Attempts
    ) -> tuple[Any, dict[str, str]]:
        """Returns the response of a call, and its metadata."""
        while True:
            call = method(self._services()).with_call
            try:
                with self._unless_closed():
                    response, rpc = call(request, **attempts.arguments())
                return response, text_metadata(rpc.trailing_metadata())
            except grpc.RpcError as error:
                wait = attempts.wait(error)
            self._sleep(wait)

    def _open(self, method: Callable[[Stubs], Any], request: Any, attempts: Attempts) -> tuple[Any, Any]:
        """Returns a call whose response is a stream, and the first message, after which it is not
        repeated."""
        while True:
            call = method(self._services())
            try:
                with self._unless_closed():
                    rpc = call(request, **attempts.arguments())
                    first = _first(rpc)
            except grpc.RpcError as error:
                wait = attempts.wait(error)
            else:
                if first is None:
                    raise IncompleteStream("The server sent nothing. Try again")
                return rpc, first
            self._sleep(wait)

    def _next(self, rpc: Any, attempts: Attempts) -> Any:
        """Returns the next message of a stream, None at its end."""
        try:
            with self._unless_closed():
                return next(rpc, None)
        except grpc.RpcError as error:
            raise attempts.failure(error) from None

    def _pages(self, method: Callable[[Stubs], Any], request: Any) -> Iterator[Any]:
        while True:
            response, _ = self._unary(method, request, Attempts(self._connection))
            yield response
            request.page_token = response.next_page_token
            if not request.page_token:
                return

    def _upload_audio(self, task: Task[T, R], attempts: Attempts) -> None:
        if task.upload is not None:
            media = self._upload(task.upload, attempts)
            getattr(task.spec, task.spec.WhichOneof("input") or "").audio.media_id = media.id

    def _upload(self, upload: Upload, attempts: Attempts) -> Media:
        while True:
            failures: list[Exception] = []
            try:
                opened = self._opened(upload.open, attempts, pipe=upload.is_pipe)
                with opened as file, self._unless_closed():
                    requests = _recorded(upload.requests(file), failures)
                    arguments = attempts.arguments()
                    rpc = self._services().media.UploadMedia.future(requests, **arguments)
                    media: Media = _result(rpc, arguments["timeout"]).media
                return media
            except grpc.RpcError as error:
                if failures:
                    raise failures[0] from None
                if not upload.repeatable:
                    raise attempts.failure(error) from None
                wait = attempts.wait(error)
            self._sleep(wait)

    def _opened(self, open_file: Callable[[], T], attempts: Attempts, *, pipe: bool) -> T:
        """Opens a file. A pipe waits for its other end, at most until the deadline."""
        if not pipe:
            return open_file()
        return open_pipe(open_file, attempts.arguments()["timeout"], self._closed)


class Stream(StreamState[Client, T, R]):
    """The output of a task as it arrives: `with` opens the stream and cancels it when it is left, `for`
    yields its pieces. After the last piece there is the `result`.

    Raises:
        pomelo.client.ApiError: the task was refused or failed.
        pomelo.client.IncompleteStream: the server ended the stream too early.
    """

    def __enter__(self) -> Self:
        self._check_unopened()
        self._rpc, self._first, self._attempts = self._client._open_task(self._task)
        return self

    def __exit__(self, *error: object) -> None:
        self._left = True
        self._rpc.cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        while (event := self._next_event()) is not None:
            piece = self._read(event)
            if piece is not None:
                return piece
        raise StopIteration

    def events(self) -> Iterator[TaskEvent]:
        """Yields the events of the contract in place of the pieces."""
        while (event := self._next_event()) is not None:
            self._read(event)
            yield event

    def _next_event(self) -> TaskEvent | None:
        if self._rpc is None:
            raise RuntimeError("Open the stream with: with client.stream(…) as stream")
        if self._is_over():
            return None
        message, self._first = self._first, None
        if message is None:
            message = self._next_message()
        if message is None:
            self._finish(text_metadata(self._rpc.initial_metadata(), self._rpc.trailing_metadata()))
            return None
        event: TaskEvent = message.event
        return event

    def _next_message(self) -> Any:
        try:
            return self._client._next(self._rpc, self._attempts)
        except ApiError:
            self._is_over()  # another thread may have left the block
            raise


def _first(rpc: Any) -> Any:
    """Returns the first message of a call, None without one. An exception ends the call, also one that a
    signal raises: its traceback would keep the call alive."""
    try:
        return next(rpc, None)
    except BaseException:
        rpc.cancel()
        raise


def _result(rpc: Any, timeout: float) -> Any:
    """Returns the response of a call. grpc may not end it at its deadline: of 23,000 uploads whose deadline
    passed meanwhile, three waited without end.

    Raises:
        DeadlineExceeded: the call has not ended at its deadline.
    """
    ended = threading.Event()
    rpc.add_done_callback(lambda _: ended.set())
    try:
        ended.wait(timeout + _GRACE)
        return rpc.result(0)
    except grpc.FutureTimeoutError:
        raise DeadlineExceeded("The timeout passed before the call was done") from None
    finally:
        rpc.cancel()


def _recorded(
    requests: Iterator[UploadMediaRequest], failures: list[Exception]
) -> Iterator[UploadMediaRequest]:
    """Yields the requests; keeps the exception that ends them, which grpc does not report."""
    try:
        yield from requests
    except Exception as error:
        failures.append(error)
        raise
