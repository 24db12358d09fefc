"""The ports over a channel: what a gateway holds that stands before a server on another machine.

`pomelo.app.open_gateway` opens it; the routes can't tell it from the engine. It forwards and translates:
the server checks the key, the limits and the task.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc

from pomelo.call import STRICT, Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.account_service_pb2 import Account, GetAccountRequest, ListUsageRequest, ListUsageResponse
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest, DownloadMediaResponse
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2 import GetModelRequest, ListModelsRequest, Model
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest, StreamTaskResponse
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.in_flight import InFlight, InFlightLimits, Ticket
from pomelo.origin import GatewayProof
from pomelo.process import is_cancelled
from pomelo.server.uploads import FAILED_WRITE, send
from pomelo.server.watch import ServerWatch
from pomelo.service import MediaBytes, Services
from pomelo.status import HEADER_NAMES, OPEN_KEY, REFUSED_KEY, from_rpc_error
from pomelo.turns import Turn, Turns

MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of one message from the server: a picture or a sound may ride in one."""

_PER_CHANNEL = 200
"""Concurrent calls on one connection: a fifth of what a server accepts by default. The server
counts a cancelled call until it has cleaned up after it, and accepts few connections from one
address."""

_KNOWN_KEYS = 10_000
_KNOWN_SECONDS = 30.0
"""How many accepted keys are remembered, and for how long."""

_DROP_WITHIN = 5.0
"""Seconds that the deletion of a refused upload may take."""

_SLACK = 0.25
"""Seconds that the server gets after the deadline to say itself that it passed."""

_PLAIN = re.compile(r"[\x21-\x7e]{1,256}")
"""What metadata can carry, and more than a key or a traceparent has."""

M = TypeVar("M")

_ARGS = [
    ("grpc.max_receive_message_length", MAX_ANSWER),
    # Each channel has a connection of its own.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    # A caller who reads slowly must not make this end hold megabytes.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 256 * 1024),
    # Times are in milliseconds.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS to the server. `ca` is the authority to trust (None: the well-known ones); `cert` and `key` are
    shown to a server that asks for them."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> Any:
        """grpc's channel credentials.

        Raises:
            OSError: a file can't be read.
        """
        ca, cert, key = [path.read_bytes() if path else None for path in (self.ca, self.cert, self.key)]
        return grpc.ssl_channel_credentials(ca, key, cert)


@asynccontextmanager
async def open_remote(
    target: str,
    *,
    tls: Tls | None = None,
    limits: InFlightLimits | None = None,
    proof: GatewayProof | None = None,
) -> AsyncIterator[Services]:
    """The services of the gRPC server at `target`, such as host:port or unix:/path. It need not be up yet.
    `limits` bound the calls in flight in this gateway.

    Without a `proof` that the server recognises, every call counts as a gRPC call from this address.

    Raises:
        OSError: a TLS file can't be read.
    """
    async with AsyncExitStack() as stack:
        lines = _Lines(target, tls.credentials() if tls else None, stack, proof or GatewayProof())
        models = RemoteModels(lines)
        turns = Turns()
        yield Services(
            tasks=RemoteTasks(lines, models, turns),
            models=models,
            media=RemoteMedia(lines, turns),
            accounts=RemoteAccounts(lines, models),
            access=RemoteAccess(lines, models, limits),
        )


class _Line:
    """One connection, its stubs, and how many calls are on it; a context manager that counts one."""

    __slots__ = ("_proof", "_watch", "accounts", "busy", "media", "models", "tasks")

    def __init__(self, channel: Any, proof: GatewayProof, watch: ServerWatch) -> None:
        self.busy = 0
        self._proof = proof
        self._watch = watch
        self.tasks = TaskServiceStub(channel)
        self.models = ModelServiceStub(channel)
        self.media = MediaServiceStub(channel)
        self.accounts = AccountServiceStub(channel)

    def __enter__(self) -> _Line:
        self.busy += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.busy -= 1
        self._watch.ended(error)

    def given(self, call: Call) -> dict[str, Any]:
        """The metadata and the timeout of the gRPC call that stands for `call`."""
        return _given(call, self._proof)


class _Lines:
    """The connections to one server: one, and another whenever all are full."""

    def __init__(self, target: str, credentials: Any, stack: AsyncExitStack, proof: GatewayProof) -> None:
        self._target = target
        self._proof = proof
        self._watch = ServerWatch(target)
        self._credentials = credentials
        self._stack = stack
        self._lines: list[_Line] = []

    def pick(self) -> _Line:
        """A connection that has room."""
        for line in self._lines:
            if line.busy < _PER_CHANNEL:
                return line
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(self._target, options=_ARGS)
        else:
            channel = grpc.aio.secure_channel(self._target, self._credentials, options=_ARGS)
        self._stack.push_async_callback(channel.close)
        line = _Line(channel, self._proof, self._watch)
        self._lines.append(line)
        return line


class RemoteModels:
    """The port `ModelService` over a channel."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines

    async def list_models(self, call: Call) -> list[Model]:
        """See the port."""
        with self._lines.pick() as line:
            response = await _unary(line.models.ListModels(ListModelsRequest(), **line.given(call)), call)
        if call.header_error is not None:
            raise call.header_error
        return list(response.models)

    async def get_model(self, name: str, call: Call) -> Model:
        """See the port."""
        await self.refuse_fault(call)
        with self._lines.pick() as line:
            response = await _unary(
                line.models.GetModel(GetModelRequest(name=name), **line.given(call)), call
            )
        model: Model = response.model
        return model

    async def refuse_fault(self, call: Call) -> None:
        """Raises what is wrong with a call's headers, which the server does not see, after the key was
        looked at.

        Raises:
            PomeloError: the fault, or what refuses the key.
        """
        if call.header_error is not None:
            await self.list_models(call)


class RemoteAccess:
    """The port `AccessService` over a channel.

    A key that the server accepted is trusted for a while, which saves most calls a round trip. The
    server checks it again when it receives the call itself.
    """

    def __init__(self, lines: _Lines, models: RemoteModels, limits: InFlightLimits | None = None) -> None:
        self._lines = lines
        self._models = models
        self._in_flight = InFlight(limits)
        self._known: dict[str, float] = {}
        """Digest of a key -> when its trust expires, on the clock of `time.monotonic`."""

    async def admit(self, call: Call) -> RemoteVisit:
        """See the port."""
        digest = hashlib.blake2b((call.api_key or "").encode("utf-8", "replace"), digest_size=16).hexdigest()
        now = time.monotonic()
        if self._known.get(digest, 0.0) <= now:
            self._known.pop(digest, None)
            try:
                await self._models.list_models(call)
            except PomeloError as error:
                # The key is valid; the call itself reports any other error.
                if error is not call.header_error and error.code != "model_not_allowed":
                    raise
            if len(self._known) >= _KNOWN_KEYS:
                del self._known[next(iter(self._known))]
            self._known[digest] = now + _KNOWN_SECONDS
        return RemoteVisit(self._lines, call, self._in_flight.enter(digest))


class RemoteVisit:
    """An admitted call. The server counts and reports its limits."""

    __slots__ = ("_call", "_lines", "_ticket", "close", "reserve")

    def __init__(self, lines: _Lines, call: Call, ticket: Ticket) -> None:
        self._lines = lines
        self._call = call
        self._ticket = ticket
        self.reserve = ticket.reserve
        self.close = ticket.close

    async def refuse(self, error: PomeloError, model: str = "") -> PomeloError:
        """See the port."""
        try:
            with self._lines.pick() as line:
                given = line.given(self._call)
                given["metadata"].append((REFUSED_KEY, f"{error.code} {self._ticket.size}"))
                await _unary(line.tasks.RunTask(RunTaskRequest(task=Task(model=model)), **given), self._call)
        except PomeloError as refusal:
            return error if refusal.code == error.code else refusal
        return error

    async def refuse_task(self, error: PomeloError) -> PomeloError:
        """See the port. The server has counted it."""
        return error


class RemoteTasks:
    """The port `TaskService` over a channel."""

    def __init__(self, lines: _Lines, models: RemoteModels, turns: Turns) -> None:
        self._lines = lines
        self._models = models
        self._turns = turns

    async def run_task(self, task: Task, call: Call) -> TaskResult:
        """See the port."""
        await self._models.refuse_fault(call)
        _hand_over(task, call)
        with self._lines.pick() as line:
            response = await _unary(line.tasks.RunTask(RunTaskRequest(task=task), **line.given(call)), call)
        result: TaskResult = response.result
        return result

    @asynccontextmanager
    async def stream_task(self, task: Task, call: Call) -> AsyncIterator[AsyncIterator[StreamTaskResponse]]:
        """See the port."""
        await self._models.refuse_fault(call)
        _hand_over(task, call)
        with self._lines.pick() as line:
            rpc = line.tasks.StreamTask(StreamTaskRequest(task=task), **line.given(call))
            events: _Messages[StreamTaskResponse] = _Messages(rpc, call, self._turns.stream())
            try:
                async with _until_deadline(call):
                    await _opened(rpc, events, call)
                    yield events
            finally:
                rpc.cancel()


def _hand_over(task: Task, call: Call) -> None:
    """Leaves the upload of a task to the server, which deletes it when the task ends or is refused."""
    given = getattr(task, task.WhichOneof("input") or "text")
    if "audio" in given.DESCRIPTOR.fields_by_name and given.audio.media_id:
        call.at_end.clear()


class RemoteAccounts:
    """The port `AccountService` over a channel."""

    def __init__(self, lines: _Lines, models: RemoteModels) -> None:
        self._lines = lines
        self._models = models

    async def get_account(self, call: Call) -> Account:
        """See the port."""
        await self._models.refuse_fault(call)
        with self._lines.pick() as line:
            response = await _unary(line.accounts.GetAccount(GetAccountRequest(), **line.given(call)), call)
        account: Account = response.account
        return account

    async def list_usage(self, request: ListUsageRequest, call: Call) -> ListUsageResponse:
        """See the port."""
        await self._models.refuse_fault(call)
        with self._lines.pick() as line:
            response: ListUsageResponse = await _unary(
                line.accounts.ListUsage(request, **line.given(call)), call
            )
        return response


class RemoteMedia:
    """The port `MediaService` over a channel."""

    def __init__(self, lines: _Lines, turns: Turns) -> None:
        self._lines = lines
        self._dropping: set[asyncio.Task[None]] = set()
        self._turns = turns

    async def upload_media(self, content_type: str, chunks: AsyncIterator[bytes], call: Call) -> Media:
        """See the port. A refusal ends the upload at once, also while the next chunk is waited for."""
        with self._lines.pick() as line:
            # Asks for something small: the key must be known to be good before the first chunk is taken.
            await _unary(line.models.ListModels(ListModelsRequest(), **line.given(call)), call)
            rpc = line.media.UploadMedia(**line.given(call))
            try:
                async with _until_deadline(call):
                    ends = await send(rpc, content_type, chunks)
                    response = await _unary(rpc, call, ends)
            finally:
                if rpc.cancel():
                    # Unless somebody takes what a cancelled upload ends in, it is a ring of references that
                    # holds one of the connection's streams until the garbage collector comes by.
                    with suppress(asyncio.CancelledError):
                        await rpc
        media: Media = response.media
        call.at_end.append(partial(self._drop, media.media_id, call))
        return media

    def _drop(self, media_id: str, call: Call) -> None:
        """Asks the server to delete the upload of a request that this gateway refused."""
        task = asyncio.create_task(self._refused(media_id, call))
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def _refused(self, media_id: str, call: Call) -> None:
        # The server refuses a task without a model, and deletes the upload of a refused REST task.
        # If that fails, the upload expires with the request's deadline.
        task = Task()
        task.speech_to_text.audio.media_id = media_id
        again = replace(
            call,
            deadline=time.monotonic() + _DROP_WITHIN,
            response_headers={},
            response_trailers={},
            at_end=[],
        )
        with suppress(PomeloError), self._lines.pick() as line:
            await _unary(line.tasks.RunTask(RunTaskRequest(task=task), **line.given(again)), again)

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call
    ) -> AsyncIterator[tuple[Media, MediaBytes]]:
        """See the port."""
        request = DownloadMediaRequest(media_id=media_id, signature=signature)
        with self._lines.pick() as line:
            rpc = line.media.DownloadMedia(request, **line.given(call))
            messages: _Messages[DownloadMediaResponse] = _Messages(rpc, call, self._turns.stream())
            try:
                async with _until_deadline(call):
                    await _opened(rpc, messages, call)
                    first = await anext(messages)
                    yield first.media, _Bytes(messages)
            finally:
                rpc.cancel()


# --- one call


def _given(call: Call, proof: GatewayProof) -> dict[str, Any]:
    left = max(call.deadline - time.monotonic(), 0.001)
    authorization = ""
    if call.api_key is not None:
        # What can't be a key may not fit into metadata; any other wrong one is refused just the same.
        authorization = f"Bearer {call.api_key if _PLAIN.fullmatch(call.api_key) else '-'}"
    elif call.key_error:
        authorization = "-"
    metadata = [
        *proof.metadata(call.wire, call.address, authorization),
        ("x-request-id", call.request_id),
        ("x-request-timeout", f"{left:.6f}"),
    ]
    if authorization:
        # What was given twice is given twice again: the server says so, and counts it as a failed key.
        metadata += [("authorization", authorization)] * (2 if call.key_error else 1)
    if call.idempotency_key is not None and call.header_error is None:
        metadata.append(("idempotency-key", call.idempotency_key))
    if call.strict:
        metadata.append(("prefer", STRICT))
    if call.traceparent is not None and _PLAIN.fullmatch(call.traceparent):
        metadata.append(("traceparent", call.traceparent))
    return {"metadata": metadata, "timeout": left + _SLACK}


def _fill(call: Call, metadata: Iterable[tuple[str, Any]] | None) -> None:
    for key, value in metadata or ():
        name = HEADER_NAMES.get(key)
        if name is not None:
            call.response_headers[name] = value


async def _unary(rpc: Any, call: Call, ends: Iterable[Any] = ()) -> Any:
    """The answer of a call with one; fills `call.reply`, also when it raises. `ends`: see `uploading`."""
    with _translated():
        try:
            response = await rpc
        except grpc.aio.AioRpcError as last:
            error = next((end for end in ends if end.details() != FAILED_WRITE), last)
            _fill(call, error.initial_metadata())
            _fill(call, error.trailing_metadata())
            raise error from None
        _fill(call, await rpc.trailing_metadata())
        return response


async def _opened(rpc: Any, messages: _Messages[Any], call: Call) -> None:
    """Returns once the server has taken the call in; `call.reply` is complete.

    Raises:
        PomeloError: the server refused it.
    """
    with _translated():
        metadata = await rpc.initial_metadata()
    _fill(call, metadata)
    if OPEN_KEY not in metadata:
        await anext(messages, None)
        raise PomeloError("internal_error")


def _lost() -> PomeloError | None:
    """What a CancelledError means: None when we were cancelled, else that the channel was closed under us."""
    return None if is_cancelled() else PomeloError("shutting_down")


@contextmanager
def _translated() -> Iterator[None]:
    """Makes a PomeloError of whatever grpc raises inside."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    except asyncio.CancelledError:
        if (lost := _lost()) is not None:
            raise lost from None
        raise
    except grpc.aio.BaseError as error:
        raise PomeloError("internal_error") from error


@asynccontextmanager
async def _until_deadline(call: Call) -> AsyncIterator[None]:
    scope = asyncio.timeout_at(call.deadline + _SLACK)
    try:
        async with scope:
            yield
    except TimeoutError as error:
        if scope.expired():
            raise PomeloError("deadline_exceeded") from error
        raise


class _Messages(AsyncIterator[M]):
    """The messages of a server's stream; what ends it badly is raised as a PomeloError, and what its end
    tells is filled into the call's reply."""

    __slots__ = ("_call", "_next", "_rpc", "_turn")

    def __init__(self, rpc: Any, call: Call, turn: Turn) -> None:
        self._call = call
        self._rpc = rpc
        self._turn = turn
        self._next = aiter(rpc).__anext__

    def __aiter__(self) -> _Messages[M]:
        return self

    async def __anext__(self) -> M:
        try:
            message: M = await self._next()
        except StopAsyncIteration:
            _fill(self._call, await self._rpc.trailing_metadata())
            raise
        except grpc.aio.AioRpcError as error:
            _fill(self._call, error.trailing_metadata())
            raise from_rpc_error(error) from None
        except asyncio.CancelledError:
            if (lost := _lost()) is not None:
                raise lost from None
            raise
        if self._turn.over():
            await self._turn.next()
        return message


class _Bytes(AsyncIterator[bytes]):
    """The bytes of a media file. Implements `pomelo.service.MediaBytes`."""

    def __init__(self, messages: _Messages[DownloadMediaResponse]) -> None:
        self._messages = messages
        self._unwanted = 0

    def skip(self, size: int) -> None:
        """See the port."""
        self._unwanted += size

    async def __anext__(self) -> bytes:
        while True:
            chunk: bytes = (await anext(self._messages)).chunk
            if self._unwanted < len(chunk):
                break
            self._unwanted -= len(chunk)
        unwanted, self._unwanted = self._unwanted, 0
        return chunk[unwanted:]
