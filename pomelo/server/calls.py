"""The life of a gRPC call: admitted from its metadata, its message read within limits, answered or refused.

Every method is registered as one that takes a stream of raw bytes, which changes nothing on the network:
grpc.aio would otherwise receive, decompress and parse the message before any code of ours runs. The methods
themselves are in `pomelo.server.servicers`. Nothing here decides what a key may do.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from pomelo.call import Call
from pomelo.errors import TABLE, PomeloError
from pomelo.inflight import FairPermits
from pomelo.origin import GatewayProof
from pomelo.server import budget
from pomelo.service import AccessService, Visit
from pomelo.traces import trace
from pomelo.wire import OPEN_KEY, REFUSED_KEY, retry, status_code, to_status, trailing

log = logging.getLogger("pomelo.server")

_MIB = 1024 * 1024
_SLACK = 5.0
"""Seconds after a call's deadline in which the services end it themselves, with all that an answer has."""

_LINGER = 1.0
"""Seconds for which what a refused uploader still sends is taken and dropped."""

_MOST_WAITING = 200
_TICK = 0.001
"""Seconds by which a timer of the event loop may be early."""

_MOMENTS = 0.25
"""Seconds within which a call that its caller cancels is one that was never meant."""

_BODY_FAULTS = frozenset({"invalid_body", "payload_too_large", "unsupported_media_type"})


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What calls may cost. Sizes are in bytes, times in seconds.

    A caller without a key gets `unauthenticated_time` for a call; there are at most `unauthenticated` such
    calls at a time, and `unauthenticated_reads` of them may be receiving a message, which comes at once or
    makes room for the next one. Health checks have `health_reads` apart. An account receives `reads` messages
    at a time, each within `read_time` of the call's beginning, and pieces of `uploads` uploads, each within
    `piece_time` of the one before. `lookups` are keys that are being looked up.
    """

    message: int = 9 * _MIB
    unauthenticated: int = 200
    unauthenticated_reads: int = 2
    unauthenticated_time: float = 9.0
    health_reads: int = 1
    lookups: int = 500
    forwarded: int = 1_000
    """Downloads by a signed link that gateways pass on: without a key, but with the gateway's own bounds."""
    reads: int = 8
    read_time: float = 60.0
    uploads: int = 6
    piece_time: float = 30.0

    @property
    def transport(self) -> int:
        """Bytes above which grpc itself refuses a message, compressed or not. Its refusal has no details, so
        it is above ours; but what is between the two is received before it is refused."""
        return 2 * self.message


class Connections(Protocol):
    """What is told of the calls on each connection. `peer` is grpc's name for a caller's address."""

    def authenticated(self, peer: str) -> None:
        """A call with a good key has come; once for each."""

    def received(self, peer: str, size: int) -> None:
        """A message of `size` bytes was read."""

    def reset(self, peer: str) -> None:
        """A call was cancelled before its message was read, or moments after it came."""

    def ended(self, peer: str) -> None:
        """A call with a good key has ended; once for each."""

    def trust(self, peer: str) -> None:
        """A gateway of ours speaks: the connection carries the calls of many callers."""


class AnyConnections:
    """Takes all connections as they are. Implements `Connections`."""

    def authenticated(self, peer: str) -> None:
        """See the protocol."""

    def received(self, peer: str, size: int) -> None:
        """See the protocol."""

    def reset(self, peer: str) -> None:
        """See the protocol."""

    def ended(self, peer: str) -> None:
        """See the protocol."""

    def trust(self, peer: str) -> None:
        """See the protocol."""


class Running:
    """Counts the calls whose handlers have not ended.

    grpc.aio's own stop returns before the handlers that it cancelled have cleaned up, so whoever stops a
    server waits here as well.
    """

    __slots__ = ("_idle", "count")

    def __init__(self) -> None:
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


class Pool:
    """At most `limit` at a time; whoever comes above that is refused."""

    __slots__ = ("_limit", "count")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.count = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """One place, until the block is left.

        Raises:
            PomeloError: overloaded.
        """
        if self.count >= self._limit:
            raise PomeloError("overloaded")
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


class NewestFirst:
    """At most `limit` at a time. While others wait, nobody keeps a place for more than `patience` seconds,
    and the newest is next: for work that takes a moment where it is honest, so that the slow keep nobody out.
    """

    __slots__ = ("_free", "_holders", "_patience", "_timer", "_waiting")

    def __init__(self, limit: int, patience: float = 0.2) -> None:
        self._free = limit
        self._patience = patience
        self._holders: dict[asyncio.Timeout, float] = {}
        """Since when each has its place."""
        self._waiting: list[asyncio.Future[bool]] = []
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """One place, until the block is left.

        Raises:
            PomeloError: overloaded; a newer one has the place.
        """
        if self._free:
            self._free -= 1
        elif not await self._wait():
            raise PomeloError("overloaded")
        scope = asyncio.timeout(None)
        self._holders[scope] = asyncio.get_running_loop().time()
        self._watch()
        try:
            async with scope:
                yield
        except TimeoutError:
            if scope.expired():
                raise PomeloError("overloaded") from None
            raise
        finally:
            if self._holders.pop(scope, None) is not None:
                self._give()

    async def _wait(self) -> bool:
        """Waits for a place; False when too many newer ones do."""
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        if len(self._waiting) > _MOST_WAITING:
            oldest = self._waiting.pop(0)
            if not oldest.done():
                oldest.set_result(False)
        self._watch()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):
                    self._waiting.remove(turn)
            elif turn.result():
                self._give()  # it came at the same moment
            raise

    def _give(self) -> None:
        """Gives a place that is free to the newest."""
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(True)
                return
        self._free += 1

    def _watch(self) -> None:
        """Sees to it that the oldest holder ends in time where somebody waits."""
        if self._timer is None and self._waiting and self._holders:
            since = next(iter(self._holders.values()))
            self._timer = asyncio.get_running_loop().call_at(since + self._patience, self._end_oldest)

    def _end_oldest(self) -> None:
        self._timer = None
        if self._waiting and self._holders:
            oldest, since = next(iter(self._holders.items()))
            if since + self._patience <= asyncio.get_running_loop().time() + _TICK:
                del self._holders[oldest]
                with suppress(RuntimeError):  # it is ending anyway
                    oldest.reschedule(0)
                self._give()
        self._watch()


Late = tuple[str, str]
"""The code and message of the error of a call whose time is over; no message: the row's."""

_DEADLINE: Late = ("deadline_exceeded", "")
_CROWDED: Late = (
    "overloaded",
    "The account sends more messages at a time than the server takes. Retry later",
)

Refusal = tuple[Any, str, tuple[tuple[str, str | bytes], ...]]
"""What `abort` takes: status, message, trailing metadata."""

Method = Callable[["Rpc"], Awaitable[bytes | None]]
"""What a method does with its call: the serialized answer, or None where it has written its messages."""


class FrontEnd:
    """What the calls of one gRPC server share."""

    def __init__(
        self,
        access: AccessService | None,
        limits: CallLimits,
        connections: Connections,
        proof: GatewayProof | None = None,
    ) -> None:
        self.access = access
        self.proof = proof or GatewayProof()
        self.limits = limits
        self.connections = connections
        self.running = Running()
        self.unauthenticated = Pool(limits.unauthenticated)
        self.unauthenticated_reads = NewestFirst(limits.unauthenticated_reads)
        self.health_reads = NewestFirst(limits.health_reads)
        self.forwarded = Pool(limits.forwarded)
        self.lookups = Pool(limits.lookups)
        self.reads = FairPermits(limits.reads)
        self.uploads = FairPermits(limits.uploads)

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
        """A handler of every method that no other one has."""
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
                    # The call keeps the error that `abort` raises, and that keeps this frame: a circle that
                    # only the garbage collector would open, unless the frame keeps nothing.
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
            rpc.left()
            raise
        finally:
            rpc.end()

    async def _attempt(self, rpc: "Rpc", serve: Method) -> PomeloError | None:
        """Serves a call; what it failed with, any row of the table.

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
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Something inside was cancelled, not this call: left alone, the caller would wait for ever.
            log.error("request %s failed: something that it waited for was cancelled", rpc.call.request_id)
            return PomeloError("internal_error")
        except grpc.aio.BaseError:
            raise
        except Exception as fault:
            return _unforeseen(rpc.call, fault)
        return None


class _Unknown(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Has one handler for whatever is asked."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler

    def service(self, handler_call_details: Any) -> Any:
        """See grpc."""
        return self._handler


async def _no_method(rpc: "Rpc") -> None:
    raise PomeloError("method_not_allowed", "There is no such method. Check its name")


def answering(method: Callable[[Any, Any, "Rpc"], Awaitable[Any]]) -> Callable[[Any, Any, Any], Any]:
    """Makes a handler of grpc's usual kind of a method, for a server that only its operator can reach: it
    answers what is raised, and bounds nothing."""

    async def handler(self: Any, request: Any, context: Any) -> Any:
        front = FrontEnd(None, CallLimits(), AnyConnections())

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
    """Marks a method that may be called without a key, and sees to its callers itself."""
    method.keyless = True  # type: ignore[attr-defined]
    return method


def _serve(method: MethodDescriptor, function: Callable[..., Awaitable[Any]]) -> Method:
    """What is done with a call of a method."""
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
    log.error("request %s failed unexpectedly\n%s", call.request_id, trace(fault))
    return PomeloError("internal_error")


def bare(error: PomeloError) -> PomeloError:
    """The error without what led to it: an exception that is kept keeps every frame that it went through,
    and all that is in them, such as a message of megabytes."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


class Rpc:
    """One gRPC call as its method sees it: its `Call`, its messages, and what goes back."""

    __slots__ = (
        "_accepted", "_authenticated", "_began", "_context", "_front", "_loop", "_peer", "_read", "_served",
        "_size",
        "answer", "call", "gateway", "late", "model", "refused_body", "scope", "trusted", "visit",
    )  # fmt: skip

    def __init__(self, front: FrontEnd, context: Any) -> None:
        pairs = context.invocation_metadata() or ()
        given = dict(pairs)
        self._front = front
        self._context = context
        self._peer: str = context.peer()
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._accepted = False
        self._authenticated = False
        self._read = False
        self._served = False
        self._size = 0
        origin = front.proof.origin(given, self._peer)
        self.gateway = origin.gateway
        self.trusted = origin.proven
        # A gateway's own deadline is a little later than its caller's, which it sends in a header: so a
        # late task is answered from here, with all that an answer has.
        self.call = Call.from_headers(
            given.get,
            wire=origin.wire,
            address=origin.address,
            timeout=None if self.trusted else context.time_remaining(),
            names=[name for name, _ in pairs] if len(given) < len(pairs) else (),
        )
        self.refused_body: str = given.get(REFUSED_KEY, "") if self.trusted else ""
        """What a gateway says of a body that it refused itself; see `REFUSED_KEY`."""
        self.answer: bytes | None = None
        """What the method gave."""
        self.model = ""
        """The model that the message names, once it was read."""
        self.visit: Visit | None = None
        """None until the call was admitted."""
        self.late: Late = _DEADLINE
        """What the call ends with when its time is over."""
        seconds = front.limits.unauthenticated_time
        when = min(self.call.deadline, self._began + seconds)
        if when < self.call.deadline:
            self.late = _late(f"A call without a key ends after {seconds:g} seconds. Send a key")
        self.scope = asyncio.timeout_at(when)

    # --- who calls

    async def admit(self) -> None:
        """Checks the key, and counts the call as in flight for its account.

        Raises:
            PomeloError: invalid_api_key, concurrency_limit_exceeded, overloaded, store_unavailable.
        """
        access = self._front.access
        assert access is not None
        try:
            with self._front.lookups.place():
                self.visit = await access.admit(self.call)
        finally:
            if self.call.principal is not None:  # the key is good, also where the account has too many calls
                self._authenticate()

    def _authenticate(self) -> None:
        """The call has shown a good key or a good signature, so its connection may stay. Idempotent."""
        if not self._authenticated:
            self._authenticated = True
            self._front.connections.authenticated(self._peer)
            if self.trusted:
                self._front.connections.trust(self._peer)

    async def admit_if_known(self) -> PomeloError | None:
        """As `admit`, for a call that needs no key; what is wrong with one that has a bad key.

        Raises:
            PomeloError: concurrency_limit_exceeded, overloaded, store_unavailable.
        """
        if self.call.secret is None:
            return None
        try:
            await self.admit()
        except PomeloError as error:
            if error.code != "invalid_api_key":
                raise
            return bare(error)
        self.unlimit()
        return None

    @contextmanager
    def without_key(self) -> Iterator[None]:
        """A place among the unauthenticated calls, unless the call was admitted.

        Raises:
            PomeloError: overloaded.
        """
        if self.visit is not None:
            yield
        elif self.trusted:
            self.unlimit()
            with self._front.forwarded.place():
                yield
        else:
            with self._front.unauthenticated.place():
                yield

    def signed(self) -> None:
        """A good signature stands for the key: the call has its own deadline, its connection stays."""
        if self.visit is None:
            self._authenticate()
            self.unlimit()

    def unlimit(self) -> None:
        """Leaves the call's time to its own deadline, and to the services that keep it."""
        if not self.scope.expired():
            self.late = _DEADLINE
            self.scope.reschedule(self.call.deadline + _SLACK)

    def _until(self, when: float, late: "Late") -> None:
        """Ends the call at that time, or at its deadline where that is earlier."""
        if self.scope.expired():
            return
        if when < self.call.deadline:
            self.late = late
        else:
            when, self.late = self.call.deadline, _DEADLINE
        self.scope.reschedule(when)

    async def _in_turn(self, turns: FairPermits, until: float, late: "Late") -> None:
        """Waits for a turn of the account, until that time; from then on the call is `late` at that time."""
        owner = self._owner
        if turns.full(owner):
            self._until(until, _CROWDED)
        await turns.enter(owner)
        self._until(until, late)

    @property
    def _owner(self) -> str:
        principal = self.call.principal
        return principal.account if principal is not None else ""

    # --- what it brings

    async def message(self, kind: Any) -> Any:
        """The one message of an admitted call, parsed.

        Raises:
            PomeloError: invalid_body, invalid_parameter, payload_too_large, overloaded, deadline_exceeded.
        """
        assert self.visit is not None
        front = self._front
        limits = front.limits
        seconds = limits.read_time
        late = _late(f"The message did not come within {seconds:g} seconds. Send it faster")
        await self._in_turn(front.reads, self._began + seconds, late)
        try:
            data = await self._receive()
            if data is None:
                raise _no_message()
            self.visit.reserve(len(data))
            _fitting(data, limits.message)
            await self._end_of_messages()
        finally:
            front.reads.leave(self._owner)
        self.unlimit()
        message = _parse(data, kind)
        self._served = True
        return message

    async def small_message(self, kind: Any, *, health: bool = False) -> Any:
        """The one message of a call that needs no key, parsed; `health`: in the places of health checks.

        Raises:
            PomeloError: invalid_body, payload_too_large, overloaded, deadline_exceeded.
        """
        front = self._front
        async with (front.health_reads if health else front.unauthenticated_reads).place():
            data = await self._receive()
            if data is None:
                raise _no_message()
            await self._end_of_messages()
        return _parse(_fitting(data), kind)

    async def next_message(self, kind: Any) -> Any:
        """The next message of a stream, parsed, or None at its end. Without a key it must be small.

        Raises:
            PomeloError: invalid_body, payload_too_large, overloaded, deadline_exceeded.
        """
        data = await self._next()
        if data is None:
            return None
        return _parse(_fitting(data) if self.visit is None else data, kind)

    async def linger(self) -> None:
        """Drops what a refused uploader still sends, for a moment.

        grpc.aio's client forgets the status that it got when one of its writes fails, so an uploader that is
        about to end gets the chance to. A gateway knows how to do without.
        """
        if self.trusted or self.scope.expired():
            return
        with suppress(TimeoutError, PomeloError):
            async with asyncio.timeout(_LINGER):
                while await self._next() is not None:
                    pass

    async def _next(self) -> bytes | None:
        """The next message of a stream, or None at its end; in its turn, and in time."""
        front = self._front
        if self.visit is None:
            async with front.unauthenticated_reads.place():
                return await self._receive()
        seconds = front.limits.piece_time
        late = _late(f"No message came for {seconds:g} seconds. Send without such pauses")
        until = self._loop.time() + seconds
        if self.trusted:  # a gateway's uploads are as slow as its callers', and its pieces are small
            self._until(until, late)
            data = await self._receive()
        else:
            await self._in_turn(front.uploads, until, late)
            try:
                data = await self._receive()
            finally:
                front.uploads.leave(self._owner)
        self.unlimit()
        return data

    async def _receive(self) -> bytes | None:
        """The next message, or None at the end of all, which is also where a caller seems to be who left."""
        data = await self._context.read()
        if data is grpc.aio.EOF:
            return None
        self._read = True
        self._size += len(data)
        self._front.connections.received(self._peer, len(data))
        return bytes(data)

    async def _end_of_messages(self) -> None:
        if await self._context.read() is not grpc.aio.EOF:
            raise PomeloError("invalid_body", "More than one message was sent. Send one")

    # --- what goes back

    async def open(self) -> None:
        """Accepts a stream: sends `call.reply` as initial metadata, once."""
        if not self._accepted:
            self._accepted = True
            pairs = self._reply()
            if self.gateway:
                pairs.append((OPEN_KEY, "1"))
            await self._context.send_initial_metadata(pairs)

    async def probe(self) -> None:
        """Sends initial metadata that says nothing.

        Raises:
            grpc.aio.BaseError: the caller has left.
        """
        await self._context.send_initial_metadata(())

    async def write(self, message: Any) -> None:
        """Sends one message of a stream; waits while the caller does not read."""
        await self._context.write(message)

    def close(self) -> None:
        """Says in the trailing metadata what was not said before; to be called before the call ends well."""
        pairs = self._trailer() if self._accepted else self._reply()
        if pairs:
            self._context.set_trailing_metadata(pairs)

    def refusal(self, error: PomeloError) -> Refusal:
        """What ends the call with an error. All of it is trailing metadata, unless the stream was accepted:
        a client retries only what is refused before anything else was sent."""
        pairs = self._trailer() if self._accepted else [*self._reply(), *retry(error)]
        status = to_status(error)
        return status_code(error), status.message, (*trailing(status), *pairs)

    def forwarded_refusal(self) -> PomeloError:
        """The error of the body that the gateway refused.

        Raises:
            PomeloError: overloaded.
        """
        assert self.visit is not None
        code, _, size = self.refused_body.partition(" ")
        # Nothing of it is buffered here; what counts is whether it was large.
        self.visit.reserve(min(int(size), _MIB) if size.isascii() and size.isdigit() else 0)
        self._served = False
        return PomeloError(code if code in TABLE else "invalid_body")

    def refuses_body(self, error: PomeloError) -> bool:
        """Whether an error is for `Visit.refuse` to answer and to count: one that no service has seen, or one
        that refuses a message which was large."""
        if self._accepted or "X-Credits-Charged" in self.call.reply:
            return False  # the task was taken in, and counted as such
        if not self._served or error.code in _BODY_FAULTS:
            return True
        return self._size > budget.SMALL and error.row.http == 400

    def end(self) -> None:
        """The call is over but for its answer."""
        if self.visit is not None:
            self.visit.close()
        if self._authenticated:
            self._front.connections.ended(self._peer)

    def left(self) -> None:
        """The caller has cancelled the call."""
        now = self._loop.time()
        if now < self.call.deadline and (not self._read or now - self._began < _MOMENTS):
            self._front.connections.reset(self._peer)

    def _reply(self) -> list[tuple[str, str]]:
        return [(name.lower(), value) for name, value in self.call.reply.items()]

    def _trailer(self) -> list[tuple[str, str]]:
        return [(name.lower(), value) for name, value in self.call.trailer.items()]


def _late(message: str) -> Late:
    return "deadline_exceeded", message


def _no_message() -> PomeloError:
    return PomeloError("invalid_body", "No message was sent. Send one")


def _fitting(data: bytes, most: int = budget.SMALL) -> bytes:
    if len(data) > most:
        raise PomeloError("payload_too_large", f"The message is larger than {most:,} bytes. Send less")
    return data


def _parse(data: bytes, kind: Any) -> Any:
    """The message of that type.

    Raises:
        PomeloError: invalid_body, invalid_parameter.
    """
    budget.check(data, kind.DESCRIPTOR)
    try:
        return kind.FromString(data)
    except DecodeError:
        raise PomeloError(
            "invalid_body", f"The message can't be decoded. Send a {kind.DESCRIPTOR.full_name}"
        ) from None
