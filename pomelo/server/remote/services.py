"""The services over a channel, except media."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pomelo.call import ADJUSTED_HEADER, CHARGED_HEADER, REPLAYED_HEADER, Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.account_service_pb2 import (
    Account,
    GetAccountRequest,
    GetAccountResponse,
    ListUsageRequest,
    ListUsageResponse,
    SumUsageRequest,
    SumUsageResponse,
)
from pomelo.gen.v1.model_service_pb2 import (
    GetModelRequest,
    GetModelResponse,
    ListModelsRequest,
    ListModelsResponse,
    Model,
)
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, RunTaskResponse, StreamTaskRequest, TaskOptions
from pomelo.runtime.in_flight import InFlight, Ticket
from pomelo.runtime.turns import Turns
from pomelo.server.remote.channel import Messages, unary
from pomelo.server.remote.pool import ConnectionPool
from pomelo.status import REFUSED_KEY

_MAX_TRUSTED_KEYS = 10_000
_TRUST_SECONDS = 30.0
"""How many accepted keys are trusted without a check, and for how long."""

_MODEL_ERRORS = frozenset({"unsupported_model", "model_not_allowed"})


class RemoteModels:
    """Implements `ModelService` over a channel."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool

    async def list_models(self, request: ListModelsRequest, call: Call) -> ListModelsResponse:
        return await self._pool.unary(lambda stubs: stubs.models.ListModels, request, call)

    async def get_model(self, model_id: str, call: Call) -> Model:
        await self._pool.check_headers(call, model_id)
        request = GetModelRequest(id=model_id)
        response: GetModelResponse
        response = await self._pool.unary(lambda stubs: stubs.models.GetModel, request, call)
        return response.model


class RemoteAccess:
    """Implements `AccessService` over a channel.

    A key that the server accepted is trusted for a while, which saves most calls a round trip. The server
    checks it again when it receives the call itself.
    """

    def __init__(self, pool: ConnectionPool, in_flight: InFlight) -> None:
        self._pool = pool
        self._in_flight = in_flight
        self._trusted: dict[str, float] = {}
        """Digest of a key -> when its trust expires, on the clock of `time.monotonic`."""

    async def admit(self, call: Call) -> RemoteVisit:
        digest = hashlib.blake2b((call.api_key or "").encode("utf-8", "replace"), digest_size=16).hexdigest()
        now = time.monotonic()
        was_trusted = self._trusted.get(digest, 0.0) > now
        if not was_trusted:
            self._trusted.pop(digest, None)
            await self._pool.check_key(call)
            if len(self._trusted) >= _MAX_TRUSTED_KEYS:
                del self._trusted[next(iter(self._trusted))]
            self._trusted[digest] = now + _TRUST_SECONDS
        try:
            ticket = self._in_flight.enter(digest)
        except PomeloError:
            if was_trusted:
                await self._pool.check_key(call)  # which reports the mode and the limits
            raise
        call.reserve = ticket.reserve
        return RemoteVisit(self._pool, call, ticket)


class RemoteVisit:
    """Implements `Visit`. The server counts the call and reports its limits."""

    __slots__ = ("_call", "_pool", "_ticket", "close", "hold", "reserve")

    def __init__(self, pool: ConnectionPool, call: Call, ticket: Ticket) -> None:
        self._pool = pool
        self._call = call
        self._ticket = ticket
        self.reserve = ticket.reserve
        self.hold = ticket.hold
        self.close = ticket.close

    def is_alone(self) -> bool:
        return self._ticket.is_alone()

    async def refuse(self, error: PomeloError, model: str = "") -> PomeloError:
        if error.code == "invalid_api_key":  # the server has reported and counted it
            return error
        header_error = self._call.header_error
        try:
            with self._pool.pick() as connection:
                arguments = connection.arguments(self._call)
                arguments["metadata"].append((REFUSED_KEY, f"{error.code} {self._ticket.size}"))
                request = RunTaskRequest(spec=TaskSpec(model=model))
                await unary(connection.tasks.RunTask(request, **arguments), self._call)
        except PomeloError as refusal:
            # A server that does not recognise this gateway reports what the request lacks. A header takes
            # precedence over the model, which the server has checked without the header.
            precedes = refusal.code not in (error.code, "missing_parameter")
            if precedes and (header_error is None or refusal.code not in _MODEL_ERRORS):
                return refusal
        return header_error or error

    async def refuse_task(self, error: PomeloError) -> PomeloError:
        return error  # the server has counted the task


class RemoteTasks:
    """Implements `TaskService` over a channel."""

    def __init__(self, pool: ConnectionPool, turns: Turns) -> None:
        self._pool = pool
        self._turns = turns

    async def run_task(self, spec: TaskSpec, options: TaskOptions, call: Call) -> TaskResult:
        request = RunTaskRequest(spec=spec, options=options)
        response: RunTaskResponse
        try:
            response = await self._pool.unary(lambda stubs: stubs.tasks.RunTask, request, call)
        except PomeloError:
            if CHARGED_HEADER in call.response_headers:  # it has run, and failed
                _leave_upload(spec, call)
            raise
        _leave_upload(spec, call)
        _reserve_replay(call, response.ByteSize())
        return response.result

    @asynccontextmanager
    async def stream_task(
        self, spec: TaskSpec, options: TaskOptions, call: Call
    ) -> AsyncIterator[AsyncIterator[TaskEvent]]:
        await self._pool.check_headers(call)
        request = StreamTaskRequest(spec=spec, options=options)
        with self._pool.pick() as connection:
            rpc = connection.stream_task(request, **connection.arguments(call))
            events: Messages[TaskEvent] = Messages(rpc, call, self._turns.stream())
            try:
                with connection.until_deadline(call):
                    await events.accepted()
                    _leave_upload(spec, call)
                    _reserve_replay(call, 0)  # its size is not known yet
                    yield events
            finally:
                rpc.cancel()


def _reserve_replay(call: Call, size: int) -> None:
    """Counts the bytes of a replay as buffered, if it is one: no limit of concurrent tasks applies to it.

    Raises:
        PomeloError: overloaded; its caller has too much to read.
    """
    if REPLAYED_HEADER in call.response_headers:
        try:
            call.reserve(size)
        except PomeloError:
            for name in (REPLAYED_HEADER, CHARGED_HEADER, ADJUSTED_HEADER):
                call.response_headers.pop(name, None)
            raise


def _leave_upload(spec: TaskSpec, call: Call) -> None:
    """Leaves the upload of an accepted task to the server, which deletes it when the task ends. That of a
    refused task is deleted by a request: a server that is too busy, for example, has not read the task."""
    if not call.at_end:
        return
    task_input = getattr(spec, spec.WhichOneof("input") or "text")
    if "audio" in task_input.DESCRIPTOR.fields_by_name and task_input.audio.media_id:
        call.at_end.clear()


class RemoteAccounts:
    """Implements `AccountService` over a channel."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool

    async def get_account(self, call: Call) -> Account:
        response: GetAccountResponse
        response = await self._pool.unary(lambda stubs: stubs.accounts.GetAccount, GetAccountRequest(), call)
        return response.account

    async def list_usage(self, request: ListUsageRequest, call: Call) -> ListUsageResponse:
        return await self._pool.unary(lambda stubs: stubs.accounts.ListUsage, request, call)

    async def sum_usage(self, request: SumUsageRequest, call: Call) -> SumUsageResponse:
        return await self._pool.unary(lambda stubs: stubs.accounts.SumUsage, request, call)
