"""Text tasks: validation of a conversation, token estimates and output of deltas."""

from __future__ import annotations

from collections.abc import Iterator

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.pricing import Usage
from pomelo.errors import PomeloError, invalid, missing
from pomelo.fields import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_STOPS,
    MAX_TOTAL_PARTS,
    TEXT_FIELDS,
    check_numbers,
)
from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.text_pb2 import Message, Role, TextInput
from pomelo.media import data_uris
from pomelo.media.content_types import image_type
from pomelo.tasks.base import AudioInfo, Estimate, ReadMedia, TaskDefinition
from pomelo.tasks.text_output import BYTES_PER_TOKEN, TextCollector, output_size, replay

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

_SLICE = 16 * 1024
"""Characters of a text that are processed in one step, during which no other thread can run."""

_IMAGE_HEAD = 16
"""Bytes of an image that show its format."""

_NOT_AN_IMAGE = "a PNG, JPEG, WebP or GIF image. The bytes decide, not the media type"

_ROLES = frozenset((Role.ROLE_SYSTEM, Role.ROLE_USER, Role.ROLE_ASSISTANT))


def check(task_input: TextInput, model: Model, read_media: ReadMedia) -> None:
    """Refuses a conversation or a parameter that no text model takes. Replaces each image by a `data:` URI in
    its canonical form, which every vendor takes.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, context_length_exceeded.
    """
    messages = task_input.messages
    if not messages:
        raise missing("messages")
    if len(messages) > MAX_MESSAGES:
        raise invalid("messages", f"at most {MAX_MESSAGES:,} messages", maximum=MAX_MESSAGES)
    characters = parts = 0
    for index, message in enumerate(messages):
        if message.role not in _ROLES:
            name = f"messages[{index}].role"
            raise invalid(name, "system, user or assistant") if message.role else missing(name)
        content = message.content
        if len(content) == 1 and (part := content[0]).HasField("text"):
            characters += len(part.text)
        else:
            parts += len(content)
            if parts > MAX_TOTAL_PARTS:
                expected = f"at most {MAX_TOTAL_PARTS:,} parts in all messages together"
                raise invalid("messages", expected, maximum=MAX_TOTAL_PARTS)
            characters += _check_parts(message, f"messages[{index}].content", read_media)
    check_numbers(task_input, TEXT_FIELDS)
    if task_input.stop and (len(task_input.stop) > MAX_STOPS or not all(task_input.stop)):
        raise invalid("stop", f"at most {MAX_STOPS} strings, none of them empty", maximum=MAX_STOPS)
    # Every tokenizer makes more tokens than words. Counting words is slow, so it is done only if necessary.
    max_input = model.limits.max_input_tokens
    if characters > max_input and _count_words(task_input) > max_input:
        raise PomeloError(
            "context_length_exceeded",
            f"The prompt is longer than the {max_input:,} tokens that the model takes. Shorten messages",
            field="messages",
            values={"maxTokens": max_input},
        )


def _check_parts(message: Message, name: str, read_media: ReadMedia) -> int:
    parts = message.content
    if not parts:
        raise missing(name)
    if len(parts) > MAX_PARTS:
        raise invalid(name, f"at most {MAX_PARTS} parts", maximum=MAX_PARTS)
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
            _make_canonical(part.image.source, f"{name}[{index}].image_url", read_media)
    return characters


def _make_canonical(source: MediaSource, name: str, read_media: ReadMedia) -> None:
    """Replaces an image by its canonical `data:` URI, wherever its bytes are."""
    kind = source.WhichOneof("source")
    if kind == "media_id":
        source.url = _encode_image(read_media(source.media_id, name), name)
    elif kind == "data":
        source.url = _encode_image(source.data, name)
    else:
        url = source.url
        canonical = _canonical_image(url, name)
        if canonical is not url:
            source.url = canonical
    source.ClearField("content_type")


def image_files(task_input: TextInput) -> Iterator[str]:
    """The ids of the images that are files."""
    for message in task_input.messages:
        for part in message.content:
            if part.image.source.media_id:
                yield part.image.source.media_id


def _encode_image(data: bytes, name: str) -> str:
    media_type = image_type(data[:_IMAGE_HEAD])
    if media_type is None:
        raise invalid(name, _NOT_AN_IMAGE)
    return data_uris.encode(data, media_type)


def _canonical_image(url: str, name: str) -> str:
    """The canonical `data:` URI of an image, with the media type of its bytes: vendors refuse any other."""
    _, start = data_uris.head(url, name)
    if not start:
        raise invalid(name, "a data: URI with a base64 PNG, JPEG, WebP or GIF; remote URLs are off")
    media_type = image_type(next(data_uris.decode(url, start, name), b""))
    if media_type is None:
        raise invalid(name, _NOT_AN_IMAGE)
    return data_uris.canonical(url, start, media_type, name)


def _count_words(task_input: TextInput) -> int:
    count = 0
    for message in task_input.messages:
        for part in message.content:
            text = part.text
            count += len(text.split()) if len(text) <= _SLICE else _count_words_in(text)
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
        for part in message.content:
            text = part.text
            size += len(text) if text.isascii() else len(text.encode())
            images += part.HasField("image")
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
