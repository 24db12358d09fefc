"""Runs gRPC calls: admits a call by its metadata, reads its message within limits, and sends the response.

Every method is registered as one that receives a stream of raw bytes, which makes no difference on the
network. grpc.aio would otherwise receive, decompress and parse the message before any code of Pomelo runs.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NoReturn

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from pomelo.call import Call
from pomelo.errors import PomeloError, without_traceback
from pomelo.network.origin import is_within, peer_address
from pomelo.runtime.in_flight import LARGE_RESPONSE
from pomelo.runtime.logs import format_trace
from pomelo.runtime.process import is_cancelled, uncancel
from pomelo.server.call_limits import ServerState
from pomelo.server.rpc import Refusal, Rpc
from pomelo.telemetry.events import report_call

log = logging.getLogger("pomelo.server")

Response = Message | bytes | None
"""A response, or None if the method has written its messages itself."""

Method = Callable[[Rpc], Awaitable[Awaitable[Response]]]
"""Admits a call and receives its message. Returns an awaitable of the response, so that no frame remains here
that each event of a stream would resume."""


class FrontEnd(ServerState):
    """Creates the handlers of a server's methods, and runs their calls."""

    def handlers(self, service: ServiceDescriptor, servicer: object) -> dict[str, Any]:
        """Returns grpc handlers of the methods of `servicer`, by their names in the contract.

        A method is called with the request and the `Rpc`; with only the `Rpc` if its requests are a stream,
        or if it is `keyless` and admits the call itself.
        """
        methods = {}
        for method in service.methods:
            serve = _serve(method, getattr(servicer, method.name))
            handle = self._handler(serve, f"{service.name}/{method.name}")
            if method.server_streaming:
                handler = grpc.stream_stream_rpc_method_handler(handle)
            else:
                handler = grpc.stream_unary_rpc_method_handler(handle)
            methods[method.name] = handler
        return methods

    def unknown_method(self) -> Any:
        """Returns a handler for every method that has no other handler."""
        return _UnknownMethod(
            grpc.stream_stream_rpc_method_handler(self._handler(_refuse_unknown_method, ""))
        )

    def _handler(self, serve: Method, name: str) -> Callable[[Any, Any], Awaitable[bytes | None]]:
        async def handle(messages: Any, context: Any) -> bytes | None:
            with self.running:
                rpc = Rpc(self, context)
                outcome = await self.outcome(rpc, context, serve, name)
                if not isinstance(outcome, tuple):
                    if isinstance(outcome, Message):
                        outcome = outcome.SerializeToString()
                    if outcome is not None:
                        # Sending it ends the task. Until then, a large response counts by its bytes, a
                        # small one as a call: else unread ones could take any amount of memory. The guard
                        # limits those of callers without a key, who may only check the health.
                        if rpc.visit is None:
                            self._report_sending(rpc)
                        elif len(outcome) > LARGE_RESPONSE:
                            self._report_sending(rpc, rpc.visit.hold(len(outcome)))
                            rpc.visit.close()
                        else:
                            self._report_sending(rpc, rpc.visit.close)
                    return outcome
                if rpc.accepted:
                    self._report_sending(rpc)
                try:
                    await context.abort(*outcome)
                except grpc.aio.InternalError:
                    # The call has ended: its caller has left, or grpc itself has refused its message. grpc
                    # does not cancel a call that is being aborted, and would log this error with its trace.
                    rpc.cancelled()
                    raise asyncio.CancelledError from None
                finally:
                    if rpc.accepted:
                        rpc.end(sent=True)
                    # The call references the error that `abort` raises, which references this frame. Emptying
                    # the frame breaks this cycle, which only the garbage collector would free.
                    del messages, context, outcome, rpc
            raise AssertionError

        return handle

    def _report_sending(self, rpc: Rpc, release: Callable[[], None] | None = None) -> None:
        """Reports that the end of a response is sent. With the current task, that has ended, too: then it is
        reported, and `release` called."""
        self.connections.sending(rpc.peer)
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(partial(self._report_sent, rpc.peer, release))

    def _report_sent(self, peer: str, release: Callable[[], None] | None, _: object) -> None:
        self.connections.sent(peer)
        if release is not None:
            release()

    async def watch_streams(self) -> None:
        """Until it is cancelled, ends streams whose callers do not read."""
        await self.streams.watch(self.limits.unread_time, self._end_unread)

    def _end_unread(self, rpc: Rpc) -> None:
        address = peer_address(rpc.peer)
        if address and self.proxies and is_within(address, self.proxies):
            return  # the proxy waits for its caller, and may read on only after megabytes
        rpc.timeout_error = self.slow_reader
        rpc.scope.expire()

    def unlimited(self, method: Callable[[Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        """Returns an ordinary grpc handler that needs no key and applies no limits. It reports the errors of
        the method."""

        async def handle(request: Any, context: Any) -> Any:
            async def serve(rpc: Rpc) -> Awaitable[Any]:
                rpc.scope.reschedule(math.inf)
                return method(request)

            outcome = await self.outcome(Rpc(self, context), context, serve, "")
            if isinstance(outcome, tuple):
                await context.abort(*outcome)
            return outcome

        return handle

    async def outcome(self, rpc: Rpc, context: Any, serve: Method, name: str) -> Response | Refusal:
        """Runs a call. Returns its response, or the arguments with which to abort it. `name` is that of the
        method, for reports."""
        code, status, sent = "", 0, True
        try:
            try:
                with rpc.scope:
                    response = await (await serve(rpc))
            except PomeloError as failure:
                error = without_traceback(failure)
            except TimeoutError as failure:
                expired = rpc.scope.expired
                error = rpc.timeout_error.error() if expired else _unexpected_error(rpc.call, failure)
            except asyncio.CancelledError:
                if is_cancelled():
                    raise
                # Something that the call awaited was cancelled, not the call. Its caller still waits for a
                # response.
                log.error("request %s failed: something that it awaited was cancelled", rpc.call.request_id)
                error = PomeloError("internal_error")
            except grpc.aio.BaseError:  # the caller has left
                rpc.cancelled()
                raise
            except Exception as failure:
                error = _unexpected_error(rpc.call, failure)
            else:
                status = 200
                rpc.close()
                sent = response is None
                return response
            if rpc.visit is not None and rpc.refuses_body(error):
                error = without_traceback(await rpc.visit.refuse(error, rpc.model))
            code, status = error.code, error.row.http
            sent = not rpc.accepted  # the error of a stream follows what its caller has yet to read
            return rpc.refusal(error)
        except asyncio.CancelledError:
            # `abort` would send the initial metadata again, and grpc never frees a batch that it refuses.
            may_report = rpc.visit is not None and not rpc.opening
            if not may_report or not await _was_reported(rpc, context):
                rpc.cancelled()
            raise
        finally:
            rpc.end(sent=sent)
            if not rpc.trusted:  # a gateway reports its callers' calls, and makes some of its own
                report_call(self.observers, rpc.call, name, code, status)


class _UnknownMethod(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Returns one handler for every method."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler

    def service(self, handler_call_details: Any) -> Any:
        return self._handler


async def _was_reported(rpc: Rpc, context: Any) -> bool:
    """Reports the error of a call that something within it has cancelled. Returns False if its caller has
    left."""
    if _is_abandoned():
        return False
    uncancel()
    try:
        await context.abort(*rpc.refusal(PomeloError("internal_error")))
    except grpc.aio.AbortError:
        log.error("request %s failed: it was cancelled from within", rpc.call.request_id)
        return True
    except (grpc.aio.BaseError, asyncio.CancelledError):
        pass
    return False


def _is_abandoned() -> bool:
    """Whether grpc.aio has cancelled the current task because the caller has left. Then grpc.aio waits for
    the task, as the second of its callbacks. An operation would show it too, but grpc.aio never frees the
    memory of one that fails."""
    task = asyncio.current_task()
    return task is None or len(task._callbacks) > 1


async def _refuse_unknown_method(rpc: Rpc) -> NoReturn:
    if (refusal := await rpc.admit_if_known()) is not None:
        raise refusal
    raise PomeloError("method_not_allowed", "This method does not exist. Check its name")


def keyless(method: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a method that may be called without a key, and admits its calls itself."""
    method.keyless = True  # type: ignore[attr-defined]
    return method


def _serve(method: MethodDescriptor, function: Callable[..., Awaitable[Response]]) -> Method:
    """Adapts a servicer's method to `Method`."""
    request_type = GetMessageClass(method.input_type)
    is_keyless = getattr(function, "keyless", False)
    is_upload = method.client_streaming

    async def serve(rpc: Rpc) -> Awaitable[Response]:
        if is_keyless:
            return function(rpc)
        if is_upload:
            return upload(rpc)
        await rpc.admit()
        return function(await rpc.message(request_type), rpc)

    async def upload(rpc: Rpc) -> Response:
        try:
            await rpc.admit()
            return await function(rpc)
        except PomeloError:
            await rpc.discard_rest()
            raise

    return serve


def _unexpected_error(call: Call, error: Exception) -> PomeloError:
    log.error("request %s failed unexpectedly\n%s", call.request_id, format_trace(error))
    return PomeloError("internal_error")
