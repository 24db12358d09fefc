"""One gRPC call, as its method uses it: its caller, its messages, its limits and its response."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import grpc
from google.protobuf.message import Message

from pomelo.call import Call
from pomelo.errors import BODY_ERRORS, PomeloError, without_traceback
from pomelo.network.origin import FORWARDED_KEY, caller_address, network
from pomelo.runtime.in_flight import FairSemaphore, Ticket
from pomelo.runtime.process import CancelScope, shielded
from pomelo.server import field_limit
from pomelo.server.call_limits import DEADLINE, TOO_MANY_MESSAGES, ServerState, TimeoutReason
from pomelo.server.messages import check_request, check_size, parse, receive, too_large
from pomelo.server.unread_streams import UNREAD_PER_BYTE
from pomelo.service import Visit
from pomelo.status import (
    DISCARD_KEY,
    OPEN_KEY,
    REFUSED_KEY,
    details_metadata,
    retry_metadata,
    status_code,
    to_metadata,
    to_status,
)

_GRACE = 5.0
"""Seconds after a call's deadline in which the services end it themselves. Gateways wait a little longer."""

_DISCARD_TIME = 1.0
"""Seconds for which the messages of a refused upload are still received and discarded."""

_RESET_TIME = 0.25
"""A call that is cancelled within so many seconds counts as a reset, even if its message was read."""
_SKEW = 0.05
"""Maximum seconds by which a caller's deadline may end a call before the server's does."""

Refusal = tuple[Any, str, tuple[tuple[str, str | bytes], ...]]
"""The arguments of `abort`: status, message, trailing metadata."""


class Rpc:
    """One gRPC call: its `Call`, its messages, and its response."""

    __slots__ = (
        "_authenticated", "_context", "_front", "_loop", "_read", "_release", "_size", "_started", "_ticket",
        "accepted", "call", "gateway", "model", "opening", "peer", "refused_body", "scope", "served",
        "timeout_error", "trusted", "unread", "visit", "write",
    )  # fmt: skip

    def __init__(self, front: ServerState, context: Any) -> None:
        pairs = context.invocation_metadata() or ()
        metadata = dict(pairs)
        self._front = front
        self._context = context
        self.peer: str = context.peer()
        self._loop = loop = asyncio.get_running_loop()
        self._started = started = loop.time()
        self.accepted = False  # whether the initial metadata of a stream were sent
        self.opening = False  # whether initial metadata are being sent, or were when the call was cancelled
        self._release: Callable[[], None] | None = None
        """Ends the count of a message as unread, while a large one is sent."""
        self.unread: float | None = None  # as in `pomelo.server.unread_streams.Stream`
        self.write: Callable[[bytes], Awaitable[None]] = context.write
        """Sends one serialized message of a stream; waits until the caller reads."""
        self._ticket: Ticket | None = None  # which counts the call as one without a key
        self._authenticated = self._read = False
        self.served = False  # whether the message was passed to a service
        self._size = 0
        origin = front.proof.origin(metadata, self.peer)
        self.gateway = origin.gateway
        self.trusted = origin.proven
        address = origin.address
        if front.proxies and not origin.proven:
            address = caller_address(address, metadata.get(FORWARDED_KEY, ""), front.proxies)
        # A gateway sends its caller's deadline in a header, and sets a later one itself, so that the response
        # of a late task comes from this server and is complete.
        self.call = Call.from_headers(
            metadata.get,
            protocol=origin.protocol,
            address=address,
            timeout=None if self.trusted else context.time_remaining(),
            names=[name for name, _ in pairs] if len(metadata) < len(pairs) else (),
        )
        if sum(map(len, chain.from_iterable(pairs))) > front.limits.metadata:
            self.call.header_error = too_large("metadata", front.limits.metadata)
        self.call.relayed = self.trusted
        self.call.reported = self.trusted and DISCARD_KEY in metadata
        self.refused_body: str = metadata.get(REFUSED_KEY, "") if self.trusted else ""
        """The error and size of a body that a gateway has refused itself, as in `REFUSED_KEY`."""
        self.model = ""  # that the message names; empty until the message was read
        self.visit: Visit | None = None  # until the call is admitted
        self.timeout_error = DEADLINE  # the error of the call when `scope` expires
        when = started + front.limits.unauthenticated_time
        if when < self.call.deadline:
            self.timeout_error = front.no_key
        else:
            when = self.call.deadline
        self.scope = CancelScope(when)

    # --- authentication

    async def admit(self) -> None:
        """Authenticates the call, and counts it as in flight for its account.

        Raises:
            PomeloError: invalid_api_key, concurrency_limit_exceeded, overloaded, store_unavailable.
        """
        front, peer = self._front, self.peer
        assert front.access is not None
        front.connections.checking(peer)
        try:
            with front.lookups:
                self.visit = await front.access.admit(self.call)
        finally:
            front.connections.checked(peer)
            if self.call.principal is not None:  # the key is valid, even if the account has too many calls
                self._authenticate()

    def _authenticate(self) -> None:
        """Reports a valid key or signature, so that the connection may stay open. Idempotent."""
        if not self._authenticated:
            self._authenticated = True
            self._front.connections.authenticated(self.peer)
            if self.trusted:
                self._front.connections.trust(self.peer)

    async def admit_if_known(self) -> PomeloError | None:
        """Admits a call that needs no key. Returns the error of an invalid key instead of raising it.

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
            return without_traceback(error)
        self.unlimit()
        return None

    def count_without_key(self) -> None:
        """Counts the call as an unauthenticated one until its end, unless it was admitted.

        Raises:
            PomeloError: overloaded.
        """
        if self.visit is not None:
            return
        calls = self._front.unauthenticated
        if self.trusted:
            self.unlimit()
            calls = self._front.forwarded
        self._ticket = calls.enter(network(self.call.address))

    def signed(self) -> None:
        """Accepts a valid signature in place of a key: only the call's own deadline applies from now on."""
        if self.visit is None:
            self._authenticate()
            self.unlimit()

    def unlimit(self) -> None:
        """Applies no limit but the call's own deadline, which the services enforce."""
        if not self.scope.expired:
            self.timeout_error = DEADLINE
            self.scope.reschedule(self.call.deadline + _GRACE)

    def _until(self, when: float, reason: TimeoutReason) -> None:
        """Ends the call at that time, or at its deadline if that is earlier."""
        if self.scope.expired:
            return
        if when < self.call.deadline:
            self.timeout_error = reason
        else:
            when, self.timeout_error = self.call.deadline, DEADLINE
        self.scope.reschedule(when)

    async def _acquire(self, semaphore: FairSemaphore, until: float, reason: TimeoutReason) -> str:
        """Waits for a slot of the account, and returns the account. The call ends at `until`: as overloaded
        while it waits, then with `reason`."""
        principal = self.call.principal
        owner = "" if principal is None else principal.account
        if not semaphore.take(owner):
            self._until(until, TOO_MANY_MESSAGES)
            await semaphore.acquire(owner)
        self._until(until, reason)
        return owner

    # --- requests

    async def message(self, message_type: Any) -> Any:
        """Receives and parses the single message of an admitted call.

        Raises:
            PomeloError: invalid_body, invalid_parameter, payload_too_large, overloaded, deadline_exceeded.
        """
        assert self.visit is not None
        front = self._front
        until = self._started + front.limits.read_time
        owner = await self._acquire(front.reads, until, front.slow_message)
        try:
            data = await self._only_message(front.limits.message, self.visit)
        finally:
            front.reads.release(owner)
        self.unlimit()
        request = check_request(parse(data, message_type))
        self.served = True
        return request

    async def small_message(self, message_type: Any, *, health: bool = False) -> Any:
        """Receives and parses the single message of a call that needs no key; `health` uses the limit of
        health checks. Callers without a key can't delay that of a caller with one, or of a gateway.

        Raises:
            PomeloError: invalid_body, payload_too_large, overloaded, deadline_exceeded.
        """
        front, limit = self._front, field_limit.SMALL_MESSAGE
        if self.visit is not None:
            until = self._started + front.limits.read_time
            owner = await self._acquire(front.reads, until, front.slow_message)
            try:
                data = await self._only_message(limit)
            finally:
                front.reads.release(owner)
            self.unlimit()
        elif self.trusted:
            data = await self._only_message(limit)
        else:
            slots = front.health_reads if health else front.unauthenticated_reads
            async with slots.slot(network(self.call.address)):
                data = await self._only_message(limit)
        return parse(data, message_type)

    async def next_message(self, message_type: Any, limit: int | None = None) -> Any:
        """Receives and parses the next message of a stream, of at most `limit` bytes; None at its end.

        Raises:
            PomeloError: invalid_body, payload_too_large, overloaded, deadline_exceeded.
        """
        data = await self._next()
        if data is None:
            return None
        return parse(data if limit is None else check_size(data, limit), message_type)

    async def discard_rest(self) -> None:
        """Receives and discards the messages of a refused upload, for a moment.

        grpc.aio's client forgets the status that it received when one of its writes fails, so an upload that
        is about to end gets the time to do so. A gateway does not need this.
        """
        if self.trusted or self.scope.expired:
            return
        with suppress(TimeoutError, PomeloError):
            async with asyncio.timeout(_DISCARD_TIME):
                while await self._next() is not None:
                    pass

    async def _next(self) -> bytes | None:
        """Receives the next message of a stream, within the limits of uploads; None at its end."""
        front = self._front
        if self.visit is None:
            async with front.unauthenticated_reads.slot(network(self.call.address)):
                return await self._receive()
        until = self._loop.time() + front.limits.chunk_time
        if self.trusted:  # a gateway's uploads are as slow as its callers', and its messages are small
            self._until(until, front.slow_chunk)
            data = await self._receive()
        else:
            owner = await self._acquire(front.uploads, until, front.slow_chunk)
            try:
                data = await self._receive()
            finally:
                front.uploads.release(owner)
        self.unlimit()
        return data

    async def _receive(self) -> bytes | None:
        """Receives the next message; None at the end of the stream or if the caller has left."""
        data = await receive(self._context)
        if data is grpc.aio.EOF:
            return None
        self._read = True
        self._size += len(data)
        self._front.connections.received(self.peer, len(data))
        return bytes(data)

    async def _only_message(self, limit: int, visit: Visit | None = None) -> bytes:
        """Receives the single message of a call, of at most `limit` bytes, which `visit` counts."""
        data = await self._receive()
        if data is None:
            raise PomeloError("invalid_body", "No message was sent. Send one")
        if visit is not None:
            visit.reserve(len(data))
        check_size(data, limit)
        if await receive(self._context) is not grpc.aio.EOF:
            raise PomeloError("invalid_body", "More than one message was sent. Send one")
        return data

    # --- responses

    async def open(self) -> None:
        """Accepts a stream: sends `call.response_headers` as initial metadata. Call it once."""
        self.accepted = True
        if not self.trusted:  # a gateway reads as slowly as its callers, and ends those that do not read
            self._front.streams.add(self)
        pairs = to_metadata(self.call.response_headers)
        if self.gateway:
            pairs.append((OPEN_KEY, "1"))
        await self.send_metadata(pairs)

    async def send_metadata(self, pairs: Sequence[tuple[str, str]] = ()) -> None:
        """Sends initial metadata, also if it is cancelled meanwhile: grpc.aio can't end a call before.

        Raises:
            grpc.aio.BaseError: the caller has left.
        """
        self.opening = True
        sending = self._loop.create_task(self._context.send_initial_metadata(pairs))
        try:
            await shielded(sending)
        finally:
            if not sending.done():
                await asyncio.wait((sending,))
            self.opening = sending.exception() is not None

    async def send(self, message: Message) -> None:
        """Sends one message of a stream; waits until the caller reads."""
        data = message.SerializeToString()
        self.unread = len(data) * UNREAD_PER_BYTE
        await self.write(data)
        self.unread = None

    async def write_large(self, data: bytes) -> None:
        """As `write`, for a large message of an admitted call: it counts as unread until the caller has read
        it, or the call has ended."""
        assert self.visit is not None
        self._release = self.visit.hold(len(data))
        await self.write(data)
        self._release()
        self._release = None

    def close(self) -> None:
        """Sets the trailing metadata of a successful call to the headers that were not sent yet."""
        pairs = to_metadata(self.call.response_trailers if self.accepted else self.call.response_headers)
        if pairs:
            self._context.set_trailing_metadata(pairs)

    def refusal(self, error: PomeloError) -> Refusal:
        """Returns the arguments of `abort` for an error. Unless the stream was accepted, all headers are
        trailing metadata: clients retry only calls that fail before anything else was sent."""
        status, call = to_status(error), self.call
        pairs = to_metadata(call.response_trailers if self.accepted else call.response_headers)
        if not self.accepted:
            pairs += retry_metadata(error)
        return status_code(error), status.message, (*details_metadata(status), *pairs)

    def refuses_body(self, error: PomeloError) -> bool:
        """Whether `Visit.refuse` must report and count an error: one that no service has raised, or one that
        refuses a large message."""
        if self.accepted or self.call.reserved:
            return False  # the task was accepted and counted already
        if not self.served or error.code in BODY_ERRORS:
            return True
        return self._size + self.call.file_bytes > field_limit.SMALL_MESSAGE and error.row.http == 400

    def end(self, *, sent: bool) -> None:
        """Ends the call. Until its response is `sent`, it stays in flight: end it again then, or close
        its visit. Idempotent."""
        self._front.streams.discard(self)
        if self._authenticated:
            self._authenticated = False
            self._front.connections.ended(self.peer)
        if sent:
            if self.visit is not None:
                self.visit.close()
            if self._ticket is not None:
                self._ticket.close()
            if self._release is not None:
                self._release()
                self._release = None

    def cancelled(self) -> None:
        """Reports a reset if the caller has cancelled the call early, and not by the call's own deadline."""
        now = self._loop.time()
        elapsed, left = now - self._started, self.call.deadline - now
        if left > min(_SKEW, elapsed) and (not self._read or elapsed < _RESET_TIME):
            self._front.connections.reset(self.peer)
