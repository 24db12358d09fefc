"""What the wires of text have in common: a stream from its first event to its last, and the counts of tokens.

The vendors' modules call it, each with its own way to read an event. It knows no vendor.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta, TokenUsage
from pomelo.providers.base import Event
from pomelo.providers.http.client import BODY_MOST, EventStream
from pomelo.providers.http.errors import malformed_response
from pomelo.providers.http.parsing import split_half, well_formed

log = logging.getLogger("pomelo.providers")

_TOKENS_MOST = 10**9
"""More tokens than any model takes: a count above it is a fault."""


class Answer:
    """A stream's state: the content of its last event; the text is not kept. A subclass for each
    vendor protocol reads the events."""

    __slots__ = ("ended", "finish", "prompt", "usage")

    def __init__(self) -> None:
        self.ended = False
        """Whether the end marker has come."""
        self.finish: FinishReason.ValueType | None = None
        self.usage: TokenUsage | None = None
        """The vendor's count, where a credible one has come."""
        self.prompt: TokenUsage | None = None
        """Its count of the input, where one has come: it is good for an answer that ends early."""

    def take(self, data: bytes) -> str:
        """The text that an event adds; often empty at the beginning and the end. It may begin or end with
        half a surrogate pair.

        Raises:
            PomeloError: provider_failed; what an error in place of an event means.
        """
        raise NotImplementedError

    def last(self) -> TextDelta:
        """The delta that ends the answer; without usage where the vendor gave no credible count.

        Raises:
            PomeloError: provider_failed; no reason for the end came.
        """
        if self.finish is None:
            raise malformed_response("a stream without its finish reason")
        return TextDelta(finish_reason=self.finish, usage=self.usage)


async def streamed(
    ask: Callable[[], AbstractAsyncContextManager[EventStream]], answer: Answer
) -> AsyncGenerator[Event, None]:
    """The events of a streamed answer; `ask` makes the call, `answer` reads what comes.

    A stream that is complete but lacks a credible count of tokens ends without one: the engine makes one up.
    One that says more than a whole answer may have has failed.

    Raises:
        PomeloError: by the map in `failures`.
    """
    left = BODY_MOST
    half = ""  # of a surrogate pair whose other half is to come
    begun = False
    try:
        async with ask() as stream:
            while not answer.ended:
                try:
                    events = await stream.read()
                except PomeloError:
                    # The connection may have been cut behind an end marker that lacks its line end.
                    for _, data in stream.rest():
                        with suppress(PomeloError):
                            answer.take(data.strip())
                    if not answer.ended:
                        raise
                    break
                if not events:
                    raise malformed_response("a stream without its end marker")
                for _, data in events:
                    data = data.strip()
                    if not data:
                        continue  # it keeps the connection alive
                    content = answer.take(data)
                    if content:
                        left -= len(content)
                        if left < 0:
                            raise malformed_response("a text above the limit")
                        event = Event()
                        try:
                            event.text_delta.content = (
                                half + content
                            )  # a sixth of the cost of the constructors
                            half = ""
                        except UnicodeEncodeError:
                            content, half = split_half(half + content)
                            if not content:
                                continue
                            event.text_delta.content = well_formed(content)
                        if answer.prompt is not None:
                            event.text_delta.usage.CopyFrom(answer.prompt)
                            answer.prompt = None
                        begun = True
                        yield event
            await stream.goodbye()
    except PomeloError:
        if begun and answer.prompt is not None:  # what is delivered of the answer costs its input too
            yield Event(text_delta=TextDelta(usage=answer.prompt))
        raise
    if half:
        event = Event()
        event.text_delta.content = well_formed(half)
        yield event
    yield Event(text_delta=answer.last())


def counted(
    prompt: Any, completion: Any, *, cached: Any = None, written: Any = None, written_1h: Any = None
) -> TokenUsage | None:
    """A vendor's counts as usage; None where neither of the two is there and credible. One that isn't is 0,
    which no task with input and output uses: the engine estimates it.

    `prompt` includes those that were `cached` and `written`, and `written` those `written_1h`. These are 0
    where they are absent; where they can't be true, all of the prompt counts as ordinary input.
    """
    reported = prompt, completion
    prompt, completion = credible(prompt), credible(completion)
    if prompt is None or completion is None:
        if reported != (None, None):
            log.warning("a provider reported an impossible count of tokens, or only one, so it is estimated")
        if not prompt and not completion:
            return None
        prompt, completion = prompt or 0, completion or 0
    usage = TokenUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
    if cached or written or written_1h:
        parts = [credible(part or 0) for part in (cached, written, written_1h)]
        if None not in parts and parts[0] + parts[1] <= prompt and parts[2] <= parts[1]:
            usage.cached_prompt_tokens = parts[0]
            usage.cache_write_prompt_tokens = parts[1]
            usage.cache_write_1h_prompt_tokens = parts[2]
    return usage


def credible(value: Any) -> Any:
    """A vendor's count as a whole number; None where it is none or can't be true."""
    # type() and not isinstance: true and false are ints, too.
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= _TOKENS_MOST else None
