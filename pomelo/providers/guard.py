"""What a provider may raise and yield; anything else is `provider_failed`, with a line in the log.

A provider may be a plug-in. Whatever its code does, the caller gets an answer, no other task is affected, and
no error reaches the caller that only Pomelo itself may give: of a key, a balance, a limit or a store.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from pomelo.cancellation import is_cancelled
from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import FinishReason
from pomelo.providers.base import CODES, Event, Job, JobMethod
from pomelo.providers.connections import NoConnectionError
from pomelo.traces import trace

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

_OUTPUTS = {"image": "image", "speech_to_text": "transcription"}
"""The output of a task type's `result`."""


class GuardedEvents:
    """The events of a provider's method for one job, checked as they come.

    Raises:
        PomeloError: the provider's own, if its code is one of CODES; else provider_failed.
        asyncio.CancelledError: only if the current task is cancelled.
    """

    __slots__ = ("_allowed", "_events", "_finished", "_job", "_kind", "_method", "_next")

    def __init__(self, method: JobMethod, kind: str, job: Job) -> None:
        self._method = method
        self._kind = kind
        self._job = job
        self._allowed = _EVENTS[kind]
        self._finished = False
        self._events: Any = None
        self._next: Any = None

    def __aiter__(self) -> "GuardedEvents":
        return self

    async def __anext__(self) -> Event:
        try:
            if self._next is None:
                self._events = self._method(self._job)
                self._next = aiter(self._events).__anext__
            event = await self._next()
        except StopAsyncIteration:
            raise
        except PomeloError as error:
            refusal = self._refusal(error)
            if refusal is None:
                raise
            raise refusal from None
        # A plug-in may raise SystemExit or CancelledError, which would end the server or the connection.
        except BaseException as error:
            if is_cancelled():
                raise asyncio.CancelledError from error
            raise self._failed("failed unexpectedly", error) from None
        if type(event) is not Event:
            raise self._failed(f"yielded a {type(event).__name__} instead of an Event")
        self._check(event)
        return event

    async def aclose(self) -> None:
        """Ends the provider's call. What it raises while it ends is logged: the task's outcome is known."""
        close = getattr(self._events, "aclose", None)
        if close is None:
            return
        try:
            await close()
        except BaseException as error:
            if isinstance(error, _ENDS) and is_cancelled():
                raise
            self._failed("failed unexpectedly while it was closed", error)

    def _check(self, event: Event) -> None:
        """Refuses an event of another task type, and one after the last."""
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

    def _refusal(self, error: PomeloError) -> PomeloError | None:
        """What replaces an error that no provider may raise, or that the protocols can't carry; None: nothing
        does."""
        if error.code not in CODES and not isinstance(error, NoConnectionError):
            return self._failed(f"raised {error.code}, which no provider may raise", error)
        if type(error.message) is not str or not (error.field is None or type(error.field) is str):
            return self._failed("raised an error whose message or field is not text", error)
        if error.wait is not None and not (type(error.wait) is int and 0 <= error.wait <= WAIT_MOST):
            error.wait = None
        return None

    def _failed(self, what: str, error: BaseException | None = None) -> PomeloError:
        """Logs what the provider did; returns the error to raise for it."""
        job = self._job
        where = "" if error is None else f"\n{trace(error)}"
        log.error("request %s: the provider %s %s%s", job.request_id, job.route.provider, what, where)
        return PomeloError("provider_failed")
