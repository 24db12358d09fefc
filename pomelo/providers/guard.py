"""Checks what a provider raises, yields and returns; what it may not is logged, and the task fails.

A provider may be a plug-in. Whatever its code does, the caller gets a response, no other task is affected,
and the caller gets no error that only Pomelo itself may raise: of a key, a balance, a limit or a store.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

from pomelo.catalog.task_types import TASK_TYPE_ROWS
from pomelo.errors import TABLE, PomeloError
from pomelo.fields import MAX_CALL_CHARACTERS, MAX_PARTS
from pomelo.gen.v1.speech_pb2 import AudioChunk
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import ROLE_ASSISTANT, FinishReason, TextOutput, ToolCall, ToolCallDelta
from pomelo.providers.base import CALLER, CompleteMethod, Event, Job, JobMethod
from pomelo.providers.cancellation import SelfCancelledError, StillRunningError, await_bounded
from pomelo.providers.chunks import (
    MAX_AUDIO_BYTES,
    MAX_TEXT_CHARS,
    event_text,
    split_audio,
    split_text,
    split_tool_call,
)
from pomelo.providers.errors import CODES, RetryPolicy, UpstreamError
from pomelo.providers.http.client import MAX_BODY_BYTES
from pomelo.providers.http.connections import NoConnectionError
from pomelo.providers.http.errors import TruncatedError
from pomelo.runtime.logs import format_trace
from pomelo.runtime.process import is_cancelled

log = logging.getLogger("pomelo.providers")

MAX_RETRY_AFTER = 3600
"""The longest Retry-After of a provider, in seconds."""

MAX_TOOL_CALLS = MAX_PARTS - 1
"""Tool calls of one answer: the caller can send it back, with its text."""

_FINISH_REASONS = frozenset(FinishReason.values())

_TRUSTED = (PomeloError, UpstreamError, TruncatedError, NoConnectionError)
"""Errors that are passed on unchanged; a plug-in's own subclass may override anything."""

_CONTENT_TYPE = re.compile(r"(audio|image)/[\w!#$&^.+-]{1,64}(; ?[\w.+-]{1,32}=[\w.+-]{1,64})*", re.ASCII)
"""A content type that can be sent as a header: only tokens, so it has no line breaks."""


class GuardedEvents:
    """What a provider answers to one job, checked as it arrives. Call `begin`, then iterate.

    `account` is the one for which the provider is called. Code of Pomelo's own is `trusted`: it is awaited as
    it is, because it does nothing to the task that runs it.

    Raises:
        PomeloError: the provider's own, if its code is one of CODES; otherwise provider_failed.
        asyncio.CancelledError: only if the current task is cancelled.
    """

    __slots__ = (
        "_account", "_allowed", "_audio_started", "_call_ids", "_call_size", "_content_type", "_events",
        "_finished", "_is_text", "_job", "_loop", "_method", "_next", "_pending", "_task_type", "_trusted",
        "ended", "on_close", "on_failure",
    )  # fmt: skip

    def __init__(
        self, method: JobMethod, task_type: str, job: Job[Any], account: str = "", *, trusted: bool = False
    ) -> None:
        self._method = method
        self._task_type = task_type
        self._job = job
        self._account = account
        self._trusted = trusted
        self._allowed = TASK_TYPE_ROWS[task_type].events
        self._is_text = "text_delta" in self._allowed
        self._loop = asyncio.get_running_loop()
        self._finished = False
        self._audio_started = False
        self._content_type = ""
        self._call_ids: list[str] = []
        """The ids of the tool calls so far."""
        self._call_size = 0
        """Characters of their arguments."""
        self._events: Any = None
        self._next: Any = None
        self._pending: Iterator[Event] | None = None
        """Events that have arrived: the first one, or the parts of a large one."""
        self.ended = False
        """Whether the provider has ended without an event."""
        self.on_failure: Callable[[PomeloError], None] = lambda error: None
        """Gets the error with which the provider fails."""
        self.on_close: Callable[[], None] = lambda: None
        """Called when this is closed."""

    async def begin(self) -> None:
        """Call the provider, and wait for its first event; closes it if it fails."""
        try:
            first = await anext(self)
        except StopAsyncIteration:
            self.ended = True
        except BaseException:
            await self.aclose()
            raise
        else:
            self._pending = chain((first,), self._pending or ())

    async def complete(self, method: CompleteMethod) -> Event:
        """The whole answer, by a method that returns it."""
        CALLER.set(self._account)
        try:
            if self._trusted:
                event = await method(self._job)
            else:
                event = await await_bounded(partial(method, self._job), self._loop)
        except BaseException as error:
            self._refuse(error)
            raise
        if self._check(event) != "completed":
            raise self._failed("returned an event that is not the last one")
        return event

    def __aiter__(self) -> GuardedEvents:
        return self

    async def __anext__(self) -> Event:
        if self._pending is not None:
            if (event := next(self._pending, None)) is not None:
                return event
            self._pending = None
        if self.ended:
            raise StopAsyncIteration
        CALLER.set(self._account)  # another asyncio task may read the next event
        while True:
            try:
                if self._trusted:
                    event = await (self._next or self._start)()
                else:
                    event = await await_bounded(self._next or self._start, self._loop)
            except StopAsyncIteration:
                raise
            except BaseException as error:
                self._refuse(error)
                raise
            if self._is_text and not self._finished and type(event) is Event and event.HasField("text_delta"):
                if self._job.stream and len(event.text_delta.text) > MAX_TEXT_CHARS:
                    self._pending = split_text(event)
                    return next(self._pending)
                return event
            which = self._check(event)
            if which == "completed":
                if self._job.stream and len(event_text(event)) > MAX_TEXT_CHARS:
                    self._pending = split_text(event)
            elif which == "tool_call_delta":
                piece = event.tool_call_delta
                if self._job.stream and len(piece.arguments_json) > MAX_TEXT_CHARS:
                    self._pending = split_tool_call(piece, piece.index)
            elif which == "audio_chunk":
                audio = event.audio_chunk
                if not audio.data:
                    continue  # it would start a response that may never have any audio
                if not (self._audio_started or audio.content_type):  # an empty chunk had the content type
                    event = Event(audio_chunk=AudioChunk(data=audio.data, content_type=self._content_type))
                self._audio_started = True
                if len(audio.data) > MAX_AUDIO_BYTES:
                    self._pending = split_audio(event)
            return event if self._pending is None else next(self._pending)

    def _refuse(self, error: BaseException) -> None:
        """Report what the provider raised to `on_failure`; raise another error if it may not raise that."""
        failure: PomeloError | None = None
        if isinstance(error, PomeloError):
            failure = self._replacement(error)
            self.on_failure(failure or error)
        elif isinstance(error, SelfCancelledError):
            failure = self._failed("cancelled the task that runs it")
        elif isinstance(error, StillRunningError):
            self._events = None
            self._failed("went on after it was cancelled, and was stopped")
            raise asyncio.CancelledError from None
        # A plug-in may raise SystemExit or CancelledError, which would end the server or the connection.
        elif not is_cancelled():
            failure = self._failed("failed unexpectedly", error)
        elif not isinstance(error, asyncio.CancelledError):
            raise asyncio.CancelledError from None
        if failure is not None:
            raise failure from None

    def _start(self) -> Any:
        """Call the provider's method, and return what to await for its first event."""
        self._events = self._method(self._job)
        self._next = aiter(self._events).__anext__
        return self._next()

    async def aclose(self) -> None:
        """End the provider's call. Exceptions are logged, because the outcome of the task is known
        already."""
        self.on_close()
        close = getattr(self._events, "aclose", None)
        if close is None:
            return
        try:
            if self._trusted:
                await close()
            else:
                await await_bounded(close, self._loop, closing=True)
        except SelfCancelledError:
            self._failed("cancelled the task that runs it while it was closed")
        except StillRunningError:
            self._failed("went on after it was closed, and was stopped")
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError | GeneratorExit) and is_cancelled():
                raise
            self._failed("failed unexpectedly while it was closed", error)

    def _check(self, event: Event) -> str:
        """Refuse anything but an event of the task type, and an event after the last. Return the name of its
        field."""
        if type(event) is not Event:
            raise self._failed(f"yielded a {type(event).__name__} instead of an Event")
        which = event.WhichOneof("event")
        if which not in self._allowed:
            raise self._failed(f"yielded {which or 'an empty event'} for a task of type {self._task_type}")
        if self._finished:
            raise self._failed("yielded an event after the last one")
        if which == "completed":
            self._finished = True
            self._check_result(event.completed)
        elif which == "audio_chunk":
            if content_type := event.audio_chunk.content_type:
                self._check_content_type(content_type, "audio/")
                self._content_type = self._content_type or content_type
            elif not self._content_type:
                raise self._failed("yielded audio without its content_type")
        elif which == "tool_call_delta":
            self._check_call_piece(event.tool_call_delta)
        return which

    def _check_result(self, result: TaskResult) -> None:
        """Refuse the output of another task type, and an invalid output."""
        output = result.WhichOneof("output")
        if output != TASK_TYPE_ROWS[self._task_type].output:
            raise self._failed(f"yielded a result with {output or 'no output'}")
        if output == "text":
            self._check_text(result.text)
        elif output == "image":
            for image in result.image.images:
                self._check_content_type(image.content_type, "image/")

    def _check_text(self, text: TextOutput) -> None:
        """Refuse a text without a known finish reason, and a message that is not of the assistant, or has
        something else than text and then tool calls."""
        finish, message = text.finish_reason, text.message
        if not finish:
            raise self._failed("yielded a text without its finish_reason")
        if finish not in _FINISH_REASONS:
            raise self._failed(f"yielded the unknown finish_reason {finish}")
        if text.HasField("message") and message.role != ROLE_ASSISTANT:
            raise self._failed(f"yielded a message of the role {message.role} instead of the assistant's")
        calls = 0
        for part in message.content:
            if part.HasField("tool_call"):
                calls += 1
                self._begin_call(part.tool_call)
                self._add_arguments(part.tool_call)
            elif not part.HasField("text"):
                raise self._failed(f"yielded a message with {part.WhichOneof('part') or 'an empty part'}")
            elif calls:
                raise self._failed("yielded a message with text after a tool call")

    def _check_call_piece(self, piece: ToolCallDelta) -> None:
        """Refuse a piece of a tool call that belongs to no call, or begins one again."""
        if piece.index == len(self._call_ids):
            self._begin_call(piece)
        elif not 0 <= piece.index < len(self._call_ids):
            raise self._failed(f"yielded a piece of tool call {piece.index} too early")
        elif piece.id or piece.name:
            raise self._failed("yielded the beginning of a tool call twice")
        self._add_arguments(piece)

    def _begin_call(self, call: ToolCall | ToolCallDelta) -> None:
        if len(self._call_ids) == MAX_TOOL_CALLS:
            raise self._failed(f"yielded more than {MAX_TOOL_CALLS} tool calls")
        if not (0 < len(call.id) <= MAX_CALL_CHARACTERS and 0 < len(call.name) <= MAX_CALL_CHARACTERS):
            raise self._failed("yielded a tool call without a usable id and name")
        if call.id in self._call_ids:
            raise self._failed("yielded two tool calls with the same id")
        self._call_ids.append(call.id)

    def _add_arguments(self, call: ToolCall | ToolCallDelta) -> None:
        self._call_size += len(call.arguments_json)
        if self._call_size > MAX_BODY_BYTES:
            raise self._failed(f"yielded tool calls with more than {MAX_BODY_BYTES:,} characters")

    def _check_content_type(self, content_type: str, prefix: str) -> None:
        """Refuse a content type of other media, or with characters that a header can't have."""
        if not (content_type.startswith(prefix) and _CONTENT_TYPE.fullmatch(content_type)):
            raise self._failed(f"yielded media of a content_type that is not {prefix}*")

    def _replacement(self, error: PomeloError) -> PomeloError | None:
        """The error to raise in place of one that a provider may not raise, or that the protocols can't
        transmit; None if `error` is valid."""
        try:
            code, message, field, wait = error.code, error.message, error.field, error.retry_after
            allowed = (code in CODES and error.row is TABLE[code]) or isinstance(error, NoConnectionError)
            retry, reason, vendor_code = RetryPolicy.NEVER, "", ""
            if isinstance(error, UpstreamError):
                retry, wait, reason, vendor_code = error.retry, error.wait, error.reason, error.vendor_code
        except Exception as fault:  # a subclass may lack what PomeloError has
            return self._failed("raised an incomplete error", fault)
        if not allowed:
            return self._failed(f"raised {code}, which no provider may raise", error)
        if type(message) is not str or not (field is None or type(field) is str):
            return self._failed("raised an error whose message or field is not text", error)
        valid_wait = wait is None or (type(wait) is int and 0 <= wait <= MAX_RETRY_AFTER)
        if type(error) in _TRUSTED and valid_wait and message.strip():
            return None
        return UpstreamError(
            code,
            message if message.strip() else "",
            field=field,
            retry=retry if isinstance(retry, RetryPolicy) else RetryPolicy.NEVER,
            wait=wait if valid_wait else None,
            reason=reason if type(reason) is str else "",
            vendor_code=vendor_code if type(vendor_code) is str else "",
        )

    def _failed(self, what: str, error: BaseException | None = None) -> PomeloError:
        """Log what the provider did, and return the error to raise."""
        job = self._job
        trace = "" if error is None else f"\n{format_trace(error)}"
        log.error("request %s: the provider %s %s%s", job.request_id, job.route.provider, what, trace)
        return UpstreamError("provider_failed", reason=f"the provider's adapter {what}")
