"""Text tasks: validation of a conversation, token estimates and output of deltas."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.pricing import MAX_TOKENS, Usage
from pomelo.errors import PomeloError, invalid, missing
from pomelo.fields import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_STOPS,
    MAX_TOTAL_PARTS,
    MAX_USER_CHARACTERS,
    TEXT_FIELDS,
    check_numbers,
)
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.gen.v1.text_pb2 import Message, Role, TextInput, TokenUsage
from pomelo.media import data_uris
from pomelo.media.content_types import image_type
from pomelo.providers.chunks import split_text
from pomelo.tasks.base import AudioInfo, Collector, CollectorContext, Estimate, TaskDefinition

log = logging.getLogger("pomelo.tasks")

MAX_MESSAGE_TOKENS = 16
"""More tokens than any model adds to a message."""

MAX_IMAGE_TOKENS = 6_000
"""More tokens than any model counts for an image."""

TYPICAL_IMAGE_TOKENS = 1_100
"""Tokens of an image of about a megapixel. They are assumed for every image whose tokens the provider has not
counted, as the size that an image declares can be wrong."""

SUFFICIENT_OUTPUT_TOKENS = 1_024
"""Output tokens to allow without max_tokens if the balance covers them."""

MAX_OUTPUT_TOKENS = 128_000
"""Output tokens of a model without a limit in the catalogue."""

BYTES_PER_TOKEN = 8
"""More than the average of any language, so that Pomelo's own counts are never too high."""

_SLICE = 16 * 1024
"""Characters of a text that are processed in one step, during which no other thread can run."""

_ROLES = frozenset((Role.ROLE_SYSTEM, Role.ROLE_USER, Role.ROLE_ASSISTANT))


def check(task_input: TextInput, model: Model) -> None:
    """Refuses a conversation or a parameter that no text model takes. Replaces the `data:` URI of each image
    by its canonical form, which every vendor takes.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, context_length_exceeded.
    """
    messages = task_input.messages
    if not messages:
        raise missing("messages")
    if len(messages) > MAX_MESSAGES:
        raise invalid("messages", f"at most {MAX_MESSAGES:,} messages")
    characters = parts = 0
    for index, message in enumerate(messages):
        if message.role not in _ROLES:
            name = f"messages[{index}].role"
            raise invalid(name, "system, user or assistant") if message.role else missing(name)
        if message.HasField("content"):
            characters += len(message.content)
        else:
            parts += len(message.parts.parts)
            if parts > MAX_TOTAL_PARTS:
                raise invalid("messages", f"at most {MAX_TOTAL_PARTS:,} parts in all messages together")
            characters += _check_parts(message, f"messages[{index}].content")
    check_numbers(task_input, TEXT_FIELDS)
    if task_input.stop and (len(task_input.stop) > MAX_STOPS or not all(task_input.stop)):
        raise invalid("stop", f"at most {MAX_STOPS} strings, none of them empty")
    if len(task_input.user) > MAX_USER_CHARACTERS:
        raise invalid("user", f"at most {MAX_USER_CHARACTERS} characters")
    # Every tokenizer makes more tokens than words. Counting words is slow, so it is done only if necessary.
    max_input = model.limits.max_input_tokens
    if characters > max_input and _count_words(task_input) > max_input:
        raise PomeloError(
            "context_length_exceeded",
            f"The prompt is longer than the {max_input:,} tokens that the model takes. Shorten messages",
            field="messages",
        )


def _check_parts(message: Message, name: str) -> int:
    parts = message.parts.parts
    if not parts:
        raise missing(name)
    if len(parts) > MAX_PARTS:
        raise invalid(name, f"at most {MAX_PARTS} parts")
    characters = 0
    for index, part in enumerate(parts):
        part_type = part.WhichOneof("part")
        if part_type is None:
            raise invalid(f"{name}[{index}]", "a text or an image_url")
        if part_type == "text":
            characters += len(part.text)
        elif message.role != Role.ROLE_USER:
            raise invalid(f"{name}[{index}]", "a text; only messages of the role user can contain images")
        else:
            url = part.image_url.url
            canonical = _canonical_image(url, f"{name}[{index}].image_url")
            if canonical is not url:
                part.image_url.url = canonical
    return characters


def _canonical_image(url: str, name: str) -> str:
    """The canonical `data:` URI of an image, with the media type of its bytes: vendors refuse any other."""
    _, start = data_uris.head(url, name)
    if not start:
        raise invalid(name, "a data: URI with a base64 PNG, JPEG, WebP or GIF; remote URLs are off")
    media_type = image_type(next(data_uris.decode(url, start, name), b""))
    if media_type is None:
        raise invalid(name, "a PNG, JPEG, WebP or GIF image. The bytes decide, not the media type")
    return data_uris.canonical(url, start, media_type, name)


def _count_words(task_input: TextInput) -> int:
    count = 0
    for message in task_input.messages:
        count += _count_words_in(message.content)
        for part in message.parts.parts:
            count += _count_words_in(part.text)
    return count


def _count_words_in(text: str) -> int:
    """The same as len(text.split()), which would need 100 MB for the words of 8 MB of text."""
    count = 0
    for start in range(0, len(text), _SLICE):
        part = text[start : start + _SLICE]
        count += len(part.split())
        if start and not text[start - 1].isspace() and not part[0].isspace():
            count -= 1  # the boundary is inside a word
    return count


def estimate(task_input: TextInput, model: Model, route: Route, audio: AudioInfo) -> Estimate:
    """At most one token per byte of UTF-8, with every tokenizer in use, and max_tokens of output. Without
    max_tokens the output may be cut to what the account can pay."""
    size = images = 0
    for message in task_input.messages:
        size += _size(message.content)
        for part in message.parts.parts:
            size += _size(part.text)
            images += part.HasField("image_url")
    tokens = size + MAX_MESSAGE_TOKENS * (len(task_input.messages) + 1) + MAX_IMAGE_TOKENS * images
    limits = model.limits
    if limits.max_input_tokens:
        tokens = min(tokens, limits.max_input_tokens)
    max_output = limits.max_output_tokens or MAX_OUTPUT_TOKENS
    requested = min(task_input.max_tokens, max_output) if task_input.HasField("max_tokens") else 0
    return Estimate(
        minimum=Usage(input_tokens=tokens, output_tokens=requested or 1),
        maximum=Usage(input_tokens=tokens, output_tokens=requested or max_output),
        sufficient=None
        if requested
        else Usage(input_tokens=tokens, output_tokens=min(SUFFICIENT_OUTPUT_TOKENS, max_output)),
        tokens=size // 4 + requested,
        input_tokens=max(_count_words(task_input), size // BYTES_PER_TOKEN) + TYPICAL_IMAGE_TOKENS * images,
    )


def limit_output(task_input: TextInput, estimate: Estimate, affordable: int) -> int | None:
    """The output tokens that are paid for; None if the model's maximum is, and no max_tokens need be sent."""
    maximum = estimate.maximum.output_tokens
    if affordable >= maximum and not task_input.HasField("max_tokens"):
        return None
    return min(maximum, affordable)


def _size(text: str) -> int:
    """The bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


class TextCollector(Collector):
    """Joins deltas if the whole text is needed; otherwise only counts them.

    The last delta, which has finish_reason and usage, is kept until the task is settled. An earlier delta may
    have the provider's count of the input, in case the answer ends early.
    """

    __slots__ = ("_context", "_counted", "_joins", "_last", "_pieces", "_reported", "_stream", "_text")

    def __init__(self, context: CollectorContext) -> None:
        super().__init__()
        self._context = context
        self._stream = context.stream
        self._joins = not context.stream or context.keep
        self._text = bytearray()  # a list would need sixty more bytes per delta
        self._pieces = 0
        self._reported: Usage | None = None
        """The usage of the input, once the provider has reported it."""
        self._counted = True
        self._last: StreamTaskResponse | None = None

    def add(self, event: StreamTaskResponse) -> StreamTaskResponse | None:
        delta = event.text_delta
        if delta.finish_reason:
            self._last = event
            return None
        if delta.HasField("usage"):
            if self._is_valid_input(delta.usage):
                self._reported = replace(_from_token_usage(delta.usage), output_tokens=0)
            delta.ClearField("usage")
            if not delta.content:
                return None
        self.output_bytes += _size(delta.content)
        self._pieces += bool(delta.content)
        if self._joins:
            self._text += delta.content.encode()
        return event if self._stream else None

    def finish(self, result: TaskResult) -> StreamTaskResponse | None:
        last = self._last
        if last is None:
            raise PomeloError("provider_failed")
        delta = last.text_delta
        valid_input, valid_output = (
            self._validate_usage(delta.usage, delta.content) if delta.HasField("usage") else (False, False)
        )
        if not (valid_input and valid_output):
            self._counted = False
            # The whole answer may be one delta.
            pieces = self._pieces + (0 if self._stream else len(delta.content.split()))
            usage = self._estimated_usage(pieces, self.output_bytes + _size(delta.content))
            if valid_input:
                usage = replace(_from_token_usage(delta.usage), output_tokens=usage.output_tokens)
            elif valid_output:
                usage = replace(usage, output_tokens=delta.usage.completion_tokens)
            delta.usage.CopyFrom(_to_token_usage(usage))
        delta.usage.total_tokens = delta.usage.prompt_tokens + delta.usage.completion_tokens
        if self._joins:
            output = result.text
            output.content = self._text.decode() + delta.content
            output.finish_reason = delta.finish_reason
            output.usage.CopyFrom(delta.usage)
        return last

    def _validate_usage(self, usage: TokenUsage, content: str) -> tuple[bool, bool]:
        """Whether a provider's counts of input and of output are possible; impossible ones are logged.
        `content` is the end of the text."""
        min_output = 1 if self.output_bytes or content else 0
        max_output = self._context.model.limits.max_output_tokens or MAX_TOKENS
        valid_input = self._is_valid_input(usage)
        valid_output = min_output <= usage.completion_tokens <= max_output
        if not (valid_input and valid_output):
            log.warning(
                "a provider of %s reported impossible counts, so they are estimated: %d tokens of input "
                "(%d read from a cache, %d written to it), %d of output",
                self._context.model.name,
                usage.prompt_tokens,
                usage.cached_prompt_tokens,
                usage.cache_write_prompt_tokens,
                usage.completion_tokens,
            )
        return valid_input, valid_output

    def _is_valid_input(self, usage: TokenUsage) -> bool:
        cached, written = usage.cached_prompt_tokens, usage.cache_write_prompt_tokens
        return (
            1 <= usage.prompt_tokens <= (self._context.model.limits.max_input_tokens or MAX_TOKENS)
            and min(cached, written) >= 0
            and cached + written <= usage.prompt_tokens
            and 0 <= usage.cache_write_1h_prompt_tokens <= written
        )

    def partial_usage(self, task_input: TextInput) -> Usage:
        return self._estimated_usage(self._pieces, self.output_bytes)

    def _estimated_usage(self, pieces: int, size: int) -> Usage:
        """The provider's count of the input if it has reported one, else Pomelo's: for text lower than that
        of any tokenizer, for images a typical one. Each piece of output has at least one token."""
        estimate = self._context.estimate
        reported = self._reported or Usage(
            input_tokens=min(estimate.input_tokens, estimate.maximum.input_tokens)
        )
        tokens = min(max(pieces, size // BYTES_PER_TOKEN), estimate.maximum.output_tokens)
        return replace(reported, output_tokens=tokens)

    def usage(self) -> tuple[Usage, bool]:
        usage = self._last.text_delta.usage if self._last is not None else TokenUsage()
        return _from_token_usage(usage), self._counted


def _from_token_usage(usage: TokenUsage) -> Usage:
    return Usage(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        cached_input_tokens=usage.cached_prompt_tokens,
        cache_write_input_tokens=usage.cache_write_prompt_tokens,
        cache_write_1h_input_tokens=usage.cache_write_1h_prompt_tokens,
    )


def _to_token_usage(usage: Usage) -> TokenUsage:
    return TokenUsage(
        prompt_tokens=usage.input_tokens,
        completion_tokens=usage.output_tokens,
        total_tokens=usage.input_tokens + usage.output_tokens,
        cached_prompt_tokens=usage.cached_input_tokens,
        cache_write_prompt_tokens=usage.cache_write_input_tokens,
        cache_write_1h_prompt_tokens=usage.cache_write_1h_input_tokens,
    )


def output_size(result: TaskResult) -> int:
    return len(result.text.content.encode())


def replay(result: TaskResult, audio: Path | None) -> Iterator[StreamTaskResponse]:
    """The deltas of a stored text."""
    if result.text.content:
        event = StreamTaskResponse()
        event.text_delta.content = result.text.content
        yield from split_text(event)
    last = StreamTaskResponse()
    last.text_delta.finish_reason = result.text.finish_reason
    last.text_delta.usage.CopyFrom(result.text.usage)
    yield last


DEFINITION = TaskDefinition(
    "text",
    "task_",
    check,
    estimate,
    TextCollector,
    output_size,
    replay,
    counts_tokens=True,
    limit_output=limit_output,
)
