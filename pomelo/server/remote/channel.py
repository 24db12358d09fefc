"""Channels to a server, and single calls over them: their metadata, deadlines and errors."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2_grpc

from pomelo.call import ADJUSTED_HEADER, CHARGED_HEADER, REPEATED_KEY, STRICT, Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.gen.v1.task_service_pb2 import StreamTaskRequest, StreamTaskResponse
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.network.origin import GatewayProof
from pomelo.runtime.process import CancelScope, is_cancelled
from pomelo.runtime.turns import Turn
from pomelo.server.remote.watch import ServerWatch
from pomelo.status import OPEN_KEY, cause, from_rpc_error, header_name

MAX_MESSAGE = 64 * 1024 * 1024
"""Maximum bytes of one message from the server, which may contain an image or audio."""

_LEAVE_AFTER = 5.0
"""Seconds after which a connection may be replaced because its server drains, is not ready or does not
respond: behind one address, the next connection may lead to another server."""

_GRACE = 5.25
"""Seconds after the deadline in which the server can still respond: it ends late calls itself, within 5
seconds, and what it charges meanwhile is delivered."""

_UNPROVEN_GRACE = 0.25
"""The same without a proof: the server takes the end of this time for the deadline."""

_PLAIN = re.compile(r"[\x21-\x7e]{1,256}")
"""Text that metadata can carry; longer than any key or traceparent."""

M = TypeVar("M")

CHANNEL_OPTIONS: dict[str, Any] = {
    "grpc.max_receive_message_length": MAX_MESSAGE,
    # Each channel has its own connection.
    "grpc.use_local_subchannel_pool": 1,
    "grpc.enable_http_proxy": 0,
    "grpc.service_config_disable_resolution": 1,
    # A caller who reads slowly must not make this process buffer megabytes.
    "grpc.http2.bdp_probe": 0,
    "grpc.http2.lookahead_bytes": 256 * 1024,
    # Times are in milliseconds.
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 1_000,
    "grpc.max_reconnect_backoff_ms": 2_000,
}


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS to a server. `ca` is the trusted authority, a file or its bytes (None: the well-known ones); `cert`
    and `key` are the client certificate for a server that requests one."""

    ca: Path | bytes | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> Any:
        """Returns grpc's channel credentials.

        Raises:
            OSError: a file can't be read.
        """
        ca, cert, key = [
            file.read_bytes() if isinstance(file, Path) else file for file in (self.ca, self.cert, self.key)
        ]
        return grpc.ssl_channel_credentials(ca, key, cert)


def open_channel(target: str, credentials: Any = None, options: Mapping[str, Any] | None = None) -> Any:
    """Returns a channel to a server, without TLS if `credentials` is None. `options` replace grpc's channel
    arguments of `CHANNEL_OPTIONS`."""
    arguments = [*{**CHANNEL_OPTIONS, **(options or {})}.items()]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=arguments)
    return grpc.aio.secure_channel(target, credentials, options=arguments)


class Connection:
    """One connection, its stubs, and the number of calls on it. As a context manager it counts one call.
    While it is `leaving`, it gets no new calls."""

    __slots__ = (
        "_leave_at", "_proof", "_watch", "accounts", "calls", "channel", "health", "leaving", "media",
        "models", "stream_task", "tasks",
    )  # fmt: skip

    def __init__(self, channel: Any, proof: GatewayProof, watch: ServerWatch) -> None:
        self.channel = channel
        self.calls = 0
        self.leaving = False
        self._leave_at = time.monotonic() + _LEAVE_AFTER
        self._proof = proof
        self._watch = watch
        self.tasks = TaskServiceStub(channel)
        self.stream_task = channel.unary_stream(
            "/pomelo.v1.TaskService/StreamTask",
            request_serializer=StreamTaskRequest.SerializeToString,
            response_deserializer=_event,
        )
        """StreamTask, whose messages are the events."""
        self.models = ModelServiceStub(channel)
        self.media = MediaServiceStub(channel)
        self.accounts = AccountServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def __enter__(self) -> Connection:
        self.calls += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.calls -= 1
        self._watch.call_ended(error)
        if isinstance(error, PomeloError) and error.code == "shutting_down":
            self.leave()

    def leave(self) -> None:
        """Leads later calls to another server, unless the connection is new."""
        self.leaving = time.monotonic() >= self._leave_at

    def arguments(self, call: Call) -> dict[str, Any]:
        """Returns the metadata and the timeout with which to forward `call`."""
        now = time.monotonic()
        remaining = max(call.deadline - now, 0.000001)
        authorization = ""
        if call.api_key is not None:
            # Text that metadata can't carry is not a key either; "-" is refused in the same way.
            authorization = f"Bearer {call.api_key if _PLAIN.fullmatch(call.api_key) else '-'}"
        elif call.key_error:
            authorization = "-"
        metadata = [
            *self._proof.metadata(call.protocol, call.address, authorization),
            ("x-request-id", call.request_id),
            ("x-request-timeout", f"{remaining:.6f}"),
        ]
        if authorization:
            # A repeated or malformed header is so here, too: the server reports it, and counts a failed key.
            metadata += [("authorization", authorization)] * (2 if call.key_error == REPEATED_KEY else 1)
        if call.idempotency_key is not None and call.header_error is None:
            metadata.append(("idempotency-key", call.idempotency_key))
        if call.strict:
            metadata.append(("prefer", STRICT))
        if call.traceparent is not None and _PLAIN.fullmatch(call.traceparent):
            metadata.append(("traceparent", call.traceparent))
        # After a call for the same request that got no response, the grace is not there again.
        return {"metadata": metadata, "timeout": max(self._end(call) - now, _UNPROVEN_GRACE)}

    def _end(self, call: Call) -> float:
        return call.deadline + (_GRACE if self._proof.known else _UNPROVEN_GRACE)

    @contextmanager
    def until_deadline(self, call: Call) -> Iterator[None]:
        """Ends the body when the server can't respond to `call` any more.

        Raises:
            PomeloError: deadline_exceeded.
        """
        scope = CancelScope(self._end(call))
        try:
            with scope:
                yield
        except TimeoutError as error:
            if scope.expired:
                raise PomeloError("deadline_exceeded") from error
            raise


async def unary(rpc: Any, call: Call, errors: Iterable[Any] = ()) -> Any:
    """Returns the response of an RPC that has one; fills `call.response_headers`, also on an error.

    `errors` are earlier errors of the same RPC; the first one that came from the server takes precedence.

    Raises:
        PomeloError: the RPC failed.
    """
    with TRANSLATED_ERRORS:
        try:
            response = await rpc
        except grpc.aio.AioRpcError as last:
            # A variable with the error would be a reference cycle: error, traceback, this frame. It keeps the
            # request in memory and the connection open until garbage is collected.
            raise _with_headers(cause(errors, last), call) from None
        _fill(call, await rpc.trailing_metadata())
        return response


def _with_headers(error: Any, call: Call) -> Any:
    """Fills `call.response_headers` from the metadata of a failed RPC, and returns its error."""
    _fill(call, error.initial_metadata())
    _fill(call, error.trailing_metadata())
    return error


class Messages(AsyncIterator[M]):
    """Iterates over the messages of a server stream; its end fills `call.response_headers`.

    Raises:
        PomeloError: the stream failed.
    """

    __slots__ = ("_call", "_next", "_rpc", "_turn")

    def __init__(self, rpc: Any, call: Call, turn: Turn) -> None:
        self._call = call
        self._rpc = rpc
        self._turn = turn
        self._next = aiter(rpc).__anext__

    async def accepted(self) -> None:
        """Returns when the server has accepted the call and `call.response_headers` is complete.

        Raises:
            PomeloError: the server refused the call.
        """
        with TRANSLATED_ERRORS:
            metadata = await self._rpc.initial_metadata()
        _fill(self._call, metadata)
        if OPEN_KEY not in metadata:
            await anext(self, None)
            raise PomeloError("internal_error")

    def __aiter__(self) -> Messages[M]:
        return self

    async def __anext__(self) -> M:
        try:
            message: M = await self._next()
        except StopAsyncIteration:
            _fill(self._call, await self._rpc.trailing_metadata())
            raise
        except grpc.aio.AioRpcError as error:
            self._call.response_headers.pop(CHARGED_HEADER, None)  # the price of a complete result
            _fill(self._call, error.trailing_metadata())
            raise from_rpc_error(error) from None
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise PomeloError("shutting_down") from None
        if self._turn.over():
            await self._turn.next()
        return message


def _fill(call: Call, metadata: Iterable[tuple[str, Any]] | None) -> None:
    if metadata is None:
        return
    headers = call.response_headers
    for key, value in metadata:
        name = header_name(key)
        if name is not None:
            if name == ADJUSTED_HEADER and call.translate_adjusted is not None:
                value = call.translate_adjusted(value)
            headers[name] = value


class _TranslatedErrors:
    """Raises the errors of the body as PomeloErrors."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        match error:
            case grpc.aio.AioRpcError():
                raise from_rpc_error(error) from None
            case asyncio.CancelledError() if not is_cancelled():
                raise PomeloError("shutting_down") from None  # the channel was closed under the call
            case grpc.aio.BaseError():
                raise PomeloError("internal_error") from error


TRANSLATED_ERRORS = _TranslatedErrors()


def _event(data: bytes) -> TaskEvent:
    """Parses a StreamTaskResponse."""
    return StreamTaskResponse.FromString(data).event
