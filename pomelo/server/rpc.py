"""One gRPC call as its method sees it: its caller, its messages, its limits and its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from pomelo.call import Call
from pomelo.errors import BODY_ERRORS, TABLE, PomeloError
from pomelo.in_flight import FairSemaphore
from pomelo.server import budget
from pomelo.server.limits import ServerState
from pomelo.service import Visit
from pomelo.status import OPEN_KEY, REFUSED_KEY, retry, status_code, to_status, trailing

_MIB = 1024 * 1024
_SLACK = 5.0
"""Seconds after a call's deadline in which the services end it themselves, with all that an answer has."""

_LINGER = 1.0
"""Seconds for which messages of a refused uploader are still received and dropped."""

_MOMENTS = 0.25
"""A call that is cancelled within so many seconds counts as a reset: its caller never wanted the answer."""


Late = tuple[str, str]
"""Error code and message of a call whose time is over; an empty message stands for the row's."""

_DEADLINE: Late = ("deadline_exceeded", "")
_CROWDED: Late = (
    "overloaded",
    "The account sends more messages at a time than the server takes. Retry later",
)

Refusal = tuple[Any, str, tuple[tuple[str, str | bytes], ...]]
"""What `abort` takes: status, message, trailing metadata."""


def bare(error: PomeloError) -> PomeloError:
    """The error without traceback and cause: a stored exception references every frame that it passed, and
    everything in them, such as a message of megabytes."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


class Rpc:
    """One gRPC call as its method sees it: its `Call`, its messages, and what goes back."""

    __slots__ = (
        "_accepted", "_authenticated", "_began", "_context", "_front", "_loop", "_peer", "_read", "_served",
        "_size",
        "answer", "call", "gateway", "late", "model", "refused_body", "scope", "trusted", "visit",
    )  # fmt: skip

    def __init__(self, front: ServerState, context: Any) -> None:
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
        """What the method returned."""
        self.model = ""
        """The model that the message names, once it was read."""
        self.visit: Visit | None = None
        """None until the call is admitted."""
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
        connections = self._front.connections
        connections.checking(self._peer)
        try:
            with self._front.lookups.place():
                self.visit = await access.admit(self.call)
        finally:
            connections.checked(self._peer)
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
        """As `admit`, for a call that needs no key. Returns the error of a bad key instead of raising it.

        Raises:
            PomeloError: concurrency_limit_exceeded, overloaded, store_unavailable.
        """
        if self.call.api_key is None:
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
        """A good signature replaces the key: the call keeps its own deadline, and its connection stays."""
        if self.visit is None:
            self._authenticate()
            self.unlimit()

    def unlimit(self) -> None:
        """Limits the call only by its own deadline, which the services enforce."""
        if not self.scope.expired():
            self.late = _DEADLINE
            self.scope.reschedule(self.call.deadline + _SLACK)

    def _until(self, when: float, late: Late) -> None:
        """Ends the call at that time, or at its deadline where that is earlier."""
        if self.scope.expired():
            return
        if when < self.call.deadline:
            self.late = late
        else:
            when, self.late = self.call.deadline, _DEADLINE
        self.scope.reschedule(when)

    async def _in_turn(self, turns: FairSemaphore, until: float, late: Late) -> None:
        """Waits for a turn of the account. At `until` the call ends: as overloaded while it waits, as `late`
        once it has its turn."""
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
        """The one message of a call that needs no key, parsed; `health` uses the limit of health checks.

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
        """Receives and drops what a refused uploader still sends, for a moment.

        grpc.aio's client forgets the status that it got when one of its writes fails, so an uploader that is
        about to end gets the time to. A gateway does not need this.
        """
        if self.trusted or self.scope.expired():
            return
        with suppress(TimeoutError, PomeloError):
            async with asyncio.timeout(_LINGER):
                while await self._next() is not None:
                    pass

    async def _next(self) -> bytes | None:
        """The next message of a stream, or None at its end. Enforces the turns and time limits of uploads."""
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
        """The next message, or None at the end of the stream or if the caller has left."""
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
        """Sends empty initial metadata.

        Raises:
            grpc.aio.BaseError: the caller has left.
        """
        await self._context.send_initial_metadata(())

    async def write(self, message: Any) -> None:
        """Sends one message of a stream; waits while the caller does not read."""
        await self._context.write(message)

    def close(self) -> None:
        """Sets the trailing metadata to what was not sent before. Call it before the call succeeds."""
        pairs = self._trailer() if self._accepted else self._reply()
        if pairs:
            self._context.set_trailing_metadata(pairs)

    def refusal(self, error: PomeloError) -> Refusal:
        """The arguments of `abort` for an error. Unless the stream was accepted, all headers are trailing
        metadata: a client retries only a call that is refused before anything else was sent."""
        pairs = self._trailer() if self._accepted else [*self._reply(), *retry(error)]
        status = to_status(error)
        return status_code(error), status.message, (*trailing(status), *pairs)

    def forwarded_refusal(self) -> PomeloError:
        """The error for a body that the gateway refused.

        Raises:
            PomeloError: overloaded.
        """
        assert self.visit is not None
        code, _, size = self.refused_body.partition(" ")
        # Nothing of the body is buffered here; only its size matters.
        self.visit.reserve(min(int(size), _MIB) if size.isascii() and size.isdigit() else 0)
        self._served = False
        return PomeloError(code if code in TABLE else "invalid_body")

    def refuses_body(self, error: PomeloError) -> bool:
        """Whether `Visit.refuse` answers and counts an error: one that no service has seen, or one that
        refuses a large message."""
        if self._accepted or "X-Credits-Charged" in self.call.response_headers:
            return False  # the task was accepted and counted already
        if not self._served or error.code in BODY_ERRORS:
            return True
        return self._size > budget.SMALL and error.row.http == 400

    def end(self) -> None:
        """The call has ended, apart from sending its answer."""
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
        return [(name.lower(), value) for name, value in self.call.response_headers.items()]

    def _trailer(self) -> list[tuple[str, str]]:
        return [(name.lower(), value) for name, value in self.call.response_trailers.items()]


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
