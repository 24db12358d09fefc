"""The connections to one server, and unary calls over them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import GetModelRequest
from pomelo.network.origin import GatewayProof
from pomelo.server.remote.channel import TRANSLATED_ERRORS, Connection, open_channel, unary
from pomelo.server.remote.watch import ServerWatch

_MAX_CALLS = 200
"""Maximum concurrent calls on one connection: a fifth of what a server accepts by default. The server counts
a cancelled call until its cleanup has ended, and accepts few connections from one address."""

_HEALTH_TIMEOUT = 1.0
"""Seconds that the server has to report its health."""

_AFTER_KEY = frozenset({"missing_parameter", "model_not_found", "model_not_allowed"})
"""Errors with which the server refuses the id of a model after it has checked the key."""

M = TypeVar("M")


class ConnectionPool:
    """The connections to one server: one, and one more whenever all are full, or lead to a server that
    drains, is not ready or does not respond: its address may be that of a load balancer."""

    def __init__(
        self,
        target: str,
        credentials: Any,
        stack: AsyncExitStack,
        proof: GatewayProof,
        options: Mapping[str, Any],
    ) -> None:
        self._target = target
        self._proof = proof
        self._options = options
        self._watch = ServerWatch(target)
        self._credentials = credentials
        self._connections: list[Connection] = []
        self._closing: set[asyncio.Future[None]] = set()
        stack.push_async_callback(self._close)

    def pick(self) -> Connection:
        """Returns a connection that can take one more call."""
        for connection in self._connections:
            if connection.calls < _MAX_CALLS and not connection.leaving:
                return connection
        for connection in [one for one in self._connections if one.leaving and not one.calls]:
            self._connections.remove(connection)
            closing = asyncio.ensure_future(connection.channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        connection = Connection(self._open_channel(), self._proof, self._watch)
        self._connections.append(connection)
        return connection

    async def _close(self) -> None:
        for connection in self._connections:
            await connection.channel.close()
        if self._closing:
            await asyncio.wait(self._closing)

    def _open_channel(self) -> Any:
        return open_channel(self._target, self._credentials, self._options)

    async def check_health(self) -> None:
        """Asks the server whether it accepts calls.

        Raises:
            PomeloError: it does not, or it does not respond.
        """
        connection = self.pick()
        # Without a proof, a server closes a connection that has presented no key. So a check has its own,
        # unless calls are running, whose connection may hang.
        if self._proof.known or connection.calls:
            try:
                status = await self._health(connection)
            except PomeloError as error:
                if error.code == "deadline_exceeded":  # it may take a minute to break
                    connection.leave()
                raise
            if status != health_pb2.HealthCheckResponse.SERVING:
                connection.leave()
        else:
            async with self._open_channel() as channel:
                status = await self._health(Connection(channel, self._proof, self._watch))
        if status != health_pb2.HealthCheckResponse.SERVING:
            raise PomeloError("server_unavailable")

    async def _health(self, connection: Connection) -> int:
        with connection, TRANSLATED_ERRORS:
            response = await connection.health.Check(
                health_pb2.HealthCheckRequest(),
                metadata=self._proof.metadata("grpc", "", ""),
                timeout=_HEALTH_TIMEOUT,
            )
        status: int = response.status
        return status

    async def unary(
        self, method: Callable[[Connection], Callable[..., Awaitable[M]]], request: Message, call: Call
    ) -> M:
        """Sends a request and returns the response; fills `call.response_headers`, also on an error. `method`
        returns the method of a connection's stubs.

        Raises:
            PomeloError: a header or the key is invalid, or the RPC failed.
        """
        if call.header_error is not None:
            await self.check_headers(call)
        with self.pick() as connection:
            response: M = await unary(method(connection)(request, **connection.arguments(call)), call)
            return response

    async def check_headers(self, call: Call, model_id: str = "") -> None:
        """Checks the call's headers, which the server does not see. An invalid key is reported first.

        Raises:
            PomeloError: the key or a header is invalid.
        """
        if call.header_error is not None:
            await self.check_key(call, model_id)
            raise call.header_error

    async def check_key(self, call: Call, model_id: str = "") -> None:
        """Checks the call's key, and fills `call.response_headers`, with the limits of a model that the call
        is about.

        Raises:
            PomeloError: the key is invalid, or the server does not respond.
        """
        request = GetModelRequest(id=model_id)
        try:
            with self.pick() as connection:
                await unary(connection.models.GetModel(request, **connection.arguments(call)), call)
        except PomeloError as error:
            if error.code not in _AFTER_KEY:
                raise
