"""The life of a gRPC call: admitted from its metadata, its message read within limits, answered or refused.

Every method is registered as one that takes a stream of raw bytes, which changes nothing on the network:
grpc.aio would otherwise receive, decompress and parse the message before any code of ours runs. The methods
themselves are in `pomelo.server.servicers`. Nothing here decides what a key may do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.logs import format_trace
from pomelo.process import is_cancelled, uncancel
from pomelo.server.limits import CallLimits, Connections, ServerState
from pomelo.server.rpc import Refusal, Rpc, bare

log = logging.getLogger("pomelo.server")

Method = Callable[[Rpc], Awaitable[bytes | None]]
"""What a method does with its call: the serialized answer, or None where it has written its messages."""


class FrontEnd(ServerState):
    """Makes handlers of methods, and runs their calls."""

    def handlers(self, service: ServiceDescriptor, servicer: object) -> dict[str, Any]:
        """The methods of a service as grpc takes them: those of `servicer`, by their names in the contract.

        A method gets the request and the `Rpc`; the `Rpc` alone where requests are a stream, or where it is
        `keyless` and so admits the call itself.
        """
        methods = {}
        for method in service.methods:
            serve = _serve(method, getattr(servicer, method.name))
            if method.server_streaming:
                answer = GetMessageClass(method.output_type).SerializeToString
                handler = grpc.stream_stream_rpc_method_handler(
                    self._handler(serve), response_serializer=answer
                )
            else:
                handler = grpc.stream_unary_rpc_method_handler(self._handler(serve))
            methods[method.name] = handler
        return methods

    def unknown(self) -> Any:
        """A handler for every method that has no other handler."""
        return _Unknown(grpc.stream_stream_rpc_method_handler(self._handler(_no_method)))

    def _handler(self, serve: Method) -> Callable[[Any, Any], Awaitable[bytes | None]]:
        async def handle(messages: Any, context: Any) -> bytes | None:
            with self.running:
                outcome = await self.outcome(context, serve)
                if not isinstance(outcome, tuple):
                    return outcome
                try:
                    await context.abort(*outcome)
                finally:
                    # The call references the error that `abort` raises, which references this frame: a cycle
                    # that only the garbage collector would free, unless the frame is emptied.
                    del messages, context, outcome
            raise AssertionError

        return handle

    async def outcome(self, context: Any, serve: Method) -> bytes | Refusal | None:
        """The answer to a call, or what to abort it with."""
        rpc = Rpc(self, context)
        try:
            error = await self._attempt(rpc, serve)
            if error is None:
                rpc.close()
                return rpc.answer
            if rpc.visit is not None and rpc.refuses_body(error):
                error = bare(await rpc.visit.refuse(error, rpc.model))
            return rpc.refusal(error)
        except asyncio.CancelledError:
            if rpc.visit is None or not await _is_answered(
                rpc.call, context, rpc.refusal(PomeloError("internal_error"))
            ):
                rpc.left()
            raise
        finally:
            rpc.end()

    async def _attempt(self, rpc: Rpc, serve: Method) -> PomeloError | None:
        """Serves a call. Returns the error it failed with, None if it succeeded.

        Raises:
            asyncio.CancelledError, grpc.aio.BaseError: the caller has left, and grpc.aio knows.
        """
        try:
            async with rpc.scope:
                rpc.answer = await serve(rpc)
        except PomeloError as error:
            return bare(error)
        except TimeoutError as fault:
            if rpc.scope.expired():
                return PomeloError(*rpc.late)
            return _unforeseen(rpc.call, fault)
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            # Something inside was cancelled, not this call. Without an answer the caller would wait forever.
            log.error("request %s failed: something that it waited for was cancelled", rpc.call.request_id)
            return PomeloError("internal_error")
        except grpc.aio.BaseError:
            raise
        except Exception as fault:
            return _unforeseen(rpc.call, fault)
        return None


class _Unknown(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Has one handler for every method."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler

    def service(self, handler_call_details: Any) -> Any:
        """See grpc."""
        return self._handler


async def _is_answered(call: Call, context: Any, refusal: Refusal) -> bool:
    """Whether the caller of a cancelled call is still there, and so gets an error: something within the call
    cancelled it. grpc.aio says only by failing that the caller has left."""
    uncancel()
    try:
        await context.abort(*refusal)
    except grpc.aio.AbortError:
        log.error("request %s failed: something within it cancelled it", call.request_id)
        return True
    except (grpc.aio.BaseError, asyncio.CancelledError):
        pass
    return False


async def _no_method(rpc: Rpc) -> None:
    raise PomeloError("method_not_allowed", "There is no such method. Check its name")


def answering(method: Callable[[Any, Any, Rpc], Awaitable[Any]]) -> Callable[[Any, Any, Any], Any]:
    """Makes an ordinary grpc handler of a method, for a server that only its operator can reach: it answers
    errors that the method raises, and applies no limits."""

    async def handler(self: Any, request: Any, context: Any) -> Any:
        front = FrontEnd(None, CallLimits(), Connections())

        async def serve(rpc: Rpc) -> Any:
            rpc.scope.reschedule(None)
            return await method(self, request, rpc)

        with self.running:
            outcome = await front.outcome(context, serve)
            if isinstance(outcome, tuple):
                await context.abort(*outcome)
            return outcome

    return handler


def keyless(method: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a method that may be called without a key, and checks its callers itself."""
    method.keyless = True  # type: ignore[attr-defined]
    return method


def _serve(method: MethodDescriptor, function: Callable[..., Awaitable[Any]]) -> Method:
    """Adapts a servicer's method to `Method`."""
    request_type = GetMessageClass(method.input_type)
    is_keyless = getattr(function, "keyless", False)
    takes_stream = method.client_streaming

    async def serve(rpc: Rpc) -> bytes | None:
        if is_keyless:
            answer = await function(rpc)
        elif takes_stream:
            try:
                await rpc.admit()
                answer = await function(rpc)
            except PomeloError:
                await rpc.linger()
                raise
        else:
            await rpc.admit()
            answer = await function(await rpc.message(request_type), rpc)
        return None if answer is None else bytes(answer.SerializeToString())

    return serve


def _unforeseen(call: Call, fault: Exception) -> PomeloError:
    log.error("request %s failed unexpectedly\n%s", call.request_id, format_trace(fault))
    return PomeloError("internal_error")
