"""Text tasks: validation of a conversation, token estimates and output of deltas."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.pricing import Usage
from pomelo.errors import PomeloError, invalid
from pomelo.fields import MAX_STOPS, TEXT_FIELDS, check_enum, check_numbers
from pomelo.gen.v1.text_pb2 import ReasoningEffort, TextInput
from pomelo.providers.text import words
from pomelo.providers.text.input_texts import other_texts
from pomelo.tasks.base import AudioInfo, Estimate, InputCount, ReadMedia, TaskDefinition
from pomelo.tasks.conversation import check_messages, image_files
from pomelo.tasks.text_output import BYTES_PER_TOKEN, TextCollector, output_size, replay
from pomelo.tasks.tools import check_format, check_tools

MAX_MESSAGE_TOKENS = 16
"""More tokens than any model adds to a message."""

MAX_TOOLS_TOKENS = 1_000
"""More tokens than any model adds to a task because it has tools, or a format of its output."""

MAX_TOOL_TOKENS = 32
"""More tokens than any model adds to a tool."""

MAX_CALL_TOKENS = 64
"""More tokens than any model adds to a call of a tool, or to its result, for its id and what separates it."""

MAX_IMAGE_TOKENS = 6_000
"""More tokens than any model counts for an image."""

TYPICAL_IMAGE_TOKENS = 1_100
"""Tokens of an image of about a megapixel. They are assumed for every image whose tokens the provider has not
counted, as the size that an image declares can be wrong."""

SUFFICIENT_OUTPUT_TOKENS = 1_024
"""Output tokens to allow without max_tokens if the balance covers them."""

_LONG_PART = 130
"""Bytes from which a part with a text has a length of several bytes."""


def check(task_input: TextInput, model: Model, read_media: ReadMedia) -> None:
    """Refuses a conversation or a parameter that no text model takes. Replaces each image by a `data:` URI in
    its canonical form, which every vendor takes, and each JSON schema by its compact form.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, context_length_exceeded.
    """
    size = check_messages(task_input, read_media)
    check_numbers(task_input, TEXT_FIELDS)
    if task_input.stop and (len(task_input.stop) > MAX_STOPS or not all(task_input.stop)):
        raise invalid("stop", f"at most {MAX_STOPS} strings, none of them empty", maximum=MAX_STOPS)
    if task_input.tools or task_input.HasField("tool_choice") or task_input.HasField("parallel_tool_calls"):
        size += check_tools(task_input)
    if task_input.HasField("format"):
        size += check_format(task_input.format)
    if task_input.reasoning_effort:
        check_enum(task_input, "reasoning_effort", ReasoningEffort)
    # Every tokenizer makes more tokens than words. Counting words is slow, so it is done only if necessary: a
    # word has at least two bytes, with the space after it or the length of its text.
    max_input = model.limits.max_input_tokens
    if size // 2 > max_input and _count_words(task_input, other_texts(task_input)) > max_input:
        raise PomeloError(
            "context_length_exceeded",
            f"The prompt is longer than the {max_input:,} tokens that the model takes. Shorten messages",
            field="messages",
            values={"maxTokens": max_input},
        )


def _count_words(task_input: TextInput, others: Iterable[str]) -> int:
    """The words of the messages, and of `others`."""
    count = 0
    for message in task_input.messages:
        for part in message.content:
            text = part.text
            count += len(text.split()) if len(text) <= words.SLICE else words.count_words(text)
    for text in others:
        count += words.count_words(text)
    return count


def estimate(task_input: TextInput, model: Model, route: Route, audio: AudioInfo) -> Estimate:
    """At most one token per byte of UTF-8, with every tokenizer in use, and max_tokens of output. Without
    max_tokens the output may be cut to what the account can pay."""
    size = images = calls = 0
    tools = task_input.tools
    has_others = bool(tools) or task_input.HasField("format")
    for message in task_input.messages:
        size += len(message.name)  # which is ASCII
        for part in message.content:
            if part.HasField("text"):
                part_size = part.ByteSize()
                size += part_size - 2 if part_size < _LONG_PART else _text_size(part_size)
            elif part.HasField("image"):
                images += 1
            else:
                has_others = True
                calls += 1
    tokens = MAX_MESSAGE_TOKENS * (len(task_input.messages) + 1) + MAX_IMAGE_TOKENS * images
    if has_others:
        size += sum([len(text.encode()) for text in other_texts(task_input)])
        tokens += MAX_TOOLS_TOKENS + MAX_TOOL_TOKENS * len(tools) + MAX_CALL_TOKENS * calls
    possible = tokens + size
    tokens = min(possible, model.limits.max_input_tokens)
    max_output = model.limits.max_output_tokens
    requested = min(task_input.max_tokens, max_output) if task_input.HasField("max_tokens") else 0
    return Estimate(
        minimum=Usage(input_tokens=tokens, output_tokens=requested or 1),
        maximum=Usage(input_tokens=tokens, output_tokens=requested or max_output),
        sufficient=None
        if requested
        else Usage(input_tokens=tokens, output_tokens=min(SUFFICIENT_OUTPUT_TOKENS, max_output)),
        tokens=size // 4 + requested,
        possible_input_tokens=possible,
        count_input=InputCount(partial(_count_input, task_input, has_others, size, images), size),
    )


def _text_size(part_size: int) -> int:
    """The bytes of a text by those of its part, which begins with a tag of one byte and the text's length,
    seven bits in each byte. Reading the text would decode it, which takes up to twenty times as long."""
    size = part_size - 2
    while size >> 7 * (part_size - size - 1):
        size -= 1
    return size


def _count_input(task_input: TextInput, has_others: bool, size: int, images: int) -> int:
    """Pomelo's count of the tokens of an input that has `size` bytes of text, `images`, and maybe
    `other_texts`."""
    count = _count_words(task_input, other_texts(task_input) if has_others else ())
    return max(count, size // BYTES_PER_TOKEN) + TYPICAL_IMAGE_TOKENS * images


def limit_output(task_input: TextInput, estimate: Estimate, affordable: int) -> int | None:
    """The output tokens that are paid for; None if the model's maximum is, and no max_tokens need be sent."""
    maximum = estimate.maximum.output_tokens
    if affordable >= maximum and not task_input.HasField("max_tokens"):
        return None
    return min(maximum, affordable)


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
    files=image_files,
)
