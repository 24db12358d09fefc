"""Text tasks: the check of a conversation, its tokens, and the folding of deltas."""

from __future__ import annotations

import logging
from dataclasses import replace

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.pricing import MAX_TOKENS, Usage
from pomelo.errors import PomeloError, invalid, missing
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.gen.v1.text_pb2 import Message, Role, TextInput, TokenUsage
from pomelo.media import data_uris
from pomelo.media.content_types import image_type
from pomelo.tasks.base import AudioInfo, CollectorContext, Estimate, Progress, TaskDefinition
from pomelo.tasks.fields import MAX_SEED, within

log = logging.getLogger("pomelo.tasks")

MAX_MESSAGES = 10_000
MAX_PARTS = 100
MAX_ALL_PARTS = 10_000
"""The most parts in all messages together: checking one costs as much as checking a short
message."""
MAX_STOPS = 4
MAX_USER_CHARACTERS = 256

MESSAGE_TOKENS = 16
"""More than any model's wrapping of a message takes."""

IMAGE_TOKENS = 6_000
"""More than any model takes for a picture."""

ORDINARY_IMAGE_TOKENS = 1_100
"""What models take for a picture of about a megapixel. It is assumed of every picture whose tokens the
provider has not counted: the size that a picture claims could be a lie."""

SUFFICIENT_OUTPUT_TOKENS = 1_024
"""Tokens that an answer without max_tokens should be able to have, if the balance covers them at all."""

MAX_OUTPUT_TOKENS = 128_000
"""The most tokens of an answer of a model whose entry doesn't say."""

BYTES_PER_TOKEN = 8
"""More bytes than a token has on average, in any language: our own counts are never too high."""

_SLICE = 16 * 1024
"""Characters of a text that are processed in one step, during which no other thread can run."""

_ROLES = frozenset((Role.ROLE_SYSTEM, Role.ROLE_USER, Role.ROLE_ASSISTANT))


def check(given: TextInput, model: Model) -> None:
    """Refuses a conversation or a parameter that no model could take. Replaces the `data:` URI of each image
    with its canonical form, which every vendor takes.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, context_length_exceeded.
    """
    messages = given.messages
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
            if parts > MAX_ALL_PARTS:
                raise invalid("messages", f"at most {MAX_ALL_PARTS:,} parts in all messages together")
            characters += _check_parts(message, f"messages[{index}].content")
    if given.HasField("max_tokens") and given.max_tokens < 1:
        raise invalid("max_tokens", "a whole number from 1")
    within(given, "temperature", 0, 2)
    within(given, "top_p", 0, 1)
    within(given, "seed", 0, MAX_SEED)
    within(given, "presence_penalty", -2, 2)
    within(given, "frequency_penalty", -2, 2)
    if given.stop and (len(given.stop) > MAX_STOPS or not all(given.stop)):
        raise invalid("stop", f"at most {MAX_STOPS} strings, none of them empty")
    if len(given.user) > MAX_USER_CHARACTERS:
        raise invalid("user", f"at most {MAX_USER_CHARACTERS} characters")
    # Words are fewer than tokens with every tokenizer, and counting them is slow: only where it can matter.
    most = model.limits.max_input_tokens
    if characters > most and _words(given) > most:
        raise PomeloError(
            "context_length_exceeded",
            f"The prompt is longer than the {most:,} tokens that the model takes. Shorten messages",
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
        which = part.WhichOneof("part")
        if which is None:
            raise invalid(f"{name}[{index}]", "a text or an image_url")
        if which == "text":
            characters += len(part.text)
        elif message.role != Role.ROLE_USER:
            raise invalid(f"{name}[{index}]", "a text; only a message of the user's bears pictures")
        else:
            url = part.image_url.url
            canonical = _image(url, f"{name}[{index}].image_url")
            if canonical is not url:
                part.image_url.url = canonical
    return characters


def _image(url: str, name: str) -> str:
    """The canonical `data:` URI of an image, with the media type of its bytes: vendors refuse another one."""
    _, start = data_uris.head(url, name)
    if not start:
        raise invalid(name, "a data: URI with a base64 PNG, JPEG, WebP or GIF; remote URLs are off")
    media_type = image_type(next(data_uris.decode(url, start, name), b""))
    if media_type is None:
        raise invalid(name, "a PNG, JPEG, WebP or GIF image. The bytes decide, not the media type")
    return data_uris.canonical(url, start, media_type, name)


def _words(given: TextInput) -> int:
    count = 0
    for message in given.messages:
        count += _words_of(message.content)
        for part in message.parts.parts:
            count += _words_of(part.text)
    return count


def _words_of(text: str) -> int:
    """Same as len(text.split()), which would turn 8 MB of text into 100 MB of words."""
    count = 0
    for start in range(0, len(text), _SLICE):
        piece = text[start : start + _SLICE]
        count += len(piece.split())
        if start and not text[start - 1].isspace() and not piece[0].isspace():
            count -= 1  # the cut is inside a word
    return count


def estimate(given: TextInput, model: Model, route: Route, heard: AudioInfo) -> Estimate:
    """Tokens are at most bytes of UTF-8, with every tokenizer that is in use; the answer has at most what the
    caller asks for. Without max_tokens it may be cut to what can be paid."""
    size = pictures = 0
    for message in given.messages:
        size += _size(message.content)
        for part in message.parts.parts:
            size += _size(part.text)
            pictures += part.HasField("image_url")
    tokens = size + MESSAGE_TOKENS * (len(given.messages) + 1) + IMAGE_TOKENS * pictures
    limits = model.limits
    if limits.max_input_tokens:
        tokens = min(tokens, limits.max_input_tokens)
    most = limits.max_output_tokens or MAX_OUTPUT_TOKENS
    asked = min(given.max_tokens, most) if given.HasField("max_tokens") else 0
    return Estimate(
        minimum=Usage(input_tokens=tokens, output_tokens=asked or 1),
        maximum=Usage(input_tokens=tokens, output_tokens=asked or most),
        sufficient=None
        if asked
        else Usage(input_tokens=tokens, output_tokens=min(SUFFICIENT_OUTPUT_TOKENS, most)),
        tokens=size // 4 + asked,
        input_tokens=max(_words(given), size // BYTES_PER_TOKEN) + ORDINARY_IMAGE_TOKENS * pictures,
    )


def partial_usage(given: TextInput, bound: Estimate, delivered: Progress) -> Usage:
    """The provider's count of the input if it has reported one, else our own: for text lower than that of any
    tokenizer, for an image an ordinary one."""
    reported = delivered.reported or Usage(input_tokens=min(bound.input_tokens, bound.maximum.input_tokens))
    tokens = min(max(delivered.pieces, delivered.size // BYTES_PER_TOKEN), bound.maximum.output_tokens)
    return replace(reported, output_tokens=tokens)


def _size(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


class TextCollector:
    """Joins deltas if the whole text is needed; else it only counts them. The last delta, which has
    finish_reason and usage, is held until the task is settled. An earlier one may have the provider's count
    of the input, for an answer that has no later one."""

    __slots__ = ("_counted", "_delivered", "_folding", "_gathers", "_last", "_stream", "_text")

    def __init__(self, folding: CollectorContext) -> None:
        self._folding = folding
        self._stream = folding.stream
        self._gathers = not folding.stream or folding.keep
        self._text = bytearray()  # in a list each piece would take sixty bytes more
        self._delivered = Progress()
        self._counted = True
        self._last: StreamTaskResponse | None = None

    def add(self, event: StreamTaskResponse) -> StreamTaskResponse | None:
        """See Fold."""
        delta = event.text_delta
        if delta.finish_reason:
            self._last = event
            return None
        if delta.HasField("usage"):
            if self._is_credible_input(delta.usage):
                reported = replace(_used(delta.usage), output_tokens=0)
                self._delivered.reported = self._folding.delivered.reported = reported
            delta.ClearField("usage")
            if not delta.content:
                return None
        self._delivered.size += _size(delta.content)
        self._delivered.pieces += bool(delta.content)
        if self._gathers:
            self._text += delta.content.encode()
        return event if self._stream else None

    def finish(self, result: TaskResult) -> StreamTaskResponse | None:
        """See Fold."""
        last = self._last
        if last is None:
            raise PomeloError("provider_failed")
        delta = last.text_delta
        good_input, good_output = (
            self._are_credible(delta.usage, delta.content) if delta.HasField("usage") else (False, False)
        )
        if not (good_input and good_output):
            self._counted = False
            self._delivered.size += _size(delta.content)
            # The whole answer may be one piece.
            self._delivered.pieces += 0 if self._stream else len(delta.content.split())
            used = partial_usage(self._folding.input, self._folding.bound, self._delivered)
            if good_input:
                used = replace(_used(delta.usage), output_tokens=used.output_tokens)
            elif good_output:
                used = replace(used, output_tokens=delta.usage.completion_tokens)
            delta.usage.CopyFrom(_usage(used))
        delta.usage.total_tokens = delta.usage.prompt_tokens + delta.usage.completion_tokens
        if self._gathers:
            output = result.text
            output.content = self._text.decode() + delta.content
            output.finish_reason = delta.finish_reason
            output.usage.CopyFrom(delta.usage)
        return last

    def _are_credible(self, usage: TokenUsage, content: str) -> tuple[bool, bool]:
        """Whether a provider's counts of input and of output are possible, where `content` is the last of the
        text. Those that are not are logged."""
        least = 1 if self._delivered.size or content else 0
        most = self._folding.model.limits.max_output_tokens or MAX_TOKENS
        good_input = self._is_credible_input(usage)
        good_output = least <= usage.completion_tokens <= most
        if not (good_input and good_output):
            log.warning(
                "a provider of %s reported impossible counts, which are estimated: %d tokens of input "
                "(%d read from a cache, %d written to it), %d of output",
                self._folding.model.name,
                usage.prompt_tokens,
                usage.cached_prompt_tokens,
                usage.cache_write_prompt_tokens,
                usage.completion_tokens,
            )
        return good_input, good_output

    def _is_credible_input(self, usage: TokenUsage) -> bool:
        cached, written = usage.cached_prompt_tokens, usage.cache_write_prompt_tokens
        return (
            1 <= usage.prompt_tokens <= (self._folding.model.limits.max_input_tokens or MAX_TOKENS)
            and min(cached, written) >= 0
            and cached + written <= usage.prompt_tokens
            and 0 <= usage.cache_write_1h_prompt_tokens <= written
        )

    def used(self) -> tuple[Usage, bool]:
        """See Fold."""
        usage = self._last.text_delta.usage if self._last is not None else TokenUsage()
        return _used(usage), self._counted

    def close(self) -> None:
        """See Fold."""


def _used(usage: TokenUsage) -> Usage:
    return Usage(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        cached_input_tokens=usage.cached_prompt_tokens,
        cache_write_input_tokens=usage.cache_write_prompt_tokens,
        cache_write_1h_input_tokens=usage.cache_write_1h_prompt_tokens,
    )


def _usage(used: Usage) -> TokenUsage:
    return TokenUsage(
        prompt_tokens=used.input_tokens,
        completion_tokens=used.output_tokens,
        total_tokens=used.input_tokens + used.output_tokens,
        cached_prompt_tokens=used.cached_input_tokens,
        cache_write_prompt_tokens=used.cache_write_input_tokens,
        cache_write_1h_prompt_tokens=used.cache_write_1h_input_tokens,
    )


DEFINITION = TaskDefinition("text", "task_", check, TextCollector, estimate, partial_usage)
