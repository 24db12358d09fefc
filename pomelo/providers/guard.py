"""What a provider may raise and yield; anything else is `provider_failed`, with a line in the log.

A provider may be a plug-in. Whatever its code does, the caller gets an answer, no other task is affected, and
no error reaches the caller that only Pomelo itself may give: of a key, a balance, a limit or a store.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pomelo.errors import TABLE, PomeloError, Replay
from pomelo.gen.v1.speech_pb2 import AudioChunk
from pomelo.gen.v1.text_pb2 import FinishReason
from pomelo.logs import format_trace
from pomelo.process import is_cancelled
from pomelo.providers.base import CODES, Event, Job, JobMethod
from pomelo.providers.http.connections import NoConnectionError
from pomelo.providers.http.errors import TruncatedError
from pomelo.providers.parse_steps import NotEndedError, SelfCancelledError, bounded
from pomelo.providers.pieces import AUDIO_PIECE, TEXT_PIECE, split_audio, split_text

log = logging.getLogger("pomelo.providers")

WAIT_MOST = 3600
"""The longest Retry-After of a provider, in seconds."""

_EVENTS: Mapping[str, frozenset[str]] = {
    "text": frozenset(("text_delta",)),
    "image": frozenset(("image_progress", "result")),
    "text_to_speech": frozenset(("audio_chunk",)),
    "speech_to_speech": frozenset(("audio_chunk",)),
    "speech_to_text": frozenset(("result",)),
}
"""The events of each task type."""

_ENDS = (asyncio.CancelledError, GeneratorExit)
"""How a coroutine is ended from outside."""

_ERRORS = (PomeloError, TruncatedError, NoConnectionError)
"""Errors that are passed on as they are; a plug-in's own subclass may override anything."""

_OUTPUTS = {"image": "image", "speech_to_text": "transcription"}
"""The output of a task type's `result`."""

_MEDIA_TYPE = re.compile(r"(audio|image)/[\w!#$&^.+-]{1,64}(; ?[\w.+-]{1,32}=[\w.+-]{1,64})*", re.ASCII)
"""A content type that can be sent as a header: tokens alone, which have no line breaks."""


class GuardedEvents:
    """The events of a provider's method for one job, checked as they come.

    Raises:
        PomeloError: the provider's own, if its code is one of CODES; else provider_failed.
        asyncio.CancelledError: only if the current task is cancelled.
    """

    __slots__ = (
        "_allowed", "_begun", "_events", "_finished", "_job", "_kind", "_loop", "_media_type", "_method",
        "_next", "_rest",
    )  # fmt: skip

    def __init__(self, method: JobMethod, kind: str, job: Job) -> None:
        self._method = method
        self._kind = kind
        self._job = job
        self._allowed = _EVENTS[kind]
        self._loop = asyncio.get_running_loop()
        self._finished = False
        self._begun = False
        self._media_type = ""
        self._events: Any = None
        self._next: Any = None
        self._rest: Iterator[Event] | None = None

    def __aiter__(self) -> GuardedEvents:
        return self

    async def __anext__(self) -> Event:
        if self._rest is not None:
            if (piece := next(self._rest, None)) is not None:
                return piece
            self._rest = None
        while True:
            event = await self._received()
            which = self._check(event)
            if which == "text_delta":
                if self._job.stream and len(event.text_delta.content) > TEXT_PIECE:
                    self._rest = split_text(event)
            elif which == "audio_chunk":
                chunk = event.audio_chunk
                if not chunk.data:
                    continue  # it would begin an answer that may never have any audio
                if not (self._begun or chunk.content_type):  # it was that of an empty piece
                    event = Event(audio_chunk=AudioChunk(data=chunk.data, content_type=self._media_type))
                self._begun = True
                if len(chunk.data) > AUDIO_PIECE:
                    self._rest = split_audio(event)
            return event if self._rest is None else next(self._rest)

    async def _received(self) -> Event:
        """The next event that the provider yields, of whatever content."""
        try:
            event = await bounded(self._next or self._first, self._loop)
        except StopAsyncIteration:
            raise
        except PomeloError as error:
            refusal = self._refusal(error)
            if refusal is None:
                raise
            raise refusal from None
        except SelfCancelledError:
            raise self._failed("cancelled the task that runs it") from None
        except NotEndedError as error:
            self._events = None
            self._failed("went on after it was cancelled, and was stopped")
            raise asyncio.CancelledError from error
        # A plug-in may raise SystemExit or CancelledError, which would end the server or the connection.
        except BaseException as error:
            if is_cancelled():
                raise asyncio.CancelledError from error
            raise self._failed("failed unexpectedly", error) from None
        if type(event) is not Event:
            raise self._failed(f"yielded a {type(event).__name__} instead of an Event")
        return event

    def _first(self) -> Any:
        """Calls the provider's method; what to await for its first event."""
        self._events = self._method(self._job)
        self._next = aiter(self._events).__anext__
        return self._next()

    async def aclose(self) -> None:
        """Ends the provider's call. What it raises while it ends is logged: the task's outcome is known."""
        close = getattr(self._events, "aclose", None)
        if close is None:
            return
        try:
            await bounded(close, self._loop, closing=True)
        except SelfCancelledError:
            self._failed("cancelled the task that runs it while it was closed")
        except NotEndedError:
            self._failed("went on after it was closed, and was stopped")
        except BaseException as error:
            if isinstance(error, _ENDS) and is_cancelled():
                raise
            self._failed("failed unexpectedly while it was closed", error)

    def _check(self, event: Event) -> str:
        """Refuses an event of another task type, and one after the last. Returns what the event is."""
        which = event.WhichOneof("event")
        if which not in self._allowed:
            raise self._failed(f"yielded {which or 'an empty event'} for a task of type {self._kind}")
        if self._finished:
            raise self._failed("yielded an event after the last one")
        if which == "text_delta":
            finish = event.text_delta.finish_reason
            if finish:
                self._finished = True
                if finish not in FinishReason.values():
                    raise self._failed(f"yielded the unknown finish_reason {finish}")
        elif which == "result":
            self._finished = True
            output = event.result.WhichOneof("output")
            if output != _OUTPUTS[self._kind]:
                raise self._failed(f"yielded a result with {output or 'no output'}")
            for image in event.result.image.images:
                self._check_media_type(image.content_type, "image/")
        elif which == "audio_chunk":
            if given := event.audio_chunk.content_type:
                self._check_media_type(given, "audio/")
                self._media_type = self._media_type or given
            elif not self._media_type:
                raise self._failed("yielded audio without its content_type")
        return which

    def _check_media_type(self, given: str, beginning: str) -> None:
        """Refuses a content type that is of other media, or that would break out of a header."""
        if not (given.startswith(beginning) and _MEDIA_TYPE.fullmatch(given)):
            raise self._failed(f"yielded media of a content_type that is not {beginning}*")

    def _refusal(self, error: PomeloError) -> PomeloError | None:
        """What replaces an error that no provider may raise, or that the protocols can't carry; None: nothing
        does."""
        try:
            code, message, field, wait = error.code, error.message, error.field, error.wait
            replay = error.replay
            may = (code in CODES and error.row is TABLE[code]) or isinstance(error, NoConnectionError)
        except Exception as fault:  # a subclass may lack what PomeloError has
            return self._failed("raised an incomplete error", fault)
        if not may:
            return self._failed(f"raised {code}, which no provider may raise", error)
        if type(message) is not str or not (field is None or type(field) is str):
            return self._failed("raised an error whose message or field is not text", error)
        if wait is not None and not (type(wait) is int and 0 <= wait <= WAIT_MOST):
            error.wait = wait = None
        if not message.strip():
            error.message = message = error.row.message
        if type(error) in _ERRORS:
            return None
        refusal = PomeloError(code, message, field=field, retry_after=wait)
        refusal.replay = replay if isinstance(replay, Replay) else Replay.NEVER
        return refusal

    def _failed(self, what: str, error: BaseException | None = None) -> PomeloError:
        """Logs what the provider did; returns the error to raise for it."""
        job = self._job
        where = "" if error is None else f"\n{format_trace(error)}"
        log.error("request %s: the provider %s %s%s", job.request_id, job.route.provider, what, where)
        return PomeloError("provider_failed")
